"""The fp16 gradient scaler, which the `clip` estimator has to know: it looks at gradient values.

Under a scaler of 65,536 the clip would act on 12.7 % of entries that are untouched without one (measured). So H is
divided by the scaler's factor before the clip and multiplied after. Every torch.amp.GradScaler is known from the moment
at which it is made. The one that was made or used last multiplies the loss, until optimizers step again and again
without its being used. Whoever scales the loss otherwise says so by `grad_scaler`.
"""

import functools
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STEPS_WITHOUT = 10  # of optimizers, several of which may share a scaler

_said: list[Any] = []  # by `grad_scaler`, the innermost last
_last: Any = None  # weakly: the scaler that was made or used last
_steps = 0  # of optimizers since


@contextmanager
def grad_scaler(scaler: Any) -> Iterator[None]:
    """Say what multiplies the loss, where it is no torch.amp.GradScaler (those are known).

    scaler: has `is_enabled()` and `get_scale()`.
    """
    _said.append(scaler)
    try:
        yield
    finally:
        _said.remove(scaler)


def use(scaler: Any) -> None:
    """Know a scaler from here on as the one that multiplies the loss, if it does."""
    global _last, _steps
    if scaler.is_enabled():
        _last, _steps = weakref.ref(scaler), 0


def after_step() -> None:
    """After an optimizer's step: a scaler that was long not used belongs to a run that is over."""
    global _last, _steps
    _steps += 1
    if _steps > STEPS_WITHOUT:
        _last = None


def loss_scale(device: torch.device) -> Tensor | None:
    """The present factor on the loss as a 0-dim tensor, or None where there is none."""
    scaler = _said[-1] if _said else None if _last is None else _last()
    if scaler is None or not scaler.is_enabled():
        return None
    # The scaler makes its tensor on the first scale(loss), which comes after the first forward.
    present = getattr(scaler, "_scale", None)
    if present is None:
        present = torch.full((), scaler.get_scale())
    return present.to(device=device, dtype=torch.float32, copy=True)


def _then_used(method: Any) -> Any:
    @functools.wraps(method)
    def wrapped(scaler: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(scaler, *args, **kwargs)
        use(scaler)
        return result

    return wrapped


_Scaler: Any = torch.amp.GradScaler
# `step` too, as FSDP's own scaler has a `scale` of its own.
for _name in ("__init__", "scale", "step"):
    setattr(_Scaler, _name, _then_used(getattr(_Scaler, _name)))
for _kind in (_Scaler, *_Scaler.__subclasses__()):
    for _one in gc.get_referrers(_kind):
        if type(_one) is _kind:  # made before this package was imported
            use(_one)
