"""Gradient checkpointing: composing once a block in the place of twice, and not running adapted layers again at all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dual_lora.core import blocked, product
from dual_lora.core.blocked import Adapter, Needs
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Form

from .. import judge
from .finding import Finding, compared

T, RANK, WIDTH, INNER = 1024, 16, 576, 1536


def findings(size: int, seconds: float) -> Iterator[Finding]:
    yield from _kept_weight(size, seconds)
    yield from _policies(seconds)


def _kept_weight(size: int, seconds: float) -> Iterator[Finding]:
    """One layer's recomputed forward and its backward; W_eff handed on from the one to the other, or not."""
    x, dy = torch.randn(512, size), torch.randn(512, size)
    W = torch.randn(size, size) / size**0.5
    adapters = [Adapter(judge.exact_factors(size, size, RANK, RANK), torch.tensor(4.0), Form())]

    def twice() -> Tensor:
        blocked.forward(x, W, adapters)
        dx = blocked.backward(dy, x, W, adapters, None, Needs(True, False, True)).x
        assert dx is not None
        return dx

    def once() -> Tensor:
        whole = blocked.compose(W, adapters, torch.float32)
        product.mm(x, whole.t())
        blocked.backward(dy, x, W, adapters, None, Needs(False, False, True))
        return product.mm(dy, whole)

    judge.check_close({"dx": once()}, {"dx": twice()}, 1e-5)
    name = "W_eff kept from the recomputation"
    yield from compared(
        {"composed twice": twice, name: once}, "composed twice", seconds, {name: "keeps O·I a layer of one block"}
    )


def _policies(seconds: float) -> Iterator[Finding]:
    """A checkpointed feed-forward block of SmolLM2-135M's shape."""
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    weights = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    factors = {n: judge.exact_factors(*shape, RANK, RANK, k) for k, (n, shape) in enumerate(shapes.items())}
    leaves = [f.requires_grad_() for four in factors.values() for f in four]
    scale = torch.tensor(4.0)
    x = torch.randn(T, WIDTH, requires_grad=True)

    def layer(name: str, x: Tensor) -> Tensor:
        return dual_lora_linear(x, weights[name], None, [Adapter(factors[name], scale, Form())])

    def block(x: Tensor) -> Tensor:
        return layer("down", torch.nn.functional.silu(layer("gate", x)) * layer("up", x))

    def run(context_fn) -> dict[str, Tensor]:
        kept = {} if context_fn is None else {"context_fn": context_fn}
        checkpoint(block, x, use_reentrant=False, **kept).square().mean().backward()
        grads = {str(k): leaf.grad for k, leaf in enumerate([x, *leaves])}
        for leaf in (x, *leaves):
            leaf.grad = None
        return grads

    select = partial(create_selective_checkpoint_contexts, [torch.ops.dual_lora.linear.default])
    judge.check_close(run(select), run(None), 1e-6)
    name = "the adapted layers' outputs kept"
    kept = T * (2 * INNER + WIDTH) * 4
    variants = {"all recomputed": partial(run, None), name: partial(run, select)}
    yield from compared(
        variants,
        "all recomputed",
        seconds,
        {name: f"keeps {kept / 2**20:.1f} MiB a block; create_selective_checkpoint_contexts"},
    )
