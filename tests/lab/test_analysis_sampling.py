"""What sampled tokens add to the variance of G: judged by whole gradients and by the draws that layers make."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core.tokens import sample
from dual_lora.lab.analysis import sampling
from dual_lora.lab.analysis.sampling import sampling_pass, squared_sums

T, SEQUENCES = 48, 4


@pytest.fixture
def call():
    torch.manual_seed(0)
    x, dy = torch.randn(T, 6, dtype=torch.float64), torch.randn(T, 5, dtype=torch.float64)
    dy *= torch.rand(T, 1).exp().pow(3)
    dy[::7] = 0
    return dy, x


def test_squared_sums_are_those_of_whole_gradients(call, monkeypatch):
    dy, x = call
    monkeypatch.setattr(sampling, "ROWS", 7)
    weights = torch.randn(T, 3, dtype=torch.float64)
    expected = [(dy * w[:, None]).t().mm(x).square().sum() for w in weights.t()]
    torch.testing.assert_close(squared_sums(dy, x, weights), torch.stack(expected))


def of_one_layer(dy, x):
    """The pass over one linear layer whose calls get this x and dy."""
    net = get_peft_model(nn.Sequential(nn.Linear(6, 5, dtype=torch.float64)), DualLoraConfig(r=2, target_modules=["0"]))
    asked = x.view(SEQUENCES, -1, 6).requires_grad_(), dy.view(SEQUENCES, -1, 5)
    (row,) = sampling_pass(net, [{}], lambda model, _: (model(asked[0]) * asked[1]).sum()).values()
    return row


def test_figures_are_those_of_many_draws(call):
    dy, x = call
    row, G = of_one_layer(dy, x), dy.t() @ x
    each = torch.stack([d.t() @ v for d, v in zip(dy.view(SEQUENCES, -1, 5), x.view(SEQUENCES, -1, 6), strict=True)])
    own = (each - each.mean(0)).square().sum() * SEQUENCES / (SEQUENCES - 1)
    for share, name in ((0.5, "added_50"), (0.25, "added_25")):
        errors = []
        for draw in torch.linspace(0, 1, 2000, dtype=torch.float64)[:-1]:
            rows, cols = sample(dy, x, round(share * T), draw)
            errors.append((rows.t() @ cols - G).square().sum())
        assert row[name] == pytest.approx(float(torch.stack(errors).mean() / own), rel=0.2)  # sixteen draws of it
    generator, errors = torch.Generator().manual_seed(1), []
    for _ in range(4000):
        at = torch.randperm(T, generator=generator)[: T // 4]
        errors.append((4 * dy[at].t() @ x[at] - G).square().sum())
    assert row["uniform_25"] == pytest.approx(float(torch.stack(errors).mean() / own), rel=0.05)
    assert row["zero_rows"] == pytest.approx(7 / 48)
    assert row["tokens"] == T


def test_auto_takes_few_tokens_where_few_carry_the_gradient():
    torch.manual_seed(0)
    x, dy = torch.randn(SEQUENCES * 256, 6).double(), torch.randn(SEQUENCES * 256, 5).double()
    dy[torch.arange(len(dy)) % 16 > 0] *= 1e-4
    row = of_one_layer(dy, x)
    assert row["auto_share"] == pytest.approx(1 / 16)
    assert row["auto_added"] < 0.01
    dy = torch.randn_like(dy) * torch.tensor([1.0, 1.001, 1.0, 1.0]).double().repeat_interleave(256)[:, None]
    assert of_one_layer(dy, x)["auto_share"] > 0.4
