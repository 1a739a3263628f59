"""TRL's reference for a model that comes with an adapter: a frozen copy of that adapter, as TRL means it to be."""

import copy
import math

import pytest
import torch
from tiny import adapted, factor, layers, llama, logits, train

from dual_lora import DualLoraConfig


def trained(**options):
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    ids = torch.arange(1, 25).view(2, 12)
    train(model, steps=4, lr=3e-2, loss=lambda: model(input_ids=ids, labels=ids).loss)
    return model


def of(model, adapter):
    model.set_adapter(adapter)
    return logits(model.eval())


@pytest.mark.parametrize("warmup_steps", [0, 3, 8])
def test_an_adapter_ref_with_the_configuration_of_default_is_its_copy(warmup_steps):
    model = trained(warmup_steps=warmup_steps)
    expected = logits(model.eval())
    model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(of(model, "ref"), expected)
    for layer in layers(model).values():
        assert float(layer.warmup_factor("ref")) == float(layer.warmup_factor("default"))
        for mine, theirs in zip(layer.factors("ref"), layer.factors("default"), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()


def test_the_copy_stays_as_it_was_while_the_other_trains():
    model = trained(warmup_steps=8)
    expected = logits(model.eval())
    model.add_adapter("ref", model.peft_config["default"])
    train(
        model.train(), steps=6, lr=3e-2, loss=lambda: model(input_ids=torch.arange(1, 9)[None]).logits.square().mean()
    )
    assert torch.equal(of(model, "ref"), expected)
    assert not torch.equal(of(model, "default"), expected)


def test_any_other_adapter_is_drawn_anew():
    model = trained(warmup_steps=0)
    model.add_adapter("other", model.peft_config["default"])
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    for layer in layers(model).values():
        for other in ("other", "ref"):
            assert not torch.equal(layer.factors(other).B, layer.factors("default").B)


@pytest.mark.slow
def test_dpo_of_a_trained_adapter_starts_at_its_reference(tiny_lm, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is among what examples need: pip install '.[integrations]'")
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    config = DualLoraConfig.paper(r=8, warmup_steps=0, init_std=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.DPOTrainer(
        model=get_peft_model(base, config),
        args=trl.DPOConfig(
            str(tmp_path),
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "timer", "rejected": "alarm"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tiny_lm),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.01
    assert factor(trainer.model) == 1
