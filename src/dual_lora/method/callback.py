"""A callback for transformers' Trainer that tells layers the length of the run.

It has a file of its own, because PEFT may be imported while transformers is being imported, and TrainerCallback does
not exist yet.
"""

import copy
from typing import Any

from transformers import TrainerCallback

from .layer import layers_of


class DualLoraCallback(TrainerCallback):
    """Converts a `warmup_steps` that is a share of the run into a number of steps when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, config in [*getattr(model, "peft_config", {}).items()]:
            share = getattr(config, "warmup_steps", None)
            layers = layers_of(model, name) if isinstance(share, float) and 0 < share < 1 else []
            if any(layer.trainable_factors(name) for layer in layers):  # another one's run has another length
                model.peft_config[name] = own = copy.copy(config)  # the user's may be that of a next run as well
                own.warmup_steps = max(1, round(share * state.max_steps))
                for layer in layers:
                    layer.set_length(name, own.warmup_steps)
