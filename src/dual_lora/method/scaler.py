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
from torch.utils._pytree import tree_leaves

met = False  # whether something that scales losses was ever there
_said: list[Any] = []  # by `grad_scaler`, the innermost last
_telling: set[type] = set()  # the classes whose `scale` tells of its losses
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
    return _held(device) if met and not _only_traced() else None


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


@torch._dynamo.disable
def tell(losses: Any, factor: Tensor | float) -> None:
    """Let the backward pass of a loss, or of several, know that they are multiplied by `factor`."""

    def begins(grad: Tensor) -> None:
        _set(factor)
        Variable._execution_engine.queue_callback(lambda: _set(1.0))

    for loss in tree_leaves(losses):
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(begins)


def _know(scaler: Any) -> None:
    """Expect scaled losses from here on, of which its class tells: its own `scale` too, as FSDP's has one."""
    global met
    met = met or scaler.is_enabled()
    for kind in type(scaler).__mro__:
        _let_tell(kind)


def _let_tell(kind: Any) -> None:
    scale = vars(kind).get("scale")
    if scale is None or kind in _telling:
        return

    @functools.wraps(scale)
    def telling(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        if scaler.is_enabled():
            tell(scaled, scaler._scale.clone())
        return scaled

    kind.scale = telling
    _telling.add(kind)


_Scaler: Any = torch.amp.GradScaler
_let_tell(_Scaler)
_make = _Scaler.__init__


@functools.wraps(_make)
def _made(scaler: Any, *args: Any, **kwargs: Any) -> None:
    _make(scaler, *args, **kwargs)
    _know(scaler)


_Scaler.__init__ = _made
_kinds = (_Scaler, *_Scaler.__subclasses__())
for _one in gc.get_referrers(*_kinds):
    if type(_one) in _kinds:  # made before this package was imported
        _know(_one)
