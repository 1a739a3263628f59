"""The warm-up: λ, and the counter of steps by which it rises with the optimizer, without a call by the user.

One global hook runs after every optimizer step. A layer's adapter is counted by the optimizer that holds its first
trainable factor in the order B, A, D, C. Of steps inside a step (a wrapper's, ZeroRedundancyOptimizer's, a subclass's)
the outermost counts, for all that any of them holds; two optimizers that step on the same gradient count once; a step
that a gradient scaler has skipped does not count. Layers that are past their warm-up, and seen to train, leave the
hook's list. Updates without a torch.optim.Optimizer are counted by `count_step`.

The hook also notices the worst failure of such methods, the silent no-op: factors that no optimizer holds, that get no
gradient, or whose gradient stays zero; and a gradient scaler that the clip does not know.
"""

import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .._warning import warn
from .cache import composed_weights
from .precision import Warned
from .scaler import warn_of_unknown
from .sharded import local

# Steps after which a suspicion is spoken out. The first step has λ = 0 and gradients of zero by definition.
OWN_STEPS_WATCHED = 4
FOREIGN_STEPS_ALLOWED = 10
BACKWARDS_ALLOWED = 100

# What runs an optimizer's `step` between its hooks; the local variable `self` is the optimizer.
_STEP = Optimizer.profile_hook_step(Optimizer.step).__code__  # type: ignore[attr-defined]
_SCALER_STEP = torch.amp.GradScaler.step.__code__


class Counted(Protocol):
    """A layer whose adapters' steps are counted; what each method says stands at `Strength`."""

    def adapter_names(self) -> list[str]: ...
    def trainable_factors(self, adapter: str) -> list[Tensor]: ...
    def moved_factors(self, adapter: str) -> list[Tensor]: ...
    def clips(self, adapter: str) -> bool: ...
    def steps_left(self, adapter: str) -> int: ...
    def step(self, adapter: str) -> None: ...


class _Record:
    """What was seen of one adapter of a layer."""

    steps = 0  # counted
    foreign = 0  # of optimizers without its factors, since the last counted one
    backwards = 0  # since then, too
    last: tuple[Any, Any, int] | None = None  # optimizer, gradient and its version at the last counted step

    def is_same_step(self, optimizer: Optimizer, grad: Tensor | None) -> bool:
        """Whether another optimizer has counted this gradient already; if not, it is counted now."""
        version = 0 if grad is None else grad._version
        if self.last is not None:
            other, counted = self.last[0](), self.last[1]()
            if other is not None and other is not optimizer and counted is grad and self.last[2] == version:
                return True
        self.last = weakref.ref(optimizer), (lambda: None) if grad is None else weakref.ref(grad), version
        return False


_DCP = "torch.distributed.checkpoint.state_dict"
_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_records: weakref.WeakKeyDictionary[Any, dict[str, _Record]] = weakref.WeakKeyDictionary()
# Of an optimizer, what others held that stepped inside its steps: ever, and inside the present one.
_inside: weakref.WeakKeyDictionary[Optimizer, tuple[set[int], set[int]]] = weakref.WeakKeyDictionary()
_warned: weakref.WeakKeyDictionary[Optimizer, Warned] = weakref.WeakKeyDictionary()  # once a run, not once a layer


def factor(left: int, steps: int) -> float:
    """λ of an adapter with `left` of its warm-up's steps to go: 0 at the start, 1 at the end."""
    return 1.0 - left / steps if left else 1.0


def watch(layer: Counted) -> None:
    """Let a layer's steps be counted, until its warm-up is over."""
    _layers.add(layer)
    for adapter in layer.adapter_names():
        factors = layer.trainable_factors(adapter)
        if factors and factors[0].is_leaf and layer.steps_left(adapter):
            hooks: Any = factors[0]._post_accumulate_grad_hooks  # type: ignore[attr-defined]
            if not any(isinstance(hook, _Backward) for hook in (hooks or {}).values()):
                _Backward(layer, adapter, factors[0])


def forget(layer: Counted, adapter: str) -> None:
    """Watch an adapter that is made anew as one that was not seen to train."""
    _records.get(layer, {}).pop(adapter, None)


def count_step(model: nn.Module) -> None:
    """Count one update of the adapters that train (if none does, of all), where no torch.optim.Optimizer makes it.

    The warm-up counts the steps of optimizers by itself. Call this after every update that is written by hand
    (`p -= lr * p.grad`), made by an optimizer that is no torch.optim.Optimizer, or replayed from a CUDA graph.
    """
    composed_weights.clear()
    layers = [(layer, name) for layer in _layers.intersection(model.modules()) for name in layer.adapter_names()]
    training = [(layer, name) for layer, name in layers if layer.trainable_factors(name)]
    for layer, adapter in training or layers:  # none trains in a copy that follows a model which does
        _count(layer, adapter)


def _count(layer: Counted, adapter: str) -> None:
    record = _record(layer, adapter)
    record.steps, record.foreign, record.backwards = record.steps + 1, 0, 0
    layer.step(adapter)


