"""The strength λα/√(r1 r2): kept once, as a count; what a graph has saved of it stays as it was."""

import copy
import operator
import pickle

import pytest
import torch
from tiny import Mlp, adapted, changed, factor, layer, layers, points, state, train, trainable
from torch import nn

CHANGES = {
    "to": lambda model: model.to("cpu"),
    "float": lambda model: model.float(),
    "set_scale": lambda model: [m.set_scale("default", 0.5) for m in layers(model).values()],
    "scale_layer": lambda model: [m.scale_layer(3.0) for m in layers(model).values()],
    "unscale_layer": lambda model: [m.unscale_layer() for m in layers(model).values()],
}


def gradients(model, between=lambda model: None):
    model.zero_grad()
    value = model(points()).square().mean()
    between(model)
    value.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


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


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, unpickled], ids=["itself", "copy", "unpickled"])
@pytest.mark.parametrize("way", WRITTEN)
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
                    WRITTEN[way](ours, share * ours.states["default"].strength)
                    other.set_scale("default", share)
                for run in (model, compiled):
                    torch.testing.assert_close(run(points()), theirs(points()))
            assert counter.frame_count == before


def test_a_count_below_zero_is_none():
    model = adapted(warmup_steps=4)
    model.load_state_dict({n: t - 9 if "left" in n else t for n, t in model.state_dict().items()})
    assert factor(model) == 1


def test_whoever_writes_to_buffers_between_two_forwards_does_no_harm():
    """DistributedDataParallel of older versions does, before every forward."""
    model = adapted(init_std=0.3)
    once = gradients(copy.deepcopy(model))
    first = model(points()).square().mean()
    for buffer in model.buffers():
        buffer.copy_(buffer.clone())
    second = model(points()).square().mean()
    (first + second).backward()
    for p, gradient in zip(trainable(model), once, strict=True):
        assert gradient.any()
        assert torch.equal(p.grad, 2 * gradient)


def test_the_count_is_the_only_state():
    model = adapted(warmup_steps=4)
    assert [name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_buffers()] == ["dual_lora_left"] * 2
    assert not [*adapted(init_weights=True).named_buffers()]


def test_a_step_writes_where_a_captured_graph_reads():
    model = adapted(warmup_steps=4)
    before = layer(model).dual_lora_left["default"]
    train(model, 2)
    assert layer(model).dual_lora_left["default"] is before
    assert factor(model) == 0.5


def test_to_empty_keeps_the_count():
    model = adapted(warmup_steps=4)
    train(model, 3)
    model.to_empty(device="cpu")
    assert factor(model) == 0.75


def test_a_count_put_in_place_before_a_move_is_kept():
    model = adapted(warmup_steps=4)
    for m in layers(model).values():
        m.dual_lora_left["default"] = torch.tensor(1, dtype=torch.int32)  # as transformers' loader does
    model.to("cpu")
    assert factor(model) == 0.75


# Inference mode, in which models are often loaded.


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "cpu"])
def test_an_adapter_made_in_inference_mode_is_like_any_other(cast):
    base = Mlp()
    with torch.inference_mode():
        model = adapted(base, target_modules=["first", "second"], warmup_steps=4, ste="identity")
    getattr(model, cast)()
    dtype = base.first.weight.dtype
    layer(model).set_scale("default", 0.5)
    layer(model).set_scale("default", 1.0)
    train(model, 2, x=points().to(dtype))
    assert (float(layer(model).warmup_factor("default")), layer(model).steps_left("default")) == (0.5, 2)
    model.eval()
    with torch.no_grad():
        unmerged = model(points().to(dtype))
        before = state(model)
        model.merge_adapter()
        torch.testing.assert_close(model(points().to(dtype)), unmerged, rtol=2e-2, atol=2e-2)
        model.unmerge_adapter()
    assert not changed(model, before)


def test_a_whole_model_made_in_inference_mode_can_be_cast():
    with torch.inference_mode():
        model = adapted(Mlp(), target_modules=["first", "second"], init_weights=False).eval()
        model.half()
        inside = model(points().half())
    with torch.inference_mode():
        other = adapted(Mlp(), target_modules=["first"])
    other.half()
    assert inside.dtype == other.base_model.model.first.base_layer.weight.dtype == torch.float16


# fp64, which autocast leaves alone.


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_fp64_model_under_autocast_computes_in_fp64(grad):
    model = adapted(init_weights=False).double().eval()
    x = points().double()
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = model(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)


def test_an_fp64_convolution_under_autocast():
    model = adapted(nn.Sequential(nn.Conv1d(3, 4, 2)), target_modules=["0"], init_weights=False).double()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


def test_a_bias_in_fp64_beside_an_input_in_fp32_under_autocast():
    model = adapted(init_weights=False).eval()
    model.base_model.model.double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.base_model.model.first(points()).dtype == torch.bfloat16


def test_a_cast_that_exchanges_tensors_leaves_the_factors_their_bits():
    """`torch.__future__.set_swap_module_params_on_conversion(True)`, as for tensor subclasses."""
    model = adapted(init_weights=False).eval()
    before = [f.clone() for f in layer(model).factors("default")]
    with torch.no_grad():
        model(points())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(torch.equal(f, b) for f, b in zip(layer(model).factors("default"), before, strict=True))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: [m.set_scale("default", 0.5) for m in layers(model).values()],
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: [m.unscale_layer() for m in layers(model).values()],
    ],
    ids=["set_scale", "load", "unscale_layer"],
)
def test_what_is_set_in_inference_mode_may_be_trained(act):
    model = adapted(warmup_steps=4, init_std=0.3)
    with torch.inference_mode():
        act(model)
    train(model, 2)
    assert factor(model) == 0.5
