"""The gradient of a composed weight from a sample of the tokens, where foreign code computes the product.

y = f(x, W), linear in W: a convolution, an expert's product, the products of several experts at once. f gets W
detached, so that dx is exact and PyTorch's own. Then y passes through a function whose backward computes W's gradient
from the sampled tokens (`tokens`).
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import dispatch, tokens
from .tokens import EXACT
from .traced import memory

torch.library.define(
    "dual_lora::sampled_gradient",
    "(Tensor dy, Tensor x, SymInt[] shape, float share, Tensor draw, Tensor? ends, int[] stride, int[] padding,"
    " int[] dilation) -> Tensor",
)


class Geometry(NamedTuple):
    """A convolution's options, one number for each dimension; empty for a matrix product."""

    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()


PRODUCT = Geometry()


def with_sampled_gradient(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    share: float,
    ends: Tensor | None = None,
    geometry: Geometry = PRODUCT,
) -> Tensor:
    """Return y = f(W), with W's gradient estimated from a share of the tokens; dx is f's own.

    x, weight: [..., I] and [O, I], tokens first; with `ends`: [T, I] and [E, O, I], expert e's tokens are those from
        ends[e - 1] up to ends[e]; with a geometry: [N, I, …] and [O, I / groups, …], whose tokens are y's positions.
    """
    if share == EXACT or not (torch.is_grad_enabled() and weight.requires_grad):
        return f(weight)
    given = f(weight.detach()), x.detach(), weight, share, ends, geometry
    return _Sampled.apply(*given)  # type: ignore[no-any-return,no-untyped-call]


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, weight, share, ends, geometry):
        ctx.save_for_backward(x, ends)
        ctx.shape, ctx.dtype, ctx.share, ctx.geometry = weight.shape, weight.dtype, share, geometry
        if torch.compiler.is_compiling():  # which knows no dirty results; a view would refuse nn.ReLU(inplace=True)
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, ends = ctx.saved_tensors
        dW = None
        if ctx.needs_input_grad[2]:
            draw = torch.rand((), device=x.device)
            op = torch.ops.dual_lora.sampled_gradient
            dW = op(dy, x, ctx.shape, ctx.share, draw, ends, *ctx.geometry).to(ctx.dtype)
        return dy, None, dW, None, None, None


@torch.library.impl("dual_lora::sampled_gradient", "default")
def _sampled_gradient(dy, x, shape, share, draw, ends, stride, padding, dilation):
    with dispatch.without_autocast(x.device):
        x = x.to(dy.dtype)
        if stride:
            return _convolution_gradient(dy, x, shape, share, draw, Geometry(stride, padding, dilation))
        sequences = len(x) if x.ndim > 2 else 1
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if ends is None:
            dy, x = tokens.gradient_rows(dy, x, sequences, share, draw) or (dy, x)
            return dy.mT @ x
        return _expert_gradients(dy, x, shape, share, draw, ends)


@torch.library.register_fake("dual_lora::sampled_gradient")
def _(dy, x, shape, share, draw, ends, stride, padding, dilation):
    return dy.new_empty(shape)


torch.library.register_autograd("dual_lora::sampled_gradient", dispatch.refuse_double_backward)


def _expert_gradients(dy: Tensor, x: Tensor, shape: Sequence[int], share: float, draw: Tensor, ends: Tensor) -> Tensor:
    """Estimate the experts' gradients [E, O, I] from one sample of all their tokens."""
    T = int(ends[-1])  # later rows belong to no expert
    dy, x = dy[:T], x[:T]
    drawn = tokens.choose_tokens(tokens.leverage(dy, x), share, draw, lambda made, _: made.rest_squared[:1])
    if drawn is not None:
        dy, x = tokens.weighted_rows(dy, x, drawn)
        ends = torch.searchsorted(drawn[0].contiguous(), ends.long())  # they are drawn in their order
    G, begin = dy.new_zeros(shape), 0
    for e, end in enumerate(ends.tolist()):
        torch.mm(dy[begin:end].mT, x[begin:end], out=G[e])
        begin = end
    return G


