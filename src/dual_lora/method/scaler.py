"""The loss scale under fp16, which the `clip` estimator needs because it depends on the gradient's size.

Under a scaler of 65,536 the clip would change 12.7 % of the entries that it leaves unchanged without one (measured). So
H is divided by the loss scale before the clip and multiplied after. The loss scale is that of the backward pass which
runs: the loss that torch.amp.GradScaler's `scale` returns has a hook, which runs before any layer's backward. So
several scalers, and models without one, can be used side by side. Other loss scaling is declared with `grad_scaler`.
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
_declared_scalers: list[Any] = []  # by `grad_scaler`, the innermost last
# By device the factor of the backward pass that runs, else 1. It is read when it is needed.
_loss_scales: dict[torch.device, Tensor] = {}
_in_backward = False  # whether they hold that of a pass


@contextmanager
def grad_scaler(scaler: Any) -> Iterator[None]:
    """Declare what scales the loss of forward passes in the block. Not needed for torch.amp.GradScaler.

    scaler: has `is_enabled()` and `get_scale()`.
    """
    _declared_scalers.append(scaler)
    try:
        yield
    finally:
        _declared_scalers.remove(scaler)


def loss_scale(device: torch.device) -> Tensor | None:
    """Return the 0-dim tensor that will hold the loss scale in backward; None if there will be no backward."""
    if not (torch.is_grad_enabled() or _C._get_tracing_state()):  # torch.jit does not say whether a trace trains
        return None
    if _declared_scalers:
        scale = _declared_scalers[-1].get_scale() if _declared_scalers[-1].is_enabled() else 1.0
        return torch.full((), scale, device=device)
    return _loss_scale_on(device)


@torch._dynamo.assume_constant_result  # the tensor is, its value is not
def _loss_scale_on(device: torch.device) -> Tensor | None:
    if _C._len_torch_dispatch_stack() and detect_fake_mode() is not None:
        return None  # fake tensors (an export's) cannot be mixed with real ones, and have no backward pass
    if _in_backward and _C._current_graph_task_id() < 0:
        _set(None)  # left over from a backward pass that failed
    if device not in _loss_scales:
        tracing = _C._get_tracing_state()
        _C._set_tracing_state(None)  # else torch.jit would trace the creation of a tensor for each call
        with torch.inference_mode(False):
            _loss_scales[device] = torch.ones((), device=device)
        _C._set_tracing_state(tracing)
    return _loss_scales[device]


@torch._dynamo.disable  # it runs in the middle of a step that is compiled together with its backward pass
def _set(factor: Tensor | float | None) -> None:
    """Write the loss scale of a backward pass to the tensors; None: an unscaled loss."""
    global _in_backward
    _in_backward = factor is not None
    for held in _loss_scales.values():
        held.data.copy_(torch.as_tensor(1.0 if factor is None else factor))  # unseen by autograd


@torch._dynamo.disable
def _begin(factor: Tensor | float, grad: Tensor) -> None:
    _set(factor)
    Variable._execution_engine.queue_callback(functools.partial(_set, None))


@torch._dynamo.disable
def announce_loss_scale(losses: Any, factor: Tensor | float) -> None:
    """Set the loss scale to `factor` in the backward pass of this loss, or of several."""
    for loss in tree_leaves(losses):
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(functools.partial(_begin, factor))


def _wrap_scale(kind: Any) -> None:
    """Wrap the `scale` method of a scaler class, and those of its subclasses, such as FSDP's."""
    for subclass in kind.__subclasses__():
        _wrap_scale(subclass)
    if (scale := vars(kind).get("scale")) is None:
        return

    @functools.wraps(scale)
    def telling(scaler: Any, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        if scaler.is_enabled():
            announce_loss_scale(scaled, scaler._scale.clone())
        return scaled

    kind.scale = telling


_Scaler: Any = torch.amp.GradScaler
_Scaler.__init_subclass__ = classmethod(_wrap_scale)
_wrap_scale(_Scaler)
