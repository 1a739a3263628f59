"""Gradient pass, first step and contribution: judged by whole matrices on a model of two layers."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core.reference import delta_weight, steepness
from dual_lora.lab.analysis import matrices
from dual_lora.lab.analysis.contribution import contributions, factor_state
from dual_lora.lab.analysis.gradients import first_step, gradient_pass, gradient_shares
from dual_lora.lab.analysis.updates import adapted_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 24)
        self.second = nn.Linear(24, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK", 100)


def dual(**options):
    torch.manual_seed(0)
    return get_peft_model(Net(), DualLoraConfig(r=6, target_modules=["first", "second"], init_weights=False, **options))


def batch(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(12, 20, generator=generator), "y": scale * torch.randn(12, 5, generator=generator)}


def loss_of(model, batch):
    return (model(batch["x"]) - batch["y"]).square().sum()


def weight_gradient(model, name, batch):
    """∂L/∂W of the composed weight, from a plain model that has it as its own."""
    plain = Net()
    plain.load_state_dict(Net().state_dict())
    with torch.no_grad():
        for n, layer in adapted_layers(model).items():
            adapter = layer.adapter("default")
            update = delta_weight(adapter.factors, adapter.scale, adapter.form)
            plain.get_submodule(n).weight.copy_(layer.get_base_layer().weight + update)
            plain.get_submodule(n).bias.copy_(layer.get_base_layer().bias)
    loss_of(plain, batch).backward()
    return plain.get_submodule(name).weight.grad


@pytest.mark.parametrize("ste", ["clip", "hardtanh", "identity", "surrogate"])
def test_entries_cut_are_those_that_the_estimator_changes(ste):
    model = dual(ste=ste)
    with torch.no_grad():
        adapted_layers(model)["first"].dual_lora_D["default"].mul_(4)  # so that some |Q| are above 1
    found = gradient_pass(model, [batch()], loss_of)
    for name, layer in adapted_layers(model).items():
        (A, B, C, D), scale, *_ = layer.adapter("default")
        P, Q = (B @ A).detach(), (D @ C).detach()
        H = scale * weight_gradient(model, name, batch()) * P.clamp(min=0)
        narrowed = H / (1 + steepness(Q.square().mean()) * Q.square())
        kept = {"clip": H.clamp(-1, 1), "hardtanh": torch.where(Q.abs() > 1, 0, H), "identity": H}.get(ste, narrowed)
        cut = kept != H
        row = found[name]
        assert row["cut"] == pytest.approx(float(cut.double().mean()))
        assert row["cut_moving"] == pytest.approx(float(cut.sum() / (H != 0).sum()))
        assert row["lost"] == pytest.approx(1 - float(kept.abs().sum() / H.abs().sum()), abs=1e-5)
        assert row["largest_H"] == pytest.approx(float(H.abs().max()), rel=1e-4)
    assert ste == "identity" or any(row["cut"] > 0.01 for row in found.values())  # or the test says nothing


def test_no_entry_is_cut_when_gradients_are_small():
    found = gradient_pass(dual(), [batch()], lambda m, b: 1e-6 * loss_of(m, b))
    assert all(row["cut"] == 0 and row["lost"] == 0 for row in found.values())


def test_batches_add_up():
    model = dual()
    one, other = (gradient_pass(model, [batch(seed)], loss_of)["first"] for seed in (0, 1))
    both = gradient_pass(model, [batch(0), batch(1)], loss_of)["first"]
    assert both["cut"] == pytest.approx((one["cut"] + other["cut"]) / 2)
    assert both["largest_H"] == max(one["largest_H"], other["largest_H"])


def test_gradient_shares_of_the_groups():
    model = dual()
    loss_of(model, batch()).backward()
    layer = adapted_layers(model)["first"]
    squares = {k: float(getattr(layer, f"dual_lora_{k}")["default"].grad.square().sum()) for k in "ABCD"}
    total = sum(squares.values())
    found = gradient_shares(layer)
    assert found["share_magnitude"] == pytest.approx((squares["A"] + squares["B"]) / total)
    assert found["share_direction"] == pytest.approx((squares["C"] + squares["D"]) / total)
    assert found["share_dual_lora_C"] == pytest.approx(squares["C"] / total)
    entries = layer.dual_lora_C["default"].numel() + layer.dual_lora_D["default"].numel()
    assert found["rms_direction"] == pytest.approx(math.sqrt((squares["C"] + squares["D"]) / entries))
    model.zero_grad()
    assert gradient_shares(layer) == {}


def test_gradient_pass_leaves_no_trace_and_knows_other_methods():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"], lora_dropout=0.5))
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = gradient_pass(model.train(), [batch()], loss_of)
    assert found["first"]["share_lora_B"] == 1  # B = 0 at the start: A has no gradient
    assert "cut" not in found["first"]
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_first_step_of_lora_goes_where_the_formula_says():
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=2, target_modules=["first"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = first_step(model, batch(), loss_of, learning_rate=1e-3)
    layer = adapted_layers(model)["first"]
    plain = model.get_base_model()
    A = layer.lora_A["default"].weight.detach()
    weight = layer.get_base_layer().weight
    weight.requires_grad_(True)
    loss_of(plain, batch()).backward()
    G = weight.grad
    move = -torch.sign(G @ A.t()) @ A  # Adam's first step on B, which alone has a gradient
    assert found["first"]["gradient_cosine"] == pytest.approx(_cosine(move, -G), abs=1e-3)
    assert found["first"]["sign_cosine"] == pytest.approx(_cosine(move, -torch.sign(G)), abs=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_first_step_at_lambda_zero_is_nothing():
    torch.manual_seed(0)
    model = get_peft_model(Net(), DualLoraConfig.paper(r=6, target_modules=["first"], warmup_steps=10))
    assert first_step(model, batch(), loss_of, 1e-3)["first"]["gradient_cosine"] != 0  # NaN: no step at all
    adapted_layers(model)["first"].set_left("default", 0)
    assert first_step(model, batch(), loss_of, 1e-3)["first"]["gradient_cosine"] > 0


def _cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_contribution_of_a_group_that_did_nothing_and_of_one_that_did_all():
    model = dual()
    start = factor_state(model)
    layer = adapted_layers(model)["first"]
    with torch.no_grad():
        layer.dual_lora_B["default"].mul_(-1)  # only the magnitude has moved
    held = {n: p.clone() for n, p in model.named_parameters()}

    def loss(m):
        with torch.no_grad():
            return float(loss_of(m, batch()))

    rows = {(r["what"], r["group"]): r for r in contributions(model, start, loss, draws=3)}
    trained = rows["as trained", ""]["loss"]
    assert rows["set back to the start", "direction"]["loss"] == trained
    assert rows["set back to the start", "magnitude"]["loss"] != trained
    drawn = rows["drawn anew", "direction"]
    assert drawn["loss"] != trained
    assert drawn["spread"] > 0
    with model.disable_adapter():
        assert rows["without the adapter", "all"]["loss"] == loss(model)
    assert all(torch.equal(p, held[n]) for n, p in model.named_parameters())


def test_contribution_of_other_methods_is_by_kind_of_tensor():
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    rows = contributions(model, factor_state(model), lambda m: float(loss_of(m, batch()).detach()))
    assert {r["group"] for r in rows} == {"", "all", "lora_A", "lora_B"}
    rows = contributions(model, factor_state(model), lambda m: 0.0, keeps_base=False)
    assert {r["group"] for r in rows} == {"", "lora_A", "lora_B"}, "PiSSA's base without its adapter is no base"


class Twice(nn.Module):
    """One layer that is called twice, and an embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(self.words(x))))


