"""How many calls one adapted layer costs: they don't depend on the machine, and on small layers they are the time."""

import gc
import sys
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dual_lora import DualLoraConfig


def calls(function):
    """(Python functions, all functions) that a call enters."""
    seen = Counter()

    def note(frame, event, argument):
        seen[event] += 1

    with torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(None)
    return seen["call"], seen["call"] + seen["c_call"]


def trained(config, layers=1):
    """A model of so many layers, its optimizer, and a pass, after the steps in which much is new or watched."""
    torch.manual_seed(0)
    gc.collect()  # models of before, whose layers are watched as long as they live
    model = get_peft_model(nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    chain, x = model.base_model.model, torch.randn(32, 64)
    for _ in range(12):  # the first ten are watched
        chain(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, lambda: chain(x).sum().backward()


@pytest.mark.parametrize(("dropout", "python", "everything"), [(0.0, 138, 240), (0.1, 148, 252)])
def test_a_pass_forward_and_backward(dropout, python, everything):
    """341 and 597 before version 0.2, without dropout."""
    found, theirs = (
        calls(trained(config)[-1])
        for config in (
            DualLoraConfig(r=8, target_modules=["0"], dropout=dropout),
            LoraConfig(r=8, target_modules=["0"], lora_dropout=dropout),
        )
    )
    assert found[0] <= python
    assert found[1] <= everything
    assert found[0] <= 3 * theirs[0]


@pytest.mark.parametrize(("config", "most"), [(DualLoraConfig, 0), (DualLoraConfig.paper, 25)])
def test_an_optimizer_step(config, most):
    """What a layer more adds, less what its parameters add under LoRA."""
    added = []
    for kind in (config, LoraConfig):
        counts = []
        for layers in (2, 4):
            model, optimizer, backward = trained(kind(r=8, target_modules="all-linear"), layers)
            backward()
            counts.append(calls(optimizer.step)[0])
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        added.append((counts[1] - counts[0]) / 2)
    assert added[0] - added[1] <= most, added
