"""The adapted layer: what forward computes, which parameters move, how the base layer is respected."""

import copy
import warnings

import pytest
import torch
import transformers
from tiny import (
    MODELS,
    ONE_GRAPH,
    TARGETS,
    Mlp,
    adapted,
    changed,
    layer,
    layers,
    llama,
    logits,
    points,
    state,
    tokens,
    train,
    trainable,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora.core.reference import delta_weight
from dual_lora.method.hotswap import pad_ranks
from dual_lora.method.loaded import finish_loading

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:dual_lora.DualLoraWarning")

models = pytest.mark.parametrize("name", MODELS)


def weight_of(module):
    weight = module.get_base_layer().weight
    return weight.t() if isinstance(module.get_base_layer(), Conv1D) else weight


def by_hand(module, x, adapters=("default",)):
    """x (W + ΣΔW)ᵀ + bias from the reference's ΔW."""
    W = weight_of(module)
    for name in adapters:
        W = W + float(module.warmup_factor(name)) * delta_weight(
            module.factors(name), module.strength(name), module.states[name].form
        )
    return nn.functional.linear(x, W, module.get_base_layer().bias)


def test_the_start_is_gaussian():
    model = adapted(llama(hidden_size=64), target_modules="all-linear", init_std=0.5, r=16)
    for letter in "ABCD":
        values = torch.cat([getattr(m, f"dual_lora_{letter}")["default"].flatten() for m in layers(model).values()])
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 0.5) < 0.02


def test_the_start_is_reproducible():
    first, second = state(adapted()), state(adapted())
    assert all(torch.equal(first[k], second[k]) for k in first)


