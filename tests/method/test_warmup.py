"""The paper's start: λ counts optimizer steps by itself, in every kind of loop, over saving, loading and copies."""

import copy
import gc
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import Mlp, adapted, changed, engine, factor, layer, layers, llama, logits, points, state, train, trainable
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerState

from dual_lora import DualLoraCallback, DualLoraConfig, count_step
from dual_lora.method import warmup

pytestmark = pytest.mark.filterwarnings("ignore:This Dual LoRA adapter was saved during:dual_lora.DualLoraWarning")


def loss(model):
    return model(points()).square().mean()


def set_left(model, left):
    for m in layers(model).values():
        m.set_left("default", left)


def strengths(model):
    """λ of each layer."""
    return [float(m.warmup_factor("default")) for m in layers(model).values()]


def test_strength_rises_with_the_steps_and_the_first_one_moves_nothing():
    model = adapted(warmup_steps=4)
    optimizer, before, count = SGD(trainable(model), lr=10.0), state(model), layer(model).dual_lora_left["default"]
    seen = [factor(model)]
    for step in range(6):
        train(model, 1, optimizer=optimizer)
        seen.append(factor(model))
        assert any("dual_lora_A" in name for name in changed(model, before)) == (step > 0)
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert layer(model).dual_lora_left["default"] is count, "where a captured graph reads"
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_buffers()} == {"dual_lora_left"}


def test_lambda_is_fp32_whatever_the_default_is():
    model = adapted(warmup_steps=50)
    set_left(model, 17)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert layer(model).warmup_factor("default").item() == pytest.approx(0.66, abs=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "options", [dict(warmup_steps=0), *(dict(init_weights=v) for v in (True, False, "zero"))], ids=str
)
def test_without_a_warm_up_there_is_no_count(options):
    model = adapted(**options)
    train(model, 2)
    assert factor(model) == 1
    assert not [*model.named_buffers()]


# What is one step.


class Around(torch.optim.Optimizer):
    """As SAM, Lookahead, or Muon with AdamW for the rest: an optimizer of its own around others."""

    def __init__(self, *inner, holds=None, zeroes=False):
        super().__init__(holds or [group for one in inner for group in one.param_groups], {"lr": 0.1})
        self.inner, self.zeroes = inner, zeroes

    def step(self, closure=None):
        for one in self.inner:
            one.step(closure)
        if self.zeroes:
            self.zero_grad(set_to_none=False)


class Subclass(AdamW):
    """Each class's `step` is hooked, once the parent was in use as well."""

    def step(self, closure=None):
        return super().step(closure)


OPTIMIZERS = {
    "AdamW": AdamW,
    "Adagrad": torch.optim.Adagrad,
    "wrapper": lambda p: Around(AdamW(p)),
    "twice": lambda p: Around(Around(AdamW(p))),
    "zeroing": lambda p: Around(AdamW(p), zeroes=True),
    "outside holds nothing": lambda p: Around(AdamW(p), holds=[nn.Parameter(torch.zeros(1))]),
    "inside holds a part": lambda p: Around(AdamW(p[:1]), holds=p),
    "chain": lambda p: Around(*(AdamW(p[k::3]) for k in range(3))),
    "subclass": lambda p: (AdamW(p), Subclass(p))[1],
}


def rounds(model, *optimizers, steps=3, passes=1, none=True):
    """Backward passes, and then a step of each optimizer."""
    for _ in range(steps):
        for _ in range(passes):
            loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=none)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("none", [True, False])
def test_a_step_counts_once_whatever_makes_it(kind, none):
    model = adapted(warmup_steps=10)
    rounds(model, OPTIMIZERS[kind](trainable(model)), none=none)
    assert factor(model) == pytest.approx(0.3)


def steps_that_fail(model):
    optimizer = AdamW(trainable(model))
    for other in (SGD(trainable(model), lr=0.1), Around(SGD(trainable(model), lr=0.1)), optimizer):
        with pytest.raises(ZeroDivisionError):
            other.step(lambda: 1 / 0)
    rounds(model, optimizer)


