"""The operators in plain aten: the operators' own values, and nothing of ours left in the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formula import FORMS, name_of
from torch import nn

from dual_lora.core import decompositions
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form

O, I, T = 20, 12, 5
TWO = (Form(), Form())


def factors(*lead, seed=0):
    """Multiples of 1/4, so that both ways agree on every sign; zeros among the products."""
    gen = torch.Generator().manual_seed(seed)

    def quarters(*shape):
        return torch.randint(-3, 4, (*lead, *shape), generator=gen) / 4

    return Factors(quarters(3, I), quarters(O, 3), quarters(2, I), quarters(O, 2))


def adapters(*lead, forms=TWO):
    return [Adapter(factors(*lead, seed=k), torch.tensor(0.5 + k), form) for k, form in enumerate(forms)]


class Linear(nn.Module):
    def __init__(self, weight=None, bias=None, forms=TWO):
        super().__init__()
        self.weight, self.bias, self.adapters = weight, bias, adapters(forms=forms)

    def forward(self, x):
        return dual_lora_linear(x, self.weight, self.bias, self.adapters)


class Weight(nn.Module):
    def __init__(self, weight, lead=(), dtype=None):
        super().__init__()
        self.weight, self.dtype, self.adapters = weight, dtype, adapters(*lead)

    def forward(self, x, routed=None):
        return x + dual_lora_weight(self.weight, self.adapters, routed=routed, dtype=self.dtype)


class Embedding(nn.Module):
    def __init__(self, weight, **options):
        super().__init__()
        self.weight, self.options, self.adapters = weight, options, adapters()

    def forward(self, ids):
        return dual_lora_embedding(ids, self.weight, self.adapters, **self.options)


def assert_decomposes(module, *args):
    """The exported program with our operators, and without them, gives what the module gives."""
    expected = module(*args)
    program = torch.export.export(module, args)
    assert any(str(node.target).startswith("dual_lora.") for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), expected, rtol=0, atol=0)
    plain = program.run_decompositions(decompositions.decompositions())
    assert not any(str(node.target).startswith("dual_lora.") for node in plain.graph.nodes)
    got = plain.module()(*args)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def weight(*lead, dtype=torch.float32):
    return torch.randn(*lead, O, I, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("form", [f for f in FORMS if f["ste"] == "clip"], ids=name_of)
def test_every_form_that_forward_tells_apart(form):
    assert_decomposes(Linear(weight(), torch.ones(O), forms=[Form(**form)]), torch.randn(2, T, I))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_precision_is_that_of_x_and_the_sum_is_rounded_once(dtype):
    assert_decomposes(Linear(weight(dtype=dtype)), torch.randn(T, I, dtype=dtype))


def test_the_adapters_share_alone():
    assert_decomposes(Linear(), torch.randn(T, I))
    assert_decomposes(Weight(None, dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16))


def test_composed_weight_with_routed_experts():
    x = torch.ones(O, I)
    assert_decomposes(Weight(weight()), x)
    module = Weight(weight(4), lead=(4,))
    assert_decomposes(module, x)
    routed = torch.tensor([2, 0])
    assert not torch.equal(module(x, routed), module(x))
    assert_decomposes(module, x, routed)


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3}, {"max_norm": 1.5}, {"max_norm": 2.0, "norm_type": 1.0}], ids=str
)
def test_embedding(options):
    assert_decomposes(Embedding(weight(), **options), torch.tensor([[0, 3, 3], [7, 19, 1]]))


def test_shapes_come_from_the_operators_own_fake(monkeypatch):
    """Symbolic sizes make PyTorch prefer a decomposition, whose strides may be others and which is slow to trace."""

    def never(*args):
        raise AssertionError("traced through the decomposition")

    monkeypatch.setitem(torch._decomp.decomposition_table, torch.ops.dual_lora.linear.default, never)
    x = torch.randn(T, I)
    program = torch.export.export(Linear(weight()), (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    assert program.module()(torch.randn(3, I)).shape == (3, O)


IN_CI = """
import os, torch
from operands import gaussian
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Form
os.environ["CI"] = "true"
x, weight, bias, factors = gaussian()
x, weight = (t.detach().T.contiguous().T for t in (x, weight))
adapters = [Adapter(f, torch.tensor(0.5), Form()) for f in (factors, gaussian()[3])]
function = torch.no_grad()(lambda x: dual_lora_linear(x, weight, bias, adapters))
torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ci", [pytest.param("", marks=pytest.mark.long), "true"], ids=["set later", "set before"])
def test_where_ci_is_set_inductor_takes_the_operator_all_the_same(ci, tmp_path):
    """PyTorch refuses there what has a decomposition; with an empty cache, so that Inductor is asked.

    The operator alone, so that Inductor has no C++ to compile.
    """
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CI": ci, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", IN_CI], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
