"""The fp16 gradient scaler, made known to the `clip` estimator.

The clip looks at gradient values. Under a scaler of 65,536 it would clip 12.7 % of entries that are untouched without
one (measured), and a layer cannot see the scaler. So `clip` in fp16, by autocast or by the base's dtype, is refused
until the scaler is known.

In fp32 and bf16 nothing tells of a scaler before a step of torch's own, of which a warning is given; of any other
class nothing does. Unknown, it makes C's and D's gradients wrong (by 59 % at the usual start, 65,536, fp32 against
fp64); A's and B's are linear in the loss.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.dispatch import autocast_dtype
from .precision import Warned

_current: torch.amp.GradScaler | None = None
_told: weakref.WeakSet[torch.amp.GradScaler] = weakref.WeakSet()  # now or before


def set_grad_scaler(scaler: torch.amp.GradScaler | None, owner: object = None) -> None:
    """Make a gradient scaler known from here on, or (None) forget it.

    owner: when it is gone, so is the scaler: a run that ended by an error leaves nothing to the next one.
    """
    global _current
    _current = scaler
    if scaler is not None:
        _told.add(scaler)
    if owner is not None:
        weakref.finalize(owner, _forget, scaler)


def _forget(scaler: torch.amp.GradScaler | None) -> None:
    if _current is scaler:
        set_grad_scaler(None)


@contextmanager
def grad_scaler(scaler: torch.amp.GradScaler) -> Iterator[None]:
    """Train `clip` in fp16: H is divided by the scaler's factor before the clip and multiplied after.

    >>> scaler = torch.amp.GradScaler("cuda")                           # doctest: +SKIP
    >>> with dual_lora.grad_scaler(scaler):                             # doctest: +SKIP
    ...     for batch in loader:
    ...         with torch.autocast("cuda", torch.float16):
    ...             loss = model(**batch).loss
    ...         scaler.scale(loss).backward()
    ...         scaler.step(optimizer); scaler.update(); optimizer.zero_grad()
    """
    before = _current
    set_grad_scaler(scaler)
    try:
        yield
    finally:
        set_grad_scaler(before)


def loss_scale(device: torch.device) -> Tensor | None:
    """The known scaler's present factor as a 0-dim tensor, or None where no scaler is known (or it is off)."""
    if _current is None or not _current.is_enabled():
        return None
    # The scaler makes its tensor on the first scale(loss), which comes after the first forward.
    present = getattr(_current, "_scale", None)
    if present is None:
        present = torch.full((), _current.get_scale())
    return present.to(device=device, dtype=torch.float32, copy=True)


def check_clip_is_safe(operand: Tensor, training: bool, warned: Warned) -> None:
    """Raise RuntimeError for `clip` in fp16 with an unknown scaler; in eval mode, mostly evaluation, warn.

    operand: what the layer computes with where autocast is off.
    """
    if _current is not None or (autocast_dtype(operand.device, operand.dtype) or operand.dtype) != torch.float16:
        return
    if training:
        raise RuntimeError(
            "Dual LoRA's 'clip' estimator looks at gradient values, and in fp16 a gradient scaler multiplies them by "
            "up to 65,536 without a layer being able to see it: training would silently be another method. Make the "
            "scaler known (`with dual_lora.grad_scaler(scaler): …`, or `dual_lora.DualLoraCallback()` in a Trainer; "
            "without a scaler, `torch.amp.GradScaler(enabled=False)`), train in bf16, or choose ste='identity', "
            "'hardtanh' or 'surrogate', which are indifferent to scale."
        )
    if not torch.compiler.is_compiling():
        warned.once(
            "A Dual LoRA model in eval mode runs in fp16 with gradients. To evaluate, use torch.no_grad(). "
            "To train in eval mode, make the gradient scaler known (`with dual_lora.grad_scaler(scaler): …`): the "
            "'clip' estimator would otherwise clip scaled gradients."
        )


def warn_of_unknown(scalers: list[torch.amp.GradScaler], warned: Warned) -> None:
    """Warn of scalers that make a step of `clip` and were never made known, as can happen in fp32 and bf16."""
    if any(scaler.is_enabled() and scaler not in _told for scaler in scalers):
        warned.once(
            "A gradient scaler that Dual LoRA was not told of multiplies the loss: the 'clip' estimator clips scaled "
            "gradients, so that those of the factors C and D are wrong. Make the scaler known (`with "
            "dual_lora.grad_scaler(scaler): …`, or `dual_lora.DualLoraCallback()` in a Trainer), train without one, as "
            "fp32 and bf16 allow, or choose ste='identity', 'hardtanh' or 'surrogate', which are indifferent to scale."
        )
