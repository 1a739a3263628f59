"""What is done with adapters of a running model: several at once, mixed batches, swaps, switches, tied weights."""

import copy
import warnings

import pytest
import torch
from peft import PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from reference_layer import assert_same_bits
from tiny import llama

from dual_lora import DualLoraConfig, DualLoraLayer

IDS = torch.arange(12).view(3, 4)
TARGETS = ["q_proj", "down_proj"]


def config(**options):
    return DualLoraConfig(**{"target_modules": TARGETS, "init_weights": False, "r": 4, **options})


def two_adapters(base=None, **options):
    model = get_peft_model(base or llama(), config(), adapter_name="one")
    model.add_adapter("two", config(**{"r": 6, "target_modules": ["q_proj", "o_proj"], **options}))
    return model.eval()


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


# Several at once.


def test_ranks_by_lora_s_name_are_those_of_now():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), DualLoraConfig(r=4, target_modules=["0"]))
    ranks = model.base_model.model[0].r
    model.add_adapter("other", DualLoraConfig(r=6, target_modules=["0"]))
    assert ranks == {"default": 4, "other": 6}
    model.delete_adapter("default")
    assert ranks == {"other": 6}
    assert "default" not in ranks


def test_a_direction_of_zero_cannot_be_turned_round():
    """Sign(0) = -1 and so is Sign(-0): such rows would keep their sign in a copy of negative weight."""
    model = two_adapters()
    layer = next(m for m in model.modules() if isinstance(m, DualLoraLayer) and "one" in m.scaling)
    layer.factors("one").D.data[0] = 0
    with pytest.raises(ValueError, match="rows or columns whose direction D C is zero"):
        model.add_weighted_adapter(["one"], [-1.0], "new")
    assert "new" not in model.peft_config, "nothing was left behind"
    model.add_weighted_adapter(["one"], [2.0], "new")


def test_a_sum_in_one_adapter_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"not linear in its factors(.|\n)*set_adapter"):
        two_adapters().add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")


# Mixed batches.


def test_mixed_batch_equals_separate_batches():
    model = two_adapters()
    names = ["two", "__base__", "one"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, IDS[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, IDS[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[:1], logits(model, IDS[:1]))


def test_mixed_generation_equals_separate_generation():
    model = two_adapters()
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=2)
    mixed = model.generate(input_ids=IDS, adapter_names=["one", "two", "two"], **options)
    model.set_adapter("two")
    assert torch.equal(mixed[1:], model.generate(input_ids=IDS[1:], **options))


@pytest.mark.parametrize(
    ("names", "training", "message"),
    [
        (["one", "three", "two"], False, "non-existing adapter.*three"),
        (["one", "two"], False, "Length of `adapter_names` should be the same as the number of inputs"),
        (["one", "two", "two"], True, "Cannot pass `adapter_names` when the model is in training mode"),
    ],
)
def test_wrong_adapter_names(names, training, message):
    model = two_adapters().train(training)
    with pytest.raises(ValueError, match=message):
        model(IDS, adapter_names=names)


def test_mixed_batch_is_refused_while_merged():
    model = two_adapters()
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(IDS, adapter_names=["one", "one", "two"])


# Hot-swap.


def saved(folder, seed, **options):
    torch.manual_seed(seed)
    model = get_peft_model(llama(), config(**options)).eval()
    for module in model.modules():
        if isinstance(module, DualLoraLayer):
            for factor in module.factors("default"):
                factor.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return logits(model)


def test_padding_keeps_tied_layers_tied():
    model = get_peft_model(
        llama(tie_word_embeddings=True), config(target_modules=["embed_tokens"], ensure_weight_tying=True)
    ).eval()
    before = logits(model)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=16)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    ours, theirs = embedding.factors("default"), head.factors("default")
    assert ours.A.shape[0] == 8
    assert all(f is g for f, g in zip(ours, theirs, strict=True))
    torch.testing.assert_close(logits(model), before)


def test_a_larger_hotswapped_adapter_shares_no_memory_with_where_it_came_from():
    model, other = (get_peft_model(llama(), config(r=r)) for r in (4, 8))
    state = get_peft_model_state_dict(other)
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", config(r=8))
    own = {p.data_ptr() for p in model.parameters()}
    assert own.isdisjoint(t.data_ptr() for t in state.values())


