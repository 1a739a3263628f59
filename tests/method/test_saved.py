"""Saving and loading: every way in gives the same bits, and what does not fit raises a clear error."""

import copy
import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import (
    Counted,
    Mlp,
    adapted,
    changed,
    factor,
    gpt2,
    layer,
    layers,
    llama,
    logits,
    points,
    state,
    tokens,
    train,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dual_lora import DualLoraConfig, DualLoraWarning
from forked import before_peft


def train_llama(model, steps):
    model.train()
    train(model, steps, loss=lambda: model(input_ids=tokens(), labels=tokens()).loss)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and adapters on it: trained to the end of the warm-up, and half-way."""
    root = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(root / "base")
    base = LlamaForCausalLM.from_pretrained(root / "base")
    options = dict(
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", warmup_steps=4, init_weights="paper"
    )
    model = train_llama(adapted(base, **options), 2)
    model.save_pretrained(root / "half")
    torch.save(logits(model), root / "half.pt")
    model = train_llama(model, 4)
    model.save_pretrained(root / "adapter")
    torch.save(logits(model), root / "adapter.pt")
    return root


WAYS = {
    "PeftModel": lambda root, name: PeftModel.from_pretrained(llama_of(root), root / name),
    "low memory": lambda root, name: PeftModel.from_pretrained(llama_of(root), root / name, low_cpu_mem_usage=True),
    "trainable": lambda root, name: PeftModel.from_pretrained(llama_of(root), root / name, is_trainable=True),
    "AutoPeftModel": lambda root, name: AutoPeftModelForCausalLM.from_pretrained(root / name),
    "load_adapter": lambda root, name: load_second(root, name),
    "load_adapter, low memory": lambda root, name: load_second(root, name, low_cpu_mem_usage=True),
    "transformers": lambda root, name: AutoModelForCausalLM.from_pretrained(root / name),
    "state dict": lambda root, name: by_state_dict(root, name),
}


def llama_of(root):
    return LlamaForCausalLM.from_pretrained(root / "base")


def load_second(root, name, **options):
    model = adapted(llama_of(root), target_modules=["q_proj"], init_weights=False)
    model.load_adapter(root / name, "second", **options)
    model.set_adapter("second")
    return model


def by_state_dict(root, name):
    model = get_peft_model(llama_of(root), DualLoraConfig.from_pretrained(root / name))
    set_peft_model_state_dict(model, load_file(root / name / "adapter_model.safetensors"))
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["adapter", "half"])
def test_every_way_in_gives_the_same_bits(folders, way, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = WAYS[way](folders, name).eval()
    assert torch.equal(logits(model), torch.load(folders / f"{name}.pt"))
    adapter = "second" if "load_adapter" in way else "default"
    assert factor(model, adapter) == {"adapter": 1, "half": 0.5}[name]


def test_what_is_in_the_folder(folders):
    names = {path.name for path in (folders / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pickle")) for name in names)
    tensors = load_file(folders / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("dual_lora_")[2] for name in tensors} == {"A", "B", "C", "D", "left"}
    assert {t.dtype for n, t in tensors.items() if not n.endswith("left")} == {torch.float32}
    config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DUAL_LORA"
    assert (config["r"], config["r1"], config["r2"], config["warmup_steps"]) == (4, 2, 2, 4)


def test_a_state_of_a_model_that_is_no_peft_model(tmp_path):
    """Its names have no prefix: nothing of it was loaded into a PeftModel, and nothing said so."""
    peft, base = adapted(llama(), target_modules=["q_proj"], init_weights=False).eval(), llama()
    torch.manual_seed(7)
    other = adapted(base, target_modules=["q_proj"], init_weights=False).eval()
    assert not torch.equal(logits(peft), logits(other))
    peft.save_pretrained(tmp_path)
    own = llama()
    own.load_adapter(tmp_path)
    set_peft_model_state_dict(other, get_peft_model_state_dict(own))
    assert torch.equal(logits(peft), logits(other))


def test_saved_twice_the_same_bytes(folders, tmp_path):
    model = WAYS["PeftModel"](folders, "adapter")
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_saved_from_a_low_precision_base_without_losing_a_bit(tmp_path):
    model = adapted(init_weights=False).to(torch.bfloat16)
    want = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp().to(torch.bfloat16), tmp_path)
    got = get_peft_model_state_dict(again)
    assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)


def test_several_adapters_have_their_own_folders(tmp_path):
    model = adapted(init_weights=False)
    model.add_adapter("other", DualLoraConfig(r=2, init_weights=False, target_modules=["first"]))
    model.set_adapter("other")
    want = model(points())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path / "other")
    assert list(layers(again)) == ["base_model.model.first"]
    assert torch.equal(again(points()), want)


def test_saving_and_loading_change_nothing_else(tmp_path):
    model = adapted(init_weights=False)
    before = state(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_adapter_loaded_for_inference_does_not_train(folders):
    model = WAYS["PeftModel"](folders, "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    assert {n.split("dual_lora_")[1][0] for n, p in WAYS["trainable"](folders, "adapter").named_parameters()
            if p.requires_grad} == set("ABCD")  # fmt: skip


def test_merged_adapter_is_saved_as_itself(tmp_path):
    model = adapted(init_weights=False)
    want = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    got = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(got[n], want[n]) for n in want)


# What does not fit is refused.


@pytest.fixture
def variant(folders, tmp_path):
    """A copy of the finished adapter with something changed."""

    def make(tensors=None, raw=None, **config):
        import shutil

        path = tmp_path / "variant"
        shutil.copytree(folders / "adapter", path)
        values = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(values | config))
        file = path / "adapter_model.safetensors"
        if raw is not None:
            file.write_bytes(raw(file.read_bytes()))
        if tensors is not None:
            save_file(tensors(load_file(file)), file)
        return path

    return make


LOADERS = {
    "PeftModel": lambda path: PeftModel.from_pretrained(llama(), path),
    "low memory": lambda path: PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=True),
    "load_adapter": lambda path: adapted(llama(), target_modules=["q_proj"]).load_adapter(path, "second"),
}
loaders = pytest.mark.parametrize("loader", LOADERS)


def refusal(loader, path):
    with pytest.raises(ValueError, match=r"safetensors|Dual LoRA|Unknown") as caught:
        LOADERS[loader](path)
    return str(caught.value)


@loaders
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated(variant, loader, keep):
    path = variant(raw=lambda b: b[: int(len(b) * keep)])
    message = refusal(loader, path)
    assert str(path / "adapter_model.safetensors") in message
    assert "not a complete safetensors file" in message
    assert "copy it again" in message


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])
def test_truncated_through_transformers(variant, folders, way):
    """transformers reads the file itself; it is looked at before."""
    path = variant(raw=lambda b: b[: len(b) // 2], base_model_name_or_path=str(folders / "base"))
    with pytest.raises(ValueError, match=r"not a complete safetensors file(.|\n)*copy it again"):
        AutoModelForCausalLM.from_pretrained(path) if way == "from_pretrained" else llama_of(folders).load_adapter(path)


def test_transformers_imports_after_this_package():
    """What looks at files is put in place while transformers is being imported, when PEFT cannot be."""
    script = "import sys\nfor name in [name for name in sys.modules if name.partition('.')[0] == 'transformers']:\n"
    script += "    del sys.modules[name]\n"
    script += "import dual_lora\nfrom transformers import Trainer\nimport transformers.integrations.peft as p\n"
    script += "assert p.PeftAdapterMixin.load_adapter.__wrapped__"
    before_peft(script)


def test_foreign_tensors_through_transformers(variant, folders):
    path = variant(lambda t: {"model.weight": torch.zeros(3)}, base_model_name_or_path=str(folders / "base"))
    with pytest.raises(ValueError, match="no factors of a Dual LoRA adapter"):
        AutoModelForCausalLM.from_pretrained(path)


@loaders
@pytest.mark.parametrize("kind", ["int32", "uint8", "bool", "complex64", "float8_e8m0fnu"])
def test_factors_of_other_numbers(variant, loader, kind):
    if (kind := getattr(torch, kind, None)) is None:
        pytest.skip("torch 2.6 has no such numbers")
    change = lambda t: {n: v.to(kind) if n.endswith("v_proj.dual_lora_A") else v for n, v in t.items()}  # noqa: E731
    try:
        path = variant(tensors=change)
    except KeyError:
        pytest.skip("safetensors 0.4 holds no complex numbers")
    message = refusal(loader, path)
    assert "dual_lora_A and 1 more tensors as " in message
    assert "expected floating-point numbers" in message


def test_an_adapter_named_twice_acts_once():
    """As merging does, and in all kinds of layers alike."""
    model = adapted(llama(), target_modules=["q_proj", "embed_tokens"], init_weights=False).eval()
    wanted = logits(model)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model), wanted)


def test_a_head_with_counts_and_masks(tmp_path):
    model = adapted(Counted(), target_modules=["body"], modules_to_save=["head"], init_weights=False)
    model.train()(torch.randn(32, 12))
    model.base_model.model.head.modules_to_save["default"].mask.fill_(True)
    model.eval().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} >= {torch.int64, torch.bool}
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(Counted(), tmp_path).eval()
    again.base_model.model.body.base_layer.load_state_dict(model.base_model.model.body.base_layer.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(again(x), model(x))
    assert again.base_model.model.head.modules_to_save["default"][0].num_batches_tracked == 1


def test_not_safetensors_at_all(variant):
    assert "not a complete safetensors file" in refusal("PeftModel", variant(raw=lambda b: b"PK\x03\x04" + b))


@loaders
def test_foreign_tensors(variant, loader):
    message = refusal(loader, variant(tensors=lambda t: {"model.weight": torch.zeros(3)}))
    assert "no factors of a Dual LoRA adapter" in message
    assert "model.weight" in message


@loaders
def test_tensors_of_lora(variant, loader, tmp_path):
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    stolen = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    message = refusal(loader, variant(tensors=lambda t: stolen))
    assert "adapter of another type" in message
    assert "lora_A" in message


def test_adapter_of_another_type(folders, tmp_path):
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"different peft types.*DUAL_LORA.*LORA"):
        adapted(llama(), target_modules=["q_proj"]).load_adapter(tmp_path, "lora")
    with pytest.raises(ValueError, match=r"different peft types.*LORA.*DUAL_LORA"):
        lora.load_adapter(folders / "adapter", "dual")


@loaders
def test_a_missing_layer(variant, loader):
    message = refusal(loader, variant(tensors=lambda t: {n: v for n, v in t.items() if "1.self_attn.q_proj" not in n}))
    assert "it lacks the factors of model.layers.1.self_attn.q_proj, which this model adapts" in message
    assert "Nothing was loaded" in message


@loaders
def test_a_missing_factor_is_reported(variant, loader):
    gone = "base_model.model.model.layers.1.self_attn.q_proj.dual_lora_C"
    path = variant(tensors=lambda t: {n: v for n, v in t.items() if n != gone})
    with pytest.warns(UserWarning, match=rf"lacks {gone}.(default|second): these keep their present values"):
        LOADERS[loader](path)


def test_factors_that_a_script_for_lora_does_not_save_are_missed():
    """Such a script takes the names with lora_A and lora_B from the state. C and D of the file would stay random."""
    model = adapted(llama(), target_modules=["q_proj"], init_weights=False)
    part = {n: t for n, t in model.state_dict().items() if "lora_A" in n or "lora_B" in n}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"lacks .*dual_lora_C.default and .*dual_lora_D.default: these") as caught:
            model.load_state_dict(part, strict=False)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False)
        model.load_state_dict({}, strict=False)


def test_the_names_of_a_saved_file_are_told_where_they_would_load_nothing():
    """Scripts put in the adapter's name by `replace(".weight", ".default.weight")`, which leaves our names alone."""
    model = adapted(llama(), target_modules=["q_proj"], init_weights=False)
    saved = get_peft_model_state_dict(model)
    renamed = {name.replace(".weight", ".default.weight"): tensor + 1 for name, tensor in saved.items()}
    with pytest.warns(DualLoraWarning, match=r"dual_lora_A, as a saved file names it.*dual_lora_A.default") as told:
        model.load_state_dict(renamed, strict=False)
    assert len(told) == 1
    assert torch.equal(get_peft_model_state_dict(model)[key := next(iter(saved))], saved[key])


def in_dtype(dtype):
    return lambda tensors: {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


@loaders
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_that_was_made_smaller_is_told(variant, loader, dtype):
    with pytest.warns(DualLoraWarning, match=rf"The factors that are loaded are in {dtype}|were cast to {dtype}"):
        LOADERS[loader](variant(tensors=in_dtype(dtype)))


def test_a_smaller_state_is_told_when_it_is_swapped_in_and_not_before_training(folders):
    model = PeftModel.from_pretrained(llama_of(folders), folders / "adapter")
    state = load_file(folders / "adapter" / "adapter_model.safetensors")
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    with pytest.warns(DualLoraWarning, match=r"The factors that are loaded are in torch.bfloat16"):
        hotswap_adapter_from_state_dict(
            model, in_dtype(torch.bfloat16)(state), "default", config=model.peft_config["default"]
        )
    fresh = adapted(llama(), target_modules=["q_proj"], init_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DualLoraWarning)
        set_peft_model_state_dict(fresh, in_dtype(torch.bfloat16)(get_peft_model_state_dict(fresh)))


@loaders
def test_other_ranks_are_refused_by_peft(variant, loader):
    with pytest.raises(RuntimeError, match=r"size mismatch for .*dual_lora_A.*\[2, 32\].*\[3, 32\]"):
        LOADERS[loader](variant(r=6, r1=3, r2=3))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (lambda: llama(hidden_size=64), ["size mismatch", "[2, 32]", "[2, 64]"]),
        (lambda: llama(layers=1), ["it has factors of model.layers.1.", "does not adapt"]),
        (lambda: llama(layers=3), ["it lacks the factors of model.layers.2.", "the base that it was trained on"]),
        (gpt2, ["Target modules", "not found in the base model"]),
    ],
    ids=["wider", "fewer layers", "more layers", "another family"],
)
def test_the_wrong_base(folders, base, words):
    with pytest.raises((ValueError, RuntimeError), match=words[0].replace(".", r"\.")) as caught:
        PeftModel.from_pretrained(base(), folders / "adapter")
    for word in words:
        assert word in str(caught.value)


