"""The operators in plain aten, for targets that do not know them: ONNX, and `ExportedProgram`s that run elsewhere.

    W_eff = round(W + Σ s · ReLU(B A) ⊙ Sign(D C))     linear: x W_effᵀ + bias     embedding: rows of W_eff

An exported graph composes the weight as a whole, which a runtime folds into a constant when it loads the graph. The
decompositions are in PyTorch's global table, where `torch.onnx.export` finds them. torch.compile and torch.export have
tables of their own and keep the operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from . import compose_op, embedding_op, op  # noqa: F401 - they define the operators
from .dispatch import adapters_of, without_autocast
from .reference import Adapter, Factors, direction, direction_of, magnitude


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for `ExportedProgram.run_decompositions`, after which a program runs without this package.

    >>> program = torch.export.export(model, (x,)).run_decompositions(dual_lora.decompositions())  # doctest: +SKIP
    """
    return dict(_DECOMPOSITIONS)


def keep_in_inductor() -> None:
    """Let Inductor call the operators as they are, with inputs in the strides that they were traced with.

    Inductor does so by itself, unless the environment variable CI is set. Then it raises an error for every operator
    that has a decomposition (`make_fallback` in torch/_inductor/lowering.py), a check meant for PyTorch's own ones.
    """
    from torch._inductor import lowering

    for operator in decompositions():
        lowering.make_fallback(operator, lowering.constrain_to_fx_strides, warn=False)


def linear(x, weight, bias, factors, scales, mean_squares, forms, loss_scale, share):
    """x (W + ΣΔW)ᵀ + bias, x [..., I] -> [..., O]."""
    W = _composed(weight, adapters_of(factors, scales, mean_squares, forms), x.dtype)
    return torch.nn.functional.linear(x, W, bias)


def weight(weight, factors, scales, mean_squares, forms, loss_scale, routed, dtype):
    """W + ΣΔW, [O, I] or [E, O, I]; with `routed`, ΔW of the other experts is zero."""
    adapters = adapters_of(factors, scales, mean_squares, forms)
    if routed is None:
        return _composed(weight, adapters, dtype)
    used = torch.zeros(factors[1].shape[0], 1, 1, device=routed.device).index_fill(0, routed, 1.0)
    return _composed(weight, [a._replace(scale=a.scale * used) for a in adapters], dtype)


def embedding(
    indices, weight, factors, scales, mean_squares, forms, loss_scale, padding_idx, max_norm, norm_type,
    scale_grad_by_freq, dtype,
):  # fmt: skip
    """Rows of W + ΣΔW, indices [...] -> [..., I]; ΔW of the padding is zero."""
    used = (indices != padding_idx).unsqueeze(-1)
    adapters = [
        Adapter(Factors(A, B[indices], C, D[indices]), scale * used, form)
        for (A, B, C, D), scale, form, _ in adapters_of(factors, scales, mean_squares, forms)
    ]
    y = _composed(None if weight is None else weight[indices], adapters, dtype)
    if max_norm is None:
        return y
    norm = torch.linalg.vector_norm(y, norm_type, dim=-1, keepdim=True)
    return torch.where(norm > max_norm, y * (max_norm / (norm + 1e-7)), y)  # 1e-7: as in torch's embedding_renorm_


def _composed(weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """The rounding to `dtype` of the fp32 sum W + ΣΔW."""
    A = adapters[0].in_working_dtype().factors.A
    total = None if weight is None else weight.to(torch.promote_types(dtype, A.dtype))
    with without_autocast(A.device):
        for adapter in adapters:
            (A, B, C, D), scale, form, _ = adapter.in_working_dtype()
            delta = scale * magnitude(B @ A, form) * direction(direction_of(C, D, form, weight), form)
            total = delta if total is None else total + delta
    assert total is not None
    return total.to(dtype)


_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.dual_lora.linear.default: linear,
    torch.ops.dual_lora.weight.default: weight,
    torch.ops.dual_lora.embedding.default: embedding,
}
for _operator, _function in _DECOMPOSITIONS.items():
    register_decomposition(_operator)(_function)
    # With symbolic sizes PyTorch takes shapes from a decomposition rather than from the operator's fake, unless the
    # table has a "meta" entry (which it does not call).
    register_decomposition(_operator, type="meta")(_function)
