"""A callback for transformers' Trainer: nothing but what a layer cannot know by itself.

It has a file of its own: PEFT may be imported while transformers still is, which cannot give its TrainerCallback then.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from . import scaler as known


class DualLoraCallback(TrainerCallback):
    """Makes the Trainer's fp16 gradient scaler known to the `clip` estimator, or that it has none.

    Only fp16 training with ste="clip" needs it: `Trainer(…, callbacks=[DualLoraCallback()])`. The warm-up needs no
    callback.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:
            known.set_grad_scaler(scaler, owner=optimizer)
        elif known._current is None:  # DeepSpeed's would be known by now
            known.set_grad_scaler(torch.amp.GradScaler(enabled=False), owner=optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known.set_grad_scaler(None)
