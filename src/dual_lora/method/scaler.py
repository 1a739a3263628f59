"""The factor on the loss under fp16, which the `clip` estimator has to know: it looks at gradient values.

Under a scaler of 65,536 the clip would act on 12.7 % of entries that are untouched without one (measured). So H is
divided by the factor before the clip and multiplied after. The factor is that of the loss whose backward pass runs:
what a torch.amp.GradScaler's `scale` returns carries a hook, which the pass meets before any layer. So several scalers,
and models without one next to them, each have their own. Whoever scales the loss otherwise says so by `grad_scaler`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

_C: Any = torch._C
_said: list[Any] = []  # by `grad_scaler`, the innermost last
_present: dict[torch.device, Tensor] = {}  # the factor of the backward pass that runs, else 1; read when it is needed
_running = False  # whether they hold that of a pass


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
    """What will hold the factor on the loss in backward, 0-dim; None where no gradient is wanted, or none is taken."""
    if not (torch.is_grad_enabled() or _C._get_tracing_state()):  # torch.jit does not say whether a trace trains
        return None
    if _said:
        scale = _said[-1].get_scale() if _said[-1].is_enabled() else 1.0
        return torch.full((), scale, device=device)
    return _held(device)


@torch._dynamo.assume_constant_result  # the tensor is, its value is not
def _held(device: torch.device) -> Tensor | None:
    if _C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
        return None  # fake tensors, of which an export is made, take no others and have no backward pass
    if _running and _C._current_graph_task_id() < 0:
        _set(None)  # a backward pass that failed has left its own
    if device not in _present:
        tracing = _C._get_tracing_state()
        _C._set_tracing_state(None)  # else each call of what torch.jit traces would make a tensor of its own
        with torch.inference_mode(False):
            _present[device] = torch.ones((), device=device)
        _C._set_tracing_state(tracing)
    return _present[device]


def _set(factor: Tensor | float | None) -> None:
    """None: that of a loss which nothing scales."""
    global _running
    _running = factor is not None
    for held in _present.values():
        held.data.copy_(torch.as_tensor(1.0 if factor is None else factor))  # unseen by autograd


@torch._dynamo.disable  # of a step that is compiled with its backward pass this runs in the middle
def _begin(factor: Tensor | float, grad: Tensor) -> None:
    _set(factor)
    Variable._execution_engine.queue_callback(_end)


@torch._dynamo.disable
def _end() -> None:
    _set(None)


@torch._dynamo.disable
def tell(losses: Any, factor: Tensor | float) -> None:
    """Let the backward pass of a loss, or of several, know that they are multiplied by `factor`."""
    for loss in tree_leaves(losses):
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(functools.partial(_begin, factor))


def _let_tell(kind: Any) -> None:
    """Let a class of scalers tell of its losses: those with a `scale` of their own, as FSDP's, for themselves."""
    scale = vars(kind).get("scale")
    if scale is None:
        return

    @functools.wraps(scale)
    def telling(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        if scaler.is_enabled():
            tell(scaled, scaler._scale.clone())
        return scaled

    kind.scale = telling


_Scaler: Any = torch.amp.GradScaler
_Scaler.__init_subclass__ = classmethod(_let_tell)
_kinds = [_Scaler]
for _kind in _kinds:
    _let_tell(_kind)
    _kinds += _kind.__subclasses__()
