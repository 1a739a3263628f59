"""The operator W + ΣΔW, for layers whose forward is more than one product: convolution, attention, experts.

`torch.ops.dual_lora.weight` keeps the factors for backward and takes the gradient G of the composed weight block by
block. A weight may carry a leading dimension of experts, of which only the routed ones are composed.

The layer's own function would keep the composed weight for its backward. Under `recompose_in_backward` the weight is
composed again there instead, so that nothing of the weight's size is kept.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .reference import Adapter, parts_of
from .traced import is_traced, is_transformed, memory, version

_ADAPTERS = "Tensor[] factors, Tensor[] scales, Tensor[] mean_squares, int[] forms, Tensor? loss_scale, Tensor? routed"
torch.library.define("dual_lora::weight", f"(Tensor? weight, {_ADAPTERS}, ScalarType dtype) -> Tensor")
torch.library.define("dual_lora::weight_backward", f"(Tensor G, {_ADAPTERS}) -> Tensor[]")


def dual_lora_weight(
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
    *,
    routed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compose W + ΣΔW, [O, I] or [E, O, I]: the fp32 sum, rounded to `dtype` (default: the weight's, else fp32).

    weight: any strides, which the result has as well; None for ΣΔW alone.
    adapters: factors with the same leading dimension as the weight, scale, form.
    routed: indices of the experts to compose; the others are left as they are (or zero without a weight).

    Differentiable in the factors and the weight; keeps only the factors.
    """
    if not adapters:
        raise ValueError("dual_lora_weight got no adapter: pass at least one, or use the weight as it is.")
    dispatch.refuse_transforms(None, adapters, weight, loss_scale)
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    return torch.ops.dual_lora.weight(weight, *dispatch.flat(parts_of(adapters)), loss_scale, routed, dtype)


class Composed(NamedTuple):
    """A composed weight and the operands that it was composed from."""

    result: Tensor
    weight: Tensor | None
    adapters: Sequence[Adapter]
    routed: Tensor | None = None


class _Recipe(NamedTuple):
    """The inputs from which backward composes a weight again; autograd keeps them instead of the weight, or of a view
    of it."""

    weight: Tensor | None
    adapters: Sequence[Adapter]
    routed: Tensor | None
    dtype: torch.dtype
    versions: list[int]
    size: torch.Size = torch.Size()
    stride: tuple[int, ...] = ()
    offset: int = 0


class _Kept(NamedTuple):
    """A saved tensor as it is. Autograd looks at versions where there are no hooks, so they are looked at here."""

    tensor: Tensor
    version: int


_active = threading.local()  # .recipes: by the storage of the composed weight, as long as that lives


@contextmanager
def recompose_in_backward(*composed: Composed) -> Iterator[None]:
    """Keep these weights' operands for backward, and compose the weights again there.

    It does nothing under gradient checkpointing, or other hooks on saved tensors: there a weight is kept only during
    the backward of its own checkpoint.
    """
    if not torch.is_grad_enabled() or is_traced() or is_transformed():
        yield
    elif getattr(_active, "recipes", None) is not None:
        _track(composed)
        yield
    elif _hooks_are_set():
        yield
    else:
        _active.recipes = {}
        _track(composed)
        try:
            with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
                yield
        finally:
            _active.recipes = None


def track_composed(composed: Composed) -> Tensor:
    """Add a weight that was composed inside a `recompose_in_backward` block to that block. Returns the weight."""
    if getattr(_active, "recipes", None) is not None:
        _track([composed])
    return composed.result


def _versions(c: Composed | _Recipe) -> list[int]:
    tensors = (c.weight, c.routed, *(t for a in c.adapters for t in (*a.factors, a.scale)))
    return [version(t) for t in tensors if t is not None]


def _track(composed: Sequence[Composed]) -> None:
    for c in composed:
        recipe = _Recipe(*c[1:], c.result.dtype, _versions(c))
        _active.recipes[memory(c.result)] = weakref.ref(c.result), recipe


