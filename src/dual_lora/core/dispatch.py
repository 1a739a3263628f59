"""Who computes, the Triton kernels or the blocks, and what every operator does before it computes.

The kernels compute on a GPU that they proved right on, for the dtypes, ranks and forms that they know; the blocks
everywhere else. Forward, backward, merge and cache all ask here, so that they agree on every sign: other products
might find another one where Q is within rounding of zero.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._warning import warn
from . import blocked, whole
from .blocked import RowSource
from .handle import Handle, source_of
from .reference import Adapter, Factors, Form, parts_of, refuse_trained

SWITCH = "DUAL_LORA_KERNELS"  # "plain" keeps to PyTorch's own operations
OLDEST_TRITON = (3, 4)  # earlier ones take no tuple as a constant
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_RANK = 256
_NOTHING = nullcontext()
_PLAIN = Tensor, Parameter


def implementation(
    device: torch.device,
    dtype: torch.dtype,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    gradient_of: tuple[Tensor | None, Tensor, Tensor | None] | None = None,
) -> ModuleType:
    """`triton_linear`, `blocked` or, for a small weight, `whole`; for x, G or a composed weight of that dtype there.

    gradient_of: dy and x, or None and G, and the gradient scaler's factor, where the factors' gradients are wanted.
    """
    plain = without_kernels(device, weight, adapters)
    if device.type != "cuda":
        return plain
    known = (
        dtype in DTYPES
        and (not isinstance(weight, Tensor) or (weight.dtype in DTYPES and weight.device == device))
        and all(a.factors.A.dtype != torch.float64 for a in adapters)
        and all(max(a.factors.A.shape[-2], a.factors.C.shape[-2]) <= LARGEST_RANK for a in adapters)
        and os.environ.get(SWITCH) != "plain"
    )
    kernels = triton(device) if known else None
    return kernels if kernels is not None and kernels.are_right(dtype, weight, adapters, gradient_of) else plain


def without_kernels(device: torch.device, weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> ModuleType:
    """`blocked`, or `whole` for a weight that is one of its tiles and is there."""
    A, B, *_ = adapters[0].factors
    tile = (blocked.CPU if device.type == "cpu" else blocked.CUDA).tile
    small = A.shape[-1] * B.shape[-2] <= tile and B.ndim == 2 and (weight is None or isinstance(weight, Tensor))
    return whole if small else blocked


def compose(
    weight: Tensor | RowSource | Handle | None,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """W + ΣΔW, [O, I]: the rounding to `dtype` of the fp32 sum, by whom the layer's forward is computed as well.

    `out` may be the weight itself.
    """
    refuse_transforms(None, adapters, weight)
    if isinstance(weight, Handle):
        weight = source_of(weight.number)
    adapters = parts_of(adapters)
    device = adapters[0].scale.device
    with without_autocast(device):
        return implementation(device, dtype, weight, adapters).compose(weight, adapters, dtype, out)


@functools.cache
def triton(device: torch.device) -> ModuleType | None:
    """The Triton path for a GPU; None, with one warning that says why, where it cannot be taken."""
    try:
        kernels, launch = triton_modules()
        launch.target(device)
        return kernels
    except (ImportError, NotImplementedError) as reason:
        warn(
            f"Dual LoRA's Triton kernels are not used on {torch.cuda.get_device_name(device)}: {reason}. PyTorch's own "
            f"operations compute the same, slower; {SWITCH}=plain chooses them without this warning.",
            stacklevel=2,
        )
        return None


def triton_modules() -> tuple[ModuleType, ModuleType]:
    """`triton_linear` and `triton_launch`. Raises ImportError, or NotImplementedError if Triton is too old for them."""
    import triton as installed

    if tuple(int(part) for part in installed.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise NotImplementedError(f"Triton is {installed.__version__}, and they need {oldest} or later")
    from .kernels import launch as triton_launch
    from .kernels import linear as triton_linear

    return triton_linear, triton_launch


def autocast_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """What autocast computes in on this device, or None where it is off (or, as on "meta", does not exist).

    dtype: of the tensor that is asked for; autocast leaves fp64 as it is.
    """
    # Tracing torch 2.6 breaks the graph at the other questions; what can be traced has an autocast.
    compiling = torch.compiler.is_compiling()
    if not (compiling or torch._C._is_any_autocast_enabled()):
        return None
    known = device.type != "meta" and (compiling or torch.amp.is_autocast_available(device.type))
    if dtype == torch.float64 or not known or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """x in the weight's precision, unless autocast chooses one; a quantised or fp8 weight leaves x its own."""
    dtype = weight.dtype
    if x.dtype == dtype:
        return x
    keeps = autocast_dtype(x.device, x.dtype) is not None or not dtype.is_floating_point or dtype.itemsize == 1
    return x if keeps else x.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """P and Q stay fp32 inside; nothing to do on a device that has no autocast."""
    if not torch._C._is_any_autocast_enabled() or not (torch.amp.is_autocast_available(device.type)):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


