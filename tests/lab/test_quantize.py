"""A base in 4 or 8 bits: packed while it is loaded, trained on, opened again, and whole again in a merge."""

import json
import shutil

import pytest
import torch

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.quantize import PACKAGES, check_quantize
from dual_lora.lab.recipe.read import build_recipe, identity
from dual_lora.lab.recipe.schema import ModelSection

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
KINDS = sorted(PACKAGES)


@pytest.fixture(scope="session")
def wide_lm(tmp_path_factory, tiny_lm):
    """A language model whose layers are as wide as a group of 4 bits."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-lm")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def packed_layers(model):
    """Names of linear layers whose weight is no plain tensor of floating-point numbers."""

    def is_plain(weight):
        return type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point()

    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]
    return [name for name, module in layers if not is_plain(module.weight)]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_packed_and_the_head_is_not(kind, wide_lm):
    loaded = load_model(ModelSection(path=str(wide_lm), quantize=kind, dtype="bfloat16"))
    names = packed_layers(loaded.model)
    assert len(names) == 7
    assert not any("lm_head" in name for name in names)
    plain = load_model(ModelSection(path=str(wide_lm), dtype="bfloat16")).model
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.inference_mode():
        near, exact = (model(ids).logits.float() for model in (loaded.model, plain))
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize(
    ("own", "asked"),
    [({"load_in_8bit": True}, "nf4"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "nf4"),
     ({"load_in_4bit": True}, "int8")],
)  # fmt: skip
def test_a_base_that_is_packed_in_another_way_is_not_taken_for_what_was_asked(own, asked, wide_lm, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = shutil.copytree(wide_lm, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"} | own
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"model.quantize is {asked}, but .* is quantised already"):
        load_model(ModelSection(path=str(base), quantize=asked))


@pytest.mark.parametrize("kind", KINDS)
def test_train_evaluate_merge(kind, wide_lm, lm_values, write_recipe, call, tmp_path):
    lm_values |= {"model": {"path": str(wide_lm), "dtype": "bfloat16"}, "method": {"name": "dual_lora", "r": 4}}
    run, merged = tmp_path / "run", tmp_path / "merged"
    given = ("--model.quantize", kind, "--train.steps", 3)
    code, out, err = call("train", write_recipe(lm_values), "--out", run, *given, "--json")
    assert code == 0, err
    assert "Failed to load" not in err
    assert json.loads(out)["state"] == "finished"
    code, out, err = call("evaluate", run, "--evaluate.tasks", "loss", "--json")
    assert code == 0, err
    losses = json.loads(out)["metrics"]
    assert losses["base"]["loss"] != losses["tuned"]["loss"]
    code, out, err = call("merge", run, merged, "--json")
    assert code == 0, err
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert json.loads(out)["dtype"] == "bfloat16"
    code, out, _ = call("evaluate", merged, "--recipe", write_recipe(lm_values), "--evaluate.tasks", "loss", "--json")
    assert json.loads(out)["metrics"]["base"]["loss"] == pytest.approx(losses["tuned"]["loss"], abs=0.1)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_classifier_s_head_is_trained_whole(kind, tiny_encoder, encoder_values, write_recipe, call, tmp_path):
    run = tmp_path / "run"
    given = ("--model.quantize", kind, "--train.steps", 30)
    code, _, err = call("train", write_recipe(encoder_values), "--out", run, *given)
    assert code == 0, err
    code, out, _ = call("evaluate", run, "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["tuned"]["accuracy"] > 0.8


def test_what_cannot_be_packed_is_said_early(monkeypatch):
    with pytest.raises(UserError, match="transformers cannot quantise a GGUF file"):
        check_quantize(ModelSection(path="x.gguf", quantize="nf4"), is_gguf=True)
    monkeypatch.setattr("dual_lora.lab.model.quantize.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'needs the package torchao: pip install "dual-lora\[quantized\]"'):
        check_quantize(ModelSection(path="x", quantize="torchao-int8"), is_gguf=False)
    check_quantize(ModelSection(path="anything"), is_gguf=True)
    with pytest.raises(UserError, match="method full trains the base's weights"):
        build_recipe({"model": {"path": "x", "quantize": "nf4"}, "method": {"name": "full"}})


def test_a_whole_base_has_the_identity_that_it_had():
    plain = build_recipe({"model": {"path": "x"}})
    assert "quantize" not in identity(plain)["model"]
    assert identity(build_recipe({"model": {"path": "x", "quantize": "nf4"}}))["model"]["quantize"] == "nf4"


def test_an_estimate_goes_by_the_recipe(wide_lm, lm_values):
    from dual_lora.lab.cost.options import from_recipe

    lm_values["model"] = {"path": str(wide_lm), "quantize": "nf4"}
    lm_values["data"]["max_length"] = 32
    assert from_recipe(build_recipe(lm_values)).quantisation == "nf4"
    assert from_recipe(build_recipe(lm_values), quantisation="none").quantisation == "none"
