"""DeepSpeed's optimizer steps, loss scale and (ZeRO-3) gathered parameters, which layers cannot see by themselves.

ZeRO's optimizers hold flattened copies instead of factors, so the warm-up would count no step. DeepSpeed has no hook
for a step, so its engine's methods are wrapped. ZeRO-3 gathers a module's own parameters before that module is called;
a ParameterDict is never called, so the factors are registered with the layer that uses them.
"""

import functools
from typing import Any

from .. import scaler, warmup
from ..layer import layers_of


def connect() -> None:
    """Wrap DeepSpeed's engine; to be called once, when DeepSpeed's engine module has been imported."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    wrap(DeepSpeedEngine)


def wrap(engine: Any) -> None:
    """Wrap three methods of an engine class: `__init__`, `backward` and `_take_model_step`."""
    for name, around in {"__init__": _init, "backward": _backward, "_take_model_step": _step}.items():
        setattr(engine, name, _wrapped(getattr(engine, name), around))


def _wrapped(method: Any, around: Any) -> Any:
    return functools.wraps(method)(lambda engine, *args, **kwargs: around(engine, method, *args, **kwargs))


def _init(engine: Any, init: Any, *args: Any, **kwargs: Any) -> None:
    init(engine, *args, **kwargs)
    layers = layers_of(engine.module)
    if layers and engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import register_external_parameter

        for layer in layers:
            for name in layer.adapter_layer_names:
                for factor in getattr(layer, name).values():
                    register_external_parameter(layer, factor)


def _backward(engine: Any, backward: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
    if engine.fp16_enabled():
        scaler.announce_loss_scale(loss, float(engine.optimizer.cur_scale))
    return backward(engine, loss, *args, **kwargs)


def _step(engine: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
    before = warmup.counted_steps
    result = step(engine, *args, **kwargs)
    if engine.was_step_applied() and warmup.counted_steps == before:  # else torch's optimizer holds the factors
        warmup.count_training(engine.module)
    return result
