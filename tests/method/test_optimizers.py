"""Optimizers around, inside and beside each other, and none at all: λ counts every step once, and forward sees it."""

import copy
import pickle
import warnings

import pytest
import torch
from tiny import Mlp, adapted, factor, layer, points, trainable
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dual_lora import DualLoraConfig, composed_weights, count_step
from dual_lora.core.reference import delta_weight


def loss(model):
    return model(points()).square().mean()


def told(caught):
    return [str(w.message) for w in caught if "Dual LoRA" in str(w.message)]


def dense(model):
    """The model's output by the formula, in fp64."""
    first, second = (m for m in model.modules() if hasattr(m, "dual_lora_A"))

    def apply(m, x):
        base, (A, B, C, D) = m.get_base_layer(), (f.detach().double() for f in m.factors("default"))
        strength = m.warmup_factor("default") * m.scaling["default"]
        W = base.weight.double() + strength * (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
        return x @ W.t() + base.bias.double()

    return apply(second, apply(first, points().double()).tanh()).detach()


def bitsandbytes(params):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(params, lr=0.1, min_8bit_size=1)


SILENT = {  # those that raise no version counter
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, fused=True),
    "AdamW8bit": bitsandbytes,
}


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("kind", SILENT)
def test_a_cached_weight_follows_optimizers_that_raise_no_version_counter(kind, warmup_steps):
    model = adapted(init_weights=warmup_steps > 0, warmup_steps=warmup_steps).eval()
    optimizer = SILENT[kind](trainable(model))
    for _ in range(3):
        with torch.no_grad():
            model(points())
        loss(model).backward()
        with torch.no_grad():
            model(points())  # between backward and step, too
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model(points()).double(), dense(model), rtol=1e-5, atol=1e-5)


def test_a_cached_weight_ends_with_a_backward_into_its_factors():
    """What writes to them next may be no optimizer, and raise no version counter."""
    model = adapted(init_weights=False).eval()
    x = points()
    with torch.no_grad():
        model(x)
    assert composed_weights.bytes_held
    loss(model).backward()
    assert not composed_weights.bytes_held
    for p in trainable(model):
        p.data.sub_(p.grad)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), dense(model), rtol=1e-5, atol=1e-5)
    composed_weights.clear()
    assert all(not p._post_accumulate_grad_hooks for p in trainable(model)), "a dropped entry leaves its hooks behind"


