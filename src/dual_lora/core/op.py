"""The public operator y = x (W + ΣΔW)ᵀ + bias: schema, fake, backward, dispatch.

`torch.ops.dual_lora.linear` keeps x, W and the factors for backward, and no other tensor of the weight's size. It is
opaque to torch.compile on purpose: its blocks are the optimisation.

`torch.ops.dual_lora.through_rows` gives a foreign y = x Wᵀ the gradient dx = dy W, for quantised layers whose own
forward has no backward (int8 activations).

Eager mode calls the same two functions from a plain `torch.autograd.Function`: a registered operator with lists of
tensors costs some 200 µs of Python a layer, more than a layer takes on a GPU below T = 2048.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, tokens
from .blocked import Needs, RowSource
from .dispatch import are_plain_tensors, runs_eagerly
from .handle import Handle, handle, source_of
from .reference import Adapter, Factors, check_factors, parts_of
from .tokens import EXACT

ROW_BLOCK = 1 << 19  # entries of W that `through_rows` reads at a time

# `weight` is a matrix, or a handle's number: then nothing dequantised is kept.
_ADAPTERS = "Tensor[] factors, Tensor[] scales, Tensor[] mean_squares, int[] forms, Tensor? loss_scale, float share"
torch.library.define("dual_lora::linear", f"(Tensor x, Tensor? weight, Tensor? bias, {_ADAPTERS}) -> Tensor")
torch.library.define(
    "dual_lora::linear_backward",
    f"(Tensor dy, Tensor x, Tensor? weight, {_ADAPTERS}, Tensor? draw, bool need_x, bool need_weight,"
    " bool need_factors) -> Tensor[]",
)


def dual_lora_linear(
    x: Tensor,
    weight: Tensor | RowSource | Handle | None,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
    share: float = EXACT,
) -> Tensor:
    """Compute y = x (W + ΣΔW)ᵀ + bias, x [..., I] -> y [..., O], for one or more adapters.

    weight: [O, I], any floating dtype and strides; a RowSource for a quantised weight, or under torch.compile a handle
        for one; None for the adapters' share.
    adapters: factors (kept in fp32), scale s = λα/√(r1 r2) as a 0-dim tensor, form.
    loss_scale: 0-dim tensor, the gradient scaler's present factor (only the "clip" estimator looks at it).
    share: the share of the tokens that the factors' gradients are estimated from (`tokens`). EXACT: all tokens. AUTO:
        as few as the variance allows. A sample draws one number from torch's generator in backward. An x of three
        dimensions is a batch of sequences.

    Computes in x's dtype, or in autocast's where that is on; P and Q are always fp32, and W + ΔW is rounded once.
    Raises ValueError for shapes that do not fit, TypeError for an x that is no floating tensor, RuntimeError on
    double backward, NotImplementedError under torch.func's transforms and in forward mode.
    """
    if not adapters:
        raise ValueError("dual_lora_linear got no adapter: pass at least one, or use torch.nn.functional.linear.")
    A, B, *_ = adapters[0].factors
    O, I = (B.shape[0], A.shape[1]) if weight is None else weight.shape
    check_factors(adapters, O, I)
    adapters = parts_of(adapters)
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}, expected a floating dtype: W + ΔW is composed in it.")
    if x.shape[-1] != I:
        raise ValueError(f"The last dimension of x is {x.shape[-1]}, but the weight [{O}, {I}] takes {I}.")
    if not (weight is None or isinstance(weight, Tensor)):
        if not isinstance(weight, Handle):
            source = weight
            weight = handle(lambda: source, source.shape)
        weight = weight.number
    factors = [f for a in adapters for f in a.factors]
    direct = runs_eagerly() and are_plain_tensors(x, weight, bias, loss_scale, *factors)
    if not direct:
        dispatch.refuse_transforms(x, adapters, weight, bias, loss_scale)
    if not direct or torch._C._is_any_autocast_enabled():
        autocast = dispatch.autocast_dtype(x.device, x.dtype)
        if autocast is not None:
            x = x.to(autocast)
            bias = None if bias is None else bias.to(x.dtype)
    if not direct:
        return torch.ops.dual_lora.linear(x, weight, bias, *dispatch.flat(adapters), loss_scale, share)
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, loss_scale, share, adapters, *factors)
    return _linear(x, weight, bias, adapters)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


# Forward and backward. Autocast is off inside, so that P and Q stay fp32.


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    with dispatch.without_autocast(x.device):
        source = weight if weight is None or weight.ndim else source_of(weight)  # a handle's number has no dimension
        y: Tensor = dispatch.implementation(x.device, x.dtype, source, adapters).forward(_rows(x), source, adapters)
        if bias is not None:
            y += bias
        # Not a view, because nn.ReLU(inplace=True) may follow.
        return y if x.ndim == 2 else y.resize_(*x.shape[:-1], y.shape[-1])


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    share: float,
    draw: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
    """Return dx, dW and the factors' gradients as one list."""
    with dispatch.without_autocast(x.device):
        source = weight if weight is None or weight.ndim else source_of(weight)
        dy, rows = _rows(dy), _rows(x)
        sampled = None if draw is None else tokens.gradient_rows(dy, rows, len(x) if x.ndim > 2 else 1, share, draw)
        used = tokens.nonzero_rows(dy)
        if used is not None:
            dy, rows = dy[used], rows[used]
        G_rows = sampled or (dy, rows)
        of = (*G_rows, loss_scale) if needs.factors else None
        computes = dispatch.implementation(x.device, x.dtype, source, adapters, of)
        dx, dW, dF = computes.backward(dy, rows, source, adapters, loss_scale, needs, G_rows)
    if dx is not None and used is not None:
        dx = x.new_zeros(x.numel() // x.shape[-1], x.shape[-1]).index_copy_(0, used, dx)
    if dx is not None and x.ndim != 2:
        dx = dx.view(x.shape)
    if dW is not None and weight is not None:
        dW = dW.to(weight.dtype)
    return dx, dW, None if dF is None else dispatch.flat_gradients(dF, adapters)


# The registered operators, which take lists of tensors. "default" covers devices without kernels here (mps, xpu …) too.


@torch.library.impl("dual_lora::linear", "default")
def _(x, weight, bias, factors, scales, mean_squares, forms, loss_scale, share):
    return _linear(x, weight, bias, dispatch.adapters_of(factors, scales, mean_squares, forms))


@torch.library.impl("dual_lora::linear_backward", "default")
def _(dy, x, weight, factors, scales, mean_squares, forms, loss_scale, share, draw, need_x, need_weight, need_factors):
    adapters = dispatch.adapters_of(factors, scales, mean_squares, forms)
    needs = Needs(need_x, need_weight, need_factors)
    dx, dW, dF = _linear_backward(dy, x, weight, adapters, loss_scale, share, draw, needs)
    return [t for t in (dx, dW, *(dF or ())) if t is not None]


@torch.library.register_fake("dual_lora::linear")
def _(x, weight, bias, factors, scales, mean_squares, forms, loss_scale, share):
    dispatch.refuse_meta(x, weight, *factors)
    return x.new_empty(*x.shape[:-1], factors[1].shape[0])


@torch.library.register_fake("dual_lora::linear_backward")
def _(dy, x, weight, factors, scales, mean_squares, forms, loss_scale, share, draw, need_x, need_weight, need_factors):
    like = [x] * need_x + [weight] * need_weight + [*factors] * need_factors
    return [t.new_empty(t.shape) for t in like]


def _setup(ctx, inputs, output):
    x, weight, bias, factors, scales, mean_squares, forms, loss_scale, share = inputs
    _keep(ctx, x, weight, bias, loss_scale, share, dispatch.adapters_of(factors, scales, mean_squares, forms))


def _keep(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, loss_scale: Any, share: float, adapters: Any
) -> None:
    # Operator and eager function save in the same order: checkpointing may run one in forward, the other in backward.
    kept, ctx.forms, ctx.share = [x, weight], [], share
    for factors, scale, form, mean_square in adapters:
        kept += *factors, scale, mean_square
        ctx.forms.append(form)
    ctx.save_for_backward(*kept)
    ctx.loss_scale = loss_scale  # not saved: its value is that of the backward pass
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(
    ctx: Any, dy: Tensor, need_x: bool, need_weight: bool, need_bias: bool, need_factors: Sequence[bool]
) -> tuple[Any, ...]:
    """Return dx, dW, dbias and the factors' gradients; None where no gradient is needed."""
    x, weight, *kept = ctx.saved_tensors
    dx: Any = None
    dW: Any = None
    dF: Any = None
    db: Any = None
    needs = Needs(need_x, need_weight, True in need_factors)
    if True in needs:
        adapters = [
            Adapter(Factors(*kept[i : i + 4]), kept[i + 4], form, kept[i + 5])
            for i, form in zip(range(0, len(kept), 6), ctx.forms, strict=True)
        ]
        sampling = needs.factors and not needs.weight and ctx.share != EXACT
        draw = torch.rand((), device=x.device) if sampling else None
        # With create_graph=True the operator's own backward raises the error for a second derivative.
        if runs_eagerly() and not torch.is_grad_enabled() and are_plain_tensors(dy, x, weight):
            dx, dW, dF = _linear_backward(dy, x, weight, adapters, ctx.loss_scale, ctx.share, draw, needs)
        else:
            given = dy, x, weight, *dispatch.flat(adapters), ctx.loss_scale, ctx.share, draw, *needs
            out = iter(torch.ops.dual_lora.linear_backward(*given))
            dx, dW = next(out) if needs.x else None, next(out) if needs.weight else None
            dF = list(out)
    if need_bias:
        db = _rows(dy).sum(0).to(ctx.bias_dtype)
    if dF is None or False in need_factors:
        dF = dispatch.needed_gradients(need_factors, lambda: dF or ())
    return dx, dW, db, dF


def _backward(ctx, dy):
    need_x, need_weight, need_bias, need_factors, *_ = ctx.needs_input_grad
    n = [None] * len(ctx.forms)
    return *_gradients(ctx, dy, need_x, need_weight, need_bias, need_factors), n, n, None, None, None


torch.library.register_autograd("dual_lora::linear", _backward, setup_context=_setup)
torch.library.register_autograd("dual_lora::linear_backward", dispatch.refuse_double_backward)


class _Linear(torch.autograd.Function):
    """The operator without the dispatcher: the same computation, the same saved tensors, the same gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, loss_scale, share, adapters, *factors):
        _keep(ctx, x, weight, bias, loss_scale, share, adapters)
        return _linear(x, weight, bias, adapters)

    @staticmethod
    def backward(ctx, dy):
        need_x, need_weight, need_bias, _, _, _, *need_factors = ctx.needs_input_grad
        dx, dW, db, dF = _gradients(ctx, dy, need_x, need_weight, need_bias, need_factors)
        return dx, dW, db, None, None, None, *dF


# `Function.apply` without its preparation for torch.func's transforms, of which none is active here.
_apply = super(torch.autograd.Function, _Linear).apply


torch.library.define("dual_lora::through_rows", "(Tensor x, Tensor y, Tensor weight) -> Tensor")
torch.library.define("dual_lora::through_rows_backward", "(Tensor dy, Tensor weight, int I) -> Tensor")


def through_rows(x: Tensor, y: Tensor, weight: Handle) -> Tensor:
    """Return y [..., O], which was computed without a gradient, with the gradient dy W for x [..., I]."""
    return torch.ops.dual_lora.through_rows(x, y, weight.number)


@torch.library.impl("dual_lora::through_rows", "default")
def _through_rows(x, y, weight):
    return y.clone()


@torch.library.impl("dual_lora::through_rows_backward", "default")
def _through_rows_backward(dy, weight, I):
    source = source_of(weight)
    O, rows = dy.shape[-1], _rows(dy)
    dx = torch.zeros(rows.shape[0], I, dtype=torch.float32, device=dy.device)
    step = max(ROW_BLOCK // I, 16)
    for start in range(0, O, step):
        W = source.rows(start, min(start + step, O))
        dx += rows[:, start : start + step] @ W.to(dy.dtype)
    return dx.to(dy.dtype).view(*dy.shape[:-1], I)


@torch.library.register_fake("dual_lora::through_rows")
def _(x, y, weight):
    return torch.empty_like(y)


@torch.library.register_fake("dual_lora::through_rows_backward")
def _(dy, weight, I):
    return dy.new_empty(*dy.shape[:-1], I)


def _keep_rows(ctx, inputs, output):
    x, _, weight = inputs
    ctx.save_for_backward(weight)
    ctx.I = x.shape[-1]


def _through_rows_gradient(ctx, dy):
    return torch.ops.dual_lora.through_rows_backward(dy, *ctx.saved_tensors, ctx.I), None, None


torch.library.register_autograd("dual_lora::through_rows", _through_rows_gradient, setup_context=_keep_rows)
torch.library.register_autograd("dual_lora::through_rows_backward", dispatch.refuse_double_backward)