def _record(layer: Counted, adapter: str) -> _Record:
    return _records.setdefault(layer, {}).setdefault(adapter, _Record())


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    composed_weights.clear()  # fused optimizers, and bitsandbytes', raise no version counter
    # By this attribute a gradient scaler tells a fused optimizer to leave everything as it is.
    skipped = getattr(optimizer, "found_inf", None)
    if not _layers or (skipped is not None and bool(skipped)) or _makes_state():
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    running = _running(_STEP)
    if len(running) > 1:
        for seen in _inside.setdefault(running[-1], (set(), set())):
            seen.update(held)
        return
    if optimizer in _inside:
        ever, now = _inside[optimizer]
        held = held - ever | now  # what it wraps and has made no step: a gradient scaler inside it has skipped this one
        now.clear()
    for layer in list(_layers):
        done = True
        for adapter in layer.adapter_names():
            factors = layer.moved_factors(adapter)
            if not factors:
                done = done and layer.steps_left(adapter) == 0  # it may be chosen to train later
                continue
            record = _record(layer, adapter)
            if id(factors[0]) in held:
                if not record.is_same_step(optimizer, factors[0].grad):
                    _count(layer, adapter)
                    if record.steps == OWN_STEPS_WATCHED:
                        _check_gradients(optimizer, adapter, factors, record.steps)
                        if layer.clips(adapter):
                            warn_of_unknown(_running(_SCALER_STEP), _warned.setdefault(optimizer, Warned()))
            elif factors[0].grad is not None:
                record.foreign += 1
                if record.foreign == FOREIGN_STEPS_ALLOWED:
                    _warned.setdefault(optimizer, Warned()).once(
                        f"The factors of the Dual LoRA adapter {adapter!r} get gradients, but in {record.foreign} "
                        "optimizer steps no optimizer held them: they do not move and their warm-up does not advance. "
                        "Build the optimizer from the model's trainable parameters after the adapter was added (and "
                        "after moving or sharding the model).",
                    )
            done = done and layer.steps_left(adapter) == 0 and record.steps >= OWN_STEPS_WATCHED
        if done and layer.adapter_names():
            _layers.discard(layer)


register_optimizer_step_post_hook(torch._dynamo.disable(_after_step))


def _makes_state() -> bool:
    """Whether torch.distributed.checkpoint makes this step, with a rate of 0, for an optimizer's state to be there."""
    return any(f.f_code.co_name == "_init_optim_state" and f.f_globals.get("__name__") == _DCP for f in _callers())


def _callers() -> Iterator[FrameType]:
    """The call stack, the innermost frame first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _running(method: CodeType) -> list[Any]:
    """The objects whose `method` runs, the outermost last, by the call stack.

    A list kept by hooks before and after a step would be wrong for ever after a step that raised an error.
    """
    return [frame.f_locals["self"] for frame in _callers() if frame.f_code is method]


class _Backward:
    """Counts, during the warm-up, the backward passes into an adapter's first factor."""

    def __init__(self, layer: Counted, adapter: str, factor: Tensor):
        self._layer, self._adapter = weakref.ref(layer), adapter
        self._handle: RemovableHandle = factor.register_post_accumulate_grad_hook(self)

    def __call__(self, factor: Tensor) -> None:
        layer = self._layer()
        if layer is None or self._adapter not in layer.adapter_names() or not layer.steps_left(self._adapter):
            self._handle.remove()
            return
        record = _record(layer, self._adapter)
        record.backwards += 1
        if record.backwards == BACKWARDS_ALLOWED:
            for other in _layers:
                for seen in _records.get(other, {}).values():
                    seen.backwards = BACKWARDS_ALLOWED  # told for all of them
            warn(
                f"Gradients of the Dual LoRA adapter {self._adapter!r} were computed {BACKWARDS_ALLOWED} times without "
                f"an optimizer step, and its warm-up waits for {layer.steps_left(self._adapter)} more. If you write to "
                "the parameters yourself, or by an optimizer that is no torch.optim.Optimizer, call "
                "`dual_lora.count_step(model)` after every update, or set warmup_steps=0. If you accumulate as many "
                "gradients, all is well.",
                stacklevel=2,
            )


def _check_gradients(optimizer: Optimizer, adapter: str, factors: list[Tensor], steps: int) -> None:
    grads = [f.grad for f in factors if f.grad is not None]
    # Each process looks at its own parts: asked of the others at different times, they would wait for ever. One that
    # holds nothing of some factor cannot tell; the first always holds something of each.
    here = [local(g) for g in grads]
    if not grads and all(local(f).numel() for f in factors):
        _warned.setdefault(optimizer, Warned()).once(
            f"The factors of the Dual LoRA adapter {adapter!r} got no gradient in optimizer step {steps}: they do not "
            "train. Is the loss connected to the adapted layers (no torch.no_grad(), no detach(); gradient "
            "checkpointing with use_reentrant=False or model.enable_input_require_grads()), and the adapter active?",
        )
    elif grads and all(g.numel() for g in here) and not any(bool(g.any()) for g in here):
        _warned.setdefault(optimizer, Warned()).once(
            f"All gradients of a layer of the Dual LoRA adapter {adapter!r} are exactly zero in optimizer step "
            f"{steps}: its factors do not move. Is the layer's output used, and the loss finite and not constant?",
        )
