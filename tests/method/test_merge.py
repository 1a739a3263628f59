"""Merging is exact: the rounding of W + ΣΔW, in any order and grouping, and unmerging gives every bit back."""

import copy
import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import MODELS, adapted, changed, layer, layers, llama, logits, points, state, train
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora import DualLoraConfig
from dual_lora.core.reference import delta_weight
from dual_lora.method.checksum import checksum

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:dual_lora.DualLoraWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:dual_lora.DualLoraWarning"),
]


def three(dtype=torch.float32, **options):
    """A model with three adapters of different strength, ranks and form, all at random."""
    model = adapted(init_weights=False, **options)
    targets = ["first", "second"]
    model.add_adapter("b", DualLoraConfig(r=2, alpha=1, init_weights=False, target_modules=targets))
    model.add_adapter(
        "c", DualLoraConfig(r=6, init_weights=False, magnitude_activation="identity", target_modules=targets)
    )
    return model.to(dtype).eval()


def weights(model):
    return {n: m.get_base_layer().weight.detach().clone() for n, m in layers(model).items()}


def equal(first, second):
    return all(torch.equal(first[n], second[n]) for n in first)


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    transposed=st.booleans(),
    ranks=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    data=st.data(),
)
def test_merging_is_exact_for_any_shape_dtype_and_rank(dtype, shape, transposed, ranks, data):
    """The rounding of W + ΣΔW whatever the order and grouping; as adapters leave, what the others make; at last W."""
    O, I = shape
    torch.manual_seed(O * 41 + I)
    model = nn.Sequential(Conv1D(O, I) if transposed else nn.Linear(I, O)).to(dtype)
    names = [f"a{k}" for k in range(len(ranks))]
    for name, (r1, r2) in zip(names, ranks, strict=True):
        config = DualLoraConfig(r1=r1, r2=r2, alpha=3.0, init_weights=False, target_modules=["0"])
        if name == "a0":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    module, permuted = layer(model.to(dtype)), st.permutations(names)
    weight = lambda: module.get_base_layer().weight.detach().clone()  # noqa: E731
    W = weight()

    def total(chosen):
        updates = (delta_weight(module.factors(n), module.strength(n), module.states[n].form).double() for n in chosen)
        return W.double() + sum(u.T if transposed else u for u in updates)

    def assert_rounded(merged, chosen):
        exact, slack = total(chosen), 1e-12 if dtype == torch.float64 else 1e-6
        # Where the fp64 sum is within fp32 rounding of a tie, either neighbour is right.
        assert merged.dtype == dtype
        assert ((merged.double() - exact).abs() <= (exact.to(dtype).double() - exact).abs() + slack).all()

    model.merge_adapter(names, safe_merge=data.draw(st.booleans()))
    together = weight()
    assert_rounded(together, names)
    model.unmerge_adapter()
    assert torch.equal(weight(), W)
    for name in data.draw(permuted):
        model.merge_adapter([name])
    assert torch.equal(weight(), together)
    leaving = data.draw(permuted)
    for k, name in enumerate(leaving):
        module.unmerge([name])
        if k + 1 < len(leaving):
            assert_rounded(weight(), leaving[k + 1 :])
    assert torch.equal(weight(), W)


def test_parameter_objects_stay_and_layout_stays():
    model = adapted(MODELS["gpt2"](), target_modules=["c_attn"], init_weights=False)
    module = layer(model)
    weight = module.get_base_layer().weight
    strides = weight.stride()
    model.merge_adapter()
    assert module.get_base_layer().weight is weight
    assert weight.is_contiguous()
    model.unmerge_adapter()
    assert weight.stride() == strides


@pytest.mark.parametrize("base", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Embedding(6, 4)])
def test_who_holds_the_same_memory_gets_the_merged_weight(base):
    """As with LoRA: references that a program has kept, or a process with which the base is shared."""
    held, before = base.weight.data, base.weight.data.clone()
    model = adapted(nn.Sequential(base), target_modules=["0"], init_weights=False)
    model.merge_adapter()
    assert torch.equal(held, before + layer(model).get_delta_weight("default"))
    model.unmerge_adapter()
    assert torch.equal(held, before)


def test_merging_what_is_merged_and_unmerging_what_is_not_warn():
    model = three()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Aa]ll adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_merging_in_the_warm_up_merges_the_present_strength():
    model = adapted(warmup_steps=4)
    train(model, 3)
    model.eval()
    want = model(points())
    model.merge_adapter()
    torch.testing.assert_close(model(points()), want, rtol=1e-5, atol=1e-5)


def test_a_safe_merge_that_one_layer_refuses_leaves_the_others_as_they_were():
    """Which numbers are refused in which factor is in the table."""
    model = three()
    before = state(model)
    model.merge_adapter(["b"])
    merged = state(model)
    factor = "base_model.model.second.dual_lora_D.default"
    model.get_parameter(factor).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^NaNs detected .* The adapter default seems to be broken$"):
        model.merge_adapter(["default"], safe_merge=True)
    assert changed(model, merged) <= {factor}
    assert all(m.merged_adapters == ["b"] for m in layers(model).values())
    model.unmerge_adapter()
    assert changed(model, before) <= {factor}


