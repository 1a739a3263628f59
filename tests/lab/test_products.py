"""Recipes of the relatives: frozen signs and sums, and PEFT's HiRA and LoHa by our product (`fused: true`)."""

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dual_lora.lab.analysis.matrices import Factored
from dual_lora.lab.analysis.updates import snapshot
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import simulate
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.methods import method_config
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run
from dual_lora.method import fused

FROZEN = {"name": "dual_lora", "r": 4, "direction_activation": "frozen", "magnitude_activation": "identity"}


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [FROZEN, FROZEN | {"plain_rank": 2}], ids=["frozen", "sum"])
def test_a_run_of_frozen_signs(method, lm_values, tmp_path):
    for seed in (1, 2):
        lm_values["method"], lm_values["train"]["seed"] = method, seed
        run(build_recipe(lm_values), tmp_path / str(seed), progress=False)
        saved = json.loads((tmp_path / str(seed) / "adapter/adapter_config.json").read_text())
        assert (saved["r"], saved["r1"], saved["r2"], saved["direction_seed"]) == (4, 4, 0, seed)
    one, other = (load_file(tmp_path / seed / "adapter/adapter_model.safetensors") for seed in "12")
    seeds = [name for name in one if name.endswith("dual_lora_seed")]
    assert len(seeds) == 14
    assert all(one[name] != other[name] for name in seeds)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(lm_values["model"]["path"]), tmp_path / "1" / "adapter"
    )
    updates = [layer.update() for layer in snapshot(model).values()]
    assert all(isinstance(u, Factored) and u.rows(0, 8).any() for u in updates)


@pytest.mark.parametrize("name", ["hira", "loha"])
def test_a_run_by_our_product_is_peft_s(name, lm_values, tmp_path, monkeypatch):
    calls = []
    ours = fused._FusedLayer._fallback_reason
    monkeypatch.setattr(fused._FusedLayer, "_fallback_reason", lambda *a: calls.append(1) or ours(*a))
    seen = {}
    for by in (False, True):
        lm_values["method"] = {"name": name, "r": 4, "fused": by}
        run(build_recipe(lm_values), tmp_path / f"{by}", progress=False)
        seen[by] = losses(tmp_path / f"{by}"), len(calls)
    assert seen[False][1] == 0 < seen[True][1]
    assert seen[True][0] == pytest.approx(seen[False][0], rel=1e-4)
    theirs, by_us = (load_file(tmp_path / f"{by}" / "adapter/adapter_model.safetensors") for by in (False, True))
    assert theirs.keys() == by_us.keys()


def test_what_fused_may_be():
    assert not hasattr(method_config({"name": "hira", "fused": True}, "causal", 10, []), "fused")
    with pytest.raises(UserError, match="fused is true or false, got 'yes'"):
        method_config({"name": "hira", "fused": "yes"}, "causal", 10, [])
    with pytest.raises(UserError, match="method lora has no field 'fused'"):
        method_config({"name": "lora", "fused": True}, "causal", 10, [])


def test_estimates():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=128,
    )  # fmt: skip

    def flops(method):
        step = simulate(StepOptions("tiny", config, method=method, dtype="float32", batch=2, length=64))
        return sum(step.flops.values()) if isinstance(step.flops, dict) else step.flops

    assert flops(FROZEN | {"plain_rank": 2}) > 0
    assert flops({"name": "hira", "r": 4, "fused": True}) < 0.9 * flops({"name": "hira", "r": 4})
