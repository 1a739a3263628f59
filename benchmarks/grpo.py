"""A step of TRL's GRPO on a third of SmolLM2-135M: completions, reference, loss, backward, AdamW. No server.

A third of its layers and of its vocabulary, so that head and layers cost in proportion what they cost there. The
settings of `examples/trl_grpo.py`: four completions of each of two prompts, 32 tokens each, a KL term to the reference,
which is the model with its adapter disabled. Or TRL's own: eight completions of one prompt and no such term; they are
256 tokens long here, half of its limit.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any, NamedTuple

import torch

from . import layers
from .measure import Measured, Unavailable, median_ratio, torch_threads
from .step import TARGETS, base_model

PROMPT, BATCH, RANK = 40, 8, 16
THIRD = {"num_hidden_layers": 10, "vocab_size": 16384}


class Completions(NamedTuple):
    """`generations` of each prompt, `tokens` long, eight in all; `beta` above 0 adds the KL term to the reference."""

    tokens: int
    generations: int
    beta: float


COMPLETIONS = {
    "short": Completions(tokens=32, generations=4, beta=0.04),
    "long": Completions(tokens=256, generations=8, beta=0.0),
}


class Run:
    """One method's trainer; `step` returns what one optimizer step took."""

    def __init__(self, method: str, folder: str, completions: Completions, **changes: Any):
        try:
            from datasets import Dataset
            from transformers import PrinterCallback
            from trl import GRPOConfig, GRPOTrainer
        except ImportError as error:
            raise Unavailable(f"TRL is not installed ({error})") from error
        self.clock, self.took = time.process_time, 0.0
        words = [f"w{n}" for n in torch.randint(3, 4000, (64 * PROMPT,), generator=torch.Generator().manual_seed(1))]
        prompts = [" ".join(words[k * PROMPT : (k + 1) * PROMPT]) for k in range(64)]
        self.trainer = GRPOTrainer(
            model=base_model(**{**THIRD, **changes}),
            reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
            args=GRPOConfig(
                folder, max_steps=1, per_device_train_batch_size=BATCH, num_generations=completions.generations,
                max_completion_length=completions.tokens, beta=completions.beta,
                generation_kwargs={"min_new_tokens": completions.tokens},
                learning_rate=1e-4, logging_strategy="no", save_strategy="no", report_to=[], bf16=False, use_cpu=True,
                disable_tqdm=True, gradient_checkpointing=False, seed=0,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=_tokenizer({**THIRD, **changes}["vocab_size"]),
            peft_config=layers.config(method, TARGETS, RANK),
            callbacks=[_clock(self)],
        )  # fmt: skip

        self.trainer.remove_callback(PrinterCallback)

    def step(self) -> float:
        """Seconds of one optimizer step with its completions, without what surrounds a training."""
        self.trainer.train()
        return self.took


def _clock(run: Run) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = run.clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.took = run.clock() - self.begun

    return Clock()


def _tokenizer(size: int) -> Any:
    """Words w3, w4, … are the tokens 3, 4, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<unk>": 0, "<pad>": 1, "<end>": 2}
    tokenizer = Tokenizer(models.WordLevel({**special, **{f"w{n}": n for n in range(3, size)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def measure(
    threads: int, seconds: float, completions: Completions, rounds: tuple[int, int] = (3, 9), **changes: Any
) -> Measured:
    """Seconds of a step with Dual LoRA and with LoRA of as many parameters, in turn."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        runs = {method: Run(method, folder, completions, **changes) for method in ("dual", "lora")}
        for run in runs.values():
            run.clock = time.process_time if threads == 1 else time.perf_counter
            run.step()  # warm
        costs: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        start, start_cpu = time.perf_counter(), time.process_time()
        while len(costs["dual"]) < rounds[1]:
            for name in names:
                costs[name].append(runs[name].step())
            names.reverse()
            narrow = median_ratio(costs["dual"], costs["lora"]).uncertainty < 0.01
            if len(costs["dual"]) >= rounds[0] and (narrow or time.perf_counter() - start > seconds):
                break
        wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return Measured(costs, "s", threads, min(cpu / wall / threads, 1.0))