def _convolution_gradient(
    dy: Tensor, x: Tensor, shape: Sequence[int], share: float, draw: Tensor, geometry: Geometry
) -> Tensor:
    """Estimate the gradient [O, I / groups, …] from a sample of y's positions and their patches of x."""
    kernel, n = tuple(shape[2:]), len(geometry.stride)
    if dy.ndim == n + 1:  # without a batch
        dy, x = dy.unsqueeze(0), x.unsqueeze(0)
    S, O = dy.shape[:2]
    groups = x.shape[1] // shape[1]
    places = dy.movedim(1, -1).reshape(S, -1, groups, O // groups)
    seen = _patch_norms(x, groups, kernel, geometry)

    def variance(made: tokens.WaterFilling, draw: Tensor) -> Tensor:
        if S < 2:
            return made.rest_squared[:1]
        directions = tokens.probes(draw, (groups * tokens.PROBES, *shape[1:]), x)
        projected = _convolved(x.float(), directions, geometry, groups).reshape(S, groups, tokens.PROBES, -1)
        return tokens.variance_between_sequences(places.permute(0, 2, 3, 1).float() @ projected.mT)

    scores = (tokens.norms(places).double() * seen.double()).flatten(0, 1)
    drawn = tokens.choose_tokens(scores, share, draw, variance)
    if drawn is None:
        return torch.ops.aten.convolution_backward(
            dy, x, dy.new_empty(shape), None, *geometry, False, [0] * n, groups, [False, True, False]
        )[1]
    at, weights = drawn
    patches = _patches(x, at, dy.shape[2:], kernel, geometry)
    rows = tokens.weighted(places.flatten(0, 1)[at], weights)
    if groups == 1:
        found = rows[:, 0].mT @ patches.flatten(1)
    else:
        found = torch.einsum("tgo,tkgi->goki", rows, patches.unflatten(2, (groups, -1)))
    return found.reshape(O, -1, shape[1]).mT.contiguous().view(shape)  # laid out as it is foretold


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(geometry.stride) - 1]
    return convolve(x, weight, None, *geometry, groups=groups)


def _patch_norms(x: Tensor, groups: int, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """Return the norm of each patch of x, [S, positions, groups]."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    summed = squares.unflatten(1, (groups, -1)).sum(2)
    ones = summed.new_ones(1, 1, *kernel)
    return _convolved(summed.flatten(0, 1).unsqueeze(1), ones, geometry, 1).reshape(len(x), groups, -1).mT.sqrt()


def _patches(x: Tensor, at: Tensor, sizes: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """Gather the patches of x at these positions, [tokens, kernel size, I]; each row of x is read in one piece."""
    x = functional.pad(x, [p for padding in reversed(geometry.padding) for p in (padding, padding)]).movedim(1, -1)
    sample, *places = torch.unravel_index(at, (len(x), *sizes))
    steps = torch.meshgrid(*(torch.arange(k, device=x.device) for k in kernel), indexing="ij")
    row = sample.unsqueeze(1)
    for length, place, stride, step, dilation in zip(
        x.shape[1:-1], places, geometry.stride, steps, geometry.dilation, strict=True
    ):
        row = row * length + place.unsqueeze(1) * stride + step.flatten() * dilation
    return x.reshape(-1, x.shape[-1])[row]


# Products that foreign code computes with a composed weight, found by a TorchFunctionMode.

_MATMULS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}


class SampledProducts(TorchFunctionMode):
    """Estimates the gradients of the added weights from a share of the tokens, in the products inside the mode.

    It samples linear, x @ W with a matrix, and the grouped products of experts. Other operations stay exact, and so
    does everything under torch.compile.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        # A compiled graph has no storage addresses.
        self._idle = share == EXACT or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        self._alive: dict[int, weakref.ref[Tensor]] = {}  # by storage; when its weight is gone, it may be another's

    def context(self) -> AbstractContextManager[Any]:
        """Return the mode as a context manager, or an empty one where nothing is sampled."""
        return nullcontext() if self._idle else self

    def add(self, composed: Tensor) -> None:
        """Sample the products with this weight, or with views of it."""
        if not self._idle:
            self._alive[memory(composed)] = weakref.ref(composed)

    def _is_ours(self, weight: Any) -> bool:
        if not isinstance(weight, Tensor) or weight.layout != torch.strided or not weight.requires_grad:
            return False
        known = self._alive.get(memory(weight))
        return known is not None and known() is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x, rest = args[0] if args else None, args[2:]
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if not self._is_ours(weight) or not isinstance(x, Tensor):
            return func(*args, **kwargs)
        if func is functional.linear and weight.ndim == 2:
            more = {name: value for name, value in kwargs.items() if name != "weight"}
            return with_sampled_gradient(lambda W: func(x, W, *rest, **more), x, weight, self.share)
        if func in _MATMULS and weight.ndim == 2:
            return with_sampled_gradient(lambda W: func(x, W.mT), x, weight.mT, self.share)
        ends = kwargs.get("offs", rest[0] if rest else None)
        if _is_grouped(func) and weight.ndim == 3 and x.ndim == 2 and isinstance(ends, Tensor):
            return with_sampled_gradient(lambda W: func(x, W.mT, *rest, **kwargs), x, weight.mT, self.share, ends)
        return func(*args, **kwargs)


def _is_grouped(func: Any) -> bool:
    """Whether this is PyTorch's grouped product, or transformers' replacement for it."""
    return getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
