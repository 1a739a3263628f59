"""The training loop's part of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dual_lora.lab.patterns import compiled
from dual_lora.lab.recipe.section import MOST, Section


class TrainSection(Section):
    in_place = (("epochs", "steps"),)

    steps: int | None = Field(None, ge=1, description="Optimizer steps; left out: computed from epochs.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training records, unless steps is given.")
    batch_size: int = Field(8, ge=1, le=MOST, description="Examples per device and forward pass.")
    accumulate: int = Field(1, ge=1, le=MOST, description="Forward passes per optimizer step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How the learning rate falls over the run."
    )
    lr_warmup: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the steps over which the learning rate rises. Has no effect with schedule constant; use "
        "constant_with_warmup.",
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Largest gradient norm; larger gradients are scaled down to it. 0: no limit."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    autocast: Literal["auto", "none", "bf16", "fp16"] = Field(
        "none",
        description="Mixed precision of the training loop. auto: bf16 where this device is faster with it, none "
        "elsewhere.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed for the factors, the data order and dropout.")
    optimizer: str = Field(
        "adamw_torch",
        description="An optim name of transformers (adamw_torch, galore_adamw, ...), loraplus, or your own "
        "MODULE:FACTORY. The factory is called like torch's optimizers, with parameter groups and lr, and needs "
        "--allow-module.",
    )
    loraplus_ratio: float = Field(
        16.0, gt=0, description="optimizer loraplus: learning rate of B (and D) divided by that of A (and C)."
    )
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="Regular expression of parameter names: multiple of the learning rate; the first match counts.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    log_every: int = Field(5, ge=1, description="Steps between two lines in metrics.jsonl.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(1, ge=1, description="How many complete checkpoints to keep, the newest ones.")
    validate_every: int | None = Field(None, ge=1, description="Steps between two validation losses.")
    patience: int | None = Field(
        None,
        ge=1,
        description="End the run after this many validations in a row without a lower loss. Needs validate_every.",
    )
    keep_best: bool = Field(
        False, description="Save the weights of the lowest validation loss, not the last ones. Needs validate_every."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of transformers.TrainingArguments. The error for a wrong name lists them.",
    )

    @classmethod
    def merged(cls, values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        """Merge as any section does. `lr_warmup` drops the same among the arguments; patterns of `rates` that are given
        come before those that are there, as the first that fits counts."""
        result = super().merged(values, over)
        old, given = values.get("rates"), over.get("rates")
        if isinstance(old, dict) and isinstance(given, dict):
            result["rates"] = given | old | given
        if "lr_warmup" in over and isinstance(arguments := result.get("arguments"), dict):
            dropped = {"warmup_steps", "warmup_ratio"} - set(over.get("arguments") or {})
            result["arguments"] = {name: value for name, value in arguments.items() if name not in dropped}
        return result

    @model_validator(mode="after")
    def _the_best_needs_validations(self) -> TrainSection:
        if (self.patience is not None or self.keep_best) and self.validate_every is None:
            name = "keep_best" if self.keep_best else "patience"
            raise ValueError(f"{name} uses validation losses: set validate_every, the steps between two of them")
        return self

    @field_validator("rates")
    @classmethod
    def _patterns_and_factors(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, factor in value.items():
            compiled(pattern)
            if not factor > 0:
                raise ValueError(f"{pattern}: {factor} is no multiple of a learning rate, expected a number above 0")
        return value
