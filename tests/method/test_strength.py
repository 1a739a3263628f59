"""The strength λα/√(r1 r2): a number that is written acts, and what a graph has saved of it stays as it was."""

import copy
import inspect
import operator
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from tiny import ONE_GRAPH, Mlp, adapted, changed, layer, layers, points, state, train, trainable

from dual_lora import DualLoraConfig

CHANGES = {
    "to": lambda model: model.to("cpu"),
    "float": lambda model: model.float(),
    "set_scale": lambda model: [m.set_scale("default", 0.5) for m in layers(model).values()],
    "scale_layer": lambda model: [m.scale_layer(3.0) for m in layers(model).values()],
    "unscale_layer": lambda model: [m.unscale_layer() for m in layers(model).values()],
    "buffers written": lambda model: [b.copy_(b.clone()) for b in model.buffers()],  # as DistributedDataParallel did
}


def gradients(model, between=lambda model: None):
    model.zero_grad()
    value = model(points()).square().mean()
    between(model)
    value.backward()
    return [p.grad for p in trainable(model)]


@pytest.mark.parametrize("left", [0, 2], ids=["full", "warming up"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_forward_and_backward_comes_after_both(change, left):
    model = adapted(warmup_steps=4, init_std=0.3)
    for m in layers(model).values():
        m.set_left("default", left)
    want = gradients(copy.deepcopy(model))
    for ours, theirs in zip(gradients(model, CHANGES[change]), want, strict=True):
        assert theirs.any()
        assert torch.equal(ours, theirs)


WRITTEN = {
    "item": lambda layer, value: layer.scaling.__setitem__("default", value),
    "update": lambda layer, value: layer.scaling.update(default=value),
    "or": lambda layer, value: operator.ior(layer.scaling, {"default": value}),
    "another dict": lambda layer, value: setattr(layer, "scaling", {"default": value}),  # as PEFT's rescale helper
}


def unpickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - our own


@ONE_GRAPH
@pytest.mark.parametrize(
    ("way", "copied"),
    [*((way, lambda model: model) for way in WRITTEN), ("item", copy.deepcopy), ("update", unpickled)],
    ids=[*WRITTEN, "of a copy", "unpickled"],
)
def test_a_strength_written_as_for_lora_acts_compiled_too(way, copied):
    """`layer.scaling[adapter] = …` is how much code sets a LoRA's. The graph stays the one that it was."""
    torch._dynamo.reset()
    model, theirs = copied(adapted(init_std=0.3)).eval(), adapted(init_std=0.3).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for run in (model, compiled):
                run(points())
            before = counter.frame_count
            for share in (0.5, 2.0):
                for ours, other in zip(layers(model).values(), layers(theirs).values(), strict=True):
                    WRITTEN[way](ours, share * ours.states["default"].scaling)
                    other.set_scale("default", share)
                for run in (model, compiled):
                    torch.testing.assert_close(run(points()), theirs(points()))
            assert counter.frame_count == before


@pytest.mark.parametrize("way", WRITTEN)
def test_a_strength_that_is_to_train_is_refused(way):
    """LoRA's gives it a gradient. A plain tensor is the number that it holds."""
    module, other = layers(adapted(init_std=0.3)).values()
    before = module(points())
    with pytest.raises(ValueError, match="requires a gradient, and there is none for it"), torch.no_grad():
        WRITTEN[way](module, torch.nn.Parameter(torch.tensor(2.0)))
    assert torch.equal(module(points()), before)
    WRITTEN[way](other, torch.tensor(2.0))
    assert dict(other.scaling) == {"default": 2.0}


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 10}, {"r": 6, "r1": 1, "r2": 5}, {"r": 3, "alpha": 7}], ids=str)
def test_the_number_under_lora_s_name_is_lora_s(options):
    """Scripts write `lora_alpha / r`, a part of it, or 1 where both are equal."""
    model = adapted(**{"r": 8, "init_std": 0.3} | options).eval()
    config, full = model.peft_config["default"], copy.deepcopy(model)
    for module in layers(model).values():
        assert module.scaling["default"] == pytest.approx(config.lora_alpha / config.r)
        assert module.scaling["default"] == module.lora_alpha["default"] / module.r["default"]
        assert module.strength("default") == module.states["default"].strength
        module.scaling["default"] = config.lora_alpha / config.r
    torch.testing.assert_close(model(points()), full(points()))
    for ours, theirs in zip(layers(model).values(), layers(full).values(), strict=True):
        ours.scaling["default"] = 0.25 * config.lora_alpha / config.r
        torch.testing.assert_close(ours.get_delta_weight("default"), 0.25 * theirs.get_delta_weight("default"))
        assert ours.get_delta_weight("default").any()


