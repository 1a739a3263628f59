"""The public operator y = x (W + ΣΔW)ᵀ + bias: schema, fake, backward, dispatch.

`torch.ops.dual_lora.linear` keeps x, W and the factors for backward and nothing of the weight's size. It is opaque to
torch.compile, which is meant: its blocks are the optimisation.

`torch.ops.dual_lora.through_rows` gives a foreign y = x Wᵀ the gradient dx = dy W, for quantised layers whose own
forward has no backward (int8 activations).

Eager mode calls the same two functions from a plain `torch.autograd.Function`: a registered operator with lists of
tensors costs some 200 µs of Python a layer, which is longer than a layer takes on a GPU below T = 2048.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import Parameter

from . import dispatch
from .blocked import Needs, RowSource
from .handle import Handle, handle, source_of
from .reference import Adapter, check_factors

_PLAIN = Tensor, Parameter
ROW_BLOCK = 1 << 19  # entries of W that `through_rows` reads at a time

# `weight` is a matrix, or a handle's number: then nothing dequantised is kept.
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
    weight: Tensor | RowSource | Handle | None,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
) -> Tensor:
    """y = x (W + ΣΔW)ᵀ + bias, x [..., I] -> y [..., O], for one or more adapters.

    weight: [O, I], any floating dtype and strides; a RowSource for a quantised weight, or under torch.compile a handle
        for one; None for the adapters' share.
    adapters: factors (kept in fp32), scale s = λα/√(r1 r2) as a 0-dim tensor, form.
    loss_scale: 0-dim tensor, the gradient scaler's present factor (only the "clip" estimator looks at it).

    Computes in x's dtype, or in autocast's where that is on; P and Q are always fp32, and W + ΔW is rounded once.
    Raises ValueError for shapes that do not fit, TypeError for an x that is no floating tensor, RuntimeError on
    double backward, NotImplementedError under torch.func's transforms and in forward mode.
    """
    if not adapters:
        raise ValueError("dual_lora_linear got no adapter: pass at least one, or use torch.nn.functional.linear.")
    first = adapters[0].factors
    O, I = (first.B.shape[0], first.A.shape[1]) if weight is None else weight.shape
    check_factors(adapters, O, I)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected a floating dtype: W + ΔW is composed in it.")
    if x.shape[-1] != I:
        raise ValueError(f"The last dimension of x is {x.shape[-1]}, but the weight [{O}, {I}] takes {I}.")
    dispatch.refuse_transforms(x, adapters, weight, bias, loss_scale)
    autocast = dispatch.autocast_dtype(x.device, x.dtype)
    if autocast is not None:
        x = x.to(autocast)
        bias = None if bias is None else bias.to(x.dtype)
    factors, scales, forms = dispatch.flat(adapters)
    if not (weight is None or isinstance(weight, Tensor)):
        if not isinstance(weight, Handle):
            source = weight
            weight = handle(lambda: source, source.shape)
        weight = weight.number
    if nobody_watches() and are_plain(x, weight, bias, loss_scale, *factors):
        if torch.is_grad_enabled():
            return _Linear.apply(x, weight, bias, loss_scale, forms, *factors, *scales)
        return _linear(x, weight, bias, factors, scales, forms, loss_scale)
    return torch.ops.dual_lora.linear(x, weight, bias, factors, scales, forms, loss_scale)


def nobody_watches() -> bool:
    """Whether nothing wants to see the operator itself: no compiler, no tracer, no mode (fake tensors, selective
    checkpointing, counters of flops), no transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or _functorch.peek_interpreter_stack()
    )


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether all of these are tensors with values, and of no class that sees operators (DTensor, fake tensors)."""
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _opened(weight: Tensor | None) -> Tensor | RowSource | None:
    """The weight, or the one that a handle's number stands for."""
    return weight if weight is None or weight.ndim else source_of(weight)


# Forward and backward for every device; "default" takes in those that this package has no kernels for (mps, xpu …) and
# that take the blocks. Autocast is off inside, so that P and Q stay fp32.


def _linear(x, weight, bias, factors, scales, forms, loss_scale):
    with dispatch.without_autocast(x.device):
        adapters, weight = dispatch.adapters_of(factors, scales, forms), _opened(weight)
        y = dispatch.implementation(x.device, x.dtype, weight, adapters).forward(_rows(x), weight, adapters)
        if bias is not None:
            y += bias
        return y.resize_(*x.shape[:-1], y.shape[-1])  # no view: nn.ReLU(inplace=True) may follow


