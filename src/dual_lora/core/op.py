"""The public operator y = x (W + ΣΔW)ᵀ + bias: schema, fake, backward, dispatch.

`torch.ops.dual_lora.linear` keeps x, W and the factors for backward and nothing of the weight's size. It is opaque to
torch.compile, which is meant: its blocks are the optimisation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import blocked
from .blocked import Adapter, Needs, RowSource
from .reference import Factors, Form
from .ticket import Ticket, source_of, ticket

# `weight` is a matrix, or a ticket's number: then nothing dequantised is kept.
torch.library.define(
    "dual_lora::linear",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor[] factors, Tensor[] scales, int[] forms, Tensor? loss_scale)"
    " -> Tensor",
)
torch.library.define(
    "dual_lora::linear_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor[] factors, Tensor[] scales, int[] forms, Tensor? loss_scale,"
    " bool need_x, bool need_weight, bool need_factors) -> Tensor[]",
)


def dual_lora_linear(
    x: Tensor,
    weight: Tensor | RowSource | Ticket | None,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
) -> Tensor:
    """y = x (W + ΣΔW)ᵀ + bias, x [..., I] -> y [..., O], for one or more adapters.

    weight: [O, I], any floating dtype and strides; a RowSource for a quantised weight, or under torch.compile a ticket
        for one; None for the adapters' share.
    adapters: factors (kept in fp32), scale s = λα/√(r1 r2) as a 0-dim tensor, form.
    loss_scale: 0-dim tensor, the gradient scaler's present factor (only the "clip" estimator looks at it).

    Computes in x's dtype, or in autocast's where that is on; P and Q are always fp32, and W + ΔW is rounded once.
    Raises ValueError for shapes that do not fit, RuntimeError on double backward, NotImplementedError under
    torch.func's transforms and in forward mode.
    """
    if not adapters:
        raise ValueError("dual_lora_linear got no adapter: pass at least one, or use torch.nn.functional.linear.")
    _check_shapes(x, weight, adapters)
    refuse_transforms(x, adapters)
    autocast = autocast_dtype(x.device)
    if autocast is not None:
        x = x.to(autocast)
        bias = None if bias is None else bias.to(x.dtype)
    factors = [f for a in adapters for f in a.factors]
    scales = [a.scale for a in adapters]
    forms = [a.form.code for a in adapters]
    if not (weight is None or isinstance(weight, Tensor)):
        if not isinstance(weight, Ticket):
            weight = ticket(partial(_itself, weight), weight.shape)
        weight = weight.number
    return torch.ops.dual_lora.linear(x, weight, bias, factors, scales, forms, loss_scale)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device, or None where it is off (or, as on "meta", does not exist)."""
    # Tracing torch 2.6 breaks the graph at the second question; what can be traced has an autocast.
    known = device.type != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type))
    if not known or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """P and Q stay fp32 inside; nothing to do on a device that has no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def refuse_transforms(x: Tensor | None, adapters: Sequence[Adapter]) -> None:
    """Raise NotImplementedError for torch.func's transforms, and for a tangent, which would be lost in silence."""
    inside = not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None
    forward = forward_ad._current_level >= 0
    if not (inside or forward):
        return
    tensors = [*(() if x is None else (x,)), *(f for a in adapters for f in a.factors)]
    transformed = inside and any(map(_functorch.is_functorch_wrapped_tensor, tensors))
    if transformed or (forward and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)):
        raise NotImplementedError(
            "Dual LoRA has no forward mode and no rule for torch.func's transforms (grad, vjp, jvp, vmap): its "
            "gradients are those of straight-through estimators, in backward. Use backward() or torch.autograd.grad, "
            "for each sample's gradient in a loop; or merge the adapter first."
        )


def _itself(source: RowSource) -> RowSource:
    return source


def _check_shapes(x: Tensor, weight: Tensor | RowSource | Ticket | None, adapters: Sequence[Adapter]) -> None:
    first = adapters[0].factors
    O, I = (first.B.shape[0], first.A.shape[1]) if weight is None else weight.shape
    for (A, B, C, D), _, _ in adapters:
        r1, r2 = A.shape[0], C.shape[0]
        expected = {"A": (r1, I), "B": (O, r1), "C": (r2, I), "D": (O, r2)}
        received = {name: tuple(f.shape) for name, f in zip("ABCD", (A, B, C, D), strict=True)}
        if received != expected:
            raise ValueError(f"Factors of shapes {received} do not fit a weight [{O}, {I}]: expected {expected}.")
        if x.shape[-1] != I:
            raise ValueError(f"The last dimension of x is {x.shape[-1]}, but the weight [{O}, {I}] takes {I}.")


def _adapters(factors: Sequence[Tensor], scales: Sequence[Tensor], forms: Sequence[int]) -> list[Adapter]:
    return [
        Adapter(Factors(*factors[4 * k : 4 * k + 4]), scale, Form.from_code(form))
        for k, (scale, form) in enumerate(zip(scales, forms, strict=True))
    ]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@functools.cache