def test_a_freed_address_that_comes_back_is_another_tensor():
    """`p.data = other` as weight averaging and zeroth-order training do it."""
    model = adapted(init_weights=False).eval()
    for _ in range(10):
        with torch.no_grad():
            for p in trainable(model):
                p.data = p.data + 0.1
                p.data = p.data - 0.2
            torch.testing.assert_close(model(points()).double(), dense(model), rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_kept_weight_can_be_copied_and_pickled():
    model = adapted(init_weights=False).eval()
    with torch.no_grad():
        y = model(points())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - ours
            assert torch.equal(again(points()), y)


# Optimizers inside optimizers.


class Holder(torch.optim.Optimizer):
    """Keeps the real optimizer where no attribute shows it."""

    def __init__(self, inner, params=None):
        super().__init__(inner.param_groups if params is None else params, {"lr": 0.0})
        self.call = lambda closure=None: inner.step(closure)

    def step(self, closure=None):
        return self.call(closure)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("own", [True, False])
def test_of_nested_steps_the_outermost_counts_for_all_that_is_held(depth, own):
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(depth):
        optimizer = Holder(optimizer, None if own else [nn.Parameter(torch.zeros(1))])
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_a_part_held_inside_counts_for_the_whole_outside():
    """As ZeroRedundancyOptimizer: each process steps on its share and receives the rest."""
    model = adapted(warmup_steps=10)
    optimizer = Holder(torch.optim.AdamW(trainable(model)[:1], lr=1e-3), trainable(model))
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
    assert factor(model) == pytest.approx(0.3)


def test_a_subclass_that_calls_its_parents_step_counts_once():
    """Each class's `step` is hooked, once the parent was in use as well."""

    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    model = adapted(warmup_steps=10)
    torch.optim.AdamW(trainable(model))
    optimizer = Mine(trainable(model), lr=1e-3)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
    assert factor(model) == pytest.approx(0.3)


def test_a_step_that_failed_is_forgotten():
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)

    def fails():
        raise RuntimeError("out of memory")

    for other in (torch.optim.SGD(trainable(model), lr=0.1), Holder(torch.optim.SGD(trainable(model), lr=0.1))):
        with pytest.raises(RuntimeError, match="out of memory"):
            other.step(fails)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_a_step_skipped_inside_a_wrapper_does_not_count():
    model = adapted(warmup_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = torch.optim.AdamW(trainable(model), lr=1e-3)
    outer = Holder(inner)
    outer.call = lambda closure=None: scaler.step(inner)
    for k in range(5):
        scaler.scale(loss(model) * (float("inf") if k in (1, 3) else 1)).backward()
        outer.step()
        scaler.update()
        outer.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_a_closure_that_trains_another_model_now_and_then_changes_no_count():
    model = adapted(warmup_steps=10)
    critic = nn.Linear(2, 1)
    ours, theirs = torch.optim.SGD(trainable(model), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1)
    for k in range(6):

        def closure(trains_critic=k in (0, 3)):
            ours.zero_grad()
            if trains_critic:
                critic(torch.ones(1, 2)).sum().backward()
                theirs.step()
            value = loss(model)
            value.backward()
            return value

        ours.step(closure)
    assert factor(model) == pytest.approx(0.6)


def test_two_optimizers_that_hold_the_same_factors_count_once():
    model = adapted(warmup_steps=10)
    first, second = torch.optim.SGD(trainable(model), lr=0.1), torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(3):
        loss(model).backward()
        first.step()
        second.step()
        first.zero_grad()
    assert factor(model) == pytest.approx(0.3)


def test_an_optimizer_made_anew_goes_on_counting():
    model = adapted(warmup_steps=10)
    kept = []
    for _ in range(3):
        kept.append(torch.optim.AdamW(trainable(model), lr=1e-3))
        for _ in range(2):
            loss(model).backward()
            kept[-1].step()
            kept[-1].zero_grad()
    assert factor(model) == pytest.approx(0.6)


def zero_redundancy(rank, world, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = adapted(warmup_steps=4)
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(trainable(model), optimizer_class=torch.optim.AdamW, lr=1e-2)
    before = [p.detach().clone() for p in trainable(model)]
    for _ in range(3):
        ddp(points()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = all(not torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True))
    torch.save((factor(model), moved), f"{results}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_zero_redundancy_optimizer_counts_on_every_process(tmp_path):
    torch.multiprocessing.spawn(zero_redundancy, args=(2, tmp_path / "store", tmp_path), nprocs=2)
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == [(0.75, True)] * 2


# No optimizer.


def by_hand(model, steps, count=False):
    for _ in range(steps):
        loss(model).backward()
        with torch.no_grad():
            for p in trainable(model):
                p -= 0.1 * p.grad
                p.grad = None
        if count:
            count_step(model)


def test_updates_by_hand_are_counted_by_a_call():
    model = adapted(warmup_steps=4)
    model.add_adapter("idle", DualLoraConfig(r=2, warmup_steps=4, target_modules=["first"]))
    before = trainable(model)[0].detach().clone()
    by_hand(model, 3, count=True)
    assert factor(model) == 0.75
    assert factor(model, "idle") == 0
    assert not torch.equal(trainable(model)[0], before)
    by_hand(model, 200, count=True)
    assert factor(model) == 1


def test_counting_by_hand_clears_the_cache():
    model = adapted(init_weights=False).eval()
    with torch.no_grad():
        model(points())
        layer(model).dual_lora_B["default"].data.mul_(2)
        count_step(model)
        torch.testing.assert_close(model(points()).double(), dense(model), rtol=1e-5, atol=1e-5)


def test_a_warm_up_that_nobody_counts_is_noticed():
    model = adapted(warmup_steps=4)
    with pytest.warns(UserWarning, match=r"100 times without an optimizer step.*count_step\(model\)") as caught:
        by_hand(model, 250)
    assert len(told(caught)) == 1
    other = adapted(warmup_steps=4)
    with pytest.warns(UserWarning, match="100 times without"):  # the next run is told as well
        by_hand(other, 120)


def test_backward_is_counted_during_the_warm_up_alone():
    model = adapted(warmup_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_hand(model, 3, count=True)
        by_hand(model, 120)
        model = adapted(warmup_steps=300)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(150):
            loss(model).backward()
            optimizer.step()
    assert not told(caught)


# Averages of a model in training.


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["mean", "ema"])
def test_an_averaged_model_ends_at_full_strength_and_sees_every_update(use_buffers, options):
    model = adapted(warmup_steps=4)
    averaged = AveragedModel(model, use_buffers=use_buffers, **options).eval()
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    for _ in range(8):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        with torch.no_grad():
            torch.testing.assert_close(averaged(points()).double(), dense(averaged), rtol=1e-5, atol=1e-5)
    assert factor(averaged) == 1


def test_dense_is_the_formula():
    model = adapted(Mlp(), target_modules=["first", "second"], init_weights=False)
    m = layer(model)
    W = delta_weight(m.factors("default"), m.dual_lora_scale["default"], m.forms["default"])
    assert W.any()
    torch.testing.assert_close(model(points()).double(), dense(model), rtol=1e-5, atol=1e-5)
