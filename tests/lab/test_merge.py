"""The merged folder is a plain model: another process without this package reads it and answers the same."""

import json
import subprocess
import sys

import pytest
import torch

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.export import merge
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
