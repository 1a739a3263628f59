"""What docs/how-to/works-with.md says of other people's code, in small."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny import llama, logits, train

from dual_lora import DualLoraConfig

IDS = torch.arange(1, 13)[None]


def trained(base, **options):
    """A model whose adapter has the default start, after a few steps."""
    torch.manual_seed(0)
    model = get_peft_model(base, DualLoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    train(model, steps=6, lr=1e-2, loss=lambda: model(input_ids=IDS, labels=IDS, use_cache=False).loss)
    return model.eval()


SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.2)
READ = {
    "dt_proj": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(state_size=8, **SIZES)),
    "conv.conv": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
            **SIZES,
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", READ)
def test_a_weight_that_the_parent_reads(target):
    torch.manual_seed(0)
    base = READ[target]()
    before = logits(base.eval(), IDS)
    model = trained(base, target_modules=[target])
    after = logits(model, IDS)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload(), IDS), after)


def test_a_target_network_follows_by_its_parameters_alone():
    ids = torch.arange(1, 25)[None]  # after shorter ones it would keep the weights that it has composed
    model = trained(llama())
    target = get_peft_model(llama(), copy.deepcopy(model.peft_config["default"])).eval()
    assert not torch.equal(logits(target, ids), logits(model, ids))
    for theirs, ours in zip(target.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours.data)
    assert torch.equal(logits(target, ids), logits(model, ids))


def test_a_state_of_the_parameters_that_have_lora_in_their_name(tmp_path):
    model = trained(llama())
    state = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))


def test_trls_flags_with_the_class_exchanged(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL comes with pip install '.[integrations]'")
    from trl import ModelConfig

    monkeypatch.setattr(utils, "LoraConfig", DualLoraConfig)
    config = utils.get_peft_config(ModelConfig(use_peft=True, lora_r=16, lora_alpha=32))
    assert (config.peft_type, config.r, config.lora_alpha) == ("DUAL_LORA", 16, 32)
    with pytest.raises(ValueError, match="asks for DoRA"):
        utils.get_peft_config(ModelConfig(use_peft=True, use_dora=True))
