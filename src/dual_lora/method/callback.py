"""A callback for transformers' Trainer: nothing but what a layer cannot know by itself, the length of the run.

It has a file of its own: PEFT may be imported while transformers still is, which cannot give its TrainerCallback then.
"""

from typing import Any

from transformers import TrainerCallback

from .layer import layers_of


class DualLoraCallback(TrainerCallback):
    """Tells adapters whose `warmup_steps` is a share of the run how many steps that is."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, config in getattr(model, "peft_config", {}).items():
            share = getattr(config, "warmup_steps", None)
            if isinstance(share, float) and 0 < share < 1 and (layers := layers_of(model, name)):
                config.warmup_steps = max(1, round(share * state.max_steps))
                for layer in layers:
                    layer.set_length(name, config.warmup_steps)
