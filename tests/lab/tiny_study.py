"""A study that runs in seconds: a tiny random Llama that learns which letter follows a letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_model(folder: Path) -> Path:
    """A Llama of 20 thousand parameters with a word tokenizer, saved like any other model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnop", "yes", "no", "next", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_records(path: Path, seed: int, count: int) -> Path:
    """Prompts of a few letters; the answer says whether the last letter is an early one."""
    import random

    draw = random.Random(seed)
    records = []
    for _ in range(count):
        letters = [draw.choice("abcdefghijklmnop") for _ in range(5)]
        answer = "yes" if letters[-1] < "i" else "no"
        records.append({"prompt": f"{' '.join(letters)} ?", "answer": answer, "choices": ["yes", "no"]})
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_study(folder: Path, **changes: Any) -> Path:
    """Model, data, recipe and study in `folder`; returns the study file. `changes` replace parts of the study."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_records(folder / "train.jsonl", 1, 64)
        write_records(folder / "test.jsonl", 2, 40)
    recipe = {
        "name": "letters",
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "choices": ["yes", "no"],
            "template": "plain",
            "holdout": 16,
        },
        "train": {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 2},
        "evaluate": {"tasks": ["choice"]},
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    study: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "tasks": {"letters": {"recipe": str(folder / "letters.yaml"), "metric": "loss"}},
        "methods": {"lora": {"r": 4, "lora_alpha": "2r"}, "dual_lora": {}},
        "reference": "lora",
        "budget": {"match": "parameters", "like": "lora"},
        "seeds": 2,
        "search": {"space": {"learning_rate": [1e-3, 1e-2]}},
        "cost": False,
    }
    study |= changes
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in study.items() if v is not None}, sort_keys=False), encoding="utf-8"
    )
    return path
