"""The Axolotl plugin, through Axolotl's own plugin manager and loader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import layers, llama, logits, train

from pages import ROOT, blocks

WHY = "Axolotl pins the versions of everything, so that it lives in an environment of its own"
pytest.importorskip("axolotl.loaders.adapter", reason=WHY, exc_type=ImportError)
pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


@pytest.fixture
def settings(monkeypatch):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    monkeypatch.syspath_prepend(EXAMPLES)
    PluginManager.get_instance().register("axolotl_plugin.DualLoraPlugin")
    yield DictDefault(
        adapter="dual_lora",
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_target_linear=True,
        dual_lora={"ste": "surrogate"},
    )
    PluginManager.get_instance().plugins.pop("axolotl_plugin.DualLoraPlugin")


def test_the_adapter_is_known(settings):
    from axolotl.integrations.base import PluginManager

    assert PluginManager.get_instance().supports_adapter("dual_lora")


def test_training_is_watched(settings):
    from axolotl.integrations.base import PluginManager

    from dual_lora import VerifyAdapter

    callbacks = PluginManager.get_instance().add_callbacks_pre_trainer(settings, llama())
    assert any(isinstance(callback, VerifyAdapter) for callback in callbacks)


def test_trains_and_continues(settings, tmp_path):
    from axolotl.loaders.adapter import load_adapter

    model, config = load_adapter(llama(), settings, "dual_lora")
    assert (config.peft_type, config.r, config.lora_alpha, config.ste) == ("DUAL_LORA", 8, 16, "surrogate")
    ids = torch.arange(1, 13)[None]
    train(model, steps=3, loss=lambda: model(input_ids=ids, labels=ids).loss)
    expected = logits(model.eval())
    assert not torch.allclose(expected, logits(llama().eval()))
    model.save_pretrained(tmp_path)

    settings.lora_model_dir = str(tmp_path)
    continued, _ = load_adapter(llama(), settings, "dual_lora")
    assert torch.equal(logits(continued.eval()), expected)
    train(continued.train(), steps=1, loss=lambda: continued(input_ids=ids, labels=ids).loss)
    assert not torch.equal(logits(continued.eval()), expected)
    frozen, _ = load_adapter(llama(), settings, "dual_lora", inference=True)
    assert layers(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("rate", [0.01, 0], ids=["trains", "does not move"])
@pytest.mark.timeout(1800)
def test_a_training_run_by_axolotls_own_command(rate, tiny_lm, tmp_path):
    """The file in docs/how-to/integrations.md, and what `VerifyAdapter` makes of it."""
    page = ROOT / "docs" / "how-to" / "integrations.md"
    [block] = [block for block in blocks(page) if block.language == "yaml" and "axolotl_plugin" in block.code]
    values = yaml.safe_load(block.code)
    values |= {"base_model": str(tiny_lm), "learning_rate": rate, "dataset_prepared_path": str(tmp_path / "prepared")}
    (tmp_path / "train.yml").write_text(yaml.safe_dump(values))
    with (tmp_path / "conversations.jsonl").open("w") as file:
        for answer in ["true", "false"] * 32:
            question = {"role": "user", "content": f"Is it {answer}?"}
            print(json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}), file=file)
    command = [Path(sys.executable).with_name("axolotl"), "train", "train.yml", "--launcher", "python"]
    environment = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]), "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found
    assert any(tensor.any() for name, tensor in found.items() if name.endswith("dual_lora_B")) == (rate > 0)
    assert ("VerifyAdapter of Dual LoRA" in said) == (rate == 0), said[-3000:]
    if rate == 0:
        assert "is the learning rate above 0?" in said
