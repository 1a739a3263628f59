"""GRPO's completions from a vLLM server that gets the adapter's factors before each of them.

`GRPOTrainer(..., rollout_func=VllmRollout("http://localhost:8000/v1", "mine"))`, with TRL's own settings for sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .client import AdapterServer


class VllmRollout:
    """TRL's `rollout_func`: prompts and trainer → token ids and log-probabilities.

    After each optimizer step the adapter is sent anew, by the main process alone. Works in one process and under DDP;
    sharded models (FSDP, ZeRO-3) save their adapter in parts and are not for it.
    """

    def __init__(self, url: str, model: str, timeout: float = 600.0):
        self.server = AdapterServer(url, model, timeout)
        self._sent_at = -1

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        if trainer.state.global_step != self._sent_at:
            if trainer.accelerator.is_main_process:
                self.server.send(trainer.accelerator.unwrap_model(trainer.model))
            trainer.accelerator.wait_for_everyone()
            self._sent_at = trainer.state.global_step
        tokenizer = trainer.processing_class
        ids = [_tokens(tokenizer, prompt) for prompt in prompts]
        done = self.server.complete(ids, trainer.max_completion_length, **_sampling(trainer))
        return {
            "prompt_ids": [one.prompt for one in done],
            "completion_ids": [one.tokens for one in done],
            "logprobs": [one.logprobs for one in done],
        }


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


def _tokens(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