# Leaving PEFT.


def test_merge_and_unload(tmp_path):
    model = adapted(llama(), target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM").eval()
    want = logits(model)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert not any("lora" in n for n in plain.state_dict())
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= llama().state_dict().keys()


def test_delete_adapter():
    model = three()
    alone = copy.deepcopy(model)
    alone.delete_adapter("b")
    assert all(list(m.states) == ["default", "c"] for m in layers(alone).values())
    assert not any(n.endswith(".b") for n in alone.state_dict())
    assert torch.equal(alone(points()), model(points()))
    model.set_adapter("b")
    model.delete_adapter("b")
    assert "b" not in model.peft_config
    assert model(points()).shape == (6, 5)
    with pytest.raises(ValueError, match="Adapter nothing does not exist"):
        model.delete_adapter("nothing")


# add_weighted_adapter


@pytest.mark.parametrize("weight", [0.5, 2.0, -1.0])
def test_weighted_adapter(weight, tmp_path):
    from peft import PeftModel
    from tiny import Mlp

    model = three()
    model.base_model.add_weighted_adapter(["default"], [weight], "scaled")
    for module in layers(model).values():
        want = weight * module.get_delta_weight("default")
        torch.testing.assert_close(module.get_delta_weight("scaled"), want)
    model.set_adapter("scaled")
    model.save_pretrained(tmp_path, selected_adapters=["scaled"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path / "scaled").eval()
    assert torch.equal(again(points()), model(points()))


def test_a_weighted_adapter_has_what_else_was_trained():
    model = adapted(
        llama(),
        target_modules=["q_proj"],
        init_weights=False,
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [1, 2]},
        dropout=0.5,
    ).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].add_(1)
    want = logits(model)
    model.base_model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), want)


def test_a_weighted_adapter_takes_nobodys_name():
    model = three()
    before = state(model)
    for name in ("default", "b"):
        with pytest.raises(ValueError, match="would be replaced"):
            model.base_model.add_weighted_adapter(["default"], [2.0], name)
    with pytest.raises(ValueError, match="first"):  # that of a module, which PEFT refuses
        model.base_model.add_weighted_adapter(["default"], [2.0], "first")
    assert "first" not in model.peft_config
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("adapters", "given", "kind"),
    [
        (["default", "b"], [1.0, 1.0], "linear"),
        (["default", "b"], [1.0, 1.0], "svd"),
        (["default"], [1.0, 2.0], "linear"),
    ],
)
def test_what_cannot_be_combined_says_why_and_what_to_do(adapters, given, kind):
    model = three()
    with pytest.raises(ValueError, match="not linear in its factors") as caught:
        model.base_model.add_weighted_adapter(adapters, given, "mix", kind)
    for way_out in ("set_adapter", "merge_adapter", "convert_to_lora"):
        assert way_out in str(caught.value)
    for weight, kind in ((0.0, "linear"), (1.0, "svd")):
        with pytest.raises(ValueError, match=rf"'linear' \(the default\) and a weight other than 0; given: '{kind}'"):
            model.base_model.add_weighted_adapter(["default"], [weight], "mix", kind)
    assert "mix" not in model.peft_config
    with pytest.raises(ValueError, match="Adapter nothing does not exist"):
        model.base_model.add_weighted_adapter(["nothing"], [1.0], "mix")


# Tied weights.


def test_a_module_of_two_names_is_said_to_be_adapted_under_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.block, self.again = nn.Sequential(nn.Linear(12, 12)), self.first

    with pytest.warns(UserWarning, match="'again' is the same module as one that is adapted") as caught:
        adapted(Twice(), target_modules=["first", "0"])
    assert len([w for w in caught if "same module" in str(w.message)]) == 1