def test_a_refused_adapter_leaves_the_others_as_they_were(variant):
    path = variant(tensors=lambda t: {n: v for n, v in t.items() if "layers.1" not in n})
    model = adapted(llama(), target_modules=["q_proj"], init_weights=False).eval()
    want = logits(model)
    before = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match="it lacks"):
        model.load_adapter(path, "second")
    assert torch.equal(logits(model), want)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_wrong_value_in_the_configuration(variant):
    assert "Unknown ste 'clamp'" in refusal("PeftModel", variant(ste="clamp"))


def test_a_newer_configuration_is_read_with_a_warning(variant):
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['fancy'\]"):
        PeftModel.from_pretrained(llama(), variant(fancy=1))


@pytest.mark.parametrize("way", [*LOADERS, "transformers"])
def test_a_newer_format_is_refused(variant, folders, way):
    path = variant(format_version=3, base_model_name_or_path=str(folders / "base"))
    with pytest.raises(ValueError, match=r"saved in format 3(.|\n)*reads formats up to 2(.|\n)*--upgrade dual-lora"):
        AutoModelForCausalLM.from_pretrained(path) if way == "transformers" else LOADERS[way](path)


def test_the_present_format_is_read(variant):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(llama(), variant(format_version=2))


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        PeftModel.from_pretrained(llama(), str(tmp_path / "nothing"))


