"""The paper's start: λ counts optimizer steps by itself, in every kind of loop, over saving, loading and copies."""

import copy
import gc
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import Mlp, adapted, changed, factor, layer, layers, llama, logits, points, state, tokens, train, trainable
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerState

from dual_lora import DualLoraCallback, DualLoraConfig, count_step
from dual_lora.method import warmup

pytestmark = pytest.mark.filterwarnings("ignore:This Dual LoRA adapter was saved during:dual_lora.DualLoraWarning")


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
    "options", [dict(warmup_steps=0), *(dict(init_weights=v) for v in (True, False, "zero"))], ids=str
)
def test_without_a_warm_up_there_is_no_count(options):
    model = adapted(**options)
    train(model, 2)
    assert factor(model) == 1
    assert not [*model.named_buffers()]


OPTIMIZERS = {kind.__name__: kind for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)}


class Holder(torch.optim.Optimizer):
    """As SAM, Lookahead and others: an optimizer of its own around another one, with the same parameters."""

    def __init__(self, inner, params=None):
        super().__init__(inner.param_groups if params is None else params, {"lr": 0.1})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Chain(torch.optim.Optimizer):
    """Several optimizers as one (Muon for matrices and AdamW for the rest)."""

    def __init__(self, parts):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure=None):
        for part in self.parts:
            part.step()


class Subclass(torch.optim.AdamW):
    """Each class's `step` is hooked, once the parent was in use as well."""

    def step(self, closure=None):
        return super().step(closure)


NESTED = {
    "wrapper": lambda p: Holder(torch.optim.AdamW(p, lr=1e-3)),
    "twice": lambda p: Holder(Holder(torch.optim.AdamW(p, lr=1e-3))),
    "outside holds nothing": lambda p: Holder(torch.optim.AdamW(p, lr=1e-3), [nn.Parameter(torch.zeros(1))]),
    "inside holds a part": lambda p: Holder(torch.optim.AdamW(p[:1], lr=1e-3), p),
    "chain": lambda p: Chain([torch.optim.AdamW(p[k::3], lr=1e-3) for k in range(3)]),
    "subclass": lambda p: (torch.optim.AdamW(p), Subclass(p, lr=1e-3))[1],
}


@pytest.mark.parametrize("kind", [*OPTIMIZERS, *NESTED])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_counts_once_whatever_makes_it(kind, set_to_none):
    model = adapted(warmup_steps=10)
    optimizer = (OPTIMIZERS | NESTED)[kind](trainable(model))
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    assert factor(model) == pytest.approx(0.3)


def test_lbfgs_counts_a_step_however_often_it_calls_the_closure():
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.LBFGS(trainable(model), lr=1e-3, max_iter=5)
    for m in layers(model).values():
        m.set_left("default", 8)

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    optimizer.step(closure)
    assert factor(model) == pytest.approx(0.3)


def test_a_step_that_failed_is_forgotten():
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)

    def fails():
        raise RuntimeError("out of memory")

    for other in (
        torch.optim.SGD(trainable(model), lr=0.1),
        Holder(torch.optim.SGD(trainable(model), lr=0.1)),
        optimizer,
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            other.step(fails)
    train(model, 3, optimizer=optimizer)
    assert factor(model) == pytest.approx(0.3)


def test_two_optimizers_on_one_gradient_count_once():
    model = adapted(warmup_steps=10)
    first, second = torch.optim.SGD(trainable(model), lr=0.1), torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(3):
        loss(model).backward()
        first.step()
        second.step()
        first.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_optimizers_made_anew_go_on_counting():
    model, kept = adapted(warmup_steps=10), []
    for _ in range(3):
        kept.append(torch.optim.AdamW(trainable(model), lr=1e-3))
        train(model, 2, optimizer=kept[-1])
    assert factor(model) == pytest.approx(0.6)


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
    train(model, 3, loss=lambda: model(input_ids=tokens(), labels=tokens()).loss)
    assert factor(model) == pytest.approx(0.3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerates_optimizers_count(accumulation):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = adapted(warmup_steps=10)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss(model))
            optimizer.step()
            optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.6 / accumulation)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused, wrapped):
    model = adapted(warmup_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=fused)
    outer = Holder(optimizer)
    outer.step = lambda: scaler.step(optimizer)
    for k in range(5):
        scaler.scale(loss(model) * (float("inf") if k in (1, 3) else 1)).backward()
        outer.step() if wrapped else scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_a_step_at_a_rate_of_zero_moves_nothing_and_does_not_count():
    """So are the steps by which distributed checkpoints make an optimizer's state."""
    model = adapted(warmup_steps=10)
    train(model, 3, optimizer=torch.optim.AdamW(trainable(model), lr=0.0))
    assert factor(model) == 0