def test_tied_weights_warn_before_they_are_merged():
    """As a merged head, the one weight changes the embedding as well."""
    base = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True.*tied layer is part of the adapter"):
        model = adapted(base, target_modules=["lm_head"], init_weights=False)
    with pytest.warns(UserWarning, match=r"changes Embedding.* as well, which shares its weight.*Untie"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"(?s)tied_target_modules=\['lm_head'\].*untie"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_one_weight_with_two_updates_is_not_merged(act):
    """Merged one after the other, each would add its update to both, and unmerging would leave one behind."""
    base = llama(tie_word_embeddings=True)
    model = adapted(base, target_modules=["embed_tokens", "lm_head"], init_weights=False)
    before, want = state(model), logits(model)
    with pytest.raises(ValueError, match=r"share one weight.*Untie"):
        getattr(model, act)()
    assert not changed(model, before)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
def test_a_weight_that_is_computed_is_not_merged_into(norm):
    base = torch.nn.Sequential(OrderedDict(it=norm(torch.nn.Linear(5, 6))))
    model = adapted(base, target_modules=["it"], init_weights=False)
    x = torch.randn(3, 5)
    want = model(x)
    with pytest.raises(ValueError, match=r"no parameter but computed.*remove_parametrizations"):
        model.merge_adapter()
    assert not layer(model).merged
    torch.testing.assert_close(model(x), want)


def test_a_weight_that_is_computed_is_computed_once():
    """As by the base alone: spectral_norm takes a step of its power iteration each time."""

    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    counted = Counted()
    base = torch.nn.Sequential(OrderedDict(it=torch.nn.Linear(5, 6)))
    torch.nn.utils.parametrize.register_parametrization(base.it, "weight", counted)
    model, x = adapted(base, target_modules=["it"], init_weights=False), torch.randn(3, 5)
    counted.calls = 0
    y = model(x)
    assert counted.calls == 1
    torch.testing.assert_close(y, base.it.base_layer(x) + x @ layer(model).get_delta_weight("default").t())


def test_replicated_layers_cannot_be_merged():
    model = adapted(llama(), target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    assert len(layers(model)) == 4
    with pytest.raises(ValueError, match="replicated"):
        model.merge_adapter()


def test_what_is_merged_for_good_stays():
    """ReLoRA by hand: merge, empty the list of what is merged, and begin a new update on top of it."""
    model = adapted(init_weights=False).eval()
    expected = {name: m.get_base_layer().weight.detach().clone() for name, m in layers(model).items()}
    for seed in range(3):
        for name, m in layers(model).items():
            expected[name] += m.get_delta_weight("default")
            m.merge()
            m.merged_adapters.clear()
            torch.manual_seed(seed)
            for factor in m.factors("default"):
                nn.init.normal_(factor, std=0.3)
        for name, m in layers(model).items():
            torch.testing.assert_close(m.get_base_layer().weight, expected[name])
    before, y = weights(model), model(points())
    model.merge_adapter()
    torch.testing.assert_close(model(points()), y)
    model.unmerge_adapter()
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_a_base_weight_is_not_loaded_into_a_merged_layer():
    model = adapted(init_weights=False)
    other = {k: torch.randn_like(v) if "base_layer.weight" in k else v for k, v in model.state_dict().items()}
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        model.load_state_dict(other)
    model.unmerge_adapter()
    model.load_state_dict(other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other[key])


# What happens to a base between a merge and its end, and before.


def reopened(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@torch.no_grad()
def doubled(model):
    layer(model).get_base_layer().weight.mul_(2)
    return model


def rows_turned(model):
    weight = layer(model).get_base_layer().weight
    weight.data = weight.data.flip(0)
    return model


CHANGES = {
    "in place": doubled,
    "by data": lambda model: layer(model).get_base_layer().weight.data.mul_(2) is None or model,
    "by numpy": lambda model: np.copyto(layer(model).get_base_layer().weight.detach().numpy(), 1) or model,
    "of a copy": lambda model: doubled(copy.deepcopy(model)),
    "of a file": lambda model: doubled(reopened(model)),
    "and cast": lambda model: doubled(model).double(),
    "in their order": rows_turned,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_was_changed_while_merged_is_not_lost_in_silence(change):
    model = adapted(init_weights=False)
    model.merge_adapter()
    model = CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"weight was changed while \['default'\] were merged"):
        model.unmerge_adapter()
    other = adapted(init_weights=False)
    other.merge_adapter()
    copied = copy.deepcopy(other)
    copied.unmerge_adapter()
    other.half().float()
    other.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_square_weight_that_was_transposed_is_another_one(dtype):
    """Rows and columns had the same share in its number."""
    weight = torch.randn(5, 5, dtype=torch.float64).to(dtype)
    assert checksum(weight) == checksum(weight.clone())
    assert checksum(weight) != checksum(weight.t())


def test_what_is_merged_in_inference_mode_trains():
    model, x = adapted(init_weights=False), points()
    with torch.inference_mode():
        model = model.merge_and_unload()
    assert all(p.requires_grad_(True) is p for p in model.parameters())
    model(x).sum().backward()


def test_a_base_that_was_quantised_under_the_adapter_computes_and_refuses_a_merge():
    quantization = pytest.importorskip("torchao.quantization")
    model = adapted(init_weights=False).to(torch.bfloat16).eval()
    x = points().bfloat16()
    before = model(x)
    quantization.quantize_(
        model.base_model.model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear)
    )
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.05)
    with pytest.raises(ValueError, match="put in the weight's place after the adapter was added"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout):
    module, parts = layer(adapted(init_weights=False)), [torch.randn(3, 12), torch.randn(5, 12)]
    for y, x in zip(module(torch.nested.nested_tensor(parts, layout=layout)).unbind(), parts, strict=True):
        torch.testing.assert_close(y, module(x))


def test_the_old_onnx_exporter_is_refused_in_words():
    import io

    with pytest.raises(NotImplementedError, match=r"dynamo=False.*dynamo=True.*merge"):
        torch.onnx.export(adapted(init_weights=False).eval(), (points(),), io.BytesIO(), dynamo=False)
