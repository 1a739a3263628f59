"""The clip and the scale of the loss: gradient scalers are known without a word, and what accumulation does."""

import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from reference_layer import adapted as adapted_layer
from tiny import adapted, points, train, trainable
from torch import nn

from dual_lora import grad_scaler
from dual_lora.core.reference import Factors, Form, delta_weight
from dual_lora.method import scaler as scalers
from dual_lora.method.parallel import deepspeed


@pytest.fixture
def model():
    """Gradients far beyond the clip for some entries and far below it for others."""
    return adapted(init_weights=False)


def loss_of(model, x=None):
    return 30 * model(points(64) if x is None else x).float().square().sum(1).mean()


@pytest.fixture(autouse=True)
def nothing_known():
    """No scaler of another test."""
    gc.collect()
    scalers._last = None


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


def test_what_is_said_comes_before_what_is_known():
    known = torch.amp.GradScaler("cpu", init_scale=2.0)
    said = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 8.0)
    assert scale_now() == 2
    with grad_scaler(said):
        assert scale_now() == 8
    with pytest.raises(KeyError), grad_scaler(said):
        raise KeyError
    assert scale_now() == 2
    del known
    gc.collect()
    assert scale_now() is None


def scale_now():
    scale = scalers.loss_scale(torch.device("cpu"))
    return None if scale is None else scale.item()


class OwnScaler(torch.amp.GradScaler):
    def scale(self, outputs):
        return super().scale(outputs)


def test_the_scaler_in_use_counts_and_one_of_a_run_that_is_over_does_not():
    old, new = torch.amp.GradScaler("cpu", init_scale=4.0), OwnScaler("cpu", init_scale=16.0)
    assert scale_now() == 16
    old.scale(torch.ones(1))
    assert scale_now() == 4
    new.scale(torch.ones(1))
    assert scale_now() == 16
    assert torch.amp.GradScaler("cpu", enabled=False)
    model = adapted(init_weights=False)
    train(model, scalers.STEPS_WITHOUT + 1)
    assert scale_now() is None


def test_a_scaler_that_was_made_before_the_import_is_known():
    code = (
        "import torch; scaler = torch.amp.GradScaler('cpu', init_scale=4.0)\n"
        "from dual_lora.method.scaler import loss_scale; print(loss_scale(torch.device('cpu')).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "4.0"


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


def test_deepspeeds_scale_keeps_no_engine_alive():
    class Engine:
        def __init__(self):
            self.module, self.optimizer = adapted(), SimpleNamespace(cur_scale=8.0)

        def fp16_enabled(self):
            return True

        def zero_optimization_stage(self):
            return 1

    Engine.__init__ = deepspeed._after_init(Engine.__init__)
    engine = Engine()
    assert scale_now() == 8
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
    assert scale_now() is None


def test_a_scaler_with_a_scale_of_its_own_stays_known():
    """FSDP's does not call torch's `scale`."""

    class Own(torch.amp.GradScaler):
        def scale(self, outputs):
            self._lazy_init_scale_growth_tracker(outputs.device) if self._scale is None else None
            return outputs * self._scale

    scaler, model = Own("cpu", init_scale=16.0), adapted(init_weights=False)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-6)
    for _ in range(scalers.STEPS_WITHOUT + 4):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scale_now() == 16
    assert not torch.amp.GradScaler("cpu", enabled=False).is_enabled()
    assert scale_now() == 16