def zero_redundancy(rank, world, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = adapted(warmup_steps=4)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(trainable(model), optimizer_class=torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        ddp(points()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(factor(model), f"{results}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_zero_redundancy_optimizer_counts_on_every_process(tmp_path):
    torch.multiprocessing.spawn(zero_redundancy, args=(2, tmp_path / "store", tmp_path), nprocs=2)
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == [0.75] * 2


# What is counted: layers, experts and adapters whose factors got a gradient.


def test_layers_in_different_optimizers_have_counts_of_their_own():
    model = adapted(warmup_steps=10)
    first, second = layers(model).values()
    own = torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(second.parameters(), lr=0.1)
    for k in range(4):
        loss(model).backward()
        own[0].step()
        if k % 2:
            own[1].step()
    assert float(first.warmup_factor("default")) == pytest.approx(0.4)
    assert float(second.warmup_factor("default")) == pytest.approx(0.2)


def test_a_layer_that_the_data_never_reach_stays_the_base_and_is_named_when_it_is_merged():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = adapted(Branches(), target_modules=["used", "unused"], warmup_steps=4, init_std=0.3)
    base = copy.deepcopy(model.base_model.model.unused.get_base_layer().weight)
    train(model, 6)
    used, unused = layers(model).values()
    assert (float(used.warmup_factor("default")), float(unused.warmup_factor("default"))) == (1, 0)
    with pytest.warns(UserWarning, match=r"merged during its warm-up \(unused: up to 4 of 4"):
        assert torch.equal(model.merge_and_unload().unused.weight, base)


@pytest.mark.parametrize("frozen", ["B", "BA", "BAD"])
def test_steps_are_counted_when_the_first_factor_is_frozen(frozen):
    model = adapted(warmup_steps=10)
    for letter in frozen:
        for module in layers(model).values():
            getattr(module, f"dual_lora_{letter}")["default"].requires_grad_(False)
    train(model, 3)
    assert factor(model) == pytest.approx(0.3)


def test_the_optimizer_of_the_first_factor_counts():
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


def test_adapters_count_for_themselves():
    model = adapted(warmup_steps=4)
    model.add_adapter("other", DualLoraConfig.paper(r=2, warmup_steps=20, target_modules=["first", "second"]))
    train(model, 2)
    assert (factor(model), factor(model, "other")) == (0.5, 0)
    model.base_model.set_adapter(["default", "other"])
    train(model, 5)
    assert (factor(model), factor(model, "other")) == (1, 0.25)
    model.set_adapter("default")
    train(model, 1)
    assert (factor(model), factor(model, "other")) == (1, 0.25)


def test_optimizers_of_other_models_do_not_count():
    model, other = adapted(warmup_steps=4), Mlp()
    train(model, 1)
    train(other, 12, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    assert factor(model) == 0.25


# No optimizer of torch's.


def test_updates_by_hand_are_counted_by_a_call():
    model = adapted(warmup_steps=4)
    model.add_adapter("idle", DualLoraConfig.paper(r=2, warmup_steps=4, target_modules=["first"]))
    for _ in range(3):
        loss(model).backward()
        with torch.no_grad():
            for p in trainable(model):
                p -= 0.1 * p.grad
                p.grad = None
        count_step(model)
    assert (factor(model), factor(model, "idle")) == (0.75, 0)


# A share of the run.


def test_a_share_of_the_run_becomes_steps_when_the_trainer_begins():
    model = adapted(warmup_steps=0.25)
    assert factor(model) == 0
    DualLoraCallback().on_train_begin(None, TrainerState(max_steps=40), None, model=model)
    assert model.peft_config["default"].warmup_steps == 10
    train(model, 4)
    assert factor(model) == pytest.approx(0.4)
    DualLoraCallback().on_train_begin(None, TrainerState(max_steps=400), None, model=model)  # of a second call
    assert factor(model) == pytest.approx(0.4)


def test_a_share_of_an_unknown_run_raises_a_clear_error():
    model = adapted(warmup_steps=0.25)
    with pytest.raises(ValueError, match=r"warmup_steps=0.25 is a share of the run.*DualLoraCallback\(\)"):
        train(model, 1)


# Copies, averages, saving and loading.


def test_deep_copies_count_for_themselves():
    model = adapted(warmup_steps=10)
    optimizer = train(model, 2)
    copied = copy.deepcopy(model)
    train(copied, 3)
    assert (factor(model), factor(copied)) == (pytest.approx(0.2), pytest.approx(0.5))
    train(model, 1, optimizer=optimizer)
    assert (factor(model), factor(copied)) == (pytest.approx(0.3), pytest.approx(0.5))


def test_an_average_with_buffers_acts_as_strongly_as_what_it_is_of():
    model = adapted(warmup_steps=4)
    averaged = AveragedModel(model, use_buffers=True).eval()
    train(model, 6)
    for _ in range(20):
        averaged.update_parameters(model)
    assert factor(averaged) == 1


def saved(path, warmup_steps=10, steps=4):
    model = adapted(warmup_steps=warmup_steps)
    train(model, steps)
    model.save_pretrained(path)
    return model


def load(path, **options):
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Mlp(), path, **options)


@pytest.mark.parametrize("low", [False, True])
def test_resumed_is_bit_for_bit_the_run_without_a_stop(tmp_path, low):
    straight, half = adapted(warmup_steps=10), adapted(warmup_steps=10)
    train(straight, 7, optimizer=torch.optim.SGD(trainable(straight), lr=1.0))
    train(half, 4, optimizer=torch.optim.SGD(trainable(half), lr=1.0))
    half.save_pretrained(tmp_path)
    again = load(tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    assert factor(again) == pytest.approx(0.4)
    train(again, 3, optimizer=torch.optim.SGD(trainable(again), lr=1.0))
    assert not changed(again, state(straight))


def test_a_finished_adapter_loads_at_full_strength_and_forgets_its_count(tmp_path):
    saved(tmp_path, steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert factor(load(tmp_path, is_trainable=True)) == 1
        used = load(tmp_path)
    assert factor(used) == 1
    assert not [*used.named_buffers()]
    assert not told(caught)


def test_an_unfinished_adapter_is_used_as_saved_and_says_so(tmp_path):
    model = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"saved during its warm-up: first and 1 more layers with up to 6 of 10"):
        again = load(tmp_path)
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))


@pytest.mark.parametrize("trained", [False, True])
def test_a_state_without_the_count_is_finished(tmp_path, trained):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "left" not in n}, file)
    assert factor(load(tmp_path, is_trainable=trained)) == 1


def test_more_steps_left_than_the_configuration_has_are_cut(tmp_path):
    saved(tmp_path, warmup_steps=100, steps=1)
    config = DualLoraConfig.from_pretrained(tmp_path)
    config.warmup_steps, config.inference_mode = 10, False
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Mlp(), tmp_path, config=config, is_trainable=True)
    assert factor(model) == 0
    train(model, 10)
    assert factor(model) == 1


