"""An adapter that does not train is noticed; a healthy run warns of nothing."""

import copy
import re
import sys
import warnings

import pytest
import torch
from tiny import Mlp, adapted, layers, points, train, trainable
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.method import watch_training


def told(caught):
    return [str(w.message) for w in caught if "Dual LoRA" in str(w.message)]


def test_an_optimizer_without_the_factors_is_noticed():
    model = adapted(target_modules=["first"], init_weights=True)
    head = [p.requires_grad_() for p in model.base_model.model.second.parameters()]
    with pytest.warns(UserWarning, match="and no optimizer has updated them in 10 optimizer steps") as caught:
        train(model, 30, optimizer=torch.optim.SGD(head, lr=0.1))
    assert len(told(caught)) == 1


def test_factors_without_gradients_are_noticed():
    model = adapted(target_modules=["first"], init_weights=True)
    model.base_model.model.second.requires_grad_(True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def detached():
        with torch.no_grad():
            hidden = model.base_model.model.first(points()).tanh()
        return model.base_model.model.second(hidden).sum()

    with pytest.warns(UserWarning, match="got no gradient in optimizer step 4") as caught:
        train(model, 8, optimizer=optimizer, loss=detached)
    assert len(told(caught)) == 1


def test_gradients_of_zero_are_noticed():
    model = adapted(init_weights=True)
    with pytest.warns(UserWarning, match="exactly zero in optimizer step 4") as caught:
        train(model, 8, loss=lambda: (model(points()) * 0).sum())
    assert len(told(caught)) == 1


def test_an_adapter_made_anew_is_watched_anew():
    model = adapted(init_weights=True)
    train(model, 6)
    model.delete_adapter("default")
    model.add_adapter("default", DualLoraConfig(r=4, target_modules=["first", "second"]))
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="exactly zero in optimizer step 4"):
        train(model, 8, loss=lambda: (model(points()) * 0).sum())


def test_lora_fa_raises_a_clear_error():
    from peft.optimizers import create_lorafa_optimizer

    model = adapted(init_weights=True)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises(TypeError, match=r"LoRA-FA.*make another optimizer, such as torch.optim.AdamW"):
        train(model, 1, optimizer=optimizer)
    assert all(f.requires_grad for m in layers(model).values() for f in m.factors("default"))


class TwoHeads(nn.Module):
    """Of which the data reach one, as text alone does in a model of pictures and text."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = Mlp(), Mlp()

    def forward(self, x):
        return self.seen(x)


@pytest.mark.parametrize("options", [dict(init_weights=True), dict(warmup_steps=4), dict(warmup_steps=0)], ids=str)
def test_a_healthy_run_warns_of_nothing(options):
    """Not of layers that the data do not reach, nor of a first model that nobody trains any more."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = adapted(**options)
        train(before, 6)
        before(points()).sum().backward()  # gradients that no step takes
        briefly = adapted(**options)
        train(briefly, 2)
        briefly(points()).sum().backward()
        never = adapted(**options)
        model = adapted(TwoHeads(), target_modules=["first", "second"], **options)
        model.add_adapter("idle", copy.deepcopy(model.peft_config["default"]))
        train(model, 20, optimizer=torch.optim.SGD(trainable(model), lr=0.1))
    assert not told(caught)
    assert never


def test_layers_that_the_data_do_not_reach_stay_as_they_are():
    torch.manual_seed(0)
    base = TwoHeads()
    model = adapted(copy.deepcopy(base), target_modules=["first", "second"], init_weights=True)
    train(model, 20, optimizer=torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.1))
    assert len(layers(model)) == 4
    assert torch.equal(model.base_model.model.unseen(points()), base.unseen(points()))
    merged = model.merge_and_unload()
    for (name, new), old in zip(merged.unseen.named_parameters(), base.unseen.parameters(), strict=True):
        assert torch.equal(new, old), name
    assert not torch.equal(merged.seen.first.weight, base.seen.first.weight)


def of(model, *parts):
    return [p for name, p in model.named_parameters() if any(part in name for part in parts)]


def test_factors_that_a_script_for_lora_leaves_out_are_noticed():
    """LoRA+ by hand: groups of lora_A and of lora_B, so that the signs would stay as they were drawn."""
    model = adapted(init_weights=True)
    groups = [dict(params=of(model, "lora_A")), dict(params=of(model, "lora_B"), lr=0.1)]
    with pytest.warns(UserWarning, match="dual_lora_C and dual_lora_D get gradients in 2 layers") as caught:
        train(model, 30, optimizer=torch.optim.SGD(groups, lr=0.01))
    assert len(told(caught)) == 1


