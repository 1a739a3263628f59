"""The factor on the loss under fp16, which the `clip` estimator has to know: it looks at gradient values.

Under a scaler of 65,536 the clip would act on 12.7 % of entries that are untouched without one (measured). So H is
divided by the factor before the clip and multiplied after. The factor is that of the loss whose backward pass runs:
what a torch.amp.GradScaler's `scale` returns carries a hook, which the pass meets before any layer. So several scalers,
and models without one next to them, each have their own. Whoever scales the loss otherwise says so by `grad_scaler`.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import Variable

_said: list[Any] = []  # by `grad_scaler`, the innermost last
_met = False  # whether something that scales losses was ever there
_present: dict[torch.device, Tensor] = {}  # the factor of the backward pass that runs, else 1; read when it is needed


@contextmanager
def grad_scaler(scaler: Any) -> Iterator[None]:
    """Say what multiplies the loss of forward passes in here, where it is no torch.amp.GradScaler (those are known).

    scaler: has `is_enabled()` and `get_scale()`.
    """
    _said.append(scaler)
    try:
        yield
    finally:
        _said.remove(scaler)


def loss_scale(device: torch.device) -> Tensor | None:
    """What will hold the factor on the loss in backward, 0-dim; None where nothing ever scales a loss."""
    if _said:
        scale = _said[-1].get_scale() if _said[-1].is_enabled() else 1.0
        return torch.full((), scale, device=device)
    return _held(device) if _met and not _only_traced() else None


def _only_traced() -> bool:
    """Whether what runs has no backward pass of the factors: a graph of torch.jit.trace or torch.export, fake tensors,
    a transform of torch.func (which takes no factors)."""
    if torch.compiler.is_dynamo_compiling():
        return False
    traced = torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None
    return traced or detect_fake_mode() is not None


@torch._dynamo.assume_constant_result  # the tensor is, its value is not
def _held(device: torch.device) -> Tensor:
    if torch._C._current_graph_task_id() < 0:
        _set(1.0)  # a backward pass that failed has left its own
    if device not in _present:
        with torch.inference_mode(False):
            _present[device] = torch.ones((), device=device)
    return _present[device]


def _set(factor: Tensor | float) -> None:
    for held in _present.values():
        held.data.fill_(factor) if isinstance(factor, float) else held.data.copy_(factor)  # unseen by autograd


@contextmanager
def scaled_by(factor: float) -> Iterator[None]:
    """Say that backward passes in here are of losses which were multiplied by `factor`."""
    _set(factor)
    try:
        yield
    finally:
        _set(1.0)


@torch._dynamo.disable
def _tell(loss: Any, factor: Tensor) -> Any:
    """The same loss or losses, whose backward pass will know that they were multiplied by `factor`."""

    def begins(grad: Tensor) -> None:
        _set(factor)
        Variable._execution_engine.queue_callback(lambda: _set(1.0))

    if isinstance(loss, Tensor):
        if loss.requires_grad:
            loss.register_hook(begins)
        return loss
    return type(loss)(_tell(one, factor) for one in loss)


def know(scaler: Any = None) -> None:
    """Expect scaled losses from here on; a scaler's `scale`, its class's own too (FSDP's has one), tells of them."""
    global _met
    _met = _met or scaler is None or scaler.is_enabled()
    for kind in type(scaler).__mro__:
        scale = vars(kind).get("scale")
        if scale is not None and not hasattr(scale, "_dual_lora_tells"):
            kind.scale = _telling(scale)  # type: ignore[attr-defined]


def _telling(scale: Any) -> Any:
    @functools.wraps(scale)
    def wrapped(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        if not scaler.is_enabled():
            return scaled
        return _tell(scaled, scaler._scale.clone())

    vars(wrapped)["_dual_lora_tells"] = True
    return wrapped


_Scaler: Any = torch.amp.GradScaler
_make = _Scaler.__init__


@functools.wraps(_make)
def _made(scaler: Any, *args: Any, **kwargs: Any) -> None:
    _make(scaler, *args, **kwargs)
    know(scaler)


_Scaler.__init__ = _made
_kinds = (_Scaler, *_Scaler.__subclasses__())
for _one in gc.get_referrers(*_kinds):
    if type(_one) in _kinds:  # made before this package was imported
        know(_one)
