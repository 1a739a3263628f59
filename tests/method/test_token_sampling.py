"""`token_sampling`: what the configuration takes, which layers sample, and that a run can be repeated."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import EXPERTS, GROUPED, ONE_GRAPH, mixture
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def test_one_layer_that_samples_leaves_the_others_exact():
    half = model(token_sampling=0.5, sampling_pattern={"second": None})
    gradients(half)
    own = half.base_model.model.second.dual_lora_B["default"].grad
    exact = model()
    gradients(exact)
    assert torch.equal(own, exact.base_model.model.second.dual_lora_B["default"].grad)


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


CONVOLUTIONS = {
    "plain": {"padding": 1},
    "grouped, with a stride": {"padding": 1, "groups": 3, "stride": 2},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflected": {"padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


class Pictures(nn.Module):
    def __init__(self, checkpointed=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 9, (3, 2), dtype=torch.float64, **options)
        self.relu = nn.ReLU(inplace=True)
        self.checkpointed = checkpointed

    def forward(self, x):
        both = nn.Sequential(self.conv, self.relu)
        return checkpoint(both, x, use_reentrant=False) if self.checkpointed else both(x)


def adapted(base, share, **options):
    """With factors that make an update, so that each of them has a gradient."""
    torch.manual_seed(1)
    net = get_peft_model(base, DualLoraConfig(r=4, ste="identity", token_sampling=share, **options))
    for name, p in net.named_parameters():
        if "dual_lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return net


def mean_gradients(net, inputs, monkeypatch, draws):
    """Of the inputs and the factors, averaged over so many draws, which are spread evenly."""
    wanted = [t for t in (*inputs, *net.parameters()) if t.requires_grad]
    found = []
    for k in range(draws):
        draw = torch.tensor((k + 0.5) / draws, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, draw=draw, **__: draw)
        y = net(*inputs)
        found.append(torch.autograd.grad(getattr(y, "logits", y).square().sum(), wanted))
    return [torch.stack(each).mean(0) for each in zip(*found, strict=True)]


def assert_unbiased(make, inputs, monkeypatch, sampled=True, draws=60):
    exact = mean_gradients(make(None), inputs, monkeypatch, 1)
    estimated = mean_gradients(make(0.3), inputs, monkeypatch, draws if sampled else 2)
    own = sum(t.requires_grad for t in inputs)
    for a, b in zip(exact[:own], estimated[:own], strict=True):
        torch.testing.assert_close(a, b)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact[own:], estimated[own:], strict=True)]
    assert max(errors) < 0.15, errors
    assert (min(errors) > 1e-6) == sampled, errors


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_without_bias(kind, monkeypatch):
    x = torch.randn(5, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    options = CONVOLUTIONS[kind] | {"checkpointed": kind == "same"}
    assert_unbiased(lambda share: adapted(Pictures(**options), share, target_modules=["conv"]), [x], monkeypatch)


@ONE_GRAPH
def test_a_compiled_convolution_samples():
    net = adapted(Pictures(padding=1), 0.3, target_modules=["conv"])
    x = torch.randn(5, 6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = [p for p in net.parameters() if p.requires_grad]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = []
    for call, seed in ((compiled, 0), (net, 0), (compiled, 1)):
        torch.manual_seed(seed)
        found.append(torch.autograd.grad(call(x).square().sum(), wanted))
    torch.testing.assert_close(found[0], found[1])
    assert differ(found[0], found[2])


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x):
        return nn.functional.linear(x * 2, self.weight, self.bias)


def test_a_layer_with_a_forward_of_its_own_without_bias(monkeypatch):
    x = torch.randn(5, 60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    base = nn.Sequential(Scaled(8, 6, dtype=torch.float64))
    make = lambda share: adapted(copy.deepcopy(base), share, target_modules=["0"])  # noqa: E731
    assert_unbiased(make, [x], monkeypatch)


@pytest.mark.parametrize(
    ("layout", "implementation"),
    [
        ("mixtral", "eager"),
        pytest.param("mixtral", "grouped_mm", marks=GROUPED),
        ("mixtral", "batched_mm"),
        pytest.param("gpt-oss", "grouped_mm", marks=GROUPED),
    ],
)
def test_experts_without_bias(layout, implementation, monkeypatch):
    ids = torch.randint(0, 64, (4, 120), generator=torch.Generator().manual_seed(5))

    def make(share):
        return adapted(mixture(layout, implementation), share, target_modules=[], target_parameters=EXPERTS)

    assert_unbiased(make, [ids], monkeypatch, sampled=implementation != "batched_mm", draws=30)


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
