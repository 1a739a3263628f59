"""Adapters and merged models with a planted fault, made from a run that is right."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.export.export import merge
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run
from dual_lora.lab.verify.logprobs import int4


def trained(folder, values, method, seed=0, steps=40, **data):
    """A run of the tiny model, trained until its answers are another model's."""
    values = json.loads(json.dumps(values))
    values["method"] = {
        "name": method,
        "r": 4,
        **({"warmup_steps": 4, "init_weights": "paper"} if method == "dual_lora" else {}),
    }
    values["train"] |= {"steps": steps, "learning_rate": 0.02, "seed": seed, "checkpoint_every": 1000, "log_every": 100}
    values["data"] |= data
    run(build_recipe(values), folder, progress=False)
    return folder


def copy(run_folder, target):
    """The adapter of a run in a folder of its own, without the laboratory's notes."""
    shutil.copytree(run_folder / "adapter", target)
    for name in ("lab.json", "fingerprint.json"):
        (target / name).unlink(missing_ok=True)
    return target


def with_config(adapter, **fields):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return adapter


def with_tensors(folder, change):
    """Every tensor of a folder's safetensors file as `change(name, tensor)` makes it."""
    file = next(folder.glob("*.safetensors"))
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def off(run_folder, target, base):
    shutil.copytree(base, target)
    return {"against": target}


def half(run_folder, target, base):
    outer = (".lora_B.", ".dual_lora_B")
    drop = lambda name, x: torch.zeros_like(x) if ".layers.0." in name and any(o in name for o in outer) else x  # noqa: E731
    return {"adapter": with_tensors(copy(run_folder, target), drop)}


def alpha(run_folder, target, base):
    config = json.loads((run_folder / "adapter/adapter_config.json").read_text())
    name = "lora_alpha" if "lora_alpha" in config else "alpha"
    return {"adapter": with_config(copy(run_folder, target), **{name: 3.5 * (config[name] or 8)})}


def in_warmup(run_folder, target, base):
    left = lambda name, x: torch.full_like(x, 2) if name.endswith("dual_lora_left") else x  # noqa: E731
    return {"adapter": with_tensors(copy(run_folder, target), left)}


def twice(run_folder, target, base):
    once = target.with_name("once")
    merge(run_folder, once)
    merge(run_folder, target, base=str(once))
    return {"against": target}


def template(run_folder, target, base):
    merge(run_folder, target)
    file = target / "chat_template.jinja"
    file.write_text(file.read_text().replace("assistant :", "assistant"))
    return {"against": target}


def tokenizer(run_folder, target, base):
    merge(run_folder, target)
    file = target / "tokenizer.json"
    saved = json.loads(file.read_text())
    words = saved["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    words["is"], words["the"] = words["the"], words["is"]
    file.write_text(json.dumps(saved))
    return {"against": target}


def four_bits(run_folder, target, base):
    merge(run_folder, target)
    spared = ("embed_tokens", "lm_head", "norm")
    round_ = lambda name, x: x if any(s in name for s in spared) else int4(x)  # noqa: E731
    return {"against": with_tensors(target, round_)}


def right(run_folder, target, base):
    merge(run_folder, target)
    return {"against": target}


def in_bf16(run_folder, target, base):
    merge(run_folder, target, dtype="bfloat16")
    return {"against": target}
