"""W + ΔW of many layers in one launch, for weights so small that launching costs more than composing them.

A table in device memory holds one row a layer: where its weight, factors, scales and result lie, and how large it is.
Each program finds the row that its number belongs to and composes one tile there, as `triton_compose` does. What the
compiler has to know is the same for a whole launch: ranks and forms of the adapters, dtypes, and whether everything
is aligned to 16 bytes; layers that differ in it go in launches of their own.

Row-major weights alone; a batch of experts is one launch already (`triton_compose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_launch
from .composing import Job
from .triton_compose import TILES
from .triton_launch import RANK_CHUNK, Stack
from .triton_product import displacement, product

LAYERS = 64
"""Layers of one launch: a power of two, whose first tiles a program compares with its number at once."""

# Columns of the table. Five pointers follow for every adapter: A, B, C, D, scale.
FIRST, HEIGHT, WIDTH, WEIGHT, OUT, ADAPTERS = (tl.constexpr(column) for column in range(6))
POINTERS = tl.constexpr(5)

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def compose_group(layers: Sequence[Job]) -> list[Tensor]:
    """W + Σ ΔW_n of every layer, in the order given.

    Raises ValueError for shapes that do not fit together, weights that are not row-major matrices, and dtypes that the
    kernel does not know.
    """
    stacks = [triton_launch.stack(layer.adapters) for layer in layers]
    results = []
    groups: dict[_Alike, list[list[int]]] = {}
    for layer, s in zip(layers, stacks, strict=True):
        _check(layer, s)
        out = torch.empty(s.shape, dtype=layer.dtype, device=layer.weight.device)
        results.append(out)
        if out.numel():
            row = _row(layer, s, out)
            groups.setdefault(_Alike.of(layer, s, row), []).append(row)
    for alike, rows in groups.items():
        for start in range(0, len(rows), LAYERS):
            _launch(alike, rows[start : start + LAYERS])
    return results


class _Alike(NamedTuple):
    """What is compiled into a kernel, and so the same for all layers of a launch."""

    device: torch.device
    dtype: torch.dtype
    out_dtype: torch.dtype
    r1: tuple[int, ...]
    r2: tuple[int, ...]
    forms: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, layer: Job, s: Stack, row: list[int]) -> _Alike:
        aligned = s.I % 16 == 0 and not any(pointer % 16 for pointer in row[WEIGHT.value :])
        return cls(layer.weight.device, layer.weight.dtype, layer.dtype, s.r1, s.r2, s.forms, aligned)


def _row(layer: Job, s: Stack, out: Tensor) -> list[int]:
    """A layer's row of the table, but for its first program."""
    row = [0, s.O, s.I, layer.weight.data_ptr(), out.data_ptr()]
    for tensors in zip(s.A, s.B, s.C, s.D, s.scales, strict=True):
        row += [t.data_ptr() for t in tensors]
    return row


def _launch(alike: _Alike, rows: list[list[int]]) -> None:
    tile = TILES[triton_launch.target(alike.device)]
    tiles = 0
    for row in rows:
        row[FIRST.value] = tiles
        tiles += triton.cdiv(row[HEIGHT.value], tile.rows) * triton.cdiv(row[WIDTH.value], tile.cols)
    # Rows that no program belongs to.
    rows = rows + [[tiles] + [0] * (len(rows[0]) - 1)] * (LAYERS - len(rows))
    table = torch.tensor(rows, dtype=torch.int64).to(alike.device)
    with triton_launch.on(alike.device):
        group_kernel[(tiles,)](
            table,
            COLUMNS=table.shape[1],
            ROWS_OF_TABLE=LAYERS,
            DTYPE=DTYPES[alike.dtype],
            OUT_DTYPE=DTYPES[alike.out_dtype],
            ALIGNED=alike.aligned,
            R1=alike.r1,
            R2=alike.r2,
            FORMS=alike.forms,
            ROWS=tile.rows,
            COLS=tile.cols,
            CHUNK=RANK_CHUNK,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _check(layer: Job, s: Stack) -> None:
    weight = layer.weight
    if weight.shape != s.shape or weight.ndim != 2:
        raise ValueError(f"A weight has shape {tuple(weight.shape)}, its factors make {tuple(s.shape)}.")
    if not weight.is_contiguous():
        raise ValueError(f"A weight has strides {weight.stride()}: a group takes row-major weights alone.")
    for dtype in (weight.dtype, layer.dtype):
        if dtype not in DTYPES:
            raise ValueError(f"Got a weight or result of {dtype}: expected one of {', '.join(map(str, DTYPES))}.")


@triton.jit
def group_kernel(
    table,  # int64 [ROWS_OF_TABLE, COLUMNS]
    COLUMNS: tl.constexpr,
    ROWS_OF_TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    FORMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    firsts = tl.load(table + tl.arange(0, ROWS_OF_TABLE) * COLUMNS + FIRST)
    layer = table + (tl.sum((firsts <= program).to(tl.int32), 0) - 1) * COLUMNS
    O = tl.load(layer + HEIGHT).to(tl.int32)
    I = tl.load(layer + WIDTH).to(tl.int32)
    if ALIGNED:
        I = tl.multiple_of(I, 16)
    number = program - tl.load(layer + FIRST).to(tl.int32)
    across = tl.cdiv(I, COLS)
    rows = number // across * ROWS + tl.arange(0, ROWS)
    cols = number % across * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for n in tl.static_range(len(R1)):
        of_adapter = layer + ADAPTERS + n * POINTERS
        A = pointer(of_adapter, tl.float32, ALIGNED)
        B = pointer(of_adapter + 1, tl.float32, ALIGNED)
        C = pointer(of_adapter + 2, tl.float32, ALIGNED)
        D = pointer(of_adapter + 3, tl.float32, ALIGNED)
        scale = tl.load(pointer(of_adapter + 4, tl.float32, False))
        P = product(B, A, rows, cols, O, I, R1[n], CHUNK)
        Q = product(D, C, rows, cols, O, I, R2[n], CHUNK)
        total += scale * displacement(P, Q, FORMS[n])
    inside = (rows < O)[:, None] & (cols < I)[None, :]
    at = rows.to(tl.int64)[:, None] * I + cols[None, :]
    total += tl.load(pointer(layer + WEIGHT, DTYPE, ALIGNED) + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointer(layer + OUT, OUT_DTYPE, ALIGNED) + at, total.to(OUT_DTYPE), mask=inside)


@triton.jit
def pointer(entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that an entry of the table holds."""
    address = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address
