"""The paper's warm-up: λ rises from 0 to 1 over optimizer steps, which count themselves.

An adapter's steps are those of the optimizer that holds its first trainable factor in the order B, A, D, C. A step is
counted for each layer whose factor has a gradient; a layer that the data never reach stays at λ = 0. Nested steps (of a
wrapper, a subclass, ZeroRedundancyOptimizer) count once. Steps at a learning rate of 0 (of the factors' groups), and
steps that a gradient scaler skips, change nothing and are not counted. Updates without a torch.optim.Optimizer are
counted by `count_step`. Adapters without a warm-up add no time to a step.
"""

import weakref
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import watch_training
from .cache import composed_weights
from .parallel import offloaded
from .state import AdapterState

NOT_BEGUN = torch.iinfo(torch.int32).max  # more steps than any run has; `set_length` reduces it to the warm-up's
warming_layers: weakref.WeakSet[Any] = weakref.WeakSet()  # the layers that have a count
counted_steps = 0  # by optimizers, of any adapter
# Of each optimizer: `counted_steps` before its last step.
_count_before_step: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
# Of a layer, by adapter: `counted_steps` at its last count.
_last_counts: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


class Warmup:
    """The part of a layer that keeps one count, saved with the adapter: the optimizer steps that are left."""

    states: dict[str, AdapterState]
    dual_lora_A: nn.ParameterDict
    dual_lora_left: BufferDict  # int32, 0-dim or, of experts, [E]; NOT_BEGUN in a run of unknown length
    tied: dict[str, Any]  # whose adapter it is, count and all, where it is not the layer's own

    def left(self, adapter: str) -> Tensor:
        """Return the optimizer steps that are left, int32, 0-dim or [E]."""
        owner = self.tied.get(adapter, self)
        return offloaded.load(owner.dual_lora_left, adapter) if self.states[adapter].warmup else torch.tensor(0)

    def warmup_factor(self, adapter: str) -> Tensor:
        """Return λ, from 0 at the start to 1 at the end, fp32, 0-dim or [E]."""
        steps = max(1, int(self.states[adapter].warmup))
        return 1 - self.left(adapter).clamp(0, steps).float() / steps

    def steps_left(self, adapter: str) -> int:
        """Return the optimizer steps before all of the adapter acts at full strength."""
        return int(self.left(adapter).max())

    def begin_warmup(self, adapter: str, steps: float) -> None:
        """Begin a warm-up of so many steps, or of a share of a run. With 0, remove the count: full strength."""
        self.states[adapter].warmup = steps
        if adapter in self.dual_lora_left:
            del self.dual_lora_left[adapter]
        if steps:
            A = self.dual_lora_A[adapter]
            device = "cpu" if A.is_meta else A.device  # unlike a factor, the count is not loaded later
            left = NOT_BEGUN if steps < 1 else int(steps)
            self.dual_lora_left[adapter] = torch.full(A.shape[:-2], left, dtype=torch.int32, device=device)
            warming_layers.add(self)

    @torch.inference_mode(False)  # training may follow
    def set_left(self, adapter: str, left: Tensor | int) -> None:
        """Set the count. Does nothing for an adapter without a warm-up."""
        if adapter in self.dual_lora_left:
            self.dual_lora_left[adapter] = self.fitted_count(adapter, left)

    def fitted_count(self, adapter: str, left: Tensor | int | None, sharded: bool = False) -> Tensor:
        """Convert a count to this layer's shape (one for each expert), and limit it to the warm-up's steps.

        None, for factors that come without a count, is an ended warm-up. In the middle of a warm-up it is the layer's
        own count, because weight averages are loaded and taken out again; and for sharded factors, whose state has no
        counts.
        """
        stored, steps = self.dual_lora_left[adapter], self.states[adapter].warmup
        if left is None:
            left = stored if sharded or 0 < self.steps_left(adapter) < steps else 0
        given = torch.as_tensor(left, dtype=torch.int32, device=stored.device)
        # Earlier versions saved -1 for a warm-up that is a share of a run that had not begun.
        given = given.clamp(0, int(steps)) if steps >= 1 else torch.where(given < 0, NOT_BEGUN, given)
        return given.expand(stored.shape).clone()

    def set_length(self, adapter: str, steps: int) -> None:
        """Set the number of steps of a warm-up that is a share of a run."""
        if adapter in self.dual_lora_left:
            self.states[adapter].warmup = steps
            self.set_left(adapter, self.dual_lora_left[adapter])

    def count_step(self, adapter: str) -> None:
        """Count one optimizer step, in place, for CUDA graphs that were captured before.

        Raises ValueError for a warm-up that is a share of a run whose length is unknown.
        """
        steps, left = self.states[adapter].warmup, self.left(adapter)
        if steps < 1:
            raise ValueError(
                f"warmup_steps={steps} is a share of the run, but the length of the run is not known. Pass "
                "`callbacks=[dual_lora.DualLoraCallback()]` to the Trainer, or give a number of steps."
            )
        left = left.clone() if left.is_inference() else left
        self.dual_lora_left[adapter] = left.sub_(self._got_gradient(adapter)).clamp_(min=0)

    def _got_gradient(self, adapter: str) -> Tensor | int:
        """Return 1 where a gradient came since the last step; 0 for experts that no token was sent to."""
        return 1


