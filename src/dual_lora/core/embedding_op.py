"""The operator for embeddings: rows of W + ΣΔW, of which only those in use are composed.

The result and the gradients are those of torch.nn.functional.embedding with the composed weight. The row of
`padding_idx` is the base's: nn.Embedding does not train it, so ΔW is zero there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import blocked, dispatch
from .reference import Adapter, Factors, parts_of

_ADAPTERS = "Tensor[] factors, Tensor[] scales, Tensor[] mean_squares, int[] forms, Tensor? loss_scale, int padding_idx"
torch.library.define(
    "dual_lora::embedding",
    f"(Tensor indices, Tensor? weight, {_ADAPTERS}, float? max_norm, float norm_type, bool scale_grad_by_freq,"
    " ScalarType dtype) -> Tensor",
)
torch.library.define(
    "dual_lora::embedding_backward",
    f"(Tensor dy, Tensor indices, {_ADAPTERS}, bool scale_grad_by_freq) -> Tensor[]",
)


def dual_lora_embedding(
    indices: Tensor,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Look up rows of W + ΣΔW: indices [...] -> [..., I], for W [O, I] with O = num_embeddings.

    weight: [O, I] or None for ΣΔW alone. The other arguments are nn.Embedding's; `max_norm` shortens the rows that are
    returned and, other than nn.Embedding, writes nothing back.

    The weight gets no gradient: it is frozen. Raises IndexError for indices below 0 and above O - 1, as nn.Embedding.
    """
    if not adapters:
        raise ValueError("dual_lora_embedding got no adapter: pass at least one, or use F.embedding.")
    dispatch.refuse_transforms(indices, adapters, weight, loss_scale)
    if dtype is None:
        dtype = torch.float32 if weight is None else weight.dtype
    return torch.ops.dual_lora.embedding(
        indices,
        None if weight is None else weight.detach(),
        *dispatch.flat(parts_of(adapters)),
        loss_scale,
        -1 if padding_idx is None else padding_idx,
        max_norm,
        norm_type,
        scale_grad_by_freq,
        dtype,
    )


def _rows_of(adapters: Sequence[Adapter], rows: Tensor, padding_idx: int) -> list[Adapter]:
    """Select the adapters of these rows. P = 0 at the padding, so that ΔW and the gradients are zero there."""
    used = (rows != padding_idx).unsqueeze(-1)
    return [
        a._replace(factors=Factors(A, B.index_select(0, rows) * used, C, D.index_select(0, rows)))
        for a in adapters
        for A, B, C, D in [a.factors]
    ]


@torch.library.impl("dual_lora::embedding", "default")
def _embedding(indices, weight, factors, scales, mean_squares, forms, loss_scale, padding_idx, *options):
    max_norm, norm_type, _, dtype = options
    rows, inverse = torch.unique(indices, return_inverse=True)
    adapters = _rows_of(dispatch.adapters_of(factors, scales, mean_squares, forms), rows, padding_idx)
    with dispatch.without_autocast(indices.device):
        out = blocked.compose(None if weight is None else weight.index_select(0, rows), adapters, dtype)
    y = torch.nn.functional.embedding(inverse.view(-1), out, max_norm=max_norm, norm_type=norm_type)
    return y.resize_(*indices.shape, y.shape[-1])  # no view: an operation in place may follow


@torch.library.impl("dual_lora::embedding_backward", "default")
def _embedding_backward(dy, indices, factors, scales, mean_squares, forms, loss_scale, padding_idx, scale_grad_by_freq):
    rows, inverse = torch.unique(indices, return_inverse=True)
    whole = [a.with_mean_square() for a in dispatch.adapters_of(factors, scales, mean_squares, forms)]
    adapters = _rows_of(whole, rows, padding_idx)
    with dispatch.without_autocast(indices.device):
        # Rows of a low precision are summed in fp32, which is what blocks want anyway.
        dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
        G = torch.ops.aten.embedding_dense_backward(dy, inverse, len(rows), -1, scale_grad_by_freq)
        used = (rows != padding_idx).unsqueeze(-1)
        out = []
        for k, (dA, dB, dC, dD) in enumerate(blocked.factor_gradients(G, adapters, loss_scale)):
            B, D = (torch.zeros_like(f) for f in factors[4 * k + 1 : 4 * k + 4 : 2])
            B[rows], D[rows] = (dB * used).to(B.dtype), dD.to(D.dtype)
            out.append(Factors(dA, B, dC, D))
    return dispatch.flat_gradients(out, whole)


@torch.library.register_fake("dual_lora::embedding")
def _(indices, weight, factors, *rest):
    dispatch.refuse_meta(indices, weight, *factors)
    return factors[0].new_empty(*indices.shape, factors[0].shape[-1], dtype=rest[-1])


@torch.library.register_fake("dual_lora::embedding_backward")
def _(dy, indices, factors, scales, mean_squares, forms, loss_scale, padding_idx, scale_grad_by_freq):
    return [f.new_empty(f.shape) for f in factors]


def _setup(ctx, inputs, output):
    indices, _, factors, scales, mean_squares, forms, loss_scale, padding_idx, _, _, scale_grad_by_freq, _ = inputs
    ctx.save_for_backward(indices, *factors, *scales, *mean_squares)
    # The factor on the loss is not saved: its value is that of the backward pass.
    ctx.rest = forms, loss_scale, padding_idx, scale_grad_by_freq


def _backward(ctx, dy):
    indices, *rest = ctx.saved_tensors
    forms, loss_scale, padding_idx, scale_grad_by_freq = ctx.rest
    n = len(forms)
    given = dy, indices, *dispatch.Flat.of_saved(rest, forms), loss_scale, padding_idx, scale_grad_by_freq
    dF = dispatch.needed_gradients(ctx.needs_input_grad[2], lambda: torch.ops.dual_lora.embedding_backward(*given))
    return None, None, dF, [None] * n, [None] * n, None, None, None, None, None, None, None


torch.library.register_autograd("dual_lora::embedding", _backward, setup_context=_setup)
torch.library.register_autograd("dual_lora::embedding_backward", dispatch.refuse_double_backward)
