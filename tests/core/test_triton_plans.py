"""A plan launches what Triton itself would launch. Everything runs but the last step, which is recorded: no card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")
from dual_lora.core.kernels import gradient as triton_gradient
from dual_lora.core.kernels import launch as triton_launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, whose driver would be asked")

CODE = """
import torch
from benchmarks import host
host.without_launches()
from triton.compiler import CompiledKernel
from dual_lora.core.kernels import gradient as triton_gradient, launch as triton_launch
from dual_lora.core.reference import Adapter
from dual_lora.core.reference import Factors, Form
from dual_lora.core.kernels.compose import compose

launched, plans = [], triton_launch.plans


def record(x, y, z, stream, function, packed, metadata, enter, leave, *args):
    launched.append((x, y, z, *args))

CompiledKernel.run = property(lambda self: record)

def adapter(O=48, I=32, r=4, form=Form()):
    return Adapter(Factors(*(torch.ones(s) for s in ((r, I), (O, r), (r, I), (O, r)))), torch.ones(()), form)

def flat(value):
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in flat(item)]
    return [(value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value]

def pointers(value):
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in pointers(item)]
    return [value.data_ptr()] if isinstance(value, torch.Tensor) else []

def check(run, inputs):
    run()
    known = len(plans)
    for _ in range(2):  # by the plan
        run()
    assert len(plans) == known
    first, *rest = launched[-3:]
    for other in rest:
        assert flat(other) == flat(first), (flat(other), flat(first))
        assert set(pointers(inputs)) <= set(pointers(other))
    return known

a, b = adapter(), adapter()
W = torch.ones(48, 32, dtype=torch.bfloat16)
assert check(lambda: compose(W, [a]), [W, *a.factors, a.scale]) == 1
compose(W.clone(), [b])  # other tensors of the same kinds: the same plan, and their own pointers
assert len(plans) == 1 and set(pointers([*b.factors, b.scale])) <= set(pointers(launched[-1]))
assert check(lambda: compose(W, [a, b]), [*a.factors, *b.factors]) == 2
for k, run in enumerate([
    lambda: compose(torch.ones(48 * 32 + 1, dtype=torch.bfloat16)[1:].view(48, 32), [a]),
    lambda: compose(W.t().contiguous().t(), [a]),
    lambda: compose(W, [a], torch.float32),
    lambda: compose(W, [adapter(r=5)]),
    lambda: compose(W, [adapter(form=Form("identity"))]),
    lambda: compose(None, [a]),
    lambda: compose(W, [a], products="tf32x3"),
]):
    assert check(run, []) == 3 + k, k
plans.clear()
dy, x = torch.ones(16, 48).bfloat16(), torch.ones(16, 32).bfloat16()
gradients = triton_gradient.factor_gradients
assert check(lambda: gradients(dy, x, [a]), [dy, x, *a.factors, a.scale]) == 1
scaler = torch.ones(())
for k, run in enumerate([
    lambda: gradients(dy, x, [a], scaler),
    lambda: gradients(dy, x, [a], deterministic=True),
    lambda: gradients(dy[:7], x[:7], [a]),
    lambda: gradients(dy[:1].expand(16, -1), x, [a]),
    lambda: gradients(None, W, [a]),
    lambda: gradients(dy.float(), x.float(), [a]),
]):
    assert check(run, []) == 2 + k, k
experts = Adapter(Factors(*(torch.ones(3, *f.shape) for f in a.factors)), a.scale, a.form)
G, chosen, into = torch.ones(3, 48, 32), torch.tensor([0, 2]), torch.zeros(3, 48, 32)
known = len(plans)
assert check(lambda: compose(G, [experts], torch.float32, into, chosen), [G, into, chosen]) == known + 1
assert check(lambda: compose(G, [experts], torch.float32, G, chosen), [G, chosen]) == known + 1  # in place: alike
assert check(lambda: gradients(None, G, [experts], routed=chosen), [G, chosen]) == known + 2
known = len(plans)
compose(W, [Adapter(Factors(*(f.t().contiguous().t() for f in a.factors)), a.scale, a.form)])  # copied: no plan
assert len(plans) == known
for run in (lambda: compose(W[:5], [a]), lambda: gradients(dy, x.float(), [a]), lambda: compose(W, [])):
    try:
        run()
    except ValueError:
        continue
    raise AssertionError("a plan was taken for what does not fit")
print("right")
"""


def test_a_plan_launches_what_triton_would():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "right"


def bf16(*shape, stride=None, start=0):
    """An empty matrix whose rows are `stride` apart, that starts `start` entries into its memory."""
    rows, columns = shape
    memory = torch.empty(start + rows * (stride or columns), dtype=torch.bfloat16)
    return memory[start:].as_strided(shape, (stride or columns, 1))


@pytest.mark.parametrize(
    ("dy", "x"),
    [
        (bf16(64, 4096), bf16(64, 4096, start=1)),
        (bf16(64, 4096, stride=4100), bf16(64, 4096)),
        (None, bf16(4096, 4096, stride=4097)),
    ],
    ids=["first entry", "strides", "G"],
)
def test_what_is_not_aligned_gets_no_tile_that_would_spill(monkeypatch, dy, x):
    monkeypatch.setattr(triton_launch, "target", lambda device: "sm_90")
    monkeypatch.setattr(triton_launch, "processors", lambda device: 132)
    aligned = bf16(64, 4096)
    assert triton_gradient.tile_for(4096, 4096, 1, aligned, aligned)[:2] == (128, 256)
    assert triton_gradient.tile_for(4096, 4096, 1, dy, x)[:2] == (64, 64)


@pytest.mark.parametrize(
    ("O", "I", "batch", "tile"),
    [
        (99 * 128, 256, 1, (128, 256)),  # 99 programs: three quarters of 132 processors
        (3 * 128, 256, 33, (128, 256)),
        (128, 3 * 256, 33, (128, 256)),
        (98 * 128, 256, 1, (128, 128)),  # 98, and 196 of the next smaller
        (99 * 128 - 1, 255, 1, (128, 256)),  # a part of a tile is one
        (64, 64, 1, (64, 64)),  # never enough: the smallest
    ],
)
def test_the_largest_tile_that_keeps_the_card_busy(monkeypatch, O, I, batch, tile):
    monkeypatch.setattr(triton_launch, "target", lambda device: "sm_90")
    monkeypatch.setattr(triton_launch, "processors", lambda device: 132)
    assert triton_gradient.tile_for(O, I, batch, None, bf16(16, 256))[:2] == tile