def test_what_asks_for_lora_s_factors_is_told_that_there_are_none():
    """`hasattr(module, "lora_A")`: a merge, a penalty or a strength of a script would pass these layers by."""
    model = adapted(dropout=0.5, init_std=0.3)
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        with pytest.warns(UserWarning, match=f"asks a Dual LoRA layer for '{name}'.*LoraLayer.* finds these") as told:
            found = [m for m in model.modules() if hasattr(m, name)]
        assert (found, len(told)) == ([], 1)
    for module in (m for m in model.modules() if hasattr(m, "lora_dropout")):
        module.lora_dropout["default"].p = 0.0
    assert torch.equal(model(points()), model(points()))
    assert not torch.equal(adapted(dropout=0.5, init_std=0.3)(points()), model(points()))


@pytest.mark.filterwarnings("error::dual_lora.DualLoraWarning")
def test_who_looks_through_all_names_is_told_nothing():
    """As `torch.jit` does, and debuggers."""
    model = adapted().base_model.model
    inspect.getmembers(model.first)
    torch.jit.trace(model, points(), check_trace=False)


def test_scripts_that_look_for_loras_layers_find_these():
    """`isinstance(module, LoraLayer)`, as PEFT's own helper asks."""
    model = adapted(init_std=0.3).eval()
    assert [m for m in model.modules() if isinstance(m, LoraLayer)] == [*layers(model).values()]
    assert not isinstance(model.base_model.model.first.base_layer, LoraLayer)
    full, half = model(points()), copy.deepcopy(model)
    for module in layers(half).values():
        module.set_scale("default", 0.5)
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(model(points()), half(points()))
    assert torch.equal(model(points()), full)


def test_lora_over_it_is_refused_and_below_it_works():
    options = dict(r=4, target_modules=["first"])
    for below, above in ((DualLoraConfig, LoraConfig), (LoraConfig, DualLoraConfig)):
        inner = get_peft_model(Mlp(), below(**options)).base_model.model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`|You are trying to modify a model")
            if above is DualLoraConfig:
                get_peft_model(inner, above(**options))(points())
                continue
            with pytest.raises(TypeError, match=r"cannot hold an adapter of LoraConfig.*merge the Dual LoRA adapter"):
                get_peft_model(inner, above(**options))


# Inference mode, in which models are often loaded.


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "cpu"])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "model"])
def test_what_is_made_in_inference_mode_is_like_any_other(cast, whole):
    base = Mlp()
    with torch.inference_mode():
        model = adapted(Mlp() if whole else base, target_modules=["first", "second"], warmup_steps=4, ste="identity")
    getattr(model, cast)()
    dtype = layer(model).base_layer.weight.dtype
    x = points().to(dtype)
    with torch.inference_mode():
        for change in ("set_scale", "unscale_layer"):
            CHANGES[change](model)
        model.load_state_dict(model.state_dict())
        assert model(x).dtype == dtype == getattr(base, cast)().first.weight.dtype
    if whole:
        return
    train(model, 2, x=x)
    assert (float(layer(model).warmup_factor("default")), layer(model).steps_left("default")) == (0.5, 2)
    model.eval()
    with torch.no_grad():
        unmerged = model(x)
        before = state(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), unmerged, rtol=2e-2, atol=2e-2)
        model.unmerge_adapter()
    assert not changed(model, before)


def test_writing_lora_s_alpha_of_a_layer_says_what_to_write_instead():
    module = next(iter(layers(adapted()).values()))
    with pytest.raises(TypeError, match="set_scale"):
        module.lora_alpha["default"] = 3