def another_on_new_gradients_in_the_same_tensors(model):
    first, second = AdamW(trainable(model)), SGD(trainable(model), lr=0.1)
    for optimizer in (first, second, second):
        rounds(model, optimizer, steps=1, none=False)


def the_one_that_holds_the_first_factor(model):
    first, others = ([p for n, p in model.named_parameters() if p.requires_grad and ("_B" in n) == b] for b in (1, 0))
    rounds(model, AdamW(others), SGD(first, lr=0.1))


def all_but_the_last_frozen(model):
    for name, p in model.named_parameters():
        p.requires_grad_("_C" in name)
    rounds(model, AdamW(trainable(model)))


def a_rate_of_zero_for_the_factors_or_for_one_of_them(model):
    one, others = ([p for n, p in model.named_parameters() if p.requires_grad and ("_B" in n) == b] for b in (1, 0))
    still, head = {"params": one, "lr": 0.0}, {"params": [torch.nn.Parameter(torch.ones(1))]}
    rounds(model, AdamW([still | {"params": one + others}, head]), steps=2)
    rounds(model, AdamW([still, {"params": others}]))


def skipping(fused=False, wrapped=False):
    """Two of five steps, by a gradient scaler."""

    def run(model):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), AdamW(trainable(model), fused=fused)
        outer = Around(optimizer)
        outer.step = lambda: scaler.step(optimizer)
        for k in range(5):
            scaler.scale(loss(model) * (float("inf") if k in (1, 3) else 1)).backward()
            outer.step() if wrapped else scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return run


def zero_redundancy(model):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        rounds(model, ZeroRedundancyOptimizer(trainable(model), optimizer_class=AdamW, lr=1e-2))
    finally:
        torch.distributed.destroy_process_group()


def deepspeed(model, flattened=False):
    run = engine(model, AdamW([p.detach().clone() for p in trainable(model)] if flattened else trainable(model)))
    for run.applied in (True, False, True, True):
        run.backward(loss(model))
        run._take_model_step()


