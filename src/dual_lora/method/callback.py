"""A callback for transformers' Trainer: nothing but what a layer cannot know by itself.

It has a file of its own: PEFT may be imported while transformers still is, which cannot give its TrainerCallback then.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .scaler import forget_with, set_grad_scaler


class DualLoraCallback(TrainerCallback):
    """Makes the Trainer's fp16 gradient scaler known to the `clip` estimator.

    Only fp16 training with ste="clip" needs it: `Trainer(…, callbacks=[DualLoraCallback()])`. The warm-up needs no
    callback.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        set_grad_scaler(scaler)
        if scaler is not None:
            forget_with(optimizer, scaler)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_grad_scaler(None)