@pytest.mark.parametrize("way", ["load_state_dict", "set_peft_model_state_dict"])
def test_averages_put_in_place_in_the_middle_of_the_warm_up_do_not_end_it(way):
    model = adapted(warmup_steps=4)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def put(tensors):
        if way == "load_state_dict":
            model.load_state_dict(tensors, strict=False)
        else:
            set_peft_model_state_dict(model, {n.replace(".default", ""): t for n, t in tensors.items()})

    train(model, 1)
    put({name: p * 0.5 for name, p in own.items()})
    assert factor(model) == 0.25
    for m in layers(model).values():
        m.set_left("default", 4)
    put(own)
    assert factor(model) == 1, "a state of factors alone is that of a finished adapter, before a step was made"


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("counted", "expected"), [(True, 0.75), (False, 1.0)])
@pytest.mark.parametrize("source", ["folder", "state"])
def test_transformers_own_loader_gives_what_peft_gives(tmp_path, trained, counted, expected, source):
    torch.manual_seed(3)
    base = llama()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj", "down_proj"], warmup_steps=4, init_std=0.3)
    for m in layers(model).values():
        m.set_left("default", 1)
    tensors = {n: t for n, t in get_peft_model_state_dict(model).items() if counted or "left" not in n}
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    own = copy.deepcopy(base)
    if source == "folder":
        own.load_adapter(tmp_path, is_trainable=trained)
    else:
        config = copy.deepcopy(model.peft_config["default"])
        own.load_adapter(peft_config=config, adapter_state_dict=tensors, is_trainable=trained)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trained).eval()
    assert factor(own) == factor(peft) == expected
    torch.testing.assert_close(logits(own.eval()), logits(peft))