@pytest.mark.parametrize(
    "other",
    [
        {"r": 4},
        {"r": 2},
        {"r": 8},
        {"r": None, "r1": 1, "r2": 5},
        {"alpha": 3.0},
        {"rank_pattern": {"down_proj": 2}, "alpha": 12.0, "alpha_pattern": {"q_proj": 5.0}},
    ],
    ids=str,
)
def test_hotswap_equals_loading(tmp_path, other):
    first, second = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, **other)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), first)
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-4)
    hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-4)


def test_padded_hotswap_keeps_every_tensor(tmp_path):
    """What a compiled model needs: the same tensors of the same shapes before and after."""
    first, second = saved(tmp_path / "a", 1, r=4), saved(tmp_path / "b", 2, r=8, alpha=5.0)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-4)

    def addresses():
        scales = {name: m.dual_lora_scale["default"] for name, m in model.named_modules() if hasattr(m, "dual_lora_A")}
        return {name: (t.data_ptr(), t.shape) for name, t in (*model.named_parameters(), *scales.items())}

    before = addresses()
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-4)
    assert addresses() == before


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"down_proj": 2}, "alpha": 12.0, "alpha_pattern": {"q_proj": 5.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha": 12.0, "alpha_pattern": {".*proj": 5.0}},  # one layer, two patterns
    ],
    ids=["apart", "together"],
)
def test_a_padded_adapter_is_saved_and_loaded_as_it_is(tmp_path, patterns):
    first = saved(tmp_path / "a", 1, **patterns)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    model.save_pretrained(tmp_path / "padded")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "padded").eval()
    torch.testing.assert_close(logits(loaded), first, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_hotswap_of_a_compiled_model_does_not_recompile(tmp_path):
    saved(tmp_path / "a", 1, r=4)
    second = saved(tmp_path / "b", 2, r=8, alpha=5.0)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    logits(compiled)
    frames = counter.frame_count
    assert frames
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(compiled), second, atol=1e-4, rtol=1e-3)
    assert counter.frame_count == frames


def test_a_layer_that_the_new_adapter_leaves_out_acts_no_more(tmp_path):
    saved(tmp_path / "a", 1)
    second = saved(tmp_path / "b", 2, target_modules=["q_proj"])
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model), second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["norm", "layers.0.self_attn.q_proj.base_layer"])
def test_a_hotswap_says_which_weights_of_the_base_it_changes(name, tmp_path):
    saved(tmp_path / "a", 1)
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    key = f"base_model.model.model.{name}.weight"
    state, its = get_peft_model_state_dict(model), model.state_dict()[key].clone()
    for brought, said in ((its, 0), (its + 1, 1)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            hotswap.hotswap_adapter_from_state_dict(model, state | {key: brought}, "default", config())
        assert sum("weights of the base itself" in str(each.message) for each in found) == said


def test_hotswap_refusals_change_nothing(tmp_path):
    saved(tmp_path / "a", 1, target_modules=["q_proj"])
    saved(tmp_path / "b", 2)
    saved(tmp_path / "c", 2, target_modules=["q_proj"], direction_activation="identity")
    model = PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="direction_activation"):
        hotswap_adapter(model, str(tmp_path / "c"), adapter_name="default", torch_device="cpu")
    for smaller in (lambda f: f[..., :-1], lambda f: f[:-1]):
        state = get_peft_model_state_dict(model)
        cut = {key: value if "left" in key else smaller(value) for key, value in state.items()}
        with pytest.raises(RuntimeError, match=r"the rank alone may differ.*another base model"):
            hotswap.hotswap_adapter_from_state_dict(model, cut, "default", config(target_modules=["q_proj"]))
    assert_same_bits(model.state_dict(), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default", torch_device="cpu")


# Switches.


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_set_adapter_in_inference_mode_trains_nothing():
    model = two_adapters()
    model.set_adapter("two", inference_mode=True)
    assert not trainable(model)
    model.set_adapter("two")
    assert trainable(model)
    assert all("two" in name for name in trainable(model))


def test_rank_pattern_for_both_groups():
    model = get_peft_model(
        llama(), config(rank_pattern={"q_proj": [1, 5], "down_proj": 2}, alpha=8.0, alpha_pattern={"q_proj": 7})
    )
    attention, mlp = model.base_model.model.model.layers[0].self_attn, model.base_model.model.model.layers[0].mlp
    assert (attention.q_proj.states["default"].r1, attention.q_proj.states["default"].r2) == (1, 5)
    assert attention.q_proj.states["default"].alpha == 7
    assert (mlp.down_proj.states["default"].r1, mlp.down_proj.states["default"].r2) == (1, 1)


def test_layer_replication():
    base = llama()
    model = get_peft_model(base, config(layer_replication=[(0, 2), (0, 2)]))
    layers = model.base_model.model.model.layers
    assert len(layers) == 4
    first, again = layers[0].self_attn.q_proj, layers[2].self_attn.q_proj
    assert first.base_layer.weight.data_ptr() == again.base_layer.weight.data_ptr()
    assert first.factors("default").A.data_ptr() != again.factors("default").A.data_ptr()
    model(IDS).logits.sum().backward()
    assert first.factors("default").A.grad.any()
    assert again.factors("default").A.grad.any()
    with pytest.raises(ValueError, match="Cannot merge Dual LoRA layers when base model layers are replicated"):
        model.merge_and_unload()


def test_trainable_tokens_and_modules_to_save_go_along(tmp_path):
    model = get_peft_model(llama(), config(trainable_token_indices=[1, 3], modules_to_save=["lm_head"])).eval()
    names = trainable(model)
    assert any("trainable_tokens" in n for n in names)
    assert any("lm_head.modules_to_save" in n for n in names)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter += 0.1
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-3)