LOOPS = {
    "several passes a step": lambda m: rounds(m, AdamW(trainable(m)), passes=3),
    "optimizers made anew": lambda m: [train(m, 1) for _ in range(3)],
    "those of other models": lambda m: (train(Mlp()), rounds(m, AdamW(trainable(m)))),
    "a rate of zero": lambda m: (train(m, 2, lr=0.0), rounds(m, AdamW(trainable(m)))),
    "skipped": skipping(),
    "skipped, fused": skipping(fused=True),
    "skipped, in a wrapper": skipping(wrapped=True),
    "ZeRO": lambda m: deepspeed(m, flattened=True),
    **{way.__name__.replace("_", " "): way for way in (
        steps_that_fail, another_on_new_gradients_in_the_same_tensors, the_one_that_holds_the_first_factor,
        all_but_the_last_frozen, a_rate_of_zero_for_the_factors_or_for_one_of_them, zero_redundancy, deepspeed,
    )},
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_three_steps_are_three(loop):
    model = adapted(warmup_steps=10)
    LOOPS[loop](model)
    assert factor(model) == pytest.approx(0.3)


# What is counted: layers and adapters whose factors got a gradient.


def test_layers_in_different_optimizers_have_counts_of_their_own():
    model = adapted(warmup_steps=10)
    own = [SGD(m.parameters(), lr=0.1) for m in layers(model).values()]
    for k in range(4):
        loss(model).backward()
        for optimizer in own if k % 2 else own[:1]:
            optimizer.step()
    assert strengths(model) == pytest.approx([0.4, 0.2])


def test_a_layer_that_the_data_never_reach_stays_the_base_and_is_named_when_it_is_merged():
    model = adapted(Mlp(), target_modules=["first", "second"], warmup_steps=4, init_std=0.3)
    model.base_model.model.forward = lambda x: model.base_model.model.first(x)
    base = copy.deepcopy(model.base_model.model.second.get_base_layer().weight)
    train(model, 6)
    assert strengths(model) == [1, 0]
    with pytest.warns(UserWarning, match=r"merged during its warm-up \(second: up to 4 of 4"):
        assert torch.equal(model.merge_and_unload().second.weight, base)


def test_the_counted_layers_are_those_in_a_warm_up_and_keep_no_model_alive():
    gc.collect()
    before = len(warmup.warming_layers)
    plain, model, other = adapted(init_weights=True), adapted(warmup_steps=6), adapted(warmup_steps=6)
    optimizer = train(model, 1)
    assert len(warmup.warming_layers) == before + 4
    other.delete_adapter("default")
    train(plain, 1)
    assert len(warmup.warming_layers) == before + 2
    del model, optimizer
    gc.collect()
    assert len(warmup.warming_layers) == before


# A share of the run.


def begins(model, steps):
    DualLoraCallback().on_train_begin(None, TrainerState(max_steps=steps), None, model=model)


def test_a_share_of_the_run_becomes_steps_when_the_trainer_begins(tmp_path):
    model = adapted(warmup_steps=0.25)
    assert factor(model) == 0
    for act in (train, count_step):
        with pytest.raises(ValueError, match=r"warmup_steps=0.25 is a share of the run.*DualLoraCallback\(\)"):
            act(model)
    with pytest.warns(UserWarning, match=r"merged during its warm-up \(.*: a warm-up over 25% of a run that has not"):
        copy.deepcopy(model).merge_and_unload()
    for steps in (40, 400):  # of a second call, which changes nothing
        begins(model, steps)
        assert model.peft_config["default"].warmup_steps == 10
    for steps, expected in ((4, 0.4), (6, 1)):
        train(model, steps)
        assert factor(model) == pytest.approx(expected)
        model.save_pretrained(tmp_path)
        again = adapted(warmup_steps=0.25)  # the file has steps, the fresh model a share until the Trainer begins
        again.load_adapter(tmp_path, "default", is_trainable=True)
        begins(again, 40)
        assert factor(again) == pytest.approx(expected)


def test_a_share_is_of_the_run_in_which_the_adapter_trains():
    config = adapted(warmup_steps=0.25).peft_config["default"]
    first, second = (get_peft_model(Mlp(), config) for _ in range(2))  # one configuration, as a loop over seeds has it
    first.add_adapter("other", config)
    set_left(second, -1)  # as it was once saved before a run
    begins(first, 40)
    begins(second, 80)
    first.set_adapter("other")
    begins(first, 120)
    assert [layer(m).steps_left(name) for m, name in ((first, "default"), (second, "default"), (first, "other"))] == [
        10, 20, 30,
    ]  # fmt: skip
    assert config.warmup_steps == 0.25


# Copies, averages, saving and loading.


MOVES = {
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "put by transformers": lambda model: [
        m.dual_lora_left.update({"default": torch.tensor(1, dtype=torch.int32)}) for m in layers(model).values()
    ],
    "share_memory": lambda model: model.share_memory(),
    "loaded": lambda model: model.load_state_dict(model.state_dict()),
    "in inference mode": lambda model: torch.inference_mode()(lambda: set_left(model, 1))(),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_count_is_kept_by(move):
    model = adapted(warmup_steps=4)
    train(model, 3)
    MOVES[move](model)
    model.to("cpu")
    assert factor(model) == 0.75
    train(model, 1)
    assert factor(model) == 1
    assert {m.dual_lora_left["default"].is_shared() for m in layers(model).values()} == {move == "share_memory"}


def test_copies_and_averages_count_for_themselves():
    model = adapted(warmup_steps=10)
    averaged, optimizer = AveragedModel(model, use_buffers=True), train(model, 2)
    copied = copy.deepcopy(model)
    train(copied, 3)
    train(model, 1, optimizer=optimizer)
    averaged.update_parameters(model)
    assert [factor(m) for m in (model, copied, averaged)] == pytest.approx([0.3, 0.5, 0.3])


def saved(path, warmup_steps=10, steps=4, without_count=False):
    model = adapted(warmup_steps=warmup_steps)
    train(model, steps, optimizer=SGD(trainable(model), lr=1.0))
    model.save_pretrained(path)
    file = path / "adapter_model.safetensors"
    if without_count:
        save_file({n: t for n, t in load_file(file).items() if "left" not in n}, file)
    return model


def load(path, **options):
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Mlp(), path, **options)


@pytest.mark.parametrize("low", [False, True])
def test_resumed_is_bit_for_bit_the_run_without_a_stop(tmp_path, low):
    straight = saved(tmp_path, steps=7)
    saved(tmp_path)
    again = load(tmp_path, is_trainable=True, low_cpu_mem_usage=low)
    assert factor(again) == pytest.approx(0.4)
    train(again, 3, optimizer=SGD(trainable(again), lr=1.0))
    assert not changed(again, state(straight))


@pytest.mark.parametrize("options", [dict(steps=10), dict(without_count=True)], ids=str)
def test_a_finished_adapter_loads_at_full_strength_and_forgets_its_count(tmp_path, options):
    saved(tmp_path, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = load(tmp_path)
        assert factor(used) == factor(load(tmp_path, is_trainable=True)) == 1
    assert not [*used.named_buffers()]
    assert not [w for w in caught if "Dual LoRA" in str(w.message)]


def test_an_unfinished_adapter_is_used_as_saved_and_says_so(tmp_path):
    model = saved(tmp_path)
    with pytest.warns(UserWarning, match=r"saved during its warm-up: first and 1 more layers with up to 6 of 10"):
        again = load(tmp_path)
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))


