"""`token_sampling`: what the configuration takes, which layers sample, and that a run can be repeated."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core.tokens import AUTO, EXACT


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.conv = nn.Linear(12, 20), nn.Linear(20, 8), nn.Conv1d(12, 12, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.conv(x.mT).mT)))


def model(targets=("first", "second"), **options):
    torch.manual_seed(1)
    return get_peft_model(Net(), DualLoraConfig(r=4, target_modules=list(targets), **options))


def shares(model):
    return {name: getattr(model.base_model.model, name).states["default"].share for name in ("first", "second")}


def gradients(model, seed=7, adapters=("default",)):
    x = torch.randn(4, 50, 12, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def differ(a, b):
    return not all(map(torch.equal, a, b))


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half", True])
def test_what_is_no_share(share):
    with pytest.raises(ValueError, match="share above 0 and at most 1, 'auto' or None"):
        DualLoraConfig(token_sampling=share)
    with pytest.raises(ValueError, match="sampling_pattern"):
        DualLoraConfig(sampling_pattern={"first": share})


def test_layers_by_pattern():
    assert shares(model()) == {"first": EXACT, "second": EXACT}
    assert shares(model(token_sampling=0.25)) == {"first": 0.25, "second": 0.25}
    mixed = model(token_sampling=0.25, sampling_pattern={"second": None, "first": "auto"})
    assert shares(mixed) == {"first": AUTO, "second": EXACT}


def test_a_sample_is_the_seeds():
    exact, half = gradients(model()), model(token_sampling=0.5)
    assert not differ(gradients(half, seed=1), gradients(half, seed=1))
    assert differ(gradients(half, seed=1), gradients(half, seed=2))
    assert differ(gradients(half), exact)


def test_one_layer_that_samples_leaves_the_others_exact():
    half = model(token_sampling=0.5, sampling_pattern={"second": None})
    gradients(half)
    own = half.base_model.model.second.dual_lora_B["default"].grad
    exact = model()
    gradients(exact)
    assert torch.equal(own, exact.base_model.model.second.dual_lora_B["default"].grad)


def test_the_output_is_exact():
    x = torch.randn(4, 50, 12)
    assert torch.equal(model(token_sampling=0.25)(x), model()(x))


def test_the_setting_is_saved_with_the_adapter(tmp_path):
    model(token_sampling="auto", sampling_pattern={"first": 0.5}).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert shares(loaded) == {"first": 0.5, "second": AUTO}


def test_one_gradient_serves_several_adapters():
    """Exact if one of them wants it so."""
    both = model(token_sampling=0.5)
    both.add_adapter("other", DualLoraConfig(r=4, target_modules=["first", "second"]))
    both.base_model.set_adapter(["default", "other"])
    assert not differ(gradients(both, seed=1), gradients(both, seed=2))


def test_a_copy_samples_as_well():
    half = model(token_sampling=0.5)
    assert shares(copy.deepcopy(half)) == shares(half)


def test_layers_that_cannot_sample_say_so():
    with pytest.warns(UserWarning, match=r"token_sampling has no effect on Conv1d"):
        model(("first", "conv"), token_sampling=0.5)


def test_it_learns():
    """A teacher's update is found from a quarter of the tokens, about as well as from all."""
    left = {}
    for share in (None, 0.25):
        torch.manual_seed(0)
        student = model(token_sampling=share)
        goal = Net()
        with torch.no_grad():
            goal.first.weight += 0.3 * torch.randn(20, 2) @ torch.randn(2, 12)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
        for step in range(200):
            x = torch.randn(4, 100, 12, generator=torch.Generator().manual_seed(step))
            loss = (student(x) - goal(x)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            left.setdefault(share, []).append(loss.item())
    first, exact, quarter = left[None][0], left[None][-1], left[0.25][-1]
    assert exact < 0.25 * first
    assert quarter < 2 * exact