def test_copies_of_a_loaded_model(folders):
    model = WAYS["PeftModel"](folders, "adapter").eval()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    assert not changed(copied, state(model))


def test_shards_that_were_not_gathered_are_reported(tmp_path):
    model = adapted()
    layers(model)["base_model.model.first"].dual_lora_A["default"].data = torch.zeros(0)
    with pytest.warns(DualLoraWarning, match=r"first\.dual_lora_A\.default are empty or flat(.|\n)*were not gathered"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("left_out", [None, "lm_head"])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_tied_layers_are_loaded_and_stay_tied(targets, low, left_out, tmp_path):
    """With both names of the shared factors in the file, as PEFT saves them, or with the embedding's alone."""
    base = llama(tie_word_embeddings=True)
    model = adapted(base, target_modules=targets, ensure_weight_tying=True, warmup_steps=4, init_weights="paper")
    train_llama(model, 3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any("lm_head.dual_lora_A" in name for name in tensors)
    save_file({n: t for n, t in tensors.items() if left_out is None or left_out not in n}, file)
    again = PeftModel.from_pretrained(
        llama(tie_word_embeddings=True), tmp_path, is_trainable=True, low_cpu_mem_usage=low
    )
    assert factor(again) == 0.75
    assert torch.equal(logits(again), logits(model))
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert all(h is e for h, e in zip(head.factors("default"), embedding.factors("default"), strict=True))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_saved_while_merged_into_a_tied_weight(targets, tied, copied, tmp_path):
    base = llama(tie_word_embeddings=True)
    model = adapted(copy.deepcopy(base), target_modules=targets, ensure_weight_tying=tied, init_weights=False).eval()
    expected = logits(model)
    model.merge_adapter()
    if tied:  # else the other layer reads the merged weight too, of which PEFT warns
        torch.testing.assert_close(logits(model), expected)
    given = {name: value.clone() for name, value in model.state_dict().items()} if copied else None
    model.save_pretrained(tmp_path, state_dict=given)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(base.eval()))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_saved_while_another_adapter_is_merged(tmp_path):
    """Into an embedding, which PEFT saves with whatever adapter it is asked for."""
    base = llama(tie_word_embeddings=True)
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"], init_weights=False)
    model.add_adapter("other", DualLoraConfig(r=4, target_modules=["embed_tokens"], init_weights=False, warmup_steps=0))
    expected = logits(model.eval())
    model.base_model.merge_adapter(["other"])
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval()), expected)


