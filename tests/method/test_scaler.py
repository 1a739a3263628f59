"""The clip and the scale of the loss: gradient scalers, their refusal, and gradient accumulation."""

import gc
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from reference_layer import adapted as adapted_layer
from tiny import adapted, points, trainable
from torch import nn

from dual_lora import DualLoraCallback, grad_scaler
from dual_lora.core.reference import Factors, Form, delta_weight
from dual_lora.method import deepspeed
from dual_lora.method import scaler as scalers


@pytest.fixture
def model():
    """Gradients far beyond the clip for some entries and far below it for others."""
    return adapted(init_weights=False)


def loss_of(model, x=None):
    return 30 * model(points(64) if x is None else x).float().square().sum(1).mean()


def fp16():
    return torch.autocast("cpu", torch.float16)


def gradients(model, scale=None, known=True, autocast=None):
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    if not known:
        scalers.set_grad_scaler(None)
    context = grad_scaler(scaler) if known else torch.enable_grad()
    with context, torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(model)
        scaler.scale(loss).backward()
    return {n: p.grad / (scale or 1.0) for n, p in model.named_parameters() if p.grad is not None}


def test_clip_under_fp16_autocast_raises_a_clear_error(model):
    with fp16(), pytest.raises(RuntimeError, match="gradient scaler") as caught:
        model(points())
    for way_out in ("grad_scaler(scaler)", "DualLoraCallback()", "bf16", "'identity'", "'hardtanh'", "'surrogate'"):
        assert way_out in str(caught.value)


def layers_of_every_kind():
    """(module, input, how it is called)."""
    expert = nn.Module()
    expert.weight = nn.Parameter(torch.randn(4, 6))
    expert.forward = lambda x: x @ expert.weight.t()
    return {
        "linear": (nn.Linear(6, 4), torch.randn(2, 6), {}),
        "dropout": (nn.Linear(6, 4), torch.randn(2, 6), {"dropout": 0.1}),
        "convolution": (nn.Conv1d(3, 4, 2), torch.randn(2, 3, 5), {}),
        "embedding": (nn.Embedding(9, 6), torch.arange(5), {}),
        "attention": (Attention(), torch.randn(2, 3, 8), {"target_modules": ["it.self_attn"]}),
        "parameter": (expert, torch.randn(2, 6), {"target_modules": [], "target_parameters": ["it.weight"]}),
    }


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.self_attn(x, x, x)[0]


@pytest.mark.parametrize("kind", layers_of_every_kind())
def test_clip_with_a_base_in_fp16_is_refused_too(kind):
    """A scaler is as unknown there as under autocast: C's gradient would be wrong by nine tenths."""
    base, x, options = layers_of_every_kind()[kind]
    model, _ = adapted_layer(base.half(), **options)
    x = x.half() if x.is_floating_point() else x
    with pytest.raises(RuntimeError, match=r"in fp16 a gradient scaler.*GradScaler\(enabled=False\)"):
        model.train()(x)
    with grad_scaler(torch.amp.GradScaler("cpu", enabled=False)):
        assert model(x).dtype == torch.float16
    with torch.no_grad():
        model(x)
    with pytest.warns(UserWarning, match="runs in fp16 with gradients"):
        model.eval()(x)


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
        with grad_scaler(scaler):
            scaler.scale(loss_of(model, x)).backward()
        grads.append({n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for n, g in grads[0].items():
        torch.testing.assert_close(grads[1][n], g, rtol=0.02, atol=0.02 * g.abs().max().item(), msg=n)


@pytest.mark.parametrize(
    "options", [dict(ste="identity"), dict(ste="surrogate"), dict(direction_activation="identity")]
)
def test_other_estimators_are_allowed(options):
    with fp16():
        assert adapted(init_weights=False, **options)(points()).dtype == torch.float16


def test_training_in_eval_mode_knows_the_scaler_too(model):
    """Without dropout some train in eval mode; the clip acts there as well."""
    want = gradients(model.eval())
    got = gradients(model, scale=65536.0)
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], msg=name)
    with fp16(), pytest.warns(UserWarning, match=r"train in eval mode.*grad_scaler"):
        model(points())


def test_where_nothing_is_trained_fp16_is_allowed(model):
    with fp16():
        with torch.no_grad():
            model.eval()(points())
        with torch.no_grad():
            model.train()(points())
        for p in model.parameters():
            p.requires_grad_(False)
        model.train()(points())


