"""PEFT's HiRA and LoHa by our product, against PEFT's own layers and against the formula in fp64."""

import copy
import pickle

import pytest
import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tiny import ONE_GRAPH
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora import DualLoraWarning, fuse, unfuse
from dual_lora.core import op

TARGETS = ["first", "second"]
METHODS = {
    "hira": lambda **o: HiraConfig(r=5, target_modules=TARGETS, init_weights=False, **o),
    "loha": lambda **o: LoHaConfig(r=5, alpha=7, target_modules=TARGETS, init_weights=False, **o),
}


class Model(nn.Module):
    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, width), nn.Linear(width, 33, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def theirs(method: str, dtype: torch.dtype = torch.float32, width: int = 40, **options):
    torch.manual_seed(0)
    model = get_peft_model(Model(width), METHODS[method](**options)).to(dtype)
    for name, parameter in model.named_parameters():
        if "hira_" in name or "hada_" in name:
            parameter.data *= 0.3 if "hira_" in name else 2.0  # an update that shows, and does not swamp the base
    return model


def inputs(dtype: torch.dtype = torch.float32, tokens: int = 70) -> torch.Tensor:
    return torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient, of an output that weighs all numbers differently."""
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * weights).sum(), [x, *named.values()])
    return {"y": y.detach(), **dict(zip(["x", *named], grads, strict=True))}


def assert_close(got: dict, want: dict, bound: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        difference = (got[name].double() - want[name].double()).norm()
        assert difference <= bound * want[name].double().norm(), (name, difference)


def by_formula(model: nn.Module, method: str, x: torch.Tensor) -> torch.Tensor:
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        W = layer.base_layer.weight
        if method == "hira":
            W = W + W * (layer.hira_B["default"] @ layer.hira_A["default"])
        else:
            one, two = (
                getattr(layer, f"hada_w{k}_a")["default"] @ getattr(layer, f"hada_w{k}_b")["default"] for k in (1, 2)
            )
            W = W + float(torch.tensor(7 / 5)) * one * two
        x = x @ W.T + (0 if layer.base_layer.bias is None else layer.base_layer.bias)
        x = x.tanh() if name == "first" else x
    return x


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("width", [40, 12_000], ids=["whole", "blocks"])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_peft_s_and_the_formula_s(method, width, dtype, bound, monkeypatch):
    model, x = theirs(method, dtype, width), inputs(dtype)
    want = run(model, x)
    done = fuse(model)
    assert done.layers == [f"base_model.model.{name}" for name in TARGETS]
    assert not done.left
    calls = []
    product = op._linear
    monkeypatch.setattr(op, "_linear", lambda *a: calls.append(1) or product(*a))
    got = run(model, x)
    assert len(calls) == 2  # it was ours
    assert_close(got, want, bound)
    double = copy.deepcopy(model).double()
    truth = by_formula(double, method, x.double())
    assert (got["y"].double() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("method", METHODS)
def test_lower_precisions_and_autocast(method):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model, x = theirs(method), inputs(dtype)
        for name in TARGETS:
            getattr(model.base_model.model, name).base_layer.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            want = run(model, x)
            fuse(model)
            got = run(model, x)
        assert_close(got, want, 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_files_switching_and_merging_are_peft_s(method, tmp_path):
    model, x = theirs(method), inputs()
    state, requires = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    plain = model(x).detach()
    fuse(model)
    assert [p.requires_grad for p in model.parameters()] == requires
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model(), tmp_path)
    again.load_state_dict(state)
    assert torch.equal(again(x), plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(x), model(x))
    with model.disable_adapter():
        off = model(x)
    assert not torch.allclose(off, plain, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(model(x), plain, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(x), plain, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters(method):
    model, x = theirs(method), inputs()
    model.add_adapter("other", METHODS[method](rank_pattern={"first": 3}))
    model.base_model.set_adapter(["default", "other"])
    both = run(model, x)
    fuse(model)
    assert_close(run(model, x), both, 2e-5)
    model.set_adapter("other")
    other = run(model, x)
    unfuse(model)
    assert_close(other, run(model, x), 2e-5)
    model.delete_adapter("default")
    fuse(model)
    assert_close(run(model, x), other, 2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_unfused_it_is_as_it_was(method):
    model, x = theirs(method), inputs()
    before = {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}
    want = run(model, x)
    names = fuse(model).layers
    assert unfuse(model) == names
    assert {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()} == before
    got = run(model, x)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert unfuse(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_weight_s_size_is_kept(method):
    model, x = theirs(method), inputs(tokens=3)
    sizes = {24 * 40, 40 * 33}
    for fused in (False, True):
        if fused:
            fuse(model)
        weights = {getattr(model.base_model.model, name).base_layer.weight.data_ptr() for name in TARGETS}
        kept = []

        def pack(tensor, kept=kept, weights=weights):
            if tensor.numel() in sizes and tensor.data_ptr() not in weights:
                kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        assert bool(kept) != fused


@pytest.mark.parametrize("method", METHODS)
def test_token_sampling(method):
    model, x = theirs(method), inputs(tokens=400)
    exact = run(model, x)
    fuse(model, token_sampling=0.5)
    runs = []
    for seed in range(30):
        torch.manual_seed(seed)
        runs.append(run(model, x))
    name = next(n for n in exact if n.endswith(("first.hira_A.default", "first.hada_w1_b.default")))
    assert torch.allclose(runs[0]["x"], exact["x"], atol=1e-5)
    assert not torch.allclose(runs[0][name], exact[name], rtol=1e-3)
    mean = sum(r[name] for r in runs) / len(runs)
    single = (runs[0][name] - exact[name]).norm()
    assert (mean - exact[name]).norm() < 0.5 * single
    fuse(model)
    assert_close(run(model, x), exact, 2e-5)
    with pytest.raises(ValueError, match="token_sampling must be a share"):
        fuse(model, token_sampling=2.0)


def test_gpt2_s_transposed_layers():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv1D(40, 24), Conv1D(33, 40)

        forward = Model.forward

    torch.manual_seed(0)
    model, x = get_peft_model(Transposed(), METHODS["hira"](fan_in_fan_out=True)), inputs()
    want = run(model, x)
    assert len(fuse(model).layers) == 2
    assert_close(run(model, x), want, 2e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("effective", [False, True])
def test_loha_s_convolutions(effective, padding_mode):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode=padding_mode), nn.Conv2d(6, 5, 1))
    model = get_peft_model(
        base, LoHaConfig(r=3, target_modules=["0", "1"], init_weights=False, use_effective_conv2d=effective)
    )
    x = torch.randn(2, 4, 9, 9)
    want = run(model, x)
    if effective or padding_mode != "zeros":
        with pytest.warns(DualLoraWarning, match="1 of 2 layers compute as PEFT has it"):
            done = fuse(model)
        words = "effective convolution" if padding_mode == "zeros" or effective else "padding_mode='circular'"
        assert words in done.left["base_model.model.0"]
    else:
        done = fuse(model)
    assert done.layers[-1] == "base_model.model.1"
    assert_close(run(model, x), want, 2e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [("hira", {"hira_dropout": 0.1}), ("loha", {"rank_dropout": 0.1}), ("loha", {"module_dropout": 0.1})],
)
def test_dropout_stays_peft_s(method, options):
    model, x = theirs(method, **options), inputs()
    with pytest.warns(DualLoraWarning, match=r"2 of 2 layers compute as PEFT has it\. .*dropout"):
        done = fuse(model)
    assert done.layers == []
    assert list(done.left) == [f"base_model.model.{name}" for name in TARGETS]
    outputs = []
    for one in (model.train(), theirs(method, **options).train()):
        torch.manual_seed(3)
        outputs.append(one(x))
    assert torch.equal(*outputs)


def test_an_adapter_with_dropout_that_comes_later_stays_peft_s():
    model, x = theirs("hira"), inputs()
    fuse(model)
    model.add_adapter("dropped", METHODS["hira"](hira_dropout=0.5))
    model.set_adapter("dropped")
    model.train()
    torch.manual_seed(0)
    got = model(x)
    unfuse(model)
    torch.manual_seed(0)
    assert torch.equal(model(x), got)


def test_a_base_that_trains_or_has_hooks_stays_peft_s():
    model, x = theirs("hira"), inputs()
    fuse(model)
    model.base_model.model.first.base_layer.weight.requires_grad_(True)
    seen = []
    model.base_model.model.second.base_layer.register_forward_hook(lambda *_: seen.append(1))
    got = run(model, x)
    assert seen
    unfuse(model)
    want = run(model, x)
    assert_close(got, want, 0.0)
    with pytest.warns(DualLoraWarning, match="its base trains"):
        done = fuse(model)
    assert "has hooks" in done.left["base_model.model.second"]


def test_other_layers_are_named():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first = nn.Embedding(8, 24), nn.Linear(24, 6)

    model = get_peft_model(Mixed(), HiraConfig(r=2, target_modules=["table", "first"]))
    with pytest.warns(DualLoraWarning, match=r"table: PEFT's hira\.Embedding has no other form here"):
        assert fuse(model).layers == ["base_model.model.first"]
    with pytest.raises(ValueError, match="no layer of PEFT's HiRA or LoHa"):
        fuse(get_peft_model(Model(), LoraConfig(target_modules=TARGETS)))


@ONE_GRAPH
@pytest.mark.parametrize("method", METHODS)
def test_compiled(method):
    model, x = theirs(method), inputs()
    fuse(model)
    want = run(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = {name.replace("_orig_mod.", ""): value for name, value in run(compiled, x).items()}
    assert_close(got, want, 2e-5)
