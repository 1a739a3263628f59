"""What PyTorch's counter says of the operators is the arithmetic that they do, product by product."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dual_lora.core import whole
from dual_lora.core.blocked import Needs
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form
from dual_lora.core.sampled import Geometry, with_sampled_gradient

T, O, I = 80, 12, 20


def adapter(*experts, r1=3, r2=2):
    torch.manual_seed(0)
    shapes = (r1, I), (O, r1), (r2, I), (O, r2)
    factors = (torch.randn(*experts, *shape, requires_grad=True) for shape in shapes)
    return Adapter(Factors(*factors), torch.tensor(0.5), Form())


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("need_x", "need_factors"), [(True, True), (False, True), (True, False)])
def test_a_linear_layer(need_x, need_factors):
    adapters = [adapter(), adapter(r1=4)]
    x, W, dy = torch.randn(T, I, requires_grad=need_x), torch.randn(O, I), torch.randn(T, O)
    for factor in (f for a in adapters for f in a.factors):
        factor.requires_grad_(need_factors)
    needs = Needs(need_x, False, need_factors)
    with torch.no_grad():
        products = counted(lambda: whole.forward(x, W, adapters))
        products += counted(lambda: whole.backward(dy, x, W, adapters, None, needs))
    assert counted(lambda: dual_lora_linear(x, W, None, adapters).backward(dy)) == products > 0


def test_a_sample_counts_what_it_takes():
    x, W, dy = torch.randn(2 * T, I), torch.randn(O, I), torch.randn(2 * T, O)
    exact = counted(lambda: dual_lora_linear(x, W, None, [adapter()]).backward(dy))
    half = counted(lambda: dual_lora_linear(x, W, None, [adapter()], share=0.5).backward(dy))
    assert exact - half == 2 * T * O * I
    conv = nn.functional.conv1d
    W, x = torch.randn(O, I, 3, requires_grad=True), torch.randn(2, I, T)
    whole_gradient = counted(lambda: conv(x, W, padding=1).sum().backward())
    same = counted(
        lambda: with_sampled_gradient(
            lambda W: conv(x, W, padding=1), x, W, 0.5, geometry=Geometry([1], [1], [1])
        ).sum().backward()
    )  # fmt: skip
    assert whole_gradient - same == 2 * T * O * I * 3


def test_a_composed_weight_of_all_experts_or_of_some():
    one = counted(lambda: dual_lora_weight(torch.randn(O, I), [adapter()]).sum().backward())
    assert one == 4 * 2 * O * I * (3 + 2)  # P and Q, again in backward, and four gradients
    experts = [adapter(6)]
    assert counted(lambda: dual_lora_weight(torch.randn(6, O, I), experts).sum().backward()) == 6 * one
    routed = torch.tensor([1, 4])
    assert counted(lambda: dual_lora_weight(torch.randn(6, O, I), experts, routed=routed).sum().backward()) == 2 * one


def test_rows_of_an_embedding():
    rows = torch.tensor([1, 5, 7])
    assert counted(lambda: dual_lora_embedding(rows, torch.randn(O, I), [adapter()]).sum().backward()) == (
        4 * 2 * len(rows) * I * (3 + 2)
    )
