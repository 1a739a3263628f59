"""Early stopping, and the weights of the lowest validation loss (`train.patience`, `train.keep_best`).

What has been best so far lies in every checkpoint, so that a resumed run knows it. A validation within Dual LoRA's
warm-up does not count: the same weights compute something else when it is over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_json
from dual_lora.lab.model.device import is_sharded_launch
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.schema import TrainSection

NUMBERS, WEIGHTS = "best.json", "best.safetensors"  # in a checkpoint


class Best(TrainerCallback):
    """Counts the validations that brought no lower loss, and holds the weights of the lowest.

    first: the step from which validations count. Its `on_save` has to come before the checkpoint is declared whole.
    """

    def __init__(self, part: TrainSection, folder: RunFolder, first: int, main: bool):
        self.patience, self.keep, self.folder, self.first, self.main = (
            part.patience, part.keep_best, folder, first, main,
        )  # fmt: skip
        self.step: int | None = None
        self.loss = math.inf
        self.without = 0  # validations since
        self.stopped = False
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def ended(self) -> bool:
        """Whether enough validations in a row have brought nothing."""
        return self.patience is not None and self.without >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take up what the checkpoint says, which may be a stranger's. Raises ValueError if it cannot be so."""
        if not state.global_step:
            return
        checkpoint = self.folder.checkpoints / f"checkpoint-{state.global_step}"
        if not (checkpoint / NUMBERS).is_file():
            return
        known = read_object(checkpoint / NUMBERS)
        step, without, loss = (known.get(name) for name in ("step", "without", "loss"))
        counts = all(type(count) is int and 0 <= count <= state.global_step for count in (step, without))
        if not counts or not (loss is None or (isinstance(loss, int | float) and abs(loss) < math.inf)):
            raise ValueError(f"{NUMBERS} holds {known!r:.200}, expected step, loss and without as it was written.")
        self.step, self.without = step, without  # type: ignore[assignment]
        self.loss = math.inf if loss is None else float(loss)
        if (checkpoint / WEIGHTS).is_file():
            self.weights = _fitting(checkpoint / WEIGHTS, model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is None or state.global_step < self.first:
            return
        if loss < self.loss:  # NaN is not
            self.step, self.loss, self.without = state.global_step, float(loss), 0
            own = _trained(model) if self.keep else ()
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in own}
        else:
            self.without += 1
        if self.ended and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True  # it may get longer from here

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.main or self.step is None:
            return
        checkpoint = self.folder.checkpoints / f"checkpoint-{state.global_step}"
        loss = self.loss if math.isfinite(self.loss) else None
        write_json(checkpoint / NUMBERS, {"step": self.step, "loss": loss, "without": self.without})
        if self.weights:
            from safetensors.torch import save_file

            save_file(self.weights, checkpoint / WEIGHTS)

    def put_back(self, model: Any) -> None:
        """Give the model the weights of the lowest validation loss."""
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.weights.items():
                named[name].copy_(weight)


def _trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    plain = getattr(model, "module", model)  # of one that several processes train
    return ((name, p) for name, p in plain.named_parameters() if p.requires_grad)


def _fitting(file: Path, model: Any) -> dict[str, torch.Tensor]:
    """The weights in a file. Raises ValueError unless they are finite and those that the model trains."""
    from safetensors.torch import load_file

    held = load_file(file)
    known = {name: weight.shape for name, weight in _trained(model)}
    if known != {name: weight.shape for name, weight in held.items()}:
        raise ValueError(f"{file.name} holds other weights than this run trains.")
    if bad := next((name for name, weight in held.items() if not torch.isfinite(weight).all()), None):
        raise ValueError(f"{file.name} holds NaN or infinity in {bad}.")
    return held


def check_best(part: TrainSection) -> None:
    """Raise UserError for weights that no process holds whole."""
    sharded = is_sharded_launch() or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if part.keep_best and sharded:
        raise UserError("train.keep_best needs the trained weights whole; FSDP and DeepSpeed shard them: leave it out.")


def counts_from(config: Any) -> int:
    """The first step whose validation tells what the weights will compute at the end."""
    return int(getattr(config, "warmup_steps", 0) or 0)