def test_lm_head_and_embedding_as_targets():
    base = llama()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["embed_tokens", "lm_head"])).eval()
    W = {name: base.get_submodule(name).weight.detach() for name in ("model.embed_tokens", "lm_head")}
    plain = copy.deepcopy(base).eval()
    for name in W:
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        plain.get_submodule(name).weight.data += delta
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("padding", [None, 3])
def test_tied_layers_share_their_factors_and_merge_once(padding):
    """The padding has no update in the embedding, and so none in the head: they are one weight when merged."""
    base = llama(tie_word_embeddings=True, pad_token_id=padding)
    model = get_peft_model(
        copy.deepcopy(base), config(target_modules=["embed_tokens"], ensure_weight_tying=True)
    ).eval()
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert isinstance(head, DualLoraLayer)
    for ours, theirs in zip(embedding.factors("default"), head.factors("default"), strict=True):
        assert ours is theirs
    before = head.base_layer.weight.detach().clone()
    unmerged = logits(model)
    assert torch.equal(logits(model), unmerged), "the weight that is kept for inference"
    torch.testing.assert_close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    torch.testing.assert_close(model(IDS).logits, unmerged, atol=1e-5, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), unmerged, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(head.base_layer.weight, before + embedding.get_delta_weight("default"))
    model.unmerge_adapter()
    assert torch.equal(head.base_layer.weight, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), unmerged, atol=1e-4, rtol=1e-3)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_low_cpu_mem_usage(tmp_path):
    expected = saved(tmp_path, 1)
    model = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(model), expected)
    model.add_adapter("elsewhere", DualLoraConfig(r=2, target_modules=["o_proj"]))  # whose layers are asked as well
    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), expected)


def test_transformers_own_functions(monkeypatch, tmp_path):
    """They ask for a newer PEFT than there is, of every method; but for that they work."""
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.21.0")
    model = llama()
    before = logits(model)
    model.add_adapter(config(target_modules=["q_proj"], init_weights=False))
    one = logits(model)
    assert not torch.equal(one, before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    model.add_adapter(config(target_modules=["q_proj"], init_weights=False), "other")
    assert model.active_adapters() == ["other"]
    assert not torch.equal(logits(model), one)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), one)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]


def test_set_requires_grad():
    model = two_adapters()
    model.set_adapter("one")
    model.set_requires_grad("two")
    names = trainable(model)
    assert any(".one" in n for n in names)
    assert any(".two" in n for n in names)
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert not trainable(model)


def test_mixed_model_raises_a_clear_error():
    with pytest.raises(ValueError, match="'DUAL_LORA' is not compatible with the `PeftMixedModel`"):
        PeftMixedModel(llama(), config(), "default")
