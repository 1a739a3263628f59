"""LLaMA-Factory continues any adapter that PEFT loads: the one made beforehand, and its own trainer where installed."""

import json

import pytest
import yaml
from tiny import layers, train
from transformers import AutoModelForCausalLM

from dual_lora import VerifyAdapter

pytestmark = pytest.mark.slow

ARGUMENTS = {"stage": "sft", "do_train": True, "lora_rank": 8, "lora_target": "q_proj, down_proj", "lora_alpha": 16}


def test_the_adapter_made_beforehand_trains_from_its_start(example, tiny_lm, tmp_path):
    from peft import PeftModel

    given = {**ARGUMENTS, "model_name_or_path": str(tiny_lm)}
    arguments = example("llama_factory").start(given, tmp_path / "start")
    assert arguments == {**given, "finetuning_type": "lora", "adapter_name_or_path": str(tmp_path / "start")}
    # What LLaMA-Factory does with these arguments:
    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    model = PeftModel.from_pretrained(base, arguments["adapter_name_or_path"], is_trainable=True)
    assert len(layers(model)) == 4
    assert model.peft_config["default"].lora_alpha == 16
    assert not any(layer.get_delta_weight("default").any() for layer in layers(model).values())
    train(model, steps=3, loss=lambda: model(**model.dummy_inputs).logits.square().mean())
    assert all(layer.get_delta_weight("default").any() for layer in layers(model).values())


def test_options_that_nothing_here_carries_are_refused(example, tiny_lm, tmp_path):
    given = {**ARGUMENTS, "model_name_or_path": str(tiny_lm), "use_rslora": True, "pissa_init": False}
    with pytest.raises(ValueError, match=r"^use_rslora: not carried over"):
        example("llama_factory").start(given, tmp_path / "start")


@pytest.mark.timeout(1800)
def test_llama_factory_itself(example, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # it asks for peft ≤ 0.20 and transformers ≤ 5.6
    pytest.importorskip("llamafactory.train.tuner", reason="LLaMA-Factory is not installed", exc_type=ImportError)
    from safetensors.torch import load_file

    (tmp_path / "pairs.json").write_text(
        json.dumps([{"instruction": "Set a timer.", "input": "", "output": '{"tool": "timer"}'}] * 16)
    )
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.json"}}))
    arguments = {
        **ARGUMENTS,
        "model_name_or_path": str(tiny_lm),
        "dataset": "pairs",
        "dataset_dir": str(tmp_path),
        "template": "default",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 12,  # `VerifyAdapter` looks at ten
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_gradient_checkpointing": True,  # its own fails with transformers 5.24
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(arguments))
    watched, module = [], example("llama_factory")
    monkeypatch.setattr(module, "VerifyAdapter", lambda: watched.append(VerifyAdapter()) or watched[0])
    module.main(tmp_path / "train.yaml", tmp_path / "start")
    assert watched[0].problems == []
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("start", "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert not tensor.equal(before[name]), f"{name} did not move"
