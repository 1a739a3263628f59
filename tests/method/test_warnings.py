"""What a layer warns of is said once a model: not once a layer, and not once a process."""

import copy
import warnings

import pytest
import torch
from tiny import Mlp, adapted, layers, points
from torch import nn


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)


def cast_by_foreign_code():
    return cast(adapted())


def cast(model):
    for name, p in model.named_parameters():
        if "dual_lora_" in name:
            p.data = p.data.to(torch.bfloat16)
    model(points())
    return model


CASES = {
    "cast down": (cast_by_foreign_code, "were cast to"),
    "dropout of attention": (
        lambda: adapted(Attentions(), target_modules=["one", "two"], dropout=0.1),
        "has no effect on nn.MultiheadAttention",
    ),
    "autocast_adapter_dtype": (
        lambda: adapted(Mlp(), target_modules=["first", "second"]).base_model._cast_adapter_dtype("default", False),
        "autocast_adapter_dtype=False has no effect",
    ),
}


def said(do, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return sum(words in str(w.message) for w in caught)


@pytest.mark.parametrize("case", CASES)
def test_every_model_says_it_once(case):
    do, words = CASES[case]
    assert [said(do, words) for _ in range(3)] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:Dual LoRA's factors were cast:dual_lora.DualLoraWarning")
def test_a_copy_says_it_again_and_its_layers_together():
    model = cast_by_foreign_code()
    assert said(lambda: cast(model), "were cast to") == 0
    copied = copy.deepcopy(model)
    assert len({id(m.shared) for m in layers(copied).values()}) == 1
    assert said(lambda: cast(copied), "were cast to") == 1