def _triton() -> ModuleType | None:
    """The Triton path, or None without Triton 3.3 or later (older ones do not take tuples of tensors)."""
    try:
        import triton

        from . import triton_linear
    except ImportError:
        return None
    return triton_linear if [int(part) for part in triton.__version__.split(".")[:2]] >= [3, 3] else None


def _opened(weight: Tensor | None) -> Tensor | RowSource | None:
    """The weight, or the one that a ticket's number stands for."""
    return weight if weight is None or weight.ndim else source_of(weight)


def _implementation(x: Tensor, weight: Tensor | RowSource | None, adapters: list[Adapter]) -> ModuleType:
    """Who computes: the Triton kernels on a GPU that they are right on, the blocks everywhere else."""
    triton = _triton() if x.is_cuda and (weight is None or isinstance(weight, Tensor)) else None
    return triton if triton is not None and triton.takes(x, weight, adapters) else blocked


# Forward and backward for every device; "default" takes in those that this package has no kernels for (mps, xpu …) and
# that take the blocks. Autocast is off inside, so that P and Q stay fp32.


@torch.library.impl("dual_lora::linear", "default")
def _linear(x, weight, bias, factors, scales, forms, loss_scale):
    with without_autocast(x.device):
        adapters, weight = _adapters(factors, scales, forms), _opened(weight)
        y = _implementation(x, weight, adapters).forward(_rows(x), weight, adapters)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], y.shape[-1])


@torch.library.impl("dual_lora::linear_backward", "default")
def _linear_backward(dy, x, weight, factors, scales, forms, loss_scale, need_x, need_weight, need_factors):
    adapters = _adapters(factors, scales, forms)
    needs = Needs(need_x, need_weight, need_factors)
    with without_autocast(x.device):
        source = _opened(weight)
        implementation = _implementation(x, source, adapters)
        grads = implementation.backward(_rows(dy), _rows(x), source, adapters, loss_scale, needs)
    out = []
    if grads.x is not None:
        out.append(grads.x.view(x.shape))
    if grads.weight is not None:
        out.append(grads.weight.to(weight.dtype))
    if grads.factors is not None:
        out += [g.to(f.dtype) for g, f in zip((g for four in grads.factors for g in four), factors, strict=True)]
    return out


def refuse_meta(leading: Tensor, *operands: Tensor | None) -> None:
    """Raise RuntimeError for operands on the meta device beside a leading one that is not: there is no result."""
    # A ticket's number is on the CPU, whatever the weight's device.
    on_meta = any(t is not None and t.ndim and t.device.type == "meta" for t in operands)
    if on_meta and leading.device.type != "meta":
        raise RuntimeError(
            "Dual LoRA got weights or factors on the meta device, which hold no numbers, together with others on "
            f"{leading.device}. If accelerate offloads this model, keep this layer on a device (`device_map`), or "
            "leave it out of `target_modules`; if it was loaded with `low_cpu_mem_usage`, load its weights first."
        )


@torch.library.register_fake("dual_lora::linear")
def _(x, weight, bias, factors, scales, forms, loss_scale):
    refuse_meta(x, weight, *factors)
    return x.new_empty(*x.shape[:-1], factors[1].shape[0])


@torch.library.register_fake("dual_lora::linear_backward")
def _(dy, x, weight, factors, scales, forms, loss_scale, need_x, need_weight, need_factors):
    out = [x.new_empty(x.shape)] if need_x else []
    if need_weight:
        out.append(weight.new_empty(weight.shape))
    if need_factors:
        out += [f.new_empty(f.shape) for f in factors]
    return out


def _setup(ctx, inputs, output):
    x, weight, bias, factors, scales, forms, loss_scale = inputs
    ctx.save_for_backward(x, weight, loss_scale, *factors, *scales)
    ctx.forms, ctx.bias_dtype = forms, None if bias is None else bias.dtype


def _backward(ctx, dy):
    need_x, need_weight, need_bias, need_factors, *_ = ctx.needs_input_grad
    x, weight, loss_scale, *rest = ctx.saved_tensors
    n = len(ctx.forms)
    factors, scales = list(rest[: 4 * n]), list(rest[4 * n :])
    needs = bool(need_x), bool(need_weight), any(need_factors)
    out = iter(
        torch.ops.dual_lora.linear_backward(dy, x, weight, factors, scales, ctx.forms, loss_scale, *needs)
        if any(needs)
        else ()
    )
    dx = next(out) if needs[0] else None
    dW = next(out) if needs[1] else None
    db = _rows(dy).sum(0).to(ctx.bias_dtype) if need_bias else None
    dF = [g if wanted else None for g, wanted in zip(out, need_factors, strict=True)] if needs[2] else [None] * 4 * n
    return dx, dW, db, dF, [None] * n, None, None


torch.library.register_autograd("dual_lora::linear", _backward, setup_context=_setup)


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "Dual LoRA has no second derivative: Sign and ReLU are trained by straight-through estimators, whose gradient"
        " is not the derivative of anything. Call backward without create_graph=True."
    )


torch.library.register_autograd("dual_lora::linear_backward", _refuse_double_backward)