def test_bf16_autocast_needs_no_scaler(model):
    want, got = gradients(model), gradients(model, known=False, autocast=torch.bfloat16)
    assert want.keys() == got.keys()
    for name, g in got.items():
        assert 0 < (g - want[name]).norm() < 0.05 * want[name].norm(), name


def test_a_known_scaler_changes_nothing(model):
    """Powers of two scale exactly, so that the gradients are the same bits."""
    plain = gradients(model)
    scaled = gradients(model, scale=65536.0)
    assert plain.keys() == scaled.keys()
    assert all(torch.equal(plain[n], scaled[n]) for n in plain)
    unknown = gradients(model, scale=65536.0, known=False)
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


def steps_by(scaler, model, known=False):
    """What is said in some steps by a scaler, which is known, if at all, during the passes alone."""
    optimizer = torch.optim.SGD(trainable(model), lr=1e-4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            with grad_scaler(scaler) if known else nullcontext():
                scaler.scale(loss_of(model)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return [str(w.message) for w in caught if "was not told of" in str(w.message)]


class OwnScaler(torch.amp.GradScaler):
    def step(self, optimizer, *args, **kwargs):
        return super().step(optimizer, *args, **kwargs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, OwnScaler])
def test_an_unknown_scaler_is_noticed_in_its_step(kind, autocast):
    """In fp32 and bf16 nothing is refused before, as few would use a scaler there."""
    model = adapted(init_weights=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (told,) = steps_by(kind("cpu", init_scale=1024.0), model)
    assert "dual_lora.grad_scaler(scaler)" in told
    assert "'surrogate'" in told


def test_another_scaler_than_the_known_one_is_noticed():
    """A Trainer's, of a run that failed, may still be known when the next loop begins."""
    with grad_scaler(torch.amp.GradScaler("cpu", init_scale=2.0)):
        assert steps_by(torch.amp.GradScaler("cpu", init_scale=1024.0), adapted(init_weights=False))


@pytest.mark.parametrize("case", ["known", "disabled", "identity", "no sign"])
def test_a_scaler_that_does_no_harm_is_not_spoken_of(case):
    options = {"identity": dict(ste="identity"), "no sign": dict(direction_activation="identity")}.get(case, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=case != "disabled")
    assert not steps_by(scaler, adapted(init_weights=False, **options), known=case == "known")


def test_a_known_scaler_under_fp16_autocast(model):
    plain = gradients(model, scale=1.0, autocast=torch.float16)
    scaled = gradients(model, scale=64.0, autocast=torch.float16)
    for n in plain:
        torch.testing.assert_close(scaled[n], plain[n], rtol=0.02, atol=0.02 * plain[n].abs().max().item(), msg=n)


def test_a_scale_that_changes_is_followed(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1, growth_factor=2.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    seen = []
    with grad_scaler(scaler):
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
    plain, scaled = gradients(model), gradients(model, scale=65536.0, known=False)
    assert all(torch.equal(plain[n], scaled[n]) for n in plain)


def test_the_context_ends():
    outer, inner = torch.amp.GradScaler("cpu", init_scale=2.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    with grad_scaler(outer):
        with grad_scaler(inner):
            assert scalers.loss_scale(torch.device("cpu")).item() == 8
        assert scalers.loss_scale(torch.device("cpu")).item() == 2
    assert scalers.loss_scale(torch.device("cpu")) is None
    with pytest.raises(KeyError), grad_scaler(outer):
        raise KeyError
    assert scalers.loss_scale(torch.device("cpu")) is None


def test_a_disabled_scaler_is_no_scale():
    with grad_scaler(torch.amp.GradScaler("cpu", enabled=False)):
        assert scalers.loss_scale(torch.device("cpu")) is None


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


def test_a_run_that_never_ended_leaves_no_scale_behind():
    """Interrupted, the Trainer does not tell that training ends; the next run may have no scaler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # where accelerate keeps it
    DualLoraCallback().on_train_begin(None, None, None, optimizer=optimizer)
    assert scalers.loss_scale(torch.device("cpu")) == 4
    del optimizer
    gc.collect()
    assert scalers.loss_scale(torch.device("cpu")) is None


def test_a_run_without_a_scaler_that_never_ended_allows_nothing_afterwards(model):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    DualLoraCallback().on_train_begin(None, None, None, optimizer=optimizer)
    run = torch.autocast("cpu", torch.float16)
    with run:
        model(points())
    del optimizer
    gc.collect()
    with run, pytest.raises(RuntimeError, match="Make the scaler known"):
        model(points())


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
    assert scalers.loss_scale(torch.device("cpu")) == 8
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
    assert scalers.loss_scale(torch.device("cpu")) is None
