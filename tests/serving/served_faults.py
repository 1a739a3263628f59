"""What goes wrong between training and serving, as files that real servers read; and the verdict of each."""

import json
import shutil

import peft
import torch
from faulty import with_config, with_tensors
from gguf import GGUFReader
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm_server import TARGETS

from dual_lora import DualLoraConfig
from dual_lora.lab.model.merge import merge
from dual_lora.lab.verify.logprobs import int4

VERDICTS = {
    "right": "on",
    "off": "off",
    "half of the layers": "layers dropped",
    "another α": "other scale",
    "in its warm-up": "λ below 1",
    "merged twice": "merged twice",
    "another adapter": "another adapter",
    "four bits": "rounded",
    "another template": "wrong chat template",
    "another tokenizer": "other tokenizer",
}
TEMPLATE = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}### assistant:"


def adapters(folder):
    """{fault: folder of an adapter}, for those that an adapter's own files can have.

    It changes answers by some tenths of a nat: llama.cpp tells no more than the twenty likeliest tokens.
    """
    torch.manual_seed(1)
    config = DualLoraConfig(r=8, target_modules=TARGETS, warmup_steps=4)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.03 if "_A" in name or "_B" in name else 0.06))
    right = folder / "right"
    model.save_pretrained(right)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(right)
    with_tensors(right, lambda name, x: torch.zeros_like(x) if "dual_lora_left" in name else x)
    faults = "half of the layers", "another α", "in its warm-up"
    made = {name: shutil.copytree(right, folder / name) for name in faults}
    first = lambda name, x: torch.zeros_like(x) if ".layers.0." in name and "dual_lora_B" in name else x  # noqa: E731
    with_tensors(made["half of the layers"], first)
    with_config(made["another α"], alpha=3.5 * (json.loads((right / "adapter_config.json").read_text())["alpha"] or 8))
    with_tensors(made["in its warm-up"], lambda name, x: torch.full_like(x, 2) if "dual_lora_left" in name else x)
    return {"right": right, **made, "another adapter": folder / "one"}


def models(folder, made):
    """{fault: folder of a model}, for those that a whole model has."""
    whole = {}
    for name, adapter in made.items():
        merge(adapter, folder / f"{name}, merged", dtype="float32")
        whole[name] = folder / f"{name}, merged"
    whole["off"] = folder / "base"
    whole["merged twice"] = folder / "twice"
    merge(made["right"], whole["merged twice"], base=str(whole["right"]), dtype="float32")
    whole["four bits"] = rounded(shutil.copytree(whole["right"], folder / "four"))
    whole["another template"] = with_template(shutil.copytree(whole["right"], folder / "template"))
    return whole


def rounded(model):
    """A folder's matrices in steps of four bits."""
    spared = ("embed_tokens", "lm_head", "norm")
    return with_tensors(model, lambda name, x: x if any(s in name for s in spared) else int4(x))


def with_template(model):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def with_other_words(model):
    """A folder's tokenizer with all words in another order."""
    file = model / "tokenizer.json"
    saved = json.loads(file.read_text())
    names = list(saved["model"]["vocab"])
    special = {token["content"] for token in saved["added_tokens"]}
    turned = iter(reversed([name for name in names if name not in special]))
    saved["model"]["vocab"] = {name if name in special else next(turned): i for i, name in enumerate(names)}
    file.write_text(json.dumps(saved))
    return model


def with_other_words_in_gguf(file):
    """Each word in the place of another one of the same length."""
    field = GGUFReader(file, "r+").fields["tokenizer.ggml.tokens"]
    places = {}
    for index in field.data:
        places.setdefault(len(field.parts[index]), []).append(index)
    for same in places.values():
        words = [field.parts[index].copy() for index in same]
        for index, word in zip(same, words[1:] + words[:1], strict=True):
            field.parts[index][:] = word
    return file
