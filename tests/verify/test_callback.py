"""`VerifyAdapter` finds each planted fault of a training, for several methods, and is silent over a right one."""

import warnings

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dual_lora import DualLoraConfig, VerifyAdapter
from dual_lora.verify.callback import FILLED, label_problems

CONFIGS = {
    "dual_lora": lambda: DualLoraConfig.paper(r=4, warmup_steps=4, task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=4, task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "adalora": lambda: AdaLoraConfig(r=4, total_step=6, task_type="CAUSAL_LM"),
}


class Tokenizer:
    eos_token_id, chat_template = 2, None

    def decode(self, ids):
        return "</s>"


def model():
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count=16):
    chance = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 32, (7,), generator=chance)
        made.append({"input_ids": [*ids.tolist(), 2, 0], "labels": [-100] * 4 + ids[4:].tolist() + [2, -100]})
        made[-1]["attention_mask"] = [1] * 8 + [0]
    return made


def collate(batch):
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def train(peft_model, data, tmp_path, callback=None, steps=6, **more):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=data, data_collator=collate)
    for each in callback if isinstance(callback, list) else filter(None, [callback]):
        trainer.add_callback(each)
    trainer.train()
    return trainer


def check(peft_model, data, tmp_path, **more):
    callback = VerifyAdapter(steps=4, tokenizer=Tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(peft_model, data, tmp_path, callback, **more)
    return callback


@pytest.mark.parametrize("method", CONFIGS)
def test_silent_over_a_right_training_and_changes_nothing(method, tmp_path):
    found = []
    for callback in (None, VerifyAdapter(steps=4, tokenizer=Tokenizer())):
        torch.manual_seed(0)
        adapted = get_peft_model(model(), CONFIGS[method]())
        train(adapted, rows(), tmp_path, callback)
        found.append({name: p.detach().clone() for name, p in adapted.named_parameters()})
    assert callback.problems == []
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    if method != "adalora":
        assert not [note for note in callback.notes if "loaded anew" in note], callback.notes


def test_a_tensor_without_gradient(tmp_path):
    adapted = get_peft_model(model(), CONFIGS["lora"]())
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    layer.forward = layer.base_layer.forward
    callback = check(adapted, rows(), tmp_path)
    assert len(callback.problems) == 1
    assert "2 (base_model.model.model.layers.1.self_attn.q_proj" in callback.problems[0]
    assert "no gradient in 4 steps" in callback.problems[0]


def test_what_a_schedule_froze_is_no_fault(tmp_path):
    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)

    adapted = get_peft_model(model(), CONFIGS["lora"]())
    callback = VerifyAdapter(steps=4, tokenizer=Tokenizer())
    train(adapted, rows(), tmp_path, [Freeze(), callback])
    assert callback.problems == []


def test_a_tensor_that_does_not_move(tmp_path):
    class Frozen(torch.optim.SGD):
        def step(self, closure=None):
            return None

    adapted = get_peft_model(model(), CONFIGS["ia3"]())
    callback = VerifyAdapter(steps=4, tokenizer=Tokenizer())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    frozen = Frozen([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    trainer = Trainer(
        model=adapted, args=arguments, train_dataset=rows(), data_collator=collate, callbacks=[callback],
        optimizers=(frozen, None),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="have a gradient and did not move"):
        trainer.train()
    assert len(callback.problems) == 1


def changed(change):
    data = rows()
    for row in data:
        change(row)
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(labels=[-100] * 9), "no token of the first 8 rows carries the loss"),
        (lambda r: r["labels"].__setitem__(8, 0), "padding carries the loss"),
        (lambda r: r["labels"].__setitem__(7, -100), "teaches the end of an answer ('</s>')"),
        (lambda r: r.update(labels=[*r["labels"][1:], -100]), "not the token at their own place"),
    ],
    ids=["nothing", "padding", "end of turn", "shifted twice"],
)
def test_labels(change, said, tmp_path):
    callback = check(get_peft_model(model(), CONFIGS["lora"]()), changed(change), tmp_path)
    assert any(said in problem for problem in callback.problems), callback.problems


def test_pieces_of_texts_need_no_end():
    without = collate(changed(lambda r: r["labels"].__setitem__(7, -100)))
    assert [len(label_problems(without, Tokenizer(), answers)[0]) for answers in (True, False)] == [1, 0]


def test_prompts_in_the_loss_are_noted():
    data = changed(lambda r: r.update(labels=[*r["input_ids"][:8], -100]))
    problems, notes = label_problems(collate(data), Tokenizer())
    assert (problems, notes) == ([], ["every token carries the loss, prompts too"])


@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_an_adapter_that_loses_a_tensor_when_it_is_saved(method, tmp_path, monkeypatch):
    from peft import utils

    whole = utils.load_peft_weights

    def without_one(*args, **kwargs):
        state = whole(*args, **kwargs)
        state.pop(next(name for name in state if name.endswith(("lora_B.weight", "lora_B"))))
        return state

    monkeypatch.setattr(utils, "load_peft_weights", without_one)
    adapted = get_peft_model(model(), CONFIGS[method]())
    callback = check(adapted, rows(), tmp_path)
    assert len(callback.problems) == 1
    assert "saved and loaded anew, gives other logits" in callback.problems[0]
    assert not any(bool((p == FILLED).all()) for p in adapted.parameters())


def test_strict_raises(tmp_path):
    data = changed(lambda r: r.update(labels=[-100] * 9))
    with pytest.raises(ValueError, match="VerifyAdapter of Dual LoRA: no token"):
        train(get_peft_model(model(), CONFIGS["lora"]()), data, tmp_path, VerifyAdapter(strict=True))


def test_nothing_to_train(tmp_path):
    adapted = get_peft_model(model(), CONFIGS["lora"]())
    adapted.requires_grad_(False)
    state = type("State", (), {"global_step": 0, "is_world_process_zero": True})()
    callback = VerifyAdapter()
    with pytest.warns(UserWarning, match="no parameter is trained"):
        callback.on_train_begin(None, state, None, model=adapted)


def test_a_run_of_few_steps_is_not_judged(tmp_path):
    """LoRA's A has no gradient in the first step, nor in the second where the rate starts at zero."""
    for steps in (1, 3):
        callback = VerifyAdapter(tokenizer=Tokenizer())
        train(get_peft_model(model(), CONFIGS["lora"]()), rows(), tmp_path, callback, steps=steps)
        assert callback.problems == []
        assert any("too few" in note for note in callback.notes)
