"""The clock of the warm-up: λ rises with the optimizer's steps, without a call by the user.

One global hook runs after every optimizer step. A layer's adapter is counted by the optimizer that holds its first
trainable factor in the order B, A, D, C; a wrapper around an optimizer does not count (its inner one does), nor does a
step that a gradient scaler has skipped. Layers that are past their warm-up, and seen to train, leave the hook's list.

The hook also notices the worst failure of such methods, the silent no-op: factors that no optimizer holds, that get no
gradient, or whose gradient stays zero.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

# Steps after which a suspicion is spoken out. The first step has λ = 0 and gradients of zero by definition.
OWN_STEPS_WATCHED = 4
FOREIGN_STEPS_BORNE = 10


class Clocked(Protocol):
    """What the clock needs of a layer."""

    def trainable_factors(self, adapter: str) -> list[Tensor]: ...
    def adapter_names(self) -> list[str]: ...
    def steps_left(self, adapter: str) -> int: ...
    def step(self, adapter: str) -> None: ...


_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_own_steps: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
_foreign_steps = 0
_warned: set[str] = set()


def watch(layer: Clocked) -> None:
    """Put a layer on the clock's list; it leaves by itself."""
    _layers.add(layer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _foreign_steps
    if not _layers or _wraps_another(optimizer) or _was_skipped(optimizer):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = False
    orphans: list[str] = []
    for layer in list(_layers):
        done = True
        for adapter in layer.adapter_names():
            factors = layer.trainable_factors(adapter)
            if not factors:
                done = done and layer.steps_left(adapter) == 0  # it may be chosen to train later
                continue
            steps = _own_steps.setdefault(layer, {})
            if id(factors[0]) in held:
                own = True
                steps[adapter] = steps.get(adapter, 0) + 1
                if steps[adapter] <= OWN_STEPS_WATCHED:
                    _check_gradients(adapter, factors, steps[adapter])
                layer.step(adapter)
            elif factors[0].grad is not None:
                orphans.append(adapter)
            done = done and layer.steps_left(adapter) == 0 and steps.get(adapter, 0) >= OWN_STEPS_WATCHED
        if done and layer.adapter_names():
            _layers.discard(layer)
    _foreign_steps = 0 if own or not orphans else _foreign_steps + 1
    if _foreign_steps == FOREIGN_STEPS_BORNE:
        _warn(
            f"The factors of the Dual LoRA adapter {orphans[0]!r} get gradients, but in {_foreign_steps} optimizer "
            "steps no optimizer held them: they do not move and their warm-up does not advance. Build the optimizer "
            "from the model's trainable parameters after the adapter was added (and after moving or sharding the "
            "model)."
        )


register_optimizer_step_post_hook(torch._dynamo.disable(_after_step))


def _wraps_another(optimizer: Optimizer) -> bool:
    """accelerate's, and most other, wrappers are optimizers that keep the real one, or several, in an attribute."""
    for value in vars(optimizer).values():
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, Optimizer) for one in several):
            return True
    return False


def _was_skipped(optimizer: Optimizer) -> bool:
    """A gradient scaler tells fused optimizers to leave everything as it is through this attribute."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _check_gradients(adapter: str, factors: list[Tensor], steps: int) -> None:
    if steps < OWN_STEPS_WATCHED:
        return
    grads = [f.grad for f in factors if f.grad is not None]
    if not grads:
        _warn(
            f"The factors of the Dual LoRA adapter {adapter!r} got no gradient in optimizer step {steps}: they do not "
            "train. Is the loss connected to the adapted layers (no torch.no_grad(), no detach(); gradient "
            "checkpointing with use_reentrant=False or model.enable_input_require_grads()), and the adapter active?"
        )
    elif not any(bool(g.any()) for g in grads):
        _warn(
            f"All gradients of a layer of the Dual LoRA adapter {adapter!r} are exactly zero in optimizer step "
            f"{steps}: its factors do not move. Is the layer's output used, and the loss finite and not constant?"
        )


def _warn(message: str) -> None:
    key = message[:60]
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=3)
