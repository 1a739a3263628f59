"""Check that the kernels compute correctly on this card: each kind of launch is first tried on a small problem.

A compiler makes a separate program of a kernel for every tile, dtype, rank, form and alignment, and one of them may be
wrong where the others are correct. So before a kernel is launched in a new way, the same program runs on a weight of
one whole and one cut tile in each direction, and has to agree with fp64. P, Q and G are small integers there: no sign
depends on a rounding, and no sum on TF32 or on the order of atomic additions.

Verdicts are kept in this process, not on disk: a trial takes a millisecond once Triton has compiled the program (which
the launch needs anyway, and Triton caches it on disk), and a verdict on disk might be older than the driver. Running
out of memory, or a CUDA graph that is being captured, says nothing about a kernel and gives no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._warning import warn
from ..blocked import RowSource
from ..reference import Adapter, Factors, Form, delta_weight, direction_of, product_gradients
from . import compose as triton_compose
from . import gradient as triton_gradient
from . import launch as triton_launch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error against fp64, relative to the largest entry: some roundings of the dtype."""

TRIES = 3  # errors before a launch is given up: a compiler's error comes every time, a driver's may not

_verdicts: dict[Launch, bool] = {}
_errors: Counter[Launch] = Counter()


class Layout(NamedTuple):
    """The properties of a matrix, or of a batch of them, for which Triton compiles separate programs."""

    dtype: torch.dtype
    aligned: bool  # its first entry, to 16 bytes
    strides: tuple[int, ...]  # each as `kind` has it


class Launch(NamedTuple):
    """Everything for which Triton compiles a separate program of a kernel."""

    kernel: str  # "compose", or "gradient"
    device: torch.device
    deterministic: bool
    tile: triton_launch.Tile
    sizes: tuple[int, ...]  # T, O, I (and experts), each as `kind` has it; 0 for a T that there is not
    ranks: tuple[tuple[int, int, Form], ...]
    tensors: tuple[Layout | None, ...]  # compose: the weight and the result; gradient: dy and x, or None and G
    scaled: bool = False  # the loss, by a gradient scaler
    weight: Layout | None = None  # gradient: that of a direction which is the weight


def kind(n: int) -> int:
    """Return Triton's specialisation of an integer: 1 for 1, 16 for multiples of 16, else 0."""
    return 1 if n == 1 else 0 if n % 16 else 16


def layout(t: Tensor | None) -> Layout | None:
    """Return the layout of a tensor, None for None."""
    return None if t is None else Layout(t.dtype, t.data_ptr() % 16 == 0, tuple(map(kind, t.stride())))


def compose_launch(weight: Tensor | RowSource | None, adapters: Sequence[Adapter], dtype: torch.dtype) -> Launch:
    """Describe the launch that composes W + ΣΔW. A quantised weight is assumed to be dequantised to that dtype."""
    B, A = adapters[0].factors.B, adapters[0].factors.A
    sizes = 0, kind(B.shape[-2]), kind(A.shape[-1]), *map(kind, B.shape[:-2])
    fresh = _contiguous_layout(dtype, A.shape[-1])
    tile = triton_compose.TILES[triton_launch.target(B.device)]
    tensors = layout(weight) if weight is None or isinstance(weight, Tensor) else fresh, fresh
    return Launch("compose", B.device, False, tile, sizes, _ranks(adapters), tensors)


def _contiguous_layout(dtype: torch.dtype, I: int) -> Layout:
    """Return the layout of a newly allocated matrix with I columns."""
    return Layout(dtype, True, (kind(I), 1))


def gradient_launch(
    dy: Tensor | None,
    x: Tensor,
    adapters: Sequence[Adapter],
    scaled: bool,
    weight: Tensor | RowSource | None = None,
) -> Launch:
    """Describe the launch that computes the factors' gradients from dy and x, or from G in x's place (dy None)."""
    B, A = adapters[0].factors.B, adapters[0].factors.A
    O, I, experts = B.shape[-2], A.shape[-1], B.shape[:-2]
    sizes = 0 if dy is None else kind(x.shape[0]), kind(O), kind(I), *map(kind, experts)
    tile = triton_gradient.tile_for(O, I, experts[0] if experts else 1, dy, x)
    deterministic = torch.are_deterministic_algorithms_enabled()
    ranks, tensors = _ranks(adapters), (layout(dy), layout(x))
    base = None
    if triton_launch.multiplies_weight(adapters):
        base = layout(weight) if weight is None or isinstance(weight, Tensor) else _contiguous_layout(x.dtype, I)
    return Launch("gradient", x.device, deterministic, tile, sizes, ranks, tensors, scaled, base)


def _ranks(adapters: Sequence[Adapter]) -> tuple[tuple[int, int, Form], ...]:
    return tuple((a.factors.A.shape[-2], a.factors.C.shape[-2], a.form) for a in adapters)


def is_correct(launch: Launch) -> bool:
    """Whether the kernel computes correctly with this launch. Warns once if it does not."""
    verdict = _verdicts.get(launch)
    return _try_launch(launch) if verdict is None else verdict


