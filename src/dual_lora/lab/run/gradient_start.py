"""LoRA-GA's start: before the factors are made, PEFT wants to see gradients of the full weights.

Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000. The gradients are those of
the first batches of the run's own data order; PEFT averages them, and puts the leading directions into A and B.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dual_lora.lab.model.bounds import check_config

BATCHES = 8


def wants_gradients(config: Any) -> bool:
    """Whether the method starts from gradients."""
    return getattr(config, "init_lora_weights", None) == "lora_ga"


def show_gradients(
    model: Any, config: Any, rows: Sequence[Any], batch_size: int, collate: Callable[..., Any], loss: Callable[..., Any]
) -> None:
    """Run forward and backward on the first rows and leave each target's gradient where PEFT's start looks for it."""
    from peft.tuners.lora.loraga import preprocess_loraga
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    check_config(config, model, "method")
    _maybe_include_all_linear_layers(config, model)  # get_peft_model resolves "all-linear" too late for this

    def passes() -> None:
        for start in range(0, min(len(rows), BATCHES * batch_size), batch_size):
            batch = collate(list(rows[start : start + batch_size]))
            batch = {k: v.to(model.device) if hasattr(v, "to") else v for k, v in batch.items()}
            labels = batch.pop("labels")
            loss(model(**batch), labels).backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")  # the first layer's input is no tensor to train
        preprocess_loraga(model, config, passes)


def save_as_change(model: Any, start: Path, folder: Path) -> None:
    """Save the adapter so that it fits the untouched base: PEFT takes the start in `start` off, at twice the rank.

    The start subtracted itself from the base weights, by gradients that are gone when the adapter is loaded.
    """
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
