"""The clip and the scale of the loss: gradient scalers are known without a word, and what accumulation does."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference_layer import adapted as adapted_layer
from tiny import adapted, points, trainable
from torch import nn

from dual_lora import grad_scaler
from dual_lora.core.reference import Factors, Form, delta_weight
from dual_lora.method.parallel import deepspeed


@pytest.fixture
def model():
    """Gradients far beyond the clip for some entries and far below it for others."""
    return adapted(init_weights=False)


def loss_of(model, x=None):
    return 30 * model(points(64) if x is None else x).float().square().sum(1).mean()


def gradients(model, scale=None, autocast=None, scaled=None):
    """The factors' gradients, unscaled; `scaled` multiplies the loss where nobody knows it."""
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(model)
        (scaler.scale(loss) * (scaled or 1.0)).backward()
    return {n: p.grad / (scale or 1.0) / (scaled or 1.0) for n, p in model.named_parameters() if p.grad is not None}


def layers_of_every_kind():
    """(module, input, how it is called)."""
    return {
        "linear": (nn.Linear(6, 4), torch.randn(2, 6), {}),
        "dropout": (nn.Linear(6, 4), torch.randn(2, 6), {"dropout": 0.1}),
        "convolution": (nn.Conv1d(3, 4, 2), torch.randn(2, 3, 5), {}),
        "embedding": (nn.Embedding(9, 6), torch.arange(5), {}),
        "attention": (Attention(), torch.randn(2, 3, 8), {"target_modules": ["it.self_attn"]}),
        "parameter": (Expert(), torch.randn(2, 6), {"target_modules": [], "target_parameters": ["it.weight"]}),
    }


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return x @ self.weight.t()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.self_attn(x, x, x)[0]


@pytest.mark.parametrize("kind", layers_of_every_kind())
def test_a_base_in_fp16_trains_without_a_scaler(kind):
    """None is alive, so nothing multiplies the loss: as PEFT's examples train."""
    base, x, options = layers_of_every_kind()[kind]
    model, _ = adapted_layer(base.half(), **options)
    x = x.half() if x.is_floating_point() else x
    model.train()(x).float().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "dual_lora_C" in n)


def test_a_scaler_over_a_base_in_fp16():
    """Known, it changes nothing but rounding."""
    model = adapted(init_weights=False)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.half()
    x = points(64).half()
    grads = []
    for scale in (1.0, 256.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, x)).backward()
        grads.append({n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=0.02, atol=0.02 * g.abs().max().item(), msg=n)


def test_bf16_autocast_needs_no_scaler(model):
    want, got = gradients(model), gradients(model, autocast=torch.bfloat16)
    assert want.keys() == got.keys()
    for name, g in got.items():
        assert 0 < (g - want[name]).norm() < 0.05 * want[name].norm(), name


def test_a_known_scaler_changes_nothing(model):
    """Powers of two scale exactly, so that the gradients are the same bits."""
    plain = gradients(model)
    scaled = gradients(model, scale=65536.0)
    assert plain.keys() == scaled.keys()
    assert all(torch.equal(plain[n], scaled[n]) for n in plain)
    unknown = gradients(model, scaled=65536.0)
    directions = [n for n in plain if "dual_lora_C" in n or "dual_lora_D" in n]
    assert all((unknown[n] - plain[n]).abs().max() > 0.01 * plain[n].abs().max() for n in directions)


def test_what_an_unknown_scaler_does_to_each_factor():
    """By the formula in fp64: A and B are linear in the loss, the clip makes another method of C and D."""
    model = adapted(nn.Sequential(nn.Linear(12, 5)), target_modules=["0"], init_weights=False)
    layer, x, L = model.base_model.model[0], points(64), 1024.0
    (L * loss_of(model, x)).backward()
    A, B, C, D = (f.detach().double() for f in layer.factors("default"))
    base, s, x = layer.get_base_layer().double(), layer.scaling["default"], x.double()
    sign, P = torch.where(D @ C > 0, 1.0, -1.0).double(), B @ A
    y = x @ (base.weight + s * P.clamp(min=0) * sign).t() + base.bias
    G = (60 * y / len(x)).t() @ x
    dP, H = s * G * sign * (P > 0), s * G * P.clamp(min=0)

    def gradients(dQ):
        return dict(A=B.t() @ dP, B=dP @ A.t(), C=D.t() @ dQ, D=dQ @ C.t())

    right, wrong = gradients(H.clamp(-1, 1)), gradients((L * H).clamp(-1, 1) / L)
    for name, expected in wrong.items():
        found = getattr(layer, f"dual_lora_{name}")["default"].grad.double() / L
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)
        error = (expected - right[name]).norm() / right[name].norm()
        assert error == 0 if name in "AB" else error > 0.5, name


def test_a_known_scaler_under_fp16_autocast(model):
    plain = gradients(model, scale=1.0, autocast=torch.float16)
    scaled = gradients(model, scale=64.0, autocast=torch.float16)
    for n in plain:
        torch.testing.assert_close(scaled[n], plain[n], rtol=0.02, atol=0.02 * plain[n].abs().max().item(), msg=n)