def begin_anew(model, *names):
    """As scripts do that train an adapter for each problem or fold: LoRA's factors by name."""
    with torch.no_grad():
        for part in names:
            for factor in of(model, part):
                nn.init.zeros_(factor) if part == "lora_B" else nn.init.uniform_(factor, -0.1, 0.1)


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_adapter_that_keeps_its_signs_when_a_script_begins_anew_is_noticed(optimizer, steps):
    model = adapted(init_weights=True)
    train(model, steps, optimizer=optimizer(trainable(model), lr=0.1))
    begin_anew(model, "lora_A", "lora_B")
    with pytest.warns(
        UserWarning, match="was set to zero since the last optimizer step, and C and D were not"
    ) as caught:
        train(model, steps, optimizer=optimizer(trainable(model), lr=0.1))
    assert len(told(caught)) == 1


def test_what_is_reset_whole_or_before_it_is_trained_is_no_fault():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, other = adapted(init_weights=True), adapted(init_weights=True)
        train(other, 3)
        begin_anew(model, "lora_A", "lora_B")
        train(model, 3)
        begin_anew(model, "lora_A", "lora_B", "lora_C", "lora_D")
        train(model, 3)
        for layer in layers(model).values():
            layer.reset_dual_lora_parameters("default", model.peft_config["default"])
        train(model, 3)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model, 3)
        model.load_state_dict(start)
        train(model, 3)
    assert not told(caught)


def of_peft(model, ratio):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=ratio)


def by_hand(model, ratio, *higher):
    groups = dict(params=of(model, *higher), lr=0.01 * ratio), dict(params=[], lr=0.01)
    own = {id(p) for p in groups[0]["params"]}
    groups[1]["params"] += [p for p in trainable(model) if id(p) not in own]
    optimizer = torch.optim.SGD(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # all rates are 0 in the first step
    return optimizer


def with_head(model, ratio, *higher):
    """Groups by hand, of which the second has a bias besides."""
    model.base_model.model.first.base_layer.bias.requires_grad_(True)
    return by_hand(model, ratio, *higher)


@pytest.mark.parametrize(
    ("made", "told_of"),
    [
        (lambda model: of_peft(model, 16.0), "learning rates as LoRA+"),
        (lambda model: by_hand(model, 16.0, "lora_B"), "learning rates as LoRA+"),
        (lambda model: with_head(model, 4.0, "lora_A", "lora_B"), "C and D .* have the learning rate of other param"),
        (lambda model: with_head(model, 4.0, "lora_C", "lora_D"), False),
        (lambda model: with_head(model, 4.0, "lora_"), False),
        (lambda model: of_peft(model, 1.0), False),
        (lambda model: by_hand(model, 16.0, "lora_B", "lora_D"), False),
        (lambda model: by_hand(model, 4.0, "lora_C", "lora_D"), False),
        (lambda model: by_hand(model, 4.0, "first"), False),
    ],
    ids=["PEFT", "hand", "a head's", "C and D, a head", "a head", "one rate", "B and D", "C and D", "by layer"],
)
def test_rates_by_lora_s_names_are_noticed(made, told_of):
    """LoRA+: B's rate, which D is to have as well. Or `lora_A` and `lora_B` at one rate, and all others at a head's.
    It comes once, before anything has moved."""
    model = adapted(init_weights=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 6, optimizer=made(model))
    assert [bool(told_of and re.search(told_of, message)) for message in told(caught)] == [True] * bool(told_of)


def test_factors_that_are_frozen_or_have_an_optimizer_of_their_own_are_no_fault():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = adapted(init_weights=True)
        for factor in of(frozen, "lora_C", "lora_D"):
            factor.requires_grad_(False)
        train(frozen, 30, optimizer=torch.optim.SGD(trainable(frozen), lr=0.01))
        model = adapted(init_weights=True)
        train(model, 30, optimizer=torch.optim.SGD(of(model, "first"), lr=0.01))  # one layer alone, as with LoRA
        model = adapted(init_weights=True)
        two = [torch.optim.SGD(of(model, *parts), lr=0.01) for parts in (("lora_A", "lora_B"), ("lora_C", "lora_D"))]
        for step in range(30):
            model(points()).square().sum().backward()
            two[step % 2].step()
            two[step % 2].zero_grad()
    assert not told(caught)


def test_a_layer_that_ends_with_the_interpreter_says_nothing(monkeypatch):
    """A module's names are None by then."""
    ignored = []
    layer = nn.Linear(2, 2)
    watch = watch_training.ResetWatch("default", layer)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(watch_training, "resets", None)
    del layer
    assert watch.layer() is None
    assert not ignored
