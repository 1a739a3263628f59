"""What DeepSpeed hides from a layer: its optimizer steps, its loss scale, and (ZeRO-3) the parameters themselves.

ZeRO's optimizers hold flattened copies, so that no optimizer holds a factor of ours and the warm-up would count no
step. DeepSpeed has no hook for a step, so its engine's method is wrapped. ZeRO-3 gathers a module's own parameters
before that module is called; a ParameterDict never is, so the factors are registered with the layer that uses them.
"""

import functools
import weakref
from typing import Any

from .. import scaler
from ..cache import composed_weights
from ..layer import layers_of


def connect() -> None:
    """Wrap DeepSpeed's engine; to be called once, when DeepSpeed's engine module has been imported."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine.__init__ = _after_init(DeepSpeedEngine.__init__)
    DeepSpeedEngine._take_model_step = _counted(DeepSpeedEngine._take_model_step)


def _after_init(init: Any) -> Any:
    @functools.wraps(init)
    def wrapped(engine: Any, *args: Any, **kwargs: Any) -> None:
        init(engine, *args, **kwargs)
        layers = layers_of(engine.module)
        if not layers:
            return
        if engine.fp16_enabled():
            engine._dual_lora_loss_scale = _LossScale(engine)
            scaler.use(engine._dual_lora_loss_scale)
        if engine.zero_optimization_stage() == 3:
            from deepspeed.runtime.zero import register_external_parameter

            for layer in layers:
                for name in layer.adapter_layer_names:
                    for factor in getattr(layer, name).values():
                        register_external_parameter(layer, factor)

    return wrapped


def _counted(take_model_step: Any) -> Any:
    @functools.wraps(take_model_step)
    def wrapped(engine: Any, *args: Any, **kwargs: Any) -> Any:
        found = layers_of(engine.module)
        layers = [(layer, name) for layer in found for name, state in layer.states.items() if state.warmup]
        before = [int(layer.left(name).sum()) for layer, name in layers]
        result = take_model_step(engine, *args, **kwargs)
        composed_weights.clear()  # ZeRO writes to the factors through what it has flattened
        if hasattr(engine, "_dual_lora_loss_scale"):
            scaler.use(engine._dual_lora_loss_scale)
        if engine.was_step_applied():
            for left, (layer, name) in zip(before, layers, strict=True):
                # Without ZeRO, torch's optimizer holds the factors and the step has been counted already.
                if left and int(layer.left(name).sum()) == left and layer.trainable_factors(name):
                    layer.count_step(name)
        return result

    return wrapped


class _LossScale:
    """DeepSpeed's fp16 loss scale, read as a gradient scaler's; keeps no engine, and no model, alive."""

    def __init__(self, engine: Any):
        self._engine = weakref.ref(engine)

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return float(self._engine().optimizer.cur_scale)  # type: ignore[union-attr]