def _try_launch(launch: Launch) -> bool:
    if launch.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # nothing can be read back during a capture; the capture's warm-up has found the verdict
    try:
        worst = error(launch)
    except torch.OutOfMemoryError:
        return False
    except Exception as broken:  # a compiler or driver may raise any error: training goes on without the kernel
        _errors[launch] += 1
        if _errors[launch] < TRIES:
            return False
        reason = f"{type(broken).__name__}: {broken}"
    else:
        if worst <= TOLERANCE[_input_dtype(launch)]:
            _verdicts[launch] = True
            return True
        reason = f"it differs from fp64 by {worst:.2g} of the largest entry"
    _verdicts[launch] = False
    device = torch.cuda.get_device_name(launch.device) if launch.device.type == "cuda" else "the interpreter"
    warn(
        f"Dual LoRA's {launch.kernel} kernel is not used with {_input_dtype(launch)} and tiles of {launch.tile.rows} × "
        f"{launch.tile.cols} on {device}: {reason}. PyTorch's own operations compute the same, slower. "
        "`dual-lora gpu-check` tries every way of launching it; please report what it says.",
        stacklevel=2,
    )
    return False


def _input_dtype(launch: Launch) -> torch.dtype:
    """Return the dtype of the launch's last tensor: the composed weight, x or G."""
    last = launch.tensors[-1]
    assert last is not None
    return last.dtype


def error(launch: Launch) -> float:
    """Run this launch on a small problem. Returns its largest error against fp64, relative to the largest entry."""
    generator = torch.Generator().manual_seed(0)
    tile = launch.tile
    edges = {1: 0, 16: 48, 0: 37}  # a whole tile, and a part of one
    T, O, I = (
        1 if k == 1 else n + edges[k] for n, k in zip((tile.tokens, tile.rows, tile.cols), launch.sizes, strict=False)
    )
    lead = tuple(2 if k == 0 else k for k in launch.sizes[3:])

    def integers(*shape: int, most: int = 1) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).double().to(launch.device)

    adapters = []
    for r1, r2, form in launch.ranks:
        shapes = (*lead, r1, I), (*lead, O, r1), (*lead, r2, I), (*lead, O, r2)
        factors = Factors(*(integers(*shape).float() for shape in shapes))
        if form.direction == "frozen":  # products beyond 2³¹, which wrap around
            C, D = (integers(*shape, most=1 << 20).int() | 1 for shape in shapes[2:])
            factors = factors._replace(C=C, D=D)
        adapters.append(Adapter(factors, torch.tensor(2.0**-6, device=launch.device), form))
    loss_scale = torch.tensor(8.0, device=launch.device) if launch.scaled else None
    if launch.kernel == "compose":
        weight, result = launch.tensors
        assert result is not None
        W = None if weight is None else _with_layout(integers(*lead, O, I, most=100) / 64, weight)
        got = [triton_compose.compose(W, adapters, result.dtype).double()]
        wide = None if W is None else W.double()
        deltas = [delta_weight(_to_fp64(a.factors), a.scale.double(), a.form, weight=wide) for a in adapters]
        truth = [sum(deltas, torch.zeros_like(got[0]) if wide is None else wide)]
    else:
        dy_layout, x_layout = launch.tensors
        assert x_layout is not None
        dy = None if dy_layout is None else _with_layout(integers(T, O), dy_layout)
        x = _with_layout(integers(*lead, O, I, most=60) if dy is None else integers(T, I), x_layout)
        W = None if launch.weight is None else _with_layout(integers(O, I, most=100) / 64, launch.weight)
        found = triton_gradient.factor_gradients(
            dy, x, adapters, loss_scale, deterministic=launch.deterministic, tile=tile, weight=W
        )
        got = [g.double() for four in found for g in four]
        G = x.double() if dy is None else dy.double().t() @ x.double()
        wide = None if W is None else W.double()
        truth = [g for a in adapters for g in _gradients(G, a, loss_scale, wide)]
    return max(_relative(g, t) for g, t in zip(got, truth, strict=True))


def _to_fp64(factors: Factors) -> Factors:
    """Convert factors to fp64; integers stay integers."""
    return Factors(*(f.double() if f.is_floating_point() else f for f in factors))


def _gradients(G: Tensor, adapter: Adapter, loss_scale: Tensor | None, weight: Tensor | None) -> list[Tensor]:
    """Compute dA, dB, dC, dD in fp64 from G = ∂L/∂W."""
    A, B, C, D = _to_fp64(adapter.factors)
    L = None if loss_scale is None else loss_scale.double()
    Q = direction_of(C, D, adapter.form, weight)
    dP, dQ = product_gradients(G, B @ A, Q, adapter.scale.double(), adapter.form, L)
    return [B.mT @ dP, dP @ A.mT, D.double().mT @ dQ, dQ @ C.double().mT]


def _relative(got: Tensor, truth: Tensor) -> float:
    """Return max |got − truth| / max |truth|; infinity if an entry is not finite."""
    if not truth.numel():  # there is no direction group
        return 0.0
    worst = ((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()
    return worst if worst == worst else float("inf")


def _with_layout(values: Tensor, layout: Layout) -> Tensor:
    """Copy values into a tensor with the dtype, alignment and kinds of strides of `layout`."""
    *lead, rows, cols = values.shape
    kinds = layout.strides[-2:]

    def at_least(n: int, k: int) -> int:
        return -(-n // 16) * 16 if k == 16 else n | 1 if n > 1 else 3

    if kinds[1] == 1:
        strides = at_least(cols, kinds[0]), 1
    elif kinds[0] == 1:
        strides = 1, at_least(rows, kinds[1])
    else:
        across = at_least(2, kinds[1])
        strides = at_least(across * cols, kinds[0]), across
    each = -(-(strides[0] * rows + strides[1] * cols) // 16) * 16
    count = lead[0] if lead else 1
    start = 0 if layout.aligned else 1
    memory = torch.zeros(start + each * count, dtype=layout.dtype, device=values.device)
    whole = memory[start:].as_strided(values.shape, (*([each] if lead else []), *strides))
    return whole.copy_(values)