def _linear_backward(dy, x, weight, factors, scales, forms, loss_scale, need_x, need_weight, need_factors):
    adapters = dispatch.adapters_of(factors, scales, forms)
    needs = Needs(need_x, need_weight, need_factors)
    with dispatch.without_autocast(x.device):
        source, dy, rows = _opened(weight), _rows(dy), _rows(x)
        of = (dy, rows, loss_scale) if need_factors else None
        computes = dispatch.implementation(x.device, x.dtype, source, adapters, of)
        grads = computes.backward(dy, rows, source, adapters, loss_scale, needs)
    out = []
    if grads.x is not None:
        out.append(grads.x.view(x.shape))
    if grads.weight is not None:
        out.append(grads.weight.to(weight.dtype))
    if grads.factors is not None:
        out += dispatch.flat_gradients(grads.factors, factors)
    return out


torch.library.impl("dual_lora::linear", "default", _linear)
torch.library.impl("dual_lora::linear_backward", "default", _linear_backward)


@torch.library.register_fake("dual_lora::linear")
def _(x, weight, bias, factors, scales, forms, loss_scale):
    dispatch.refuse_meta(x, weight, *factors)
    return x.new_empty(*x.shape[:-1], factors[1].shape[0])


@torch.library.register_fake("dual_lora::linear_backward")
def _(dy, x, weight, factors, scales, forms, loss_scale, need_x, need_weight, need_factors):
    like = [x] * need_x + [weight] * need_weight + [*factors] * need_factors
    return [t.new_empty(t.shape) for t in like]


def _setup(ctx, inputs, output):
    x, weight, bias, factors, scales, forms, loss_scale = inputs
    _keep(ctx, x, weight, bias, loss_scale, forms, (*factors, *scales))


def _keep(ctx, x, weight, bias, loss_scale, forms, tensors):
    # One order for both ways: gradient checkpointing may see one in forward and the other when it computes again.
    ctx.save_for_backward(x, weight, loss_scale, *tensors)
    ctx.forms, ctx.bias_dtype = forms, None if bias is None else bias.dtype


def _backward(ctx, dy):
    need_x, need_weight, need_bias, need_factors, *_ = ctx.needs_input_grad
    dx, dW, db, *dF = _gradients(ctx, dy, need_x, need_weight, need_bias, need_factors)
    return dx, dW, db, dF, [None] * len(ctx.forms), None, None


def _gradients(ctx, dy, need_x, need_weight, need_bias, need_factors):
    """dx, dW, dbias and the factors' gradients in a row; None where no gradient is wanted."""
    x, weight, loss_scale, *rest = ctx.saved_tensors
    n = 4 * len(ctx.forms)
    needs = bool(need_x), bool(need_weight), any(need_factors)
    out: Iterator[Tensor] = iter(())
    if any(needs):
        # With create_graph=True the operator's own backward raises the error for a second derivative.
        direct = nobody_watches() and not torch.is_grad_enabled() and are_plain(dy, x, weight)
        function = _linear_backward if direct else torch.ops.dual_lora.linear_backward
        out = iter(function(dy, x, weight, rest[:n], rest[n:], ctx.forms, loss_scale, *needs))
    dx = next(out) if needs[0] else None
    dW = next(out) if needs[1] else None
    db = _rows(dy).sum(0).to(ctx.bias_dtype) if need_bias else None
    return dx, dW, db, *dispatch.wanted(need_factors, lambda: out)


torch.library.register_autograd("dual_lora::linear", _backward, setup_context=_setup)


class _Linear(torch.autograd.Function):
    """The operator without the dispatcher: the same computation, the same saved tensors, the same gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, loss_scale, forms, *tensors):
        _keep(ctx, x, weight, bias, loss_scale, forms, tensors)
        n = 4 * len(forms)
        return _linear(x, weight, bias, tensors[:n], tensors[n:], forms, loss_scale)

    @staticmethod
    def backward(ctx, dy):
        need_x, need_weight, need_bias, _, _, *need = ctx.needs_input_grad
        n = len(ctx.forms)
        dx, dW, db, *dF = _gradients(ctx, dy, need_x, need_weight, need_bias, need[: 4 * n])
        return dx, dW, db, None, None, *dF, *[None] * n


torch.library.register_autograd("dual_lora::linear_backward", dispatch.refuse_double_backward)


torch.library.define("dual_lora::through_rows", "(Tensor x, Tensor y, Tensor weight) -> Tensor")
torch.library.define("dual_lora::through_rows_backward", "(Tensor dy, Tensor weight, int I) -> Tensor")


def through_rows(x: Tensor, y: Tensor, weight: Handle) -> Tensor:
    """y [..., O], of which x [..., I] gets the gradient dy W; y is computed without one."""
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
