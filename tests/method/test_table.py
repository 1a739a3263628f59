"""Every kind of layer (`kinds`) × every operation: one table.

The reference is the plain layer with `core.reference`'s W + ΔW in its weights. `--layer-kinds FILE` runs the table on
the rows of a file of one's own.
"""

import contextlib
import copy
import weakref

import pytest
import torch
from kinds import KINDS, WHOLE, call_plainly, of_file
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from quantized_layers import int4_config
from reference_layer import Holder, assert_same_bits
from safetensors.torch import load_file
from tiny import ONE_GRAPH
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dual_lora import DualLoraConfig, DualLoraLayer, DualLoraWarning
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.reference import Factors, Form, delta_weight
from dual_lora.method import layer as layer_module
from dual_lora.method.layers import experts
from dual_lora.method.layers.quantized_rows import keep_unpacked

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:dual_lora.DualLoraWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:.*quantised again:dual_lora.DualLoraWarning"),
    pytest.mark.filterwarnings("ignore:Merged into:dual_lora.DualLoraWarning"),
]

FORMS = {
    "clip": {"ste": "clip"},
    "identity": {"ste": "identity"},
    "hardtanh": {"ste": "hardtanh"},
    "surrogate": {"ste": "surrogate"},
    "no ReLU or Sign": {"magnitude_activation": "identity", "direction_activation": "identity"},
    "frozen signs": {"r": 4, "direction_activation": "frozen", "plain_rank": 1},
}
USUAL = ["clip", "surrogate", "frozen signs"]


def pytest_generate_tests(metafunc):
    if "kind" not in metafunc.fixturenames:
        return
    path = metafunc.config.getoption("--layer-kinds")
    rows = of_file(path) if path else KINDS
    rows = {name: kind for name, kind in rows.items() if takes_part(kind, metafunc.function)}
    if "dtype" in metafunc.fixturenames:
        cells = {f"{name}-{dtype}": (kind, dtype) for name, kind in rows.items() for dtype in kind.dtypes}
        metafunc.parametrize(("kind", "dtype"), cells.values(), ids=cells)
    elif metafunc.function is test_value_and_gradients:
        cells = {f"{n}-{form}": (k, form) for n, k in rows.items() for form in (USUAL if k.variant else FORMS)}
        metafunc.parametrize(("kind", "form"), cells.values(), ids=cells)
    else:
        metafunc.parametrize("kind", rows.values(), ids=rows)


def takes_part(kind, test):
    """Whether an operation says something of a row."""
    if test is test_no_composed_weight_is_kept_for_backward:
        return kind.recomposes
    if kind.variant and test not in (test_value_and_gradients, test_merged_and_unmerged, test_the_merged_weight):
        return False
    if test in (test_merged_and_unmerged, test_the_merged_weight, test_a_broken_adapter_is_not_merged):
        return kind.merges
    needed = {test_compiled: kind.compiles, test_a_copy_is_independent: kind.copies}
    return bool((needed | {test_a_layer_that_cannot_merge_says_so: kind.merge_refused}).get(test, True))


@pytest.fixture
def fixed_order():
    """torch adds a gather's gradient (`weight[index]`, as in batched experts) by atomics on several threads."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


# A model of one layer, and its reference.


def config(kind, **options):
    ranks = {} if "r" in options else {"r1": 2, "r2": 3}
    made = DualLoraConfig(**{**ranks, "init_weights": False, **kind.targets, **options})
    if kind.custom:
        made._register_custom_module(kind.custom)
    return made


def adapted(kind, dtype=WHOLE, **options):
    """(PEFT model over the layer, the layer as it was)."""
    base = kind.built()
    base = base if dtype == WHOLE else base.to(dtype)
    torch.manual_seed(2)
    model = get_peft_model(Holder(base, kind.call), config(kind, **options))
    return model if dtype != torch.float64 else model.double()


def with_other(kind, dtype=WHOLE):
    """With a second adapter of another rank and another form."""
    model = adapted(kind, dtype)
    model.add_adapter("other", config(kind, alpha=3.0, direction_seed=5, **FORMS["frozen signs"]))
    return model if dtype != torch.float64 else model.double()


def input_of(kind, dtype):
    """The input in that precision, where the layer computes with it."""
    x = kind.x()
    return x.to(dtype) if x.is_floating_point() and kind.dropout != "silent" else x


def parts(model):
    """The adapted layers by what they adapt: "it", "out_proj", or the parameter's name."""
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, DualLoraLayer)]
    return {getattr(m, "parameter_name", name.rpartition(".")[2]): m for name, m in named}