def test_a_scale_that_changes_is_followed(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1, growth_factor=2.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    seen = []
    for _ in range(3):
        loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 32.0
    for later in seen[1:]:  # step() has unscaled them
        assert all(torch.equal(seen[0][n], later[n]) for n in later)


@pytest.mark.parametrize("ste", ["identity", "hardtanh", "surrogate"])
def test_the_others_are_indifferent_to_scale(ste):
    model = adapted(init_weights=False, ste=ste)
    plain, scaled = gradients(model), gradients(model, scaled=65536.0)
    assert all(torch.equal(plain[n], scaled[n]) for n in plain)


def grads_of(run, model):
    model.zero_grad()
    run()
    return [p.grad.clone() for p in trainable(model)]


def scaler_of(scale, kind=torch.amp.GradScaler):
    return kind("cpu", init_scale=scale)


class OwnScale(torch.amp.GradScaler):
    """FSDP's does not call torch's `scale` either."""

    def scale(self, outputs):
        self._lazy_init_scale_growth_tracker(outputs.device) if self._scale is None else None
        return outputs * self._scale


class Said:
    def is_enabled(self):
        return True

    def get_scale(self):
        return 1024.0


def by_two_scalers(model):
    """As for a GAN: both losses are there before the first backward pass."""
    one, other = loss_of(model), loss_of(model)
    scaler_of(65536.0).scale(other).backward()
    model.zero_grad()
    scaler_of(1024.0).scale(one).backward()


def one_that_is_said(model):
    with grad_scaler(Said()):
        loss = loss_of(model) * 1024
    loss.backward()


def several_at_once(model):
    sum(scaler_of(1024.0).scale([loss_of(model) / 2] * 2)).backward()


def kept_outside(model):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = scaler_of(1024.0).scale(loss_of(model))
    loss.backward()


def checkpointed(model):
    loss = torch.utils.checkpoint.checkpoint(loss_of, model, points(64), use_reentrant=False)
    scaler_of(1024.0).scale(loss).backward()


def compiled(model):
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(fast).backward()  # its graph is of no scaler's time
    model.zero_grad()
    by_two_scalers(fast)


def by_deepspeed(model):
    class Engine:
        module, optimizer = model, SimpleNamespace(cur_scale=1024.0)

        def fp16_enabled(self):
            return True

        def zero_optimization_stage(self):
            return 1

        def backward(self, loss):
            (self.optimizer.cur_scale * loss).backward()

        def _take_model_step(self):
            raise AssertionError

    deepspeed.wrap(Engine)
    Engine().backward(loss_of(model))


WAYS = {
    "a scaler": lambda model: scaler_of(1024.0).scale(loss_of(model)).backward(),
    "its own scale": lambda model: scaler_of(1024.0, OwnScale).scale(loss_of(model)).backward(),
    **{way.__name__.replace("_", " "): way for way in (
        by_two_scalers, one_that_is_said, several_at_once, kept_outside, checkpointed, compiled, by_deepspeed
    )},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_factor_is_that_of_the_loss_whose_backward_pass_runs(way, model):
    """Powers of two scale exactly, so that the gradients are the same bits."""
    want = grads_of(lambda: loss_of(model).backward(), model)
    for ours, theirs in zip(grads_of(lambda: WAYS[way](model), model), want, strict=True):
        torch.testing.assert_close(ours / 1024, theirs, rtol=0, atol=0)
    again = grads_of(lambda: loss_of(model).backward(), model)  # without a scaler
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, want, strict=True))


def test_a_loss_that_is_not_scaled_waits_for_one_that_is(model):
    want = grads_of(lambda: loss_of(model).backward(), model)
    own, other = loss_of(model), loss_of(model)
    scaler_of(65536.0).scale(other).backward()
    again = grads_of(lambda: own.backward(), model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, want, strict=True))


def test_a_backward_pass_that_fails_leaves_no_factor_behind(model):
    want = grads_of(lambda: loss_of(model).backward(), model)
    model.base_model.model.first.register_full_backward_pre_hook(fails := lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scaler_of(65536.0).scale(loss_of(model)).backward()
    assert fails is model.base_model.model.first._backward_pre_hooks.popitem()[1]
    again = grads_of(lambda: loss_of(model).backward(), model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, want, strict=True))


def test_a_scaler_that_was_made_before_the_import_is_known():
    code = (
        "import torch; scaler = torch.amp.GradScaler('cpu', init_scale=4.0)\n"
        "from dual_lora.method.scaler import loss_scale; print(loss_scale(torch.device('cpu')) is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def test_accumulation_clips_every_micro_batch_by_itself():
    """What the documentation says: the clip acts on each micro-batch's gradient as it arrives, not on their sum."""
    model = adapted(nn.Sequential(nn.Linear(12, 5)), target_modules=["0"], init_weights=False)
    module = model.base_model.model[0]
    chunks = points(64).chunk(4)

    def of_C(x):
        (grad,) = torch.autograd.grad(loss_of(model, x) / 4, module.dual_lora_C["default"])
        return grad

    for x in chunks:
        (loss_of(model, x) / 4).backward()
    accumulated = module.dual_lora_C["default"].grad
    torch.testing.assert_close(accumulated, sum(of_C(x) for x in chunks))

    # By the formula: the sum of clips, which is not the clip of the sum.
    A, B, C, D = (f.detach() for f in module.factors("default"))
    s = module.scaling["default"]
    W = module.get_base_layer().weight + delta_weight(Factors(A, B, C, D), s, Form())
    total = torch.zeros_like(W)
    clipped = torch.zeros_like(W)
    for x in chunks:
        y = nn.functional.linear(x, W, module.get_base_layer().bias)
        G = (30 * 2 * y / len(x) / 4).t() @ x
        H = s * G * (B @ A).clamp(min=0)
        total += H
        clipped += H.clamp(-1, 1)
    torch.testing.assert_close(accumulated, D.t() @ clipped, rtol=1e-4, atol=1e-4)
    assert (accumulated - D.t() @ total.clamp(-1, 1)).abs().max() > 0.05 * accumulated.abs().max()
