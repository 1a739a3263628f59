"""The merged folder is a plain model: another process without this package reads it and answers the same."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dual_lora import DualLoraConfig
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run

PLAIN = """
import sys, json, torch
sys.modules["dual_lora"] = sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
kind = AutoModelForSequenceClassification if sys.argv[2] == "classification" else AutoModelForCausalLM
model, info = kind.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("is the red fire warm ?", return_tensors="pt").input_ids
print(json.dumps([model(ids).logits.double().tolist(), model.config.id2label]))
"""


@pytest.mark.parametrize("kind", ["causal", pytest.param("classification", marks=pytest.mark.long)])
def test_merged_model_needs_nothing_of_ours(kind, lm_values, encoder_values, tmp_path):
    values = lm_values if kind == "causal" else encoder_values
    values["method"] = {"name": "dual_lora", "r": 8}
    values["train"]["steps"] = 20
    run(build_recipe(values), tmp_path / "run", progress=False)
    result = merge(tmp_path / "run", tmp_path / "merged")
    assert result.bytes > 0
    heads = {"causal": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
    assert result.loads == heads[kind]
    done = subprocess.run([sys.executable, "-c", PLAIN, result.folder, kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, names = json.loads(done.stdout)
    tuned = open_tuned(tmp_path / "run")
    ids = tuned.tokenizer("is the red fire warm ?", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = tuned.model(ids).logits.double()
    torch.testing.assert_close(torch.tensor(logits, dtype=torch.float64), ours, atol=1e-5, rtol=1e-5)
    if kind == "classification":
        assert list(names.values()) == ["0", "1"]


def test_merge_never_writes_over_anything(lm_values, tmp_path, tiny_lm):
    lm_values["train"]["steps"] = 1
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        merge(tmp_path / "run", tmp_path / "full")
    with pytest.raises(UserError, match="holds no adapter"):
        merge(tiny_lm, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert merge(tmp_path / "run/adapter", tmp_path / "half", dtype="bfloat16").dtype == "bfloat16"


def adapter_of(tiny_lm, folder, config):
    """(an adapter off its start, on a base whose embeddings and head are one weight; its logits)."""
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_lm, tie_word_embeddings=True))
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder / "base")
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
        logits = model(torch.arange(8)[None]).logits
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits


METHODS = {
    "lora": lambda **o: peft.LoraConfig(r=4, **o),
    "dual_lora": lambda **o: DualLoraConfig.paper(r=4, warmup_steps=0, **o),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tying", [False, True], ids=["", "kept tied"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
@pytest.mark.parametrize("method", METHODS)
def test_what_shares_a_weight_with_an_adapted_module_is_left_alone(method, targets, tying, tiny_lm, tmp_path):
    config = METHODS[method](target_modules=targets, ensure_weight_tying=tying, task_type="CAUSAL_LM")
    adapter, expected = adapter_of(tiny_lm, tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged").folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(8)[None]).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings is (tying and method == "dual_lora"), "what other programs go by"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (METHODS["lora"](target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), "repeats its base's layers"),
        (METHODS["dual_lora"](target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]), "repeats its base's"),
        (peft.LilyConfig(r=4, target_modules=["q_proj"]), "cannot be merged into its base: This method"),
    ],
    ids=["lora", "dual_lora", "lily"],
)
def test_what_has_no_merged_form_is_told_in_a_sentence(config, message, tiny_lm, tmp_path):
    adapter, _ = adapter_of(tiny_lm, tmp_path, config)
    with pytest.raises(UserError, match=message):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