def leaves(model, adapter="default"):
    """Detached copies of the factors, of which those that train take gradients."""
    return {
        part: Factors(*(f.detach().clone().requires_grad_(f.is_floating_point()) for f in layer.factors(adapter)))
        for part, layer in parts(model).items()
    }


def update(model, part, factors, adapter):
    """ΔW by the reference, [O, I] or [E, O, I], from what was asked for and not from what the layer made of it."""
    asked, layer = model.peft_config[adapter], parts(model)[part]
    r1, r2 = factors.A.shape[-2], factors.C.shape[-2] if asked.direction_activation != "frozen" else 0
    alpha = layer.states[adapter].alpha if asked.alpha is None else asked.alpha
    scale = alpha / ((r1 * r2) ** 0.5 if r2 else 2 * r1) * layer.warmup_factor(adapter).double()
    live = asked.init_weights != "paper"
    form = Form(asked.ste, asked.magnitude_activation, asked.direction_activation, live, asked.plain_rank)
    if factors.A.ndim == 2:
        return delta_weight(factors, float(scale), form)
    scales = torch.as_tensor(scale).expand(len(factors.A)).tolist()
    return torch.stack([delta_weight(Factors(*(f[e] for f in factors)), s, form) for e, s in enumerate(scales)])


def reference(kind, model, x, *adapters, given=None, strength=1.0):
    """f(x; W + strength · ΣΔW) of the plain layer; `given` are the leaves of the one adapter."""
    plain = kind.plain(kind.built())
    plain = plain.double() if next(model.parameters()).dtype == torch.float64 else plain
    holder = Holder(plain, kind.call)
    own = 0.0
    if kind.own_product:  # off from the plain product by up to 17 %, on processors whose 8-bit sums overflow
        with torch.no_grad():
            its = parts(model)["it"].base_layer.training  # bitsandbytes rounds x in eval mode alone
            own = Holder(kind.built(), kind.call).train(its)(x) - holder(x)
    if not adapters:
        return holder(x) + own
    updates = {
        part: strength * sum(update(model, part, given[part] if given else leaves(model, a)[part], a) for a in adapters)
        for part in parts(model)
    }
    return functional_call(holder, {f"it.{n}": w for n, w in kind.weights(plain, updates).items()}, (x,)) + own


def assert_near(ours, theirs, rough=0.0, what="output"):
    """Equal but for rounding: of the dtype, or of the base's own arithmetic."""
    if rough:
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error < rough, f"{what}: relative error {error:.3g}"
    else:
        exact = {"atol": 1e-10, "rtol": 1e-8} if ours.dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-3}
        torch.testing.assert_close(ours, theirs, **exact, msg=lambda m: f"{what}: {m}")


def outputs(model, x):
    with torch.no_grad():
        return model(x).clone()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stored(model):
    """Every entry of the state, those of torchao's tensors apart."""
    found = {}
    for name, entry in model.state_dict().items():
        inner = entry.__tensor_flatten__()[0] if hasattr(entry, "__tensor_flatten__") else []
        found |= {f"{name}.{part}": getattr(entry, part).clone() for part in inner}
        if not inner and isinstance(entry, torch.Tensor):
            found[name] = entry.detach().clone()
    return found


def may_merge(model):
    """What transformers' quantiser would have told torchao's layers."""
    for layer in parts(model).values():
        backend = getattr(layer, "quantization_backend", None)
        if backend is not None and backend.backend_name == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            four = "Intx" in type(layer.get_base_layer().weight).__name__
            backend.get_apply_tensor_subclass = int4_config if four else Int8WeightOnlyConfig
            backend.supports_merge = True
    return model