def _hooks_are_set() -> bool:
    # torch 2.6 has no such function. Our hooks then come on top of others: correct, with more memory kept.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    alive, recipe = _active.recipes.get(memory(tensor), (None, None))
    if alive is None or alive() is None or recipe.dtype != tensor.dtype:
        return _Kept(tensor, version(tensor))
    return recipe._replace(size=tensor.size(), stride=tensor.stride(), offset=tensor.storage_offset())


def _unpack(packed: _Kept | _Recipe) -> Tensor:
    if isinstance(packed, _Kept):
        if version(packed.tensor) != packed.version:
            raise RuntimeError(
                "One of the variables needed for gradient computation has been modified by an in-place operation: a "
                f"{packed.tensor.type()} of shape {list(packed.tensor.shape)}, which a layer with Dual LoRA was called "
                "with or computed, is at another version than in the forward pass (x += layer(x)?)."
            )
        return packed.tensor
    if _versions(packed) != packed.versions:
        raise RuntimeError(
            "A weight, a factor or the warm-up of a Dual LoRA layer has been modified by an in-place operation between "
            "forward and backward (an optimizer step, load_state_dict): call backward before it."
        )
    with torch.no_grad():
        composed = dual_lora_weight(packed.weight, packed.adapters, routed=packed.routed, dtype=packed.dtype)
    return composed.as_strided(packed.size, packed.stride, packed.offset)


def _empty_result(weight: Tensor | None, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if weight is not None:
        return torch.empty_like(weight, dtype=dtype)
    A, B = factors[0], factors[1]
    return B.new_empty(*B.shape[:-1], A.shape[-1], dtype=dtype)


@torch.library.impl("dual_lora::weight", "default")
def _weight(weight, factors, scales, mean_squares, forms, loss_scale, routed, dtype):
    adapters, out = dispatch.adapters_of(factors, scales, mean_squares, forms), _empty_result(weight, factors, dtype)
    if out.ndim == 2:
        return dispatch.compose(weight, adapters, dtype, out)
    if routed is not None:
        out.zero_() if weight is None else out.copy_(weight)
    computes = dispatch.implementation(out.device, dtype, weight, adapters)
    with dispatch.without_autocast(out.device):
        return computes.compose(weight, adapters, dtype, out, routed)


@torch.library.impl("dual_lora::weight_backward", "default")
def _weight_backward(G, factors, scales, mean_squares, forms, loss_scale, routed):
    adapters = dispatch.adapters_of(factors, scales, mean_squares, forms)
    computes = dispatch.implementation(G.device, G.dtype, None, adapters, (None, G, loss_scale))
    with dispatch.without_autocast(G.device):
        stack = (routed,) if G.ndim == 3 else ()
        grads = computes.factor_gradients(G, adapters, loss_scale, *stack)
    return dispatch.flat_gradients(grads, adapters)


@torch.library.register_fake("dual_lora::weight")
def _(weight, factors, scales, mean_squares, forms, loss_scale, routed, dtype):
    dispatch.refuse_meta(factors[0] if weight is None else weight, *factors)
    return _empty_result(weight, factors, dtype)


@torch.library.register_fake("dual_lora::weight_backward")
def _(G, factors, scales, mean_squares, forms, loss_scale, routed):
    return [f.new_empty(f.shape) for f in factors]


def _setup(ctx, inputs, output):
    weight, factors, scales, mean_squares, forms, loss_scale, routed, _ = inputs
    ctx.save_for_backward(routed, *factors, *scales, *mean_squares)
    ctx.loss_scale = loss_scale  # not saved: its value is that of the backward pass
    ctx.forms, ctx.weight_dtype = forms, None if weight is None else weight.dtype


def _backward(ctx, G):
    need_weight, need_factors, *_ = ctx.needs_input_grad
    routed, *rest = ctx.saved_tensors
    n = len(ctx.forms)
    given = G, *dispatch.Flat.of_saved(rest, ctx.forms), ctx.loss_scale, routed
    dF = dispatch.needed_gradients(need_factors, lambda: torch.ops.dual_lora.weight_backward(*given))
    return G.to(ctx.weight_dtype) if need_weight else None, dF, [None] * n, [None] * n, None, None, None, None


torch.library.register_autograd("dual_lora::weight", _backward, setup_context=_setup)
torch.library.register_autograd("dual_lora::weight_backward", dispatch.refuse_double_backward)
