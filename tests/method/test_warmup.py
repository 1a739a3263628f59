"""λ counts optimizer steps by itself: in every kind of loop, over saving and loading; no silent no-op."""

import copy
import gc
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from tiny import Mlp, adapted, changed, factor, layer, layers, llama, points, state, tokens, train, trainable
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.method import warmup


def loss(model):
    return model(points()).square().mean()


def told(caught):
    return [str(w.message) for w in caught if "Dual LoRA" in str(w.message)]


def test_plain_loop():
    model = adapted(warmup_steps=4)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    seen = [factor(model)]
    for _ in range(6):
        train(model, 1, optimizer=optimizer)
        seen.append(factor(model))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_the_first_step_moves_nothing_and_that_is_the_definition():
    model = adapted(warmup_steps=4)
    optimizer = torch.optim.SGD(trainable(model), lr=10.0)
    before = state(model)
    train(model, 1, optimizer=optimizer)
    assert all("dual_lora_left" in name for name in changed(model, before))
    train(model, 1, optimizer=optimizer)
    assert any("dual_lora_A" in name for name in changed(model, before))


@pytest.mark.parametrize(
    "options", [dict(warmup_steps=0), dict(init_weights=False), dict(init_weights="zero")], ids=str
)
def test_no_ramp(options):
    model = adapted(**(dict(warmup_steps=4) | options))
    assert factor(model) == 1
    train(model, 2)
    assert factor(model) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adamax])
def test_any_optimizer(kind):
    model = adapted(warmup_steps=10)
    train(model, 3, optimizer=kind(trainable(model), lr=1e-3))
    assert factor(model) == pytest.approx(0.3)


def test_lbfgs_counts_a_step_however_often_it_calls_the_closure():
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.LBFGS(trainable(model), lr=1e-3, max_iter=5)
    calls = []

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        calls.append(value)
        return value

    layer(model)._set_steps_left("default", 8)
    layers(model)["base_model.model.second"]._set_steps_left("default", 8)
    optimizer.step(closure)
    assert len(calls) > 1
    assert factor(model) == pytest.approx(0.3)


def test_gradient_accumulation_counts_steps_not_backward_passes():
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(2):
        for _ in range(5):
            loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_forward_twice_and_counts_once(reentrant):
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], warmup_steps=10)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert factor(model) == pytest.approx(0.3)


def test_evaluation_in_the_middle_does_not_count_and_sees_the_present_strength():
    model = adapted(warmup_steps=4)
    optimizer = train(model, 1)
    outputs = []
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            outputs.append(model(points()))
            assert torch.equal(model(points()), outputs[-1])
        model.train()
        torch.testing.assert_close(model(points()), outputs[-1], rtol=1e-5, atol=1e-6)
        train(model, 1, optimizer=optimizer)
    assert not torch.equal(outputs[0], outputs[1])
    assert factor(model) == 1


