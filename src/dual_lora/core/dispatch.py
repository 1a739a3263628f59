"""Choose between the Triton kernels and the blocks, and check what every operator checks before it computes.

The kernels compute on a GPU on which they passed their check, for the dtypes, ranks and forms that they know; the
blocks compute everywhere else. Forward, backward, merge and cache all choose here, so that they agree on every sign:
another product might give another sign where Q is within rounding of zero.
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
from . import blocked, stacked, whole
from .blocked import RowSource
from .handle import Handle, source_of
from .reference import Adapter, Factors, Form, parts_of, refuse_trained
from .traced import is_transformed

SWITCH = "DUAL_LORA_KERNELS"  # "plain" keeps to PyTorch's own operations
OLDEST_TRITON = (3, 4)  # earlier ones take no tuple as a constant
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_RANK = 256
_NO_CONTEXT = nullcontext()
_PLAIN_TYPES = Tensor, Parameter


def implementation(
    device: torch.device,
    dtype: torch.dtype,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    gradient_of: tuple[Tensor | None, Tensor, Tensor | None] | None = None,
) -> ModuleType:
    """Choose the module that computes: `kernels.linear`, `blocked`, for a small weight `whole`, for experts `stacked`.

    device, dtype: of x, of G, or of the composed weight.
    gradient_of: dy and x (or None and G) and the gradient scaler's factor, where the factors' gradients are needed.
    """
    plain = stacked if adapters[0].factors.B.ndim == 3 else whole if whole.fits(weight, adapters) else blocked
    if device.type != "cuda":
        return plain
    known = (
        dtype in DTYPES
        and (not isinstance(weight, Tensor) or (weight.dtype in DTYPES and weight.device == device))
        and all(a.factors.A.dtype != torch.float64 for a in adapters)
        and all(max(a.factors.A.shape[-2], a.factors.C.shape[-2]) <= LARGEST_RANK for a in adapters)
        and os.environ.get(SWITCH) != "plain"
    )
    kernels = triton_kernels(device) if known else None
    return kernels if kernels is not None and kernels.are_correct(dtype, weight, adapters, gradient_of) else plain


def compose(
    weight: Tensor | RowSource | Handle | None,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Compose W + ΣΔW, [O, I]: the fp32 sum, rounded to `dtype`, by the implementation that forward uses too.

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
def triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the Triton implementation for a GPU, or None, with one warning that says why it cannot be used."""
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
    """Import `kernels.linear` and `kernels.launch`. Raises ImportError, or NotImplementedError if Triton is too old."""
    import triton as installed

    if tuple(int(part) for part in installed.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise NotImplementedError(f"Triton is {installed.__version__}, and they need {oldest} or later")
    from .kernels import launch as triton_launch
    from .kernels import linear as triton_linear

    return triton_linear, triton_launch


def autocast_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype | None:
    """Return the dtype that autocast computes in on this device, or None where it is off (or, as on "meta", missing).

    dtype: of the tensor that would be cast; autocast leaves fp64 as it is.
    """
    # Under torch.compile, torch 2.6 breaks the graph at the other calls; a device that can be traced has an autocast.
    compiling = torch.compiler.is_compiling()
    if not (compiling or torch._C._is_any_autocast_enabled()):
        return None
    known = device.type != "meta" and (compiling or torch.amp.is_autocast_available(device.type))
    if dtype == torch.float64 or not known or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """Cast x to the weight's dtype, unless autocast is on, or the weight is quantised or fp8."""
    dtype = weight.dtype
    if x.dtype == dtype:
        return x
    keeps = autocast_dtype(x.device, x.dtype) is not None or not dtype.is_floating_point or dtype.itemsize == 1
    return x if keeps else x.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, so that P and Q are fp32. Does nothing on a device that has no autocast."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device.type):
        return _NO_CONTEXT
    return torch.autocast(device.type, enabled=False)


def runs_eagerly() -> bool:
    """Whether the operator may be bypassed: no compiler, tracer, dispatch mode (fake tensors, selective checkpointing,
    flop counters), functional transform or forward-mode AD is active."""
    return not (
        torch.compiler.is_compiling()  # these five are asked in every pass, hence no functions of ours
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or _functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def are_plain_tensors(*tensors: Tensor | None) -> bool:
    """Whether all of these are ordinary tensors with values: not on "meta", and of no subclass (DTensor, fake)."""
    for t in tensors:  # noqa: SIM110 - a generator costs a call of Python for each tensor
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta):
            return False
    return True


def refuse_transforms(x: Tensor | None, adapters: Sequence[Adapter], *others: Any) -> None:
    """Raise NotImplementedError for torch.func's transforms and forward-mode tangents, which would be ignored."""
    inside = is_transformed()
    forward = forward_ad._current_level >= 0
    if not (inside or forward):
        return
    own = [*(() if x is None else (x,)), *(f for a in adapters for f in a.factors)]
    rest = [t for t in (*others, *(a.scale for a in adapters)) if isinstance(t, Tensor)]
    # Inside a transform every view is wrapped, even one of a weight that is not differentiated.
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
    """Raise RuntimeError for operands on the meta device whose leading operand is on another one."""
    # A handle's number is on the CPU, whatever the weight's device.
    on_meta = any(t is not None and t.ndim and t.device.type == "meta" for t in operands)
    if on_meta and leading.device.type != "meta":
        raise RuntimeError(
            "Dual LoRA got weights or factors on the meta device, which hold no numbers, together with others on "
            f"{leading.device}. If accelerate offloads this model, keep this layer on a device (`device_map`), or "
            "leave it out of `target_modules`; if it was loaded with `low_cpu_mem_usage`, load its weights first."
        )


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    """Raise RuntimeError: the registered backward of every backward operator."""
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

    @classmethod
    def of_saved(cls, tensors: Sequence[Tensor], forms: list[int]) -> "Flat":
        """Cut the tensors that an operator's forward saved, list after list, into their lists again."""
        n = len(forms)
        return cls([*tensors[: 4 * n]], [*tensors[4 * n : 5 * n]], [*tensors[5 * n :]], forms)


def flat(adapters: Sequence[Adapter]) -> Flat:
    """Flatten adapters for an operator; `adapters_of` is the inverse. Raises ValueError for a scale that trains."""
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
    """Rebuild adapters from an operator's flat lists."""
    fours = (Factors(*factors[k : k + 4]) for k in range(0, len(factors), 4))
    return [
        Adapter(four, scale, Form.from_code(form), known if known.numel() else None)
        for four, scale, known, form in zip(fours, scales, mean_squares, forms, strict=True)
    ]


def flat_gradients(grads: Sequence[Factors], adapters: Sequence[Adapter]) -> list[Tensor]:
    """Flatten the adapters' gradients into one list, each in its factor's dtype."""
    return [
        g if g.dtype == f.dtype else g.to(f.dtype)
        for four, a in zip(grads, adapters, strict=True)
        for g, f in zip(four, a.factors, strict=True)
    ]


def needed_gradients(needed: Sequence[bool], compute: Callable[[], Iterable[Tensor]]) -> list[Tensor | None]:
    """Return the computed gradients, with None where none is needed; computes nothing if none is needed."""
    if not any(needed):
        return [None for _ in needed]
    return [g if need else None for g, need in zip(compute(), needed, strict=True)]