# Value and gradients.


def test_value_and_gradients(kind, form):
    model, x = adapted(kind, **FORMS[form]).train(), kind.x()
    floating = x.is_floating_point() and kind.dropout != "silent"
    ours, theirs = (x.clone().requires_grad_(floating) for _ in range(2))
    given = leaves(model)
    y, expected = model(ours), reference(kind, model, theirs, "default", given=given)
    assert_near(y, expected, kind.rough)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    if floating:
        assert_near(ours.grad, theirs.grad, kind.rough, "gradient of x")
    for part, layer in parts(model).items():
        for letter, a, b in zip("ABCD", layer.factors("default"), given[part], strict=True):
            if b.requires_grad:
                assert b.grad.any(), f"the reference has no gradient of {part} {letter}"
                assert_near(a.grad, b.grad, kind.rough, f"gradient of {part} {letter}")
    model.eval()
    expected = reference(kind, model, x, "default").detach()
    for _ in range(2):  # by the weight that is kept, too
        assert_near(outputs(model, x), expected, kind.rough, "in inference")


def test_other_precisions(kind, dtype):
    """Factors stay in fp32 on a base of lower precision, and are fp64 where the model is."""
    model, x, low = adapted(kind, dtype), input_of(kind, dtype), dtype == torch.bfloat16
    y = model(x)
    assert y.dtype == dtype
    expected = reference(kind, model, input_of(kind, WHOLE if low else dtype), "default")
    assert_near(y, expected, 0.03 if low else kind.rough)
    y.float().square().sum().backward()
    for name, p in trainable(model).items():
        assert p.dtype == p.grad.dtype == (torch.float64 if dtype == torch.float64 else WHOLE), name


def test_a_checkpoint_changes_no_gradient(kind, fixed_order):
    x, found = kind.x(), []
    for checkpointed in (False, True):
        model = adapted(kind).train()
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
    assert_same_bits(*found)


def test_no_composed_weight_is_kept_for_backward(kind, monkeypatch):
    made = []

    def spied(*args, **options):
        W = dual_lora_weight(*args, **options)
        made.append(weakref.ref(W))
        return W

    for module in (layer_module, experts):
        monkeypatch.setattr(module, "dual_lora_weight", spied)
    y = adapted(kind).train()(kind.x().requires_grad_())
    assert made
    assert {weight() for weight in made} == {None}
    y.sum().backward()


@ONE_GRAPH
def test_compiled(kind):
    torch._dynamo.reset()
    model, x = adapted(kind, **FORMS["frozen signs"]), kind.x()
    model.add_adapter("other", config(kind, r=6))
    model.base_model.set_adapter(["default", "other"])
    found = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = call(x)
        gradients = torch.autograd.grad(y.square().sum(), trainable(model).values())
        found.append({"output": y, **dict(zip(trainable(model), gradients, strict=True))})
    for name in found[0]:
        assert_near(found[1][name], found[0][name], what=name)


# The start, and training.


def test_the_start_is_the_base(kind):
    model, x = adapted(kind, init_weights=True).train(), kind.x()
    y = model(x)
    assert_near(y, reference(kind, model, x), kind.rough)
    y.square().sum().backward()
    for part, layer in parts(model).items():
        assert layer.factors("default").B.grad.any(), part


def test_the_papers_start_rises_with_the_steps(kind):
    model, x = adapted(kind, init_weights="paper", init_std=0.3, warmup_steps=2).train(), kind.x()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-3)
    for step in range(4):
        strengths = torch.stack([layer.warmup_factor("default").max() for layer in parts(model).values()])
        assert torch.equal(strengths, torch.full_like(strengths, min(1, step / 2)))
        y = model(x)
        assert_near(y.detach(), reference(kind, model, x, "default").detach(), kind.rough, f"after {step} steps")
        y.square().sum().backward()
        assert any(bool(p.grad.any()) for p in trainable(model).values()) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()