@models
def test_only_adapters_move_and_all_four_factors_do(name):
    model = adapted(MODELS[name](), target_modules=TARGETS[name], warmup_steps=2)
    before = state(model)
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    for _ in range(3):
        model(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = changed(model, before)
    factors = {n for n, p in model.named_parameters() if "dual_lora_" in n}
    counts = {n for n in before if ".dual_lora_left." in n}
    assert factors <= moved
    assert moved - factors - counts <= {n for n in before if "classifier" in n}


def test_conv1d_is_transposed_and_says_so():
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        model = adapted(MODELS["gpt2"](), target_modules=["c_attn"], init_weights=False)
    module = layer(model)
    assert (module.in_features, module.out_features) == (32, 96)
    assert module.get_delta_weight("default").shape == module.get_base_layer().weight.shape
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        adapted(fan_in_fan_out=True)


def test_all_linear_leaves_the_head_alone():
    model = adapted(llama(), target_modules="all-linear", task_type="CAUSAL_LM")
    assert len(layers(model)) == 2 * 7
    assert not any("lm_head" in name for name in layers(model))


@pytest.mark.parametrize(("chosen", "indices"), [(0, {"0"}), ([1], {"1"}), ([0, 1], {"0", "1"})])
def test_layers_to_transform(chosen, indices):
    model = adapted(llama(), target_modules=["q_proj"], layers_to_transform=chosen)
    assert {name.split("layers.")[1][0] for name in layers(model)} == indices


def test_layers_pattern():
    model = adapted(MODELS["gpt2"](), target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")
    assert ["h.1." in name for name in layers(model)] == [True]


@pytest.mark.parametrize(
    ("bias", "moving"),
    [("none", set()), ("all", {"second", "third"}), ("dual_lora_only", {"second"})],
)
def test_bias(bias, moving):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(12, 12, bias=b) for b in (False, True, True))

        def forward(self, x):
            return self.third(self.second(self.first(x).tanh()))

    model = adapted(Three(), target_modules=["first", "second"], bias=bias)
    before = state(model)
    train(model, 2, lr=0.1)
    assert {n.split(".")[2] for n in changed(model, before) if n.endswith("bias")} == moving


def test_modules_to_save():
    model = adapted(target_modules=["first"], modules_to_save=["second"])
    before = state(model)
    train(model, 2, lr=0.1)
    moved = changed(model, before)
    assert {n for n in moved if "second" in n} == {
        f"base_model.model.second.modules_to_save.default.{p}" for p in ("weight", "bias")
    }
    assert not any("original_module" in n or "base_layer" in n for n in moved)


# Dropout: the base sees x, the adapter sees x dropped out.


def test_adapters_with_and_without_dropout_together():
    model = adapted(dropout=0.5, init_weights=False, target_modules=["first"])
    model.add_adapter("plain", copy.deepcopy(model.peft_config["default"]))
    module = layer(model)
    module.dual_lora_dropout["plain"] = nn.Identity()
    module.set_adapter(["default", "plain"])
    module.train()
    x = torch.randn(20, 12)
    torch.manual_seed(7)
    y = module(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    want = by_hand(module, x, ["plain"])
    want = want + dropped @ delta_weight(module.factors("default"), module.strength("default")).t()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


# The base layer's own behaviour is kept.


@pytest.mark.parametrize("kind", ["forward", "pre", "subclass", "replaced forward"])
def test_what_users_hang_on_the_base_layer_is_honoured(kind):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.Sequential(Doubled(12, 5) if kind == "subclass" else nn.Linear(12, 5))
    x = points()
    plain = nn.functional.linear(x, base[0].weight, base[0].bias)
    if kind == "forward":
        base[0].register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "pre":
        base[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        plain = plain - base[0].bias / 2
    elif kind == "replaced forward":
        old = base[0].forward
        base[0].forward = lambda x: 2 * old(x)
    model = adapted(base, target_modules=["0"], init_weights=False)
    module = layer(model)
    update = x @ delta_weight(module.factors("default"), module.strength("default")).t()
    want = 2 * plain + (2 * update if kind == "subclass" else update)  # a subclass is a function of its weight
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), want, rtol=1e-5, atol=1e-5)


def test_backward_hook_of_the_base_layer_runs():
    base = nn.Sequential(nn.Linear(12, 5))
    called = []
    base[0].register_full_backward_hook(lambda *args: called.append(1))
    model = adapted(base, target_modules=["0"], init_weights=False)
    model(points().requires_grad_()).sum().backward()
    assert called


# Several adapters.


def test_strength_set_by_hand():
    model = adapted(init_weights=False, target_modules=["first"]).eval()
    x, module = points(), layer(model)
    base, full = module.get_base_layer()(x), module(x)
    for act, strength in (
        (lambda: module.set_scale("default", 0.5), 0.5),
        (lambda: module.scale_layer(3.0), 1.5),
        (lambda: module.unscale_layer(3.0), 0.5),
        (lambda: module.unscale_layer(), 1.0),
        (lambda: module.set_scale("default", 0.0), 0.0),
        (lambda: module.set_scale("absent", 7.0), 0.0),
    ):
        act()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(module(x), base + strength * (full - base), rtol=1e-5, atol=1e-5)


# Precision: the factors stay in fp32.


def cast_by_to(model):
    return model.to(torch.bfloat16)


def cast_by_bfloat16(model):
    return model.bfloat16()


def cast_by_data(model):
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    return model


def cast_by_swapping(model):
    """As for tensor subclasses; a pass has made and kept what it could."""
    with torch.no_grad():
        model.eval()(points())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def cast_a_copy(model):
    return cast_by_data(copy.deepcopy(model))


def cast_after_padding(model):
    pad_ranks(model, 8)
    return cast_by_data(model)


def cast_after_a_loader_of_its_own(model):
    """As transformers' `load_adapter` puts parameters in place, without load_state_dict."""
    for module in layers(model).values():
        for name in module.adapter_layer_names:
            factors = getattr(module, name)
            factors["default"] = nn.Parameter(factors["default"].detach().clone())
    finish_loading(model, "default", has_counts=True)
    model(points())
    return cast_by_data(model)


@pytest.mark.parametrize("cast", [cast_a_copy, cast_after_padding, cast_after_a_loader_of_its_own])
def test_foreign_casts_of_other_parameter_objects_are_noticed_too(cast):
    model = cast(adapted(init_weights=False))
    with pytest.warns(UserWarning, match="cast to torch.bfloat16 by foreign code and are fp32 again"):
        model(points().bfloat16())
    assert all(f.dtype == torch.float32 for module in layers(model).values() for f in module.factors("default"))


@pytest.mark.parametrize("cast", [cast_by_to, cast_by_bfloat16, cast_by_data, cast_by_swapping])
def test_foreign_casts_are_noticed_once(cast):
    model = adapted(init_weights=False)
    before = state(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = cast(model)
        y = model(points().bfloat16())
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    told = [str(w.message) for w in caught if "fp32" in str(w.message)]
    if cast is cast_by_data:
        assert len(told) == 1
        assert "bits" in told[0]
        assert "lost" in told[0]
        before = {n: t.bfloat16().float() if "dual_lora_" in n else t for n, t in before.items()}
    else:
        assert not told, "no bit was lost"
    assert not any("dual_lora_" in n for n in changed(model, before))
    for module in layers(model).values():
        assert module.get_base_layer().weight.dtype == torch.bfloat16
        for f in module.factors("default"):
            assert f.dtype == f.grad.dtype == torch.float32
        assert module.dual_lora_scale["default"].dtype == torch.float32


def test_an_optimizer_made_before_the_cast_still_moves_the_factors():
    model = adapted(init_weights=False)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model.to(torch.bfloat16)
    before = state(model)
    train(model, 1, optimizer=optimizer, x=points().bfloat16())
    assert {n for n in before if "dual_lora_" in n and "left" not in n} <= changed(model, before)


def test_factors_keep_all_bits_when_the_base_is_bf16():
    """PEFT rounds fresh factors to the base's dtype on the way; that flips signs."""
    torch.manual_seed(0)
    model = adapted(llama().bfloat16(), target_modules=["q_proj"], init_weights=False)
    module = layer(model)
    assert all(f.dtype == torch.float32 for f in module.factors("default"))
    assert not any(torch.equal(f, f.bfloat16().float()) for f in module.factors("default"))
    assert logits(model).dtype == torch.bfloat16


def test_no_autocast_of_adapters_is_answered_with_one_warning():
    from peft import get_peft_model

    from dual_lora import DualLoraConfig

    base = llama().bfloat16()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, DualLoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    assert [str(w.message)[:58] for w in caught if "autocast_adapter_dtype" in str(w.message)] == [
        "autocast_adapter_dtype=False has no effect on Dual LoRA: i"
    ]
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "dual_lora_" in n)


def test_autocast():
    model = adapted(init_weights=False)
    full = model(points())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(points())
    assert low.dtype == torch.bfloat16
    assert 0 < (low.float() - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("base", "targets", "x"),
    [(Mlp(), ["first", "second"], points()), (nn.Sequential(nn.Conv1d(3, 4, 2)), ["0"], torch.randn(2, 3, 9))],
    ids=["linear", "convolution"],
)
def test_an_fp64_model_under_autocast_computes_in_fp64(base, targets, x, grad):
    model = adapted(copy.deepcopy(base), target_modules=targets, init_weights=False).double().eval()
    want = model(x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x.double()), want, rtol=1e-12, atol=1e-12)
        if targets != ["0"]:  # a bias in fp64 beside an input in fp32
            assert model.base_model.model.first(x).dtype == torch.bfloat16


def test_representation_names_the_method():
    assert "dual_lora.Linear" in repr(adapted())


@pytest.mark.skipif(transformers.__version__ < "5.1", reason="transformers 5.0's own forward fails on the meta device")
def test_meta_device():
    with torch.device("meta"):
        base = llama()
    model = adapted(base, target_modules="all-linear", task_type="CAUSAL_LM")
    assert model(input_ids=tokens().to("meta")).logits.shape == (3, 7, 60)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointed):
        model = adapted(llama(), target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)


@ONE_GRAPH
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_equals_eager_and_does_not_recompile_as_the_ramp_rises(backend):
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    try:
        results = []
        for compiled in (False, True):
            model = adapted(warmup_steps=5)
            forward = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
            optimizer = torch.optim.SGD(trainable(model), lr=1.0)
            losses = []
            for _ in range(7):
                loss = forward(points()).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            results.append(torch.tensor(losses))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert (results[0].diff() != 0).all()
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_exclude_modules():
    model = adapted(llama(), target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    assert len(layers(model)) == 3
    model = adapted(llama(), target_modules=["q_proj", "v_proj"], exclude_modules=".*v_proj")
    assert all(name.endswith("q_proj") for name in layers(model))