def test_more_steps_left_than_the_configuration_has_are_cut_and_fewer_than_none_are_none(tmp_path):
    saved(tmp_path, warmup_steps=100, steps=1)
    config = DualLoraConfig.from_pretrained(tmp_path)
    config.warmup_steps, config.inference_mode = 10, False
    model = load(tmp_path, config=config, is_trainable=True)
    assert (factor(model), layer(model).steps_left("default")) == (0, 10)
    train(model, 4)
    assert factor(model) == pytest.approx(0.4)
    model.load_state_dict({n: t - 9 if "left" in n else t for n, t in model.state_dict().items()})
    assert factor(model) == 1


@pytest.mark.parametrize("way", ["load_state_dict", "set_peft_model_state_dict"])
def test_averages_put_in_place_in_the_middle_of_the_warm_up_do_not_end_it(way):
    model = adapted(warmup_steps=4)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for steps, expected in ((1, 0.25), (0, 1)):  # before a step it is the state of a finished adapter
        set_left(model, 4)
        train(model, steps)
        if way == "load_state_dict":
            model.load_state_dict(own, strict=False)
        else:
            set_peft_model_state_dict(model, {n.replace(".default", ""): t for n, t in own.items()})
        assert factor(model) == expected


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("counted", "expected"), [(True, 0.75), (False, 1.0)])
@pytest.mark.parametrize("source", ["folder", "state"])
def test_transformers_own_loader_gives_what_peft_gives(tmp_path, trained, counted, expected, source):
    base = llama()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj", "down_proj"], warmup_steps=4, init_std=0.3)
    set_left(model, 1)
    tensors = {n: t for n, t in get_peft_model_state_dict(model).items() if counted or "left" not in n}
    model.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    own, state = copy.deepcopy(base), dict(peft_config=model.peft_config["default"], adapter_state_dict=tensors)
    own.load_adapter(**(dict(peft_model_id=tmp_path) if source == "folder" else state), is_trainable=trained)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trained).eval()
    assert factor(own) == factor(peft) == expected
    torch.testing.assert_close(logits(own.eval()), logits(peft))


def test_an_adapter_of_an_earlier_version_keeps_its_start(tmp_path):
    """Format 1 said `init_weights=True` for Gaussian factors, and had α = 2 r."""
    model, file = saved(tmp_path), tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"init_weights": True, "alpha": None, "warmup_steps": 10}
    del config["format_version"]
    file.write_text(json.dumps(config))
    again = load(tmp_path, is_trainable=True)
    assert again.peft_config["default"].init_weights == "paper"
    assert not again.peft_config["default"].form.live_zero
    assert layer(again).strength("default") == layer(model).strength("default") == 4
    assert factor(again) == pytest.approx(0.4)
    assert torch.equal(again(points()), model(points()))
    assert get_peft_model(Mlp(), DualLoraConfig(**config)).peft_config["default"].warmup_steps == 10
