"""LoRA's rate is a good rate: a step of the default start gains what one of LoRA's gains."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dual_lora import DualLoraConfig, DualLoraLayer

STEPS, RATE = 20, 1e-3


class Expert(nn.Module):
    """A parameter with a matrix for each expert, which all of them use."""

    def __init__(self, experts, O, I):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, O, I) / I**0.5)

    def forward(self, x):
        return torch.einsum("ti,eoi->teo", x, self.weight)


def base(kind, O, I):
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(I, O, bias=False),
        "convolution": lambda: nn.Conv2d(I // 9, O, 3, bias=False),
        "embedding": lambda: nn.Embedding(O, I),
        "experts": lambda: Expert(3, O, I),
    }[kind]()


def update_of(model, original):
    weight = next(iter(model.merge_and_unload()[0].parameters()))
    return weight.detach() - original


def gain(config, kind, O, I, seed):
    """-⟨G, ΔW⟩ after 20 steps of Adam on a fixed random gradient G of the weight."""
    layer = base(kind, O, I)
    original = next(layer.parameters()).detach().clone()
    G = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(layer), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        weight_gradient(model, kind, G, O, I)
        optimizer.step()
    return -(G * update_of(model, original)).sum().item()


def weight_gradient(model, kind, G, O, I):
    """A loss whose gradient in the weight is G: the inputs are the unit vectors."""
    if kind == "embedding":
        (model(torch.arange(O)) * G).sum().backward()
    elif kind == "convolution":
        patches = torch.eye(I).view(I, I // 9, 3, 3)
        (model(patches).flatten(1) * G.flatten(1).t()).sum().backward()
    elif kind == "experts":
        (model(torch.eye(I)) * G.permute(2, 0, 1)).sum().backward()
    else:
        (model(torch.eye(I)) * G.t()).sum().backward()


SIZES = [
    *(("linear", O, I, r) for O, I, r in [(64, 64, 2), (64, 64, 64), (576, 576, 8), (1536, 96, 16), (96, 1536, 16)]),
    ("linear", 1024, 1024, 64), ("convolution", 64, 288, 8), ("embedding", 500, 64, 8), ("embedding", 300, 384, 16),
    ("experts", 64, 96, 8),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "O", "I", "r"), SIZES, ids=str)
def test_a_step_gains_what_loras_does(kind, O, I, r):
    """Measured between 1.04 (64 wide, r = 2) and 1.27 (2,048 wide, r = 256); larger sizes stand in the log."""
    target = (
        dict(target_modules=[], target_parameters=["0.weight"]) if kind == "experts" else dict(target_modules=["0"])
    )
    options = dict(r=r, lora_alpha=2 * r, **target)
    ratios = [
        gain(DualLoraConfig(**options), kind, O, I, seed) / gain(LoraConfig(**options), kind, O, I, seed)
        for seed in (1, 2)
    ]
    assert 0.67 < sum(ratios) / 2 < 1.5, ratios


def test_the_default_alpha_is_loras_two_r():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), DualLoraConfig(r=8, target_modules=["0"]))
    layer = next(m for m in model.modules() if isinstance(m, DualLoraLayer))
    assert layer.scaling["default"] == DualLoraConfig(r=8, lora_alpha=16).alpha / 4
