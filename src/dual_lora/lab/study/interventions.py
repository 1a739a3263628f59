"""The additions of a study to a training: parameters are held still or kept in low precision, a probe's steps are
timed."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from dual_lora.lab.patterns import Pattern
from dual_lora.lab.run.loop import check_patterns


class Freeze(TrainerCallback):
    """A callback that holds parameters still after a share of the steps (0: they never move and keep their random
    start).

    shares: regular expression of parameter names -> share of the run's steps.
    """

    def __init__(self, shares: Mapping[str, float]):
        self.shares = {Pattern(text, "freeze"): share for text, share in shares.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_patterns("freeze", [pattern.text for pattern in self.shares], model)
        self._hold(model, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._hold(model, state)

    def _hold(self, model: Any, state: Any) -> None:
        due = [p for p, share in self.shares.items() if state.global_step >= share * state.max_steps]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(pattern.search(name) for pattern in due):
                parameter.requires_grad_(False)
                parameter.grad = None


class Round(TrainerCallback):
    """A callback that rounds parameters after every step: trained and stored in low precision, without a finer copy.

    formats: regular expression of parameter names -> "bfloat16", "float16" or "int8" (symmetric, one scale a row).
    """

    def __init__(self, formats: Mapping[str, str]):
        self.formats = {Pattern(text, "round"): name for text, name in formats.items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        check_patterns("round", [pattern.text for pattern in self.formats], model)
        self._round(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._round(model)

    @torch.no_grad()
    def _round(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            kind = next((k for pattern, k in self.formats.items() if pattern.search(name)), None)
            if kind and parameter.requires_grad:
                parameter.copy_(rounded(parameter, kind))


class StepTimes(TrainerCallback):
    """Measures the time of each step. The first ones also warm up: kernels are compiled, buffers and threads made."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def warm(self) -> float | None:
        """Seconds of a step after the first two; None of too few."""
        later = self.seconds[2:]
        return sum(later) / len(later) if later else None


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The values as `kind` can hold them, in their own dtype."""
    if kind == "int8":
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (values / scale).round() * scale
    return values.to(getattr(torch, kind)).to(values.dtype)
