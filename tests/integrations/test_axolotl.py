"""The Axolotl plugin, through Axolotl's own plugin manager and loader."""

from pathlib import Path

import pytest
import torch
from tiny import factor, layers, llama, train

WHY = "Axolotl pins the versions of everything, so that it lives in an environment of its own"
pytest.importorskip("axolotl.loaders.adapter", reason=WHY, exc_type=ImportError)
pytestmark = pytest.mark.slow


@pytest.fixture
def settings(monkeypatch):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    PluginManager.get_instance().register("axolotl_plugin.DualLoraPlugin")
    yield DictDefault(
        adapter="dual_lora",
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_target_linear=True,
        dual_lora={"warmup_steps": 4},
    )
    PluginManager.get_instance().plugins.pop("axolotl_plugin.DualLoraPlugin")


def test_the_adapter_is_known(settings):
    from axolotl.integrations.base import PluginManager

    assert PluginManager.get_instance().supports_adapter("dual_lora")


def test_training_is_watched(settings):
    from axolotl.integrations.base import PluginManager

    from dual_lora import VerifyAdapter

    [callback] = PluginManager.get_instance().add_callbacks_pre_trainer(settings, llama())
    assert isinstance(callback, VerifyAdapter)


def test_trains_and_continues(settings, tmp_path):
    from axolotl.loaders.adapter import load_adapter

    model, config = load_adapter(llama(), settings, "dual_lora")
    assert (config.peft_type, config.r, config.alpha, config.warmup_steps) == ("DUAL_LORA", 8, 16, 4)
    ids = torch.arange(1, 13)[None]
    train(model, steps=3, loss=lambda: model(input_ids=ids, labels=ids).loss)
    assert factor(model) == pytest.approx(3 / 4)
    model.save_pretrained(tmp_path)

    settings.lora_model_dir = str(tmp_path)
    continued, _ = load_adapter(llama(), settings, "dual_lora")
    assert factor(continued) == pytest.approx(3 / 4)
    train(continued, steps=1, loss=lambda: continued(input_ids=ids, labels=ids).loss)
    assert factor(continued) == 1
    frozen, _ = load_adapter(llama(), settings, "dual_lora", inference=True)
    assert layers(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
