"""GRPO's completions from a vLLM server that gets the adapter's factors before each of them.

`GRPOTrainer(..., rollout_func=VllmRollout("http://localhost:8000/v1", "mine"))`, with TRL's own settings for sampling.
"""

from collections.abc import Sequence
from typing import Any

from dual_lora.verify.template import rendered

from .client import AdapterServer


class VllmRollout:
    """TRL's `rollout_func`: prompts and trainer → token ids and log-probabilities.

    After each optimizer step, or another change of its weights (the best ones may be loaded at the end), the adapter is
    sent anew, by the main process alone. Works in one process and under DDP;
    sharded models (FSDP, ZeRO-3) save their adapter in parts and are not for it.
    """

    def __init__(self, url: str, model: str, timeout: float = 600.0):
        self.server = AdapterServer(url, model, timeout)
        self._sent_at: tuple[Any, ...] = None, -1, []  # a training's state, its step, and the versions of its weights

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        state, now = trainer.state, (trainer.state.global_step, _versions(trainer.model))
        if state is not self._sent_at[0] or now != self._sent_at[1:]:
            if trainer.accelerator.is_main_process:
                self.server.send(trainer.accelerator.unwrap_model(trainer.model))
            trainer.accelerator.wait_for_everyone()
            self._sent_at = state, *now
        ids = [_tokens(trainer, prompt) for prompt in prompts]
        done = self.server.complete(ids, trainer.max_completion_length, **_sampling(trainer))
        return {
            "prompt_ids": [one.prompt for one in done],
            "completion_ids": [one.tokens for one in done],
            "logprobs": [one.logprobs for one in done],
        }


def _versions(model: Any) -> list[tuple[int, int]]:
    """Return numbers that change when trained weights are written to, or others are in their place."""
    return [(id(p), p._version) for p in model.parameters() if p.requires_grad]


def _sampling(trainer: Any) -> dict[str, Any]:
    """Every setting of TRL's, those at their default as well: for what is left out vLLM takes the base's own."""
    return {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        **(trainer.args.generation_kwargs or {}),
    }


def _tokens(trainer: Any, prompt: Any) -> list[int]:
    """A prompt's tokens; a conversation by the trainer's own template, its settings and its tools, as TRL does it."""
    tokenizer = trainer.processing_class
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    text = rendered(
        tokenizer,
        prompt,
        tools=getattr(trainer, "tools", None) or None,
        chat_template=getattr(trainer, "chat_template", None),
        add_generation_prompt=True,
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)