# Graphs.


@pytest.mark.parametrize("inference", [False, True])
def test_a_graph_sees_a_count_that_was_written_past_every_hook(inference):
    torch._dynamo.reset()
    model, x = adapted(warmup_steps=4, init_std=0.3).eval(), points()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=torch.__version__ >= "2.7")
    for left in (4, 1, 0, 3):
        with torch.no_grad():
            for m in layers(model).values():  # as DDP's broadcast and distributed checkpoints write
                m.dual_lora_left["default"].fill_(left)
        with torch.inference_mode(inference):
            torch.testing.assert_close(compiled(x), model(x))
        assert factor(model) == 1 - left / 4


# The list of layers that are counted.


def counted(others):
    gc.collect()
    return len(set(warmup.warming) - others)


def test_the_counted_layers_are_those_in_a_warm_up_and_keep_no_model_alive():
    gc.collect()
    others = set(warmup.warming)
    plain, model = adapted(init_weights=True), adapted(warmup_steps=6)
    optimizer = train(model, 1)
    train(plain, 1)
    assert counted(others) == 2
    del model, optimizer
    assert counted(others) == 0


def test_an_adapter_of_an_earlier_version_keeps_its_start(tmp_path):
    """Format 1 said `init_weights=True` for Gaussian factors, and had α = 2 r."""
    import json

    model = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["format_version"]
    file.write_text(json.dumps(config | {"init_weights": True, "alpha": None, "warmup_steps": 10}))
    again = load(tmp_path, is_trainable=True)
    assert again.peft_config["default"].init_weights == "paper"
    assert not again.peft_config["default"].form.live_zero
    assert layer(again).scaling["default"] == layer(model).scaling["default"] == 4
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))
    fresh = get_peft_model(Mlp(), DualLoraConfig(**json.loads(file.read_text())))
    assert fresh.peft_config["default"].warmup_steps == 10


def test_a_resumed_share_of_the_run_is_not_cut(tmp_path):
    """The file has steps, the fresh model a share until the Trainer begins."""
    model = adapted(warmup_steps=0.5)
    DualLoraCallback().on_train_begin(None, TrainerState(max_steps=20), None, model=model)
    train(model, 3)
    model.save_pretrained(tmp_path)
    again = adapted(warmup_steps=0.5)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    DualLoraCallback().on_train_begin(None, TrainerState(max_steps=20), None, model=again)
    assert factor(again) == pytest.approx(0.3)


def test_the_count_is_shared_with_the_factors():
    model = adapted(warmup_steps=4)
    model.share_memory()
    assert all(m.dual_lora_left["default"].is_shared() for m in layers(model).values())
    train(model, 2)
    assert factor(model) == 0.5
    assert all(m.dual_lora_left["default"].is_shared() for m in layers(model).values())


def test_another_optimizer_on_new_gradients_in_the_same_tensors_counts():
    model = adapted(warmup_steps=10)
    first, second = torch.optim.AdamW(trainable(model), lr=1e-3), torch.optim.SGD(trainable(model), lr=0.1)
    for optimizer in (first, second, second):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert factor(model) == pytest.approx(0.3)


def test_a_warmup_that_is_a_share_and_has_not_begun_is_said_in_words():
    with pytest.warns(UserWarning, match=r"merged during its warm-up \(.*: a warm-up over 10% of a run that has not"):
        adapted(warmup_steps=0.1).merge_and_unload()