def nobody_watches() -> bool:
    """Whether nothing wants to see the operator itself: no compiler, no tracer, no mode (fake tensors, selective
    checkpointing, counters of flops), no transform, no forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or _functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all of these are tensors with values, and of no class that sees operators (DTensor, fake tensors)."""
    for t in tensors:  # noqa: SIM110 - a generator costs a call of Python for each tensor
        if t is not None and (type(t) not in _PLAIN or t.is_meta):
            return False
    return True


def refuse_transforms(x: Tensor | None, adapters: Sequence[Adapter], *others: Any) -> None:
    """Raise NotImplementedError for torch.func's transforms, and for a tangent, which would be lost in silence."""
    inside = not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None
    forward = forward_ad._current_level >= 0
    if not (inside or forward):
        return
    own = [*(() if x is None else (x,)), *(f for a in adapters for f in a.factors)]
    rest = [t for t in (*others, *(a.scale for a in adapters)) if isinstance(t, Tensor)]
    # Inside a transform every view is wrapped, that of a weight that nobody differentiates as well.
    transformed = inside and (
        any(map(_functorch.is_functorch_wrapped_tensor, own))
        or any(
            _functorch.is_batchedtensor(t) or (_functorch.is_functorch_wrapped_tensor(t) and t.requires_grad)
            for t in rest
        )
    )
    tensors = own + rest
    if transformed or (forward and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)):
        raise NotImplementedError(
            "Dual LoRA has no forward mode and no rule for torch.func's transforms (grad, vjp, jvp, vmap): its "
            "gradients are those of straight-through estimators, in backward. Use backward() or torch.autograd.grad, "
            "for each sample's gradient in a loop; or merge the adapter first."
        )


def refuse_meta(leading: Tensor, *operands: Tensor | None) -> None:
    """Raise RuntimeError for operands on the meta device where the leading one is not: there is no result."""
    # A handle's number is on the CPU, whatever the weight's device.
    on_meta = any(t is not None and t.ndim and t.device.type == "meta" for t in operands)
    if on_meta and leading.device.type != "meta":
        raise RuntimeError(
            "Dual LoRA got weights or factors on the meta device, which hold no numbers, together with others on "
            f"{leading.device}. If accelerate offloads this model, keep this layer on a device (`device_map`), or "
            "leave it out of `target_modules`; if it was loaded with `low_cpu_mem_usage`, load its weights first."
        )


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    """The backward of every operator's backward: raises RuntimeError."""
    raise RuntimeError(
        "Dual LoRA has no second derivative: Sign and ReLU are trained by straight-through estimators, whose gradient"
        " is not the derivative of anything. Call backward without create_graph=True."
    )


class Flat(NamedTuple):
    """Adapters as `torch.library` takes them: lists of tensors and numbers."""

    factors: list[Tensor]  # four for each
    scales: list[Tensor]
    mean_squares: list[Tensor]  # for the parts of a matrix; for whole ones empty tensors
    forms: list[int]


def flat(adapters: Sequence[Adapter]) -> Flat:
    """Adapters as an operator takes them; `adapters_of` is the inverse. Raises ValueError for a scale that trains."""
    for adapter in adapters:
        refuse_trained(adapter.scale)
    unknown = adapters[0].scale.new_empty(0)
    return Flat(
        [f for a in adapters for f in a.factors],
        [a.scale for a in adapters],
        [unknown if a.mean_square is None else a.mean_square for a in adapters],
        [a.form.code for a in adapters],
    )


def adapters_of(
    factors: Sequence[Tensor], scales: Sequence[Tensor], mean_squares: Sequence[Tensor], forms: Sequence[int]
) -> list[Adapter]:
    """The adapters that an operator got as flat lists."""
    fours = (Factors(*factors[k : k + 4]) for k in range(0, len(factors), 4))
    return [
        Adapter(four, scale, Form.from_code(form), known if known.numel() else None)
        for four, scale, known, form in zip(fours, scales, mean_squares, forms, strict=True)
    ]


def flat_gradients(grads: Sequence[Factors], adapters: Sequence[Adapter]) -> list[Tensor]:
    """The adapters' gradients in a row, each in its factor's dtype."""
    return [
        g if g.dtype == f.dtype else g.to(f.dtype)
        for four, a in zip(grads, adapters, strict=True)
        for g, f in zip(four, a.factors, strict=True)
    ]


def wanted(needed: Sequence[bool], compute: Callable[[], Iterable[Tensor]]) -> list[Tensor | None]:
    """Gradients as autograd takes them, None where none is needed; nothing is computed if none is."""
    if not any(needed):
        return [None for _ in needed]
    return [g if need else None for g, need in zip(compute(), needed, strict=True)]