def describe_remaining_steps(left: int, warmup: float) -> str:
    """Say in words how much of a warm-up is left."""
    if warmup < 1:
        return f"a warm-up over {warmup:.0%} of a run that has not begun"
    return f"up to {left} of {warmup} optimizer steps before full strength"


def count_step(model: nn.Module) -> None:
    """Count one update of the adapters that train (if none does, of all), where no torch.optim.Optimizer makes it.

    For the paper's warm-up alone, which counts the steps of optimizers by itself. Call this after every update that is
    written by hand (`p -= lr * p.grad`), made by an optimizer that is no torch.optim.Optimizer, or replayed from a
    CUDA graph.
    """
    if not count_training(model):  # as in a copy that follows a model which trains
        for layer, adapter in _warming_adapters(model):
            layer.count_step(adapter)


def count_training(model: nn.Module) -> bool:
    """Count one update of the adapters that train. Returns whether any of them has a warm-up."""
    composed_weights.clear()
    training = [(layer, adapter) for layer, adapter in _warming_adapters(model) if layer.trainable_factors(adapter)]
    for layer, adapter in training:
        layer.count_step(adapter)
    return bool(training)


def _warming_adapters(model: nn.Module) -> list[tuple[Any, str]]:
    return [(layer, name) for layer in warming_layers.intersection(model.modules()) for name in layer.dual_lora_left]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if warming_layers:
        _count_before_step[optimizer] = counted_steps
    for one in watch_training.watches:
        one.before_step(optimizer)
    for reset in list(watch_training.resets):
        reset.before_step()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global counted_steps
    composed_weights.clear()  # fused optimizers, and bitsandbytes', raise no version counter
    for reset in list(watch_training.resets):
        reset.after_step(optimizer)
    if not (warming_layers or watch_training.watches):
        return
    groups = optimizer.param_groups
    moving = {id(p) for group in groups if group.get("lr") != 0 for p in group["params"]}
    if not moving or getattr(optimizer, "found_inf", None):  # by which a gradient scaler has a fused optimizer skip
        return
    held = {id(p) for group in groups for p in group["params"]}
    for layer in list(warming_layers):
        for adapter in [*layer.dual_lora_left]:
            A, B, C, D = layer.stored_factors(adapter)
            # The factors that train, or trained before another adapter became active.
            those = [f for f in (B, A, D, C) if f.requires_grad or f.grad is not None]
            if not those or those[0].grad is None or id(those[0]) not in held or moving.isdisjoint(map(id, those)):
                continue
            counts = _last_counts.setdefault(layer, {})
            if counts.get(adapter, 0) <= _count_before_step.get(optimizer, 0):  # else a step inside this one counted it
                layer.count_step(adapter)
                counted_steps += 1
                counts[adapter] = counted_steps
        if not layer.dual_lora_left:
            warming_layers.discard(layer)
    for one in list(watch_training.watches):
        one.after_step(optimizer, held)


register_optimizer_step_pre_hook(torch._dynamo.disable(_before_step))
register_optimizer_step_post_hook(torch._dynamo.disable(_after_step))
