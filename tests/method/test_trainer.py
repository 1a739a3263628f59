"""transformers' Trainer needs no help: λ, gradient accumulation, checkpoints, and a resume that equals no stop."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import adapted, changed, factor, layer, layers, llama, state, tokens
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dual_lora import DualLoraCallback


class Sentences(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, k):
        ids = tokens(24)[k]
        return {"input_ids": ids, "labels": ids}


class Watcher(TrainerCallback):
    def __init__(self):
        self.factors = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.factors.append(factor(model))


def trainer_of(path, model=None, callbacks=(), **options):
    if model is None:
        model = adapted(
            llama(),
            target_modules=["q_proj", "down_proj"],
            warmup_steps=5,
            init_weights="paper",
            dropout=0.1,
            task_type="CAUSAL_LM",
        )
    options = dict(per_device_train_batch_size=2, max_steps=8, learning_rate=1e-2, save_strategy="no") | options
    arguments = TrainingArguments(
        output_dir=str(path), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", seed=3, **options
    )
    return Trainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=list(callbacks)
    )


def test_counts_and_accumulates(tmp_path):
    watcher = Watcher()
    trainer = trainer_of(tmp_path, callbacks=[watcher], gradient_accumulation_steps=3)
    before = state(trainer.model)
    trainer.train()
    assert watcher.factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    moved = changed(trainer.model, before)
    assert all("dual_lora_" in n for n in moved)
    assert {n.split("dual_lora_")[1] for n in moved} == {f"{f}.default" for f in ("A", "B", "C", "D", "left")}


def test_evaluation_and_gradient_checkpointing(tmp_path):
    watcher = Watcher()
    trainer = trainer_of(
        tmp_path, callbacks=[watcher], eval_strategy="steps", eval_steps=2, gradient_checkpointing=True, max_steps=4
    )
    trainer.train()
    assert watcher.factors == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("stop", [3, 6], ids=["in the warm-up", "after it"])
def test_resumed_is_bit_for_bit_the_run_without_a_stop(tmp_path, stop):
    straight = trainer_of(tmp_path / "straight", save_strategy="steps", save_steps=stop)
    straight.train()
    checkpoint = tmp_path / "straight" / f"checkpoint-{stop}"
    left = {int(t) for n, t in load_file(checkpoint / "adapter_model.safetensors").items() if "left" in n}
    assert left == {max(0, 5 - stop)}
    resumed = trainer_of(tmp_path / "resumed")
    with torch.no_grad():
        for p in resumed.model.parameters():
            if p.requires_grad:
                p.zero_()  # whatever it has now, it has from the checkpoint
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 8
    assert not changed(resumed.model, state(straight.model))


class FakeAcceleratedOptimizer:
    def __init__(self, scaler):
        self.scaler = scaler


def test_the_callback_in_a_trainer_without_a_scaler(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[DualLoraCallback()], max_steps=2)
    trainer.train()
    assert layers(trainer.model)
    assert layer(trainer.model).steps_left("default") == 3


def test_a_base_in_fp16_trains_in_a_trainer(tmp_path):
    model = adapted(llama().half(), target_modules=["q_proj"], init_weights=True, task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, model, max_steps=3)
    before = state(model)
    trainer.train()
    assert changed(model, before)
