"""What other people's code does with an adapter, as it does it with LoRA's."""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.peft_model import ModelCard
from safetensors.torch import load_file, save_file
from tiny import Mlp, adapted, bert, layers, llama, points, state, train
from transformers import AutoModelForSequenceClassification

from dual_lora import DualLoraConfig


def trained():
    torch.manual_seed(0)
    model = adapted(init_weights=True)
    train(model, 5, optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))
    return model.eval()


def test_a_state_of_named_parameters_alone_is_the_whole_adapter(tmp_path):
    """FastChat, LLaVA and Qwen save `named_parameters()` whose name contains `lora_`, without buffers."""
    model = trained()
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    model.save_pretrained(tmp_path, state_dict=tensors)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert torch.equal(again(points()), model(points()))


def test_a_model_whose_state_dict_somebody_has_put_another_in_place_of(tmp_path):
    """As alpaca-lora does; PEFT then loads nothing of a LoRA, in silence."""
    model = trained()
    old = model.state_dict
    model.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old())).__get__(model, type(model))
    model.save_pretrained(tmp_path)
    best = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, 3)
    assert any(not torch.equal(p, best[n]) for n, p in model.named_parameters())
    model.load_adapter(tmp_path, "default")
    assert all(torch.equal(p, best[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("by", ["copy_", "lerp_"])
def test_a_target_network_that_follows_by_data(by):
    model, target = trained(), None
    target = copy.deepcopy(model)
    for _ in range(3):
        train(model, 2)
        for mine, theirs in zip(target.parameters(), model.parameters(), strict=True):
            mine.data.copy_(theirs.data) if by == "copy_" else mine.data.lerp_(theirs.data, 1.0)
        assert torch.equal(target.train()(points()), model.train()(points()))


def test_the_card_names_the_package_its_import_and_a_tag(tmp_path):
    model = adapted(llama(), target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=True)
    for _ in range(2):  # a second time adds nothing
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "dual-lora" in card.data.tags
    for words in ("pip install dual-lora", "import dual_lora", "AutoPeftModelForCausalLM"):
        assert card.text.count(words) in (1, 2)
    assert card.text.count("How to load it") == 1


def test_the_code_in_a_classifiers_card_runs(tmp_path):
    """A base's folder says nothing of the labels that the head was made for."""
    bert().bert.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in said.items() if k not in ("id2label", "label2id")}))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = adapted(base, target_modules=["query"], task_type="SEQ_CLS", init_weights=True).eval()
    model.save_pretrained(tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("…", str(tmp_path / "adapter")), names)
    ids = torch.arange(8)[None]
    assert torch.equal(names["model"].eval()(ids).logits, model(ids).logits)


def test_shapes_that_do_not_fit_leave_the_layer_at_its_start(tmp_path):
    """`ignore_mismatched_sizes=True`: no mixture of trained and random factors."""
    model = trained()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = DualLoraConfig(r1=2, r2=3, target_modules=["first", "second"])
    other = PeftModel.from_pretrained(Mlp(), tmp_path, config=config, ignore_mismatched_sizes=True)
    torch.manual_seed(0)
    assert torch.equal(other(points()), Mlp()(points()))
    with pytest.raises((RuntimeError, ValueError), match="dual_lora_C"):
        PeftModel.from_pretrained(Mlp(), tmp_path, config=copy.deepcopy(config))


@pytest.mark.parametrize("letter", "ABCD")
def test_so_does_transformers_own_loader(letter, tmp_path):
    torch.manual_seed(0)
    model = adapted(llama(), target_modules=["q_proj", "down_proj"], init_weights=False, r=4, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(name for name in state if f"down_proj.dual_lora_{letter}" in name)
    save_file(state | {key: state[key][:-1].contiguous()}, file)
    base = llama()
    base.load_adapter(tmp_path, ignore_mismatched_sizes=True)
    layer_of = dict(base.named_modules()).__getitem__
    odd, *others = sorted(layers(base), key=lambda name: name not in key)
    x = torch.randn(2, layer_of(odd).in_features)
    assert torch.equal(layer_of(odd)(x), layer_of(odd).base_layer(x))
    for name in others:
        x = torch.randn(2, layer_of(name).in_features)
        torch.testing.assert_close(layer_of(name)(x), model.get_submodule(f"base_model.model.{name}")(x))


def test_nothing_is_saved_as_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"no factor of the Dual LoRA adapter 'default'.*nothing was written"):
        trained().save_pretrained(tmp_path / "empty", state_dict={})
    assert not (tmp_path / "empty" / "adapter_model.safetensors").exists()


def actor(models, x, before, after, results):
    model = models.get().eval()
    with torch.no_grad():
        results.put(model(x).tolist())
        before.set()
        after.wait(60)
        results.put(model(x).tolist())


@pytest.mark.slow
def test_an_actor_sees_what_the_learner_trains():
    """Nothing that was composed is kept of tensors that processes share."""
    model, x = trained(), points()
    model.share_memory()
    context = torch.multiprocessing.get_context("fork")  # what is sent is pickled all the same
    before, after, models, results = context.Event(), context.Event(), context.Queue(), context.Queue()
    process = context.Process(target=actor, args=(models, x, before, after, results))
    process.start()
    models.put(model)
    assert before.wait(120)
    first = torch.tensor(results.get(timeout=60))
    train(model, 5, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    after.set()
    second = torch.tensor(results.get(timeout=60))
    process.join(60)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model.eval()(x).detach(), rtol=1e-5, atol=1e-6)


def test_layers_are_named_as_they_were():
    assert set(state(trained())) >= {f"{n}.dual_lora_A.default" for n in layers(trained())}


def test_trls_flags_with_the_class_exchanged(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL comes with pip install '.[integrations]'")
    from trl import ModelConfig

    monkeypatch.setattr(utils, "LoraConfig", DualLoraConfig)
    config = utils.get_peft_config(ModelConfig(use_peft=True, lora_r=16, lora_alpha=32))
    assert (config.peft_type, config.r, config.lora_alpha) == ("DUAL_LORA", 16, 32)
    with pytest.raises(ValueError, match="asks for DoRA"):
        utils.get_peft_config(ModelConfig(use_peft=True, use_dora=True))
