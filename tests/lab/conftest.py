"""A language model and a classifier of a few thousand weights, with a tokenizer, and records for them."""

import json
import random

import pytest
import yaml
from report_in_browser import browser, page, page_file  # noqa: F401  (fixtures)
from tiny_study import copy_of_whole, no_training, short, tiny, whole  # noqa: F401  (fixtures)

WORDS = [
    "is",
    "red",
    "blue",
    "warm",
    "cold",
    "sky",
    "fire",
    "ice",
    "sea",
    "the",
    "?",
    ":",
    "true",
    "false",
    "good",
    "bad",
]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} : {{ m['content'] }}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s>assistant : {% endif %}"
)


def _tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


# Tests that look at what a finished run notes for `verify`, or at every file of its folder.
FINGERPRINTS = {
    *("test_crash", "test_fingerprint", "test_full_disk", "test_fuzz", "test_hub", "test_launched"),
    "test_same_model_same_score",
}
_PATCH = pytest.StashKey[pytest.MonkeyPatch]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The fingerprint is a third of a tiny training: where nobody looks at it, none is made, in no fixture either."""
    name = item.path.stem
    if name in FINGERPRINTS or name.startswith("test_verify"):
        return
    try:
        from dual_lora.lab.verify import fingerprint
    except ImportError:  # without the laboratory's packages
        return
    item.stash[_PATCH] = patch = pytest.MonkeyPatch()
    patch.setattr(fingerprint, "write_for_run", lambda *_: None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if patch := item.stash.get(_PATCH, None):
        patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _fast_in_fp32():
    """`auto` is bf16 on processors with units for it, and then runs have other figures than on the rest."""
    from dual_lora.lab.model import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "measure_products", lambda: {"fp32": 1.0, "bf16": 1.0})
        yield


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """Folder of a language model with two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-lm")
    size = _tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of an encoder without a classification head."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    size = _tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Folder with train.json and test.json: fire is warm, ice is cold."""
    folder = tmp_path_factory.mktemp("questions")
    chance = random.Random(0)
    for name, count in (("train", 48), ("test", 16)):
        records = []
        for _ in range(count):
            thing, kind = chance.choice(["fire", "ice"]), chance.choice(["warm", "cold"])
            colour = chance.choice(["red", "blue"])
            answer = "true" if (thing == "fire") == (kind == "warm") else "false"
            question = f"is the {colour} {thing} {kind} ?\n\nAnswer format: true/false"
            records.append({"instruction": question, "input": "", "output": answer, "answer": answer})
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Folder with train.tsv and test.tsv: label, sentence; warm is 1."""
    folder = tmp_path_factory.mktemp("reviews")
    chance = random.Random(0)
    for name, count in (("train", 64), ("test", 24)):
        lines = []
        for _ in range(count):
            label = chance.randrange(2)
            rest = chance.sample(["the", "sea", "sky", "is", "red"], 3)
            lines.append(f"{label}\t{' '.join([*rest, 'warm' if label else 'cold'])}\n")
        (folder / f"{name}.tsv").write_text("".join(lines))
    return folder


@pytest.fixture
def lm_values(tiny_lm, questions):
    """Values of a recipe that trains the language model with LoRA for a few steps."""
    return {
        "name": "tiny",
        "model": {"path": str(tiny_lm), "dtype": "float32"},
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "learning_rate": 0.01},
        "evaluate": {"tasks": ["choice", "exact_match", "loss"], "max_new_tokens": 3, "batch_size": 5},
    }


@pytest.fixture(scope="session")
def tiny_values(tiny_lm, questions):
    """Values of a recipe for `faulty.trained`, which says the rest."""
    return {
        "name": "tiny",
        "model": {"path": str(tiny_lm), "dtype": "float32"},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"batch_size": 8},
    }


@pytest.fixture
def encoder_values(tiny_encoder, reviews):
    """Values of a recipe that trains the classifier with LoRA."""
    return {
        "name": "tiny-reviews",
        "model": {"path": str(tiny_encoder), "head": "classification", "dtype": "float32"},
        "method": {"name": "lora", "r": 4},
        "data": {
            "train": str(reviews / "train.tsv"), "test": str(reviews / "test.tsv"),
            "columns": ["label", "sentence"], "fields": {"text": "sentence"},
        },
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.01},
    }  # fmt: skip


@pytest.fixture
def write_recipe(tmp_path):
    """Function: values → recipe file."""

    def write(values, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def call(capsys):
    """Function: arguments → (exit code, standard output, standard error)."""
    from dual_lora.lab.cli import main

    def run(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return code, out.out, out.err

    return run
