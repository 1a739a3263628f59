"""The clip and the scale of the loss: gradient scalers are known without a word, and what accumulation does."""

from types import SimpleNamespace

import pytest
import torch
from tiny import ONE_GRAPH, Mlp, adapted, engine, points, trainable
from torch._subclasses.fake_tensor import FakeTensorMode

from dual_lora import grad_scaler
from dual_lora.method.scaler import loss_scale
from forked import before_peft


@pytest.fixture
def model():
    """Gradients far beyond the clip for some entries and far below it for others."""
    return adapted(init_weights=False)


def loss_of(model, x=None):
    return 30 * model(points(64) if x is None else x).float().square().sum(1).mean()


def grads_of(model, run=lambda model: loss_of(model).backward(), scale=1.0):
    model.zero_grad()
    run(model)
    return [p.grad / scale for p in trainable(model)]


def assert_alike(ours, theirs, **tolerances):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 0, "atol": 0} | tolerances)


class OwnScale(torch.amp.GradScaler):
    """FSDP's does not call torch's `scale` either."""

    def scale(self, outputs):
        self._lazy_init_scale_growth_tracker(outputs.device) if self._scale is None else None
        return outputs * self._scale


def a_scaler(model, scale=1024.0, kind=torch.amp.GradScaler, of=loss_of):
    kind("cpu", init_scale=scale).scale(of(model)).backward()


def two_scalers(model):
    """As for a GAN: both losses are there before the first backward pass."""
    one = loss_of(model)
    a_scaler(model, 65536.0)
    model.zero_grad()
    a_scaler(model, of=lambda _: one)


def one_that_has_grown(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1)
    for _ in range(2):
        model.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if scaler.get_scale() == 512:
            scaler.step(torch.optim.SGD(trainable(model), lr=0.0))
            scaler.update()


def one_that_is_said(model):
    with grad_scaler(SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 1024.0)):
        loss = loss_of(model) * 1024
    loss.backward()


def several_losses_at_once(model):
    sum(torch.amp.GradScaler("cpu", init_scale=1024.0).scale([loss_of(model) / 2] * 2)).backward()


def tensors_kept_outside(model):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = loss_of(model)
    a_scaler(model, of=lambda _: loss)


def checkpointed(model):
    a_scaler(model, of=lambda _: torch.utils.checkpoint.checkpoint(loss_of, model, points(64), use_reentrant=False))


def compiled(model):
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(fast).backward()  # its graph is of no scaler's time
    two_scalers(fast)


def a_step_compiled_whole(model):
    torch.compile(a_scaler, backend="aot_eager")(model)


def traced(model):
    graph = torch.jit.trace(model, points(64))
    loss_of(graph).backward()  # its constants are of no scaler's time
    two_scalers(graph)


def deepspeed(model):
    engine(model, torch.optim.SGD(trainable(model))).backward(loss_of(model))


WAYS = {
    "its own scale": lambda model: a_scaler(model, kind=OwnScale),
    **{way.__name__.replace("_", " "): way for way in (
        a_scaler, two_scalers, one_that_has_grown, one_that_is_said, several_losses_at_once, tensors_kept_outside,
        checkpointed, compiled, a_step_compiled_whole, traced, deepspeed,
    )},
}  # fmt: skip


@pytest.mark.parametrize("way", [pytest.param(way, marks=ONE_GRAPH) if way == "compiled" else way for way in WAYS])
def test_the_factor_is_that_of_the_loss_whose_backward_pass_runs(way, model):
    """Powers of two scale exactly, so that the gradients are the same bits."""
    want = grads_of(model)
    assert_alike(grads_of(model, WAYS[way], 1024), want)
    assert_alike(grads_of(model), want)  # without a scaler


def test_a_loss_that_is_not_scaled_waits_for_one_that_is(model):
    want, own = grads_of(model), loss_of(model)
    a_scaler(model)
    assert_alike(grads_of(model, lambda _: own.backward()), want)


def test_a_backward_pass_that_fails_leaves_no_factor_behind(model):
    want = grads_of(model)
    fails = model.base_model.model.first.register_full_backward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        a_scaler(model)
    fails.remove()
    assert_alike(grads_of(model), want)


@pytest.mark.parametrize("half", [False, True], ids=["autocast", "base"])
def test_a_scaler_in_fp16(half):
    """Known, it changes nothing but rounding; and none is needed, as PEFT's examples train."""
    base = Mlp()
    options = dict(target_modules=["first", "second"], init_weights=False, alpha=8.0)
    model = adapted(base.half() if half else base, **options)
    x = points(64).half() if half else points(64)

    def run(model, scale=None):
        with torch.autocast("cpu", torch.float16, enabled=not half):
            loss = loss_of(model, x)
        (loss if scale is None else torch.amp.GradScaler("cpu", init_scale=scale).scale(loss)).backward()

    plain = grads_of(model, run)
    for ours, theirs in zip(grads_of(model, lambda m: run(m, 64.0), 64), plain, strict=True):
        assert_alike([ours], [theirs], rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_a_class_of_scalers_that_was_there_before_the_import_is_known():
    code = (
        "import torch; from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler\n"
        "import dual_lora.method.scaler; loss = torch.ones(1, requires_grad=True)\n"
        "print(bool(ShardedGradScaler('cpu', process_group=None).scale(loss)._backward_hooks))"
    )
    assert before_peft(code).split()[-1] == "True"


def test_what_has_no_backward_pass_has_no_factor():
    device = torch.device("cpu")
    assert loss_scale(device) is not None
    for without in (FakeTensorMode(), torch.no_grad()):
        with without:
            assert loss_scale(device) is None


def test_accumulation_clips_every_micro_batch_by_itself(model):
    """What the documentation says: the clip acts on each micro-batch's gradient as it arrives, not on their sum."""
    parts = [lambda m, x=x: (loss_of(m, x) / 4).backward() for x in points(64).chunk(4)]
    single = [grads_of(model, part) for part in parts]
    together = grads_of(model, lambda m: [part(m) for part in parts])
    assert_alike(together, [sum(one) for one in zip(*single, strict=True)], rtol=1e-5, atol=1e-4)
    assert any((a - b).abs().max() > 0.05 * a.abs().max() for a, b in zip(together, grads_of(model), strict=True))
