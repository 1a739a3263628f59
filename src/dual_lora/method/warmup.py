"""The paper's warm-up counts optimizer steps by itself. And what every step of an optimizer means for adapters.

An adapter's step counter is the optimizer that holds its first trainable factor in the order B, A, D, C. After one of
its steps a layer whose factor has got a gradient is counted; a layer that the data never reach stays at λ = 0. Of steps
inside a step (a wrapper's, a subclass's, ZeroRedundancyOptimizer's) one counts, as do those of two optimizers on one
gradient. A step at a learning rate of 0 moves nothing and counts nothing, nor does one that a gradient scaler skips.
Updates without a torch.optim.Optimizer are counted by `count_step`.

Adapters without a warm-up cost a step nothing.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import watch_training
from .cache import composed_weights


class Counted(Protocol):
    """A layer whose adapters' steps are counted; what each method says stands at `Strength`."""

    states: dict[str, Any]
    dual_lora_left: Any

    def counting_factor(self, adapter: str) -> Tensor | None: ...
    def trainable_factors(self, adapter: str) -> list[Tensor]: ...
    def count_step(self, adapter: str) -> None: ...


_layers: weakref.WeakSet[Any] = weakref.WeakSet()  # in their warm-up
_events = itertools.count()  # beginnings of steps and countings, in their order
_begun: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
# Of a layer's adapter: when it was counted last, by which optimizer and for which gradient, in which version.
_counted: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, Any, Any, int]]] = weakref.WeakKeyDictionary()


def watch(layer: Counted) -> None:
    """Let a layer's steps be counted, if one of its adapters is in its warm-up."""
    if any(state.warmup for state in layer.states.values()):
        _layers.add(layer)


def count_step(model: nn.Module) -> None:
    """Count one update of the adapters that train (if none does, of all), where no torch.optim.Optimizer makes it.

    For the paper's warm-up alone, which counts the steps of optimizers by itself. Call this after every update that is
    written by hand (`p -= lr * p.grad`), made by an optimizer that is no torch.optim.Optimizer, or replayed from a
    CUDA graph.
    """
    composed_weights.clear()
    here = [(layer, name) for layer in _layers.intersection(model.modules()) for name in _warming(layer)]
    training = [(layer, name) for layer, name in here if layer.trainable_factors(name)]
    for layer, adapter in training or here:  # none trains in a copy that follows a model which does
        layer.count_step(adapter)


def _warming(layer: Counted) -> list[str]:
    return [name for name in layer.dual_lora_left if layer.states[name].warmup]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _layers:
        _begun[optimizer] = next(_events)
    for one in watch_training.watches:
        one.before_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    composed_weights.clear()  # fused optimizers, and bitsandbytes', raise no version counter
    if not (_layers or watch_training.watches):
        return
    # By this attribute a gradient scaler tells a fused optimizer to leave everything as it is.
    skipped = getattr(optimizer, "found_inf", None)
    groups = optimizer.param_groups
    if (skipped is not None and bool(skipped)) or all(group.get("lr") == 0 for group in groups):
        return
    held = {id(p) for group in groups for p in group["params"]}
    for layer in list(_layers):
        for adapter in _warming(layer):
            first = layer.counting_factor(adapter)
            if first is not None and id(first) in held and first.grad is not None:
                _count(layer, adapter, optimizer, first.grad)
        if not _warming(layer):
            _layers.discard(layer)
    for one in list(watch_training.watches):
        one.after_step(optimizer, held)


def _count(layer: Counted, adapter: str, optimizer: Optimizer, grad: Tensor) -> None:
    """Count a step, unless it is the step around one that was counted, or another optimizer's on the same gradient."""
    seen = _counted.setdefault(layer, {})
    when, by, of, version = seen.get(adapter, (-1, None, None, 0))
    inside = when > _begun.get(optimizer, -1)
    same = by is not None and by() not in (None, optimizer) and of() is grad and grad._version == version
    if not inside and not same:
        if isinstance(layer.states[adapter].warmup, float):
            raise ValueError(
                f"warmup_steps={layer.states[adapter].warmup} is a share of the run, but the length of the "
                "run is not known. Pass `callbacks=[dual_lora.DualLoraCallback()]` to the Trainer, or give a number of "
                "steps."
            )
        layer.count_step(adapter)
        seen[adapter] = next(_events), weakref.ref(optimizer), weakref.ref(grad), grad._version


register_optimizer_step_pre_hook(torch._dynamo.disable(_before_step))
register_optimizer_step_post_hook(torch._dynamo.disable(_after_step))