def test_a_penalty_on_the_update_reaches_the_factors(kind):
    """As with LoRA: ‖ΔW‖ or ΔW's share in another update, as a part of the loss."""
    model = adapted(kind)
    given = leaves(model)
    for part, layer in parts(model).items():
        ours = layer._matrix(layer.get_delta_weight("default"))
        # What has no part in the layer, such as the padding's row, is 0 in ours alone.
        G = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4)) * (ours.detach() != 0)
        theirs = update(model, part, given[part], "default")
        assert_near(ours * G.ne(0), theirs * G.ne(0), what=f"{part}: ΔW")
        factors = layer.factors("default")
        got = torch.autograd.grad(ours, factors, 3 * G, retain_graph=True)
        for name, own, want in zip("ABCD", got, torch.autograd.grad(theirs, given[part], 3 * G), strict=True):
            assert want.any()
            assert_near(own, want, what=f"{part}: {name}")
        with torch.no_grad():
            assert not layer.get_delta_weight("default").requires_grad


def test_training_moves_the_factors_alone(kind):
    model, x = adapted(kind, init_weights=True).train(), kind.x()
    before, target = stored(model), outputs(model, x) + 1
    optimizer = torch.optim.Adam(trainable(model).values(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = stored(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(trainable(model))
    assert {name.rpartition("dual_lora_")[2][0] for name in moved} == set("ABCD")


def test_dropout(kind):
    """The base sees x, the adapter sees x dropped out; a layer that cannot do that says so."""
    expects = contextlib.nullcontext()
    if "does not work" in kind.dropout:
        expects = pytest.raises(ValueError, match=kind.dropout)
    elif kind.dropout not in ("", "silent"):
        expects = pytest.warns(DualLoraWarning, match=kind.dropout)
    model, x = None, kind.x()
    with expects:
        model = adapted(kind, dropout=0.5)
    if model is None:
        return
    if kind.dropout:
        assert_near(model.train()(x), reference(kind, model, x, "default"))
    elif kind.call is call_plainly:  # a sum of the base's and the adapter's
        torch.manual_seed(3)
        y = model.train()(x)
        torch.manual_seed(3)
        dropped = torch.nn.functional.dropout(x, 0.5)
        update = reference(kind, model, dropped, "default") - reference(kind, model, dropped)
        assert_near(y, reference(kind, model, x) + update, kind.rough)
    assert_near(outputs(model.eval(), x), reference(kind, model, x, "default").detach(), kind.rough)


def test_sampled_tokens_change_gradients_alone(kind, fixed_order):
    x = kind.x()
    x = x.repeat(-(-600 // len(x)), *[1] * (x.ndim - 1))  # fewer tokens are not sampled
    if x.is_floating_point() and kind.dropout != "silent":
        x = x * torch.rand(len(x), *[1] * (x.ndim - 1))
    says_so = pytest.warns(DualLoraWarning, match="token_sampling has no effect on")
    with says_so if kind.samples is False else contextlib.nullcontext():
        model = adapted(kind, token_sampling=0.5).train()
    expected, found = reference(kind, model, x, "default"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        y = model(x)
        assert_near(y, expected, kind.rough)
        y.square().mean().backward()
        found.append([p.grad.clone() for p in trainable(model).values()])
    assert all(map(torch.equal, found[0], found[1]))
    assert bool(kind.samples) != all(map(torch.equal, found[0], found[2]))


# Several adapters.


def test_adapters_are_switched_added_up_and_disabled(kind):
    model, x = with_other(kind).eval(), kind.x()
    base = Holder(kind.built(), kind.call)
    keep_unpacked(base)  # bitsandbytes computes in bf16 on processors with units for it
    plain = outputs(base, x)
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"], ["default"]):
        model.base_model.set_adapter(names)
        assert_near(outputs(model, x), reference(kind, model, x, *names).detach(), kind.rough, str(names))
        with model.disable_adapter():
            assert_near(outputs(model, x), plain)
    assert not torch.allclose(outputs(model, x), plain, atol=1e-2)


def test_mixed_batch(kind):
    model, x = with_other(kind).eval(), kind.x()
    names = ["default", "__base__", *["other"] * (len(x) - 2)]
    if kind.mixes:
        with pytest.raises((ValueError, TypeError), match=kind.mixes):
            parts(model)["it" if "it" in parts(model) else next(iter(parts(model)))](x, x, x, adapter_names=names)
        return
    mixed = model(x, adapter_names=names)
    for k, name in enumerate(names):
        chosen = [] if name == "__base__" else [name]
        want = reference(kind, model, x, *chosen)[k]
        assert_near(mixed[k].detach(), want.detach(), kind.rough, f"sample {k} by {name}")


def test_an_adapter_is_deleted(kind):
    model, x = with_other(kind).eval(), kind.x()
    alone = outputs(model, x)
    model.delete_adapter("other")
    assert torch.equal(outputs(model, x), alone)
    assert not any("other" in name for name in model.state_dict())
    for layer in parts(model).values():
        assert list(layer.states) == ["default"]


def test_a_copy_is_independent(kind):
    model, x = adapted(kind).eval(), kind.x()
    alone, before = outputs(model, x), stored(model)
    copied = copy.deepcopy(model)
    assert torch.equal(outputs(copied, x), alone)
    with torch.no_grad():
        for p in trainable(copied).values():
            p.add_(1)
    assert_same_bits(stored(model), before)
    assert torch.equal(outputs(model, x), alone)
    assert_near(outputs(copied, x), reference(kind, copied, x, "default").detach(), kind.rough)
    assert not torch.allclose(outputs(copied, x), alone, atol=1e-2)


def test_a_swapped_adapter_is_the_other(kind):
    model, x = adapted(kind).eval(), kind.x()
    torch.manual_seed(5)
    other = get_peft_model(Holder(kind.built(), kind.call), config(kind, r=6, alpha=3.0)).eval()
    outputs(model, x)
    hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])
    assert_near(outputs(model, x), outputs(other, x), kind.rough)


def test_an_adapter_at_another_strength(kind):
    model, x = adapted(kind).eval(), kind.x()
    want = reference(kind, model, x, "default", strength=-0.5).detach()
    model.base_model.add_weighted_adapter(["default"], [-0.5], "minus")
    model.set_adapter("minus")
    assert_near(outputs(model, x), want, kind.rough)


# Saving.


@pytest.mark.parametrize("form", ["frozen signs", "paper"])
def test_saved_and_loaded(kind, form, tmp_path):
    options = FORMS.get(form) or {"init_weights": "paper", "init_std": 0.3, "warmup_steps": 4}
    model, x = adapted(kind, **options).train(), kind.x()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-3)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    want = outputs(model.eval(), x)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    extra = {"frozen signs": {"seed"}, "paper": {"left"}}.get(form, set())
    assert {name.rpartition("dual_lora_")[2] for name in file} == {
        *("AB" if form == "frozen signs" else "ABCD"),
        *extra,
    }
    for low in (False, True):
        loaded = DualLoraConfig.from_pretrained(tmp_path)
        if kind.custom:
            loaded._register_custom_module(kind.custom)
        base = Holder(kind.built(), kind.call)
        again = PeftModel.from_pretrained(base, tmp_path, config=loaded, low_cpu_mem_usage=low).eval()
        assert torch.equal(outputs(again, x), want)
        assert not trainable(again)
        for part, layer in parts(again).items():
            assert torch.equal(layer.warmup_factor("default"), parts(model)[part].warmup_factor("default"))


# Merging.


def test_merged_and_unmerged(kind, dtype):
    """merge = forward, in any order and grouping; unmerge gives every bit back."""
    model, x = may_merge(with_other(kind, dtype)).eval(), input_of(kind, dtype)
    outputs(Holder(parts(model)[next(iter(parts(model)))].get_base_layer(), kind.call), x)  # libraries repack at first
    model.base_model.set_adapter(["default", "other"])
    unmerged, before = outputs(model, x), stored(model)
    with model.disable_adapter():
        plain = outputs(model, x)
    low = dtype == torch.bfloat16

    def check():
        if kind.merge_rough:
            assert (outputs(model, x) - unmerged).norm() < kind.merge_rough * (unmerged - plain).norm()
        else:
            assert_near(outputs(model, x), unmerged, 0.02 if low else 0.0, "merged")

    model.merge_adapter()
    check()
    both, merged = stored(model), outputs(model, x)
    with model.disable_adapter():  # as in LoRA, this unmerges
        assert torch.equal(outputs(model, x), plain)
    assert not torch.equal(merged, plain)
    assert_same_bits(stored(model), before)
    assert torch.equal(outputs(model, x), unmerged)
    for order in (["other", "default"], ["default", "other"]):
        for name in order:
            model.merge_adapter([name], safe_merge=True)
        assert_same_bits(stored(model), both)
        for layer in parts(model).values():
            if layer.merged:
                layer.unmerge([order[0]])
        for layer in parts(model).values():
            assert layer.merged_adapters == [order[1]]
        model.unmerge_adapter()
        assert_same_bits(stored(model), before)
    if kind.copies:
        unloaded = copy.deepcopy(model).unload()
        assert torch.equal(outputs(unloaded, x), plain)
        assert not parts(unloaded)
    alone = model.merge_and_unload()
    assert type(alone.it) is type(kind.built())
    assert torch.equal(outputs(alone, x), merged)


def test_the_merged_weight(kind, dtype):
    """It is the rounding of W + ΣΔW, or quantised again with a loss that is told."""
    model = may_merge(with_other(kind, dtype))
    model.base_model.set_adapter(["default", "other"])
    plain = kind.plain(parts(model)["it"].get_base_layer() if kind.merge_rough else kind.built().to(dtype)).double()
    updates = {
        part: sum(update(model, part, leaves(model, a)[part], a) for a in ("default", "other")).detach().double()
        for part in parts(model)
    }
    sums, adapted_layers = kind.weights(plain, updates), parts(model)
    merged = model.merge_and_unload().it
    again = kind.plain(merged)
    for name, total in sums.items():
        W = again.get_parameter(name)
        if kind.merge_rough:
            lost = float((W - total).norm() / updates["it"].norm())
            assert lost == pytest.approx(adapted_layers["it"].merge_error, rel=0.02)
            assert lost < kind.merge_rough
            assert torch.equal(again.bias.double(), plain.bias)
        else:
            assert W.dtype == dtype
            slack = 1e-12 if dtype == torch.float64 else 2e-6
            assert ((W.double() - total).abs() <= (total.to(dtype).double() - total).abs() + slack).all(), name


def test_a_broken_adapter_is_not_merged(kind):
    """NaN in C or D as well: Sign makes a number of it, so that the merged weight shows none."""
    model, x = may_merge(with_other(kind)).eval(), kind.x()
    outputs(model, x)
    model.merge_adapter(["other"])
    before, merged = stored(model), outputs(model, x)
    for letter, bad in zip("ABCD", (float("nan"), float("inf")) * 2, strict=True):
        for layer in parts(model).values():
            factor = getattr(layer, f"dual_lora_{letter}")["default"].data
            kept = factor.clone()
            factor[..., 0, 0] = bad
            with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
                model.merge_adapter(["default"], safe_merge=True)
            factor.copy_(kept)
            assert all(layer.merged_adapters == ["other"] for layer in parts(model).values())
            assert_same_bits(stored(model), before)
    assert torch.equal(outputs(model, x), merged)


def test_a_layer_that_cannot_merge_says_so(kind):
    model, x = adapted(kind).eval(), kind.x()
    want = outputs(model, x)
    with pytest.raises(ValueError, match=kind.merge_refused):
        model.merge_adapter()
    assert not any(layer.merged for layer in parts(model).values())
    assert torch.equal(outputs(model, x), want)
