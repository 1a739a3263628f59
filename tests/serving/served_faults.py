"""What goes wrong between training and serving, as files that real servers read; and the verdict of each.

The adapter is trained: its answers are among the twenty likeliest tokens, of which alone llama.cpp's server tells.
"""

import json
import shutil

import pytest
from adapters import base_with_words, verified
from faulty import with_config, with_tensors
from gguf import GGUFReader

from dual_lora.lab.export.export import merge
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run
from dual_lora.lab.verify.logprobs import int4

VERDICTS = {
    "right": "on",
    "off": "off",
    "half of the layers": "layers dropped",
    "another α": "other scale",
    "in its warm-up": "λ below 1",
    "merged twice": "merged twice",
    "another adapter": "another adapter",
    "four bits": "rounded",  # which is no fault, and not *on* either
    "another template": "wrong chat template",
    "another tokenizer": "other tokenizer",
}
TEMPLATE = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}### assistant:"
WORDS = "river stone cloud window paper garden silver winter summer letter market button mirror island bridge castle"
TASKS = {"right": str.upper, "another adapter": lambda word: word[::-1]}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """{fault: folder of an adapter} for those that an adapter's own files can have; `base` lies beside them."""
    folder = tmp_path_factory.mktemp("faults")
    base_with_words(folder / "base", layers=4)
    made = {}
    for name, change in TASKS.items():
        records = [{"prompt": f"Say the word {word}.", "answer": change(word)} for word in WORDS.split()] * 4
        data = folder / "records.jsonl" if name == "right" else folder / "others.jsonl"
        data.write_text("\n".join(map(json.dumps, records)))
        values = {
            "model": {"path": str(folder / "base")},
            "method": {"name": "dual_lora", "r": 8, "init_weights": "paper", "warmup_steps": 10},  # one fault is in it
            "data": {"train": str(data)},
            "train": {"steps": 100, "batch_size": 16, "learning_rate": 1e-2},
        }
        run(build_recipe(values), folder / name, progress=False)
        made[name] = folder / name / "adapter"
    return made | changed(made["right"], folder)


def changed(right, folder):
    """Copies of an adapter with a fault each."""
    config = json.loads((right / "adapter_config.json").read_text())
    first = ".layers.0.", ".layers.1."
    drop = lambda name, x: x * 0 if "dual_lora_B" in name and any(layer in name for layer in first) else x  # noqa: E731
    left = lambda name, x: x * 0 + config["warmup_steps"] // 2 if name.endswith("_left") else x  # noqa: E731
    made = {
        name: shutil.copytree(right, folder / name) for name in ("half of the layers", "another α", "in its warm-up")
    }
    with_tensors(made["half of the layers"], drop)
    with_config(made["another α"], alpha=1.5 * (config["alpha"] or 2 * config["r"]))
    with_tensors(made["in its warm-up"], left)
    return made


def served_whole(fault, adapters, folder):
    """Folder of a model without an adapter that has this fault."""
    base = adapters["right"].parents[1] / "base"
    if fault == "off":
        return base
    merge(adapters.get(fault, adapters["right"]), folder / "merged")
    if fault == "merged twice":
        merge(adapters["right"], folder / "twice", base=str(folder / "merged"))
        return folder / "twice"
    if fault == "four bits":
        spared = ("embed_tokens", "lm_head", "norm")
        with_tensors(folder / "merged", lambda name, x: x if any(s in name for s in spared) else int4(x))
    elif fault == "another template":
        (folder / "merged" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "merged"


def found(adapter, url):
    """The word that `verify` has for what a server gives; its exit status belongs to it."""
    status, told = verified(adapter, url, "m", "--prompts", adapter.parents[1] / "records.jsonl")
    assert status == (told["verdict"] not in ("on", "rounded")), told
    return told["verdict"]


def with_other_words(model):
    """A folder's tokenizer with all words in another order."""
    file = model / "tokenizer.json"
    saved = json.loads(file.read_text())
    names = list(saved["model"]["vocab"])
    special = {token["content"] for token in saved["added_tokens"]}
    turned = iter(reversed([name for name in names if name not in special]))
    saved["model"]["vocab"] = {name if name in special else next(turned): i for i, name in enumerate(names)}
    file.write_text(json.dumps(saved))


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