def test_the_embedding_of_tied_layers_may_not_be_missing(tmp_path):
    options = dict(target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapted(llama(tie_word_embeddings=True), **options).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "embed_tokens" not in n}, file)
    with pytest.raises(ValueError, match=r"lacks the factors of model\.embed_tokens"):
        PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)


@pytest.mark.parametrize("letter", "CD")
def test_a_sign_that_is_no_number_is_told_when_it_is_saved_and_when_it_is_loaded(tmp_path, letter):
    """With A and B the outputs show it. Sign takes a NaN for negative, so nothing else would."""
    model = adapted(init_weights=False)
    getattr(layer(model), f"dual_lora_{letter}")["default"].data[0, 1] = float("nan")
    assert model(points()).isfinite().all()
    said = r"with NaN or infinity in C or D of first\."
    with pytest.warns(DualLoraWarning, match=f"is saved {said}"):
        model.save_pretrained(tmp_path)
    with pytest.warns(DualLoraWarning, match=f"is loaded {said}"):
        PeftModel.from_pretrained(Mlp(), tmp_path)


@pytest.mark.parametrize("broken", [False, True])
def test_signs_in_eight_bits_are_looked_at_as_well(tmp_path, broken):
    adapted(init_weights=False).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}
    name = next(n for n in state if "dual_lora_D" in n)
    state[name].view(torch.uint8)[0, 0] = 0x7F if broken else 0x30  # this kind's NaN, and 0.5
    save_file(state, file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(Mlp(), tmp_path)
    assert any("is loaded with NaN" in str(w.message) for w in caught) == broken