def twice():
    torch.manual_seed(0)
    config = DualLoraConfig(r=4, target_modules=["words", "layer"], init_weights=False, warmup_steps=0)
    return get_peft_model(Twice(), config), {"x": torch.arange(9)}, lambda model, batch: model(batch["x"]).pow(2).sum()


def test_the_first_step_of_a_layer_that_is_called_twice_is_judged_by_the_whole_gradient():
    model, batch, loss = twice()
    layer = model.base_model.model.layer
    before = layer.get_delta_weight("default").detach()
    found = first_step(model, batch, loss, 0.01)
    assert set(found) == {"layer"}, "an embedding's gradient is no product"
    plain = Twice()
    with torch.no_grad():
        for name in ("words", "layer"):
            own = model.base_model.model.get_submodule(name)
            plain.get_submodule(name).weight.copy_(own.get_base_layer().weight + own.get_delta_weight("default"))
        plain.layer.bias.copy_(layer.get_base_layer().bias)
    loss(plain, batch).backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    model.eval()
    loss(model, batch).backward()
    optimizer.step()
    move = layer.get_delta_weight("default").detach() - before
    cosine = torch.nn.functional.cosine_similarity(move.flatten(), -plain.layer.weight.grad.flatten(), dim=0)
    assert found["layer"]["gradient_cosine"] == pytest.approx(float(cosine), abs=1e-4)


def test_embeddings_have_shares_and_no_figures_of_the_product():
    model, batch, loss = twice()
    rows = gradient_pass(model, [batch], loss)
    assert "cut" in rows["layer"]
    assert "cut" not in rows["words"]
    assert rows["words"]["share_magnitude"] > 0