def test_optimizers_of_other_models_do_not_count():
    model, other = adapted(warmup_steps=4), Mlp()
    train(model, 1)
    for _ in range(12):
        train(other, 1, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert factor(model) == 0.25


# Several adapters.


def test_only_the_active_adapter_advances():
    model = adapted(warmup_steps=4)
    model.add_adapter("other", DualLoraConfig(r=2, warmup_steps=20, target_modules=["first", "second"]))
    train(model, 2)
    assert (factor(model), factor(model, "other")) == (0.5, 0)
    train(model, 8)
    model.set_adapter("other")
    train(model, 5)
    assert (factor(model), factor(model, "other")) == (1, 0.25)
    model.set_adapter("default")
    train(model, 1)
    assert (factor(model), factor(model, "other")) == (1, 0.25)


def test_an_adapter_added_after_training_advances():
    model = adapted(warmup_steps=2)
    train(model, 10)
    model.add_adapter("late", DualLoraConfig(r=2, warmup_steps=4, target_modules=["first"]))
    model.set_adapter("late")
    train(model, 1)
    assert factor(model, "late") == 0.25


def test_two_active_adapters_advance_together():
    model = adapted(warmup_steps=4)
    model.add_adapter("other", DualLoraConfig(r=2, warmup_steps=8, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    train(model, 2)
    assert (factor(model), factor(model, "other")) == (0.5, 0.25)


def test_an_adapter_frozen_for_a_while_goes_on_afterwards():
    model = adapted(warmup_steps=4)
    model.add_adapter("other", DualLoraConfig(r=2, warmup_steps=20, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    others = [p for n, p in model.named_parameters() if n.endswith(".other")]
    for p in others:
        p.requires_grad_(False)
    train(model, 10)
    assert (factor(model), factor(model, "other")) == (1, 0)
    for p in others:
        p.requires_grad_(True)
    train(model, 5)
    assert factor(model, "other") == 0.25


# Several optimizers.


def test_factors_in_two_optimizers_count_once():
    """Steps of the optimizer that holds B count; those of the one that holds A, D and C do not."""
    model = adapted(warmup_steps=10)
    magnitude = [p for n, p in model.named_parameters() if "dual_lora_B" in n]
    others = [p for n, p in model.named_parameters() if "dual_lora_" in n and "dual_lora_B" not in n]
    first, second = torch.optim.SGD(magnitude, lr=0.1), torch.optim.AdamW(others, lr=0.1)
    for _ in range(3):
        loss(model).backward()
        second.step()
        first.step()
        second.step()
    assert factor(model) == pytest.approx(0.3)


@pytest.mark.parametrize("frozen", ["B", "BA", "BAD"])
def test_steps_are_counted_when_the_first_factor_is_frozen(frozen):
    model = adapted(warmup_steps=10)
    for letter in frozen:
        for module in layers(model).values():
            getattr(module, f"dual_lora_{letter}")["default"].requires_grad_(False)
    train(model, 3)
    assert factor(model) == pytest.approx(0.3)


def test_layers_in_different_optimizers_have_step_counters_of_their_own():
    model = adapted(warmup_steps=10)
    first, second = layers(model).values()
    own = torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(second.parameters(), lr=0.1)
    for k in range(4):
        loss(model).backward()
        own[0].step()
        if k % 2:
            own[1].step()
    assert (first.warmup_factor("default"), second.warmup_factor("default")) == (pytest.approx(0.4), pytest.approx(0.2))


def test_parameter_groups_and_groups_added_later():
    model = adapted(warmup_steps=10)
    first, second = layers(model).values()
    optimizer = torch.optim.AdamW([{"params": trainable(first), "lr": 1e-3}])
    optimizer.add_param_group({"params": trainable(second)})
    train(model, 3, optimizer=optimizer)
    assert factor(model) == pytest.approx(0.3)


# Wrapped and scaled optimizers.


class Wrapper(torch.optim.Optimizer):
    """As SAM, Lookahead and others do it: an optimizer of its own around another one, with the same parameters."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_a_wrapper_does_not_count_twice():
    model = adapted(warmup_steps=10)
    train(model, 3, optimizer=Wrapper(torch.optim.AdamW(trainable(model), lr=1e-3)))
    assert factor(model) == pytest.approx(0.3)


class Chain(torch.optim.Optimizer):
    """Several optimizers as one (Muon for matrices and AdamW for the rest, and the like)."""

    def __init__(self, parts):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = dict(enumerate(parts)) if len(parts) > 2 else parts

    def step(self, closure=None):
        for part in self.parts.values() if isinstance(self.parts, dict) else self.parts:
            part.step()


@pytest.mark.parametrize("parts", [2, 3])
def test_optimizers_chained_in_one_do_not_count_twice(parts):
    model = adapted(warmup_steps=10)
    chain = Chain([torch.optim.AdamW(trainable(model)[k::parts], lr=1e-3) for k in range(parts)])
    train(model, 3, optimizer=chain)
    assert factor(model) == pytest.approx(0.3)


def test_an_optimizer_prepared_by_accelerate_counts_once():
    accelerator = Accelerator(cpu=True)
    model = adapted(warmup_steps=10)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    for _ in range(3):
        accelerator.backward(loss(model))
        optimizer.step()
        optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_accelerate_accumulates():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = adapted(warmup_steps=10)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model))
            optimizer.step()
            optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.2)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    model = adapted(warmup_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
    for k in range(5):
        value = loss(model) * (float("inf") if k in (1, 3) else 1)
        before = state(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert bool(changed(model, before)) == (k not in (1, 3))
    assert scaler.get_scale() < 1024
    assert factor(model) == pytest.approx(0.3)


# Copies, saving and loading.


def test_deep_copies_count_for_themselves():
    model = adapted(warmup_steps=10)
    optimizer = train(model, 2)
    copied = copy.deepcopy(model)
    assert factor(copied) == pytest.approx(0.2)
    train(copied, 3)
    assert (factor(model), factor(copied)) == (pytest.approx(0.2), pytest.approx(0.5))
    train(model, 1, optimizer=optimizer)
    assert (factor(model), factor(copied)) == (pytest.approx(0.3), pytest.approx(0.5))


def test_moving_the_model_keeps_the_count():
    model = adapted(warmup_steps=4)
    train(model, 1)
    model.double().float()
    assert factor(model) == 0.25
    train(model, 1)
    assert factor(model) == 0.5


def saved(path, warmup_steps=10, steps=4):
    model = adapted(warmup_steps=warmup_steps)
    train(model, steps)
    model.save_pretrained(path)
    return model


def load(path, **options):
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Mlp(), path, **options)


@pytest.mark.parametrize("low", [False, True])
def test_half_way_saved_loaded_and_continued(tmp_path, low):
    model = saved(tmp_path)
    again = load(tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))
    train(again, 6)
    assert factor(again) == 1


def test_resumed_is_bit_for_bit_the_run_without_a_stop(tmp_path):
    straight = adapted(warmup_steps=10)
    train(straight, 7, optimizer=torch.optim.SGD(trainable(straight), lr=1.0))
    half = adapted(warmup_steps=10)
    train(half, 4, optimizer=torch.optim.SGD(trainable(half), lr=1.0))
    half.save_pretrained(tmp_path)
    again = load(tmp_path, is_trainable=True)
    train(again, 3, optimizer=torch.optim.SGD(trainable(again), lr=1.0))
    assert not changed(again, state(straight))


def test_a_finished_adapter_loads_at_full_strength(tmp_path):
    saved(tmp_path, steps=10)
    for trainable_ in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert factor(load(tmp_path, is_trainable=trainable_)) == 1
        assert not told(caught)


def test_an_unfinished_adapter_is_used_as_saved_and_says_so(tmp_path):
    model = saved(tmp_path)
    with pytest.warns(UserWarning, match="saved during its warm-up, 6 of 10 optimizer steps before full strength"):
        again = load(tmp_path)
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))


def test_merging_for_good_during_the_warm_up_is_said():
    """Somebody who swaps the class name in a script of 30 steps has 50 steps of warm-up by default."""
    model = adapted(warmup_steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copy.deepcopy(model).merge_and_unload()  # never trained
    assert not told(caught)
    train(model, 4)
    with pytest.warns(UserWarning, match="merged during its warm-up, 6 of 10 optimizer steps before full") as caught:
        copy.deepcopy(model).merge_and_unload()
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copy.deepcopy(model).unload()
        train(model, 6)
        model.merge_and_unload()
    assert not told(caught)


def test_a_state_without_the_count_is_finished(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any("left" in name for name in tensors)
    save_file({n: t for n, t in tensors.items() if "left" not in n}, file)
    for trainable_ in (False, True):
        assert factor(load(tmp_path, is_trainable=trainable_)) == 1


def test_more_steps_left_than_the_configuration_has_are_cut(tmp_path):
    saved(tmp_path, warmup_steps=100, steps=1)
    config = DualLoraConfig.from_pretrained(tmp_path)
    config.warmup_steps = 10
    config.inference_mode = False
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Mlp(), tmp_path, config=config, is_trainable=True)
    assert factor(model) == 0
    train(model, 10)
    assert factor(model) == 1


def test_a_loaded_adapter_beside_another_has_its_own_count(tmp_path):
    saved(tmp_path)
    model = adapted(warmup_steps=20)
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    model.set_adapter("loaded")
    train(model, 1)
    assert (factor(model), factor(model, "loaded")) == (0, pytest.approx(0.5))


def test_load_state_dict_restores_the_count():
    model = adapted(warmup_steps=10)
    half = copy.deepcopy(model)
    train(half, 5)
    model.load_state_dict(half.state_dict())
    assert factor(model) == 0.5


# The worst failure of such methods is a silent no-op.


def test_an_optimizer_without_the_factors_is_noticed():
    model = adapted(target_modules=["first"], warmup_steps=4)
    head = [p.requires_grad_() for p in model.base_model.model.second.parameters()]
    with pytest.warns(UserWarning, match="no optimizer held them.*do not move") as caught:
        train(model, 30, optimizer=torch.optim.SGD(head, lr=0.1))
    assert len(told(caught)) == 1
    assert factor(model) == 0


def test_factors_without_gradients_are_noticed():
    model = adapted(target_modules=["first"], warmup_steps=4)
    model.base_model.model.second.requires_grad_(True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def detached():
        with torch.no_grad():
            hidden = model.base_model.model.first(points()).tanh()
        return model.base_model.model.second(hidden).sum()

    with pytest.warns(UserWarning, match="got no gradient in optimizer step 4") as caught:
        train(model, 8, optimizer=optimizer, loss=detached)
    assert len(told(caught)) == 1


@pytest.mark.parametrize("held", [3, 0])
def test_a_process_that_holds_nothing_of_a_factor_cannot_tell(held):
    """Of FSDP's flat shards some are empty, and get no gradient."""
    factors = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(held))]
    optimizer = torch.optim.SGD(factors, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warmup._check_gradients(optimizer, "default", factors, 4)
    assert len(told(caught)) == (held > 0)


def test_gradients_of_zero_are_noticed():
    model = adapted(warmup_steps=4)
    with pytest.warns(UserWarning, match="exactly zero in optimizer step 4") as caught:
        train(model, 8, loss=lambda: (model(points()) * 0).sum())
    assert len(told(caught)) == 1


def test_an_adapter_made_anew_is_watched_anew():
    model = adapted(warmup_steps=0)
    train(model, 6)
    model.delete_adapter("default")
    model.add_adapter("default", DualLoraConfig(r=4, warmup_steps=0, target_modules=["first", "second"]))
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="exactly zero in optimizer step 4"):
        train(model, 8, loss=lambda: (model(points()) * 0).sum())


def test_a_healthy_run_warns_of_nothing():
    """Above all not of the first step, whose gradients are zero by definition."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in (dict(warmup_steps=4), dict(warmup_steps=0), dict(init_weights="zero")):
            model = adapted(**options)
            model.add_adapter("idle", copy.deepcopy(model.peft_config["default"]))
            train(model, 20, optimizer=torch.optim.SGD(trainable(model), lr=0.1))
    assert not told(caught)


def counted(others):
    """How many layers the step counter has beside others, after what nobody holds has gone."""
    gc.collect()
    return len(set(warmup._layers) - others)


@pytest.fixture
def others():
    """Layers of models that something outside a test still holds, such as a compiler's caches."""
    gc.collect()
    return set(warmup._layers)


def test_finished_layers_leave_the_step_counter(others):
    model = adapted(warmup_steps=6)
    train(model, 5)
    assert counted(others) == 2
    train(model, 2)
    assert counted(others) == 0


def test_the_step_counter_keeps_no_model_alive(others):
    model = adapted(warmup_steps=6)
    optimizer = train(model, 1)
    assert counted(others) == 2
    del model, optimizer
    assert counted(others) == 0


def test_an_adapter_chosen_later_is_watched_too():
    model = adapted(warmup_steps=0)
    model.add_adapter("other", DualLoraConfig(r=2, warmup_steps=0, target_modules=["first", "second"]))
    train(model, 10)
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="exactly zero"):
        train(model, 5, loss=lambda: (model(points()) * 0).sum())


def test_a_compiled_model_follows_a_loaded_state():
    torch._dynamo.reset()
    model = adapted(warmup_steps=4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(points())
    half = copy.deepcopy(model)
    train(half, 2)
    model.load_state_dict(half.state_dict())
    torch.testing.assert_close(compiled(points()), half(points()), rtol=1e-5, atol=1e-6)
