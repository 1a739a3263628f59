"""What a stranger's model, tokenizer or adapter names outside of its folder is neither read nor run."""

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import save_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.load import load_model, load_tokenizer
from dual_lora.lab.model.location import Location, locate
from dual_lora.lab.model.named_files import MADE
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.model.tokenizer_rules import check_rules
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import ModelSection
from dual_lora.lab.run.train import run

pytestmark = pytest.mark.timeout(120)  # what hangs is the failure


@pytest.fixture
def base(tiny_lm, tmp_path):
    return shutil.copytree(tiny_lm, tmp_path / "base")


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "mine").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\nmy-password\n")
    return str(tmp_path / "mine")


def settings(file, **values):
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | values))


def only_settings(folder, **values):
    """A tokenizer of a class that takes its words from where its settings say."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    settings(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", **values)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "config.4.0.0.json"])
@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoTokenizer", "RagTokenizer"])
def test_a_tokenizer_s_class_is_a_tokenizer(name, file, base, monkeypatch):
    """transformers takes any class of its own, and a model in a tokenizer's place has its parts loaded by others."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    if file != "tokenizer_config.json":
        settings(base / "config.json", configuration_files=["config.4.0.0.json"] * (file != "config.json"))
        settings(base / "tokenizer_config.json", tokenizer_class=None)
        shutil.copy(base / "config.json", base / "config.4.0.0.json")
    settings(base / file, tokenizer_class=name)
    with pytest.raises(UserError, match=f"has tokenizer_class '{name}', which is no tokenizer of one model"):
        load_tokenizer(str(base))


@pytest.mark.parametrize("name", ["vocab", "vocab_file", "init_inputs", "new_dictionary"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_tokenizer_s_settings_name_no_file_of_the_user(name, relative, base, secret, monkeypatch):
    monkeypatch.chdir(os.path.dirname(secret))
    text = "mine" if relative else secret
    only_settings(base, **{name: [text] if name == "init_inputs" else text})
    with pytest.raises(UserError, match=rf"names a file as {name}, .*mine, which lies outside"):
        load_tokenizer(str(base))
    with pytest.raises(UserError, match="lies outside"):
        load_model(ModelSection(path=str(base)))


def test_nor_do_its_special_tokens(base, secret):
    only_settings(base)
    settings(base / "special_tokens_map.json", vocab=secret)
    with pytest.raises(UserError, match=r"special_tokens_map.json of .* names a file as vocab"):
        load_tokenizer(str(base))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"gguf_file": "mine.gguf", "subfolder": "../elsewhere"}),
        ("tokenizer_config.json", {"cache_dir": "/home/me"}),
        ("tokenizer_config.json", {"token": "hf_theirs"}),
        ("special_tokens_map.json", {"name_or_path": "somebody/else"}),
        ("special_tokens_map.json", {"is_local": False}),
        ("special_tokens_map.json", {"local_files_only": False}),
        ("special_tokens_map.json", {"tokenizer_file": "/home/me/tokenizer.json"}),
        ("special_tokens_map.json", {"gguf_file": "mine.gguf"}),
    ],
)
def test_nor_is_it_sought_in_another_place(file, values, base):
    """transformers passes on to the hub's client, and to its reader of GGUF, what a tokenizer's settings have."""
    path = base / file
    settings(path, **(json.loads(path.read_text()) if path.is_file() else {}), **values)
    with pytest.raises(UserError, match=rf"{file} of .* has {next(iter(values))} .*sought in another place"):
        load_tokenizer(str(base))


def test_nor_is_the_hub_asked_for_a_part_of_its_configuration(base):
    """Next to an adapter's tokenizer, transformers builds whatever a config.json describes."""
    settings(base / "config.json", model_type="detr", backbone="somebody/else")
    with pytest.raises(UserError, match="transformers may ask the hub"):
        load_tokenizer(str(base), Location(str(base)))


def test_nor_settings_that_are_too_long_to_be_looked_at(base, secret):
    only_settings(base, vocab=secret)
    os.truncate(base / "tokenizer_config.json", 200_000_001)
    with pytest.raises(UserError, match="bytes, and at most"):
        load_tokenizer(str(base))


def test_a_tokenizer_saved_by_an_older_transformers_is_read(base, secret, monkeypatch):
    """It noted where its files lay, on whoever's machine; texts of other kinds may be a file's name by chance."""
    monkeypatch.chdir(os.path.dirname(secret))
    settings(
        base / "tokenizer_config.json", tokenizer_file=secret, special_tokens_map_file=secret, name_or_path=secret,
        is_local=False, local_files_only=False, cache_dir=None, token=False,
        padding_side="right", x_token="mine", vocab_file=str(base / "tokenizer.json"),
    )  # fmt: skip
    assert load_tokenizer(str(base))("fire").input_ids


SPECIAL = [f"<x{i}>" for i in range(10_001)]
ADDED = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10**9}, "has extra_ids 1,000,000,"),
        ("tokenizer_config.json", {"tokenizer_class": "PegasusTokenizer", "offset": 10**9}, "has offset 1,000,000,000"),
        ("tokenizer_config.json", {"extra_special_tokens": SPECIAL}, "10,001 special tokens"),
        ("special_tokens_map.json", {"additional_special_tokens": SPECIAL}, "10,001 special tokens"),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "ByT5Tokenizer",
                "added_tokens_decoder": {str(900 + i): ADDED | {"content": text} for i, text in enumerate(SPECIAL)},
            },
            "10,001 special tokens",
        ),
    ],
    ids=["extra ids", "offset", "extra", "additional", "added in Python"],
)
def test_a_tokenizer_makes_no_tokens_without_an_end(file, values, said, base):
    """By a number of a few bytes they filled the memory, and as a list they took hours."""
    settings(base / file, **values)
    with pytest.raises(UserError, match=said):
        load_tokenizer(str(base))


def test_every_number_by_which_a_tokenizer_makes_tokens_has_its_bound():
    """In transformers' sources: a loop over as many as a parameter of the tokenizer says."""
    import transformers

    sources = [file.read_text("utf-8") for file in Path(transformers.__file__).parent.glob("models/*/tokeniz*.py")]
    loop, parameter = r"in range\((?:2, )?(?:self\.)?(\w+)\)", r"(?m)^        (\w+)(?:: int)? ?= ?\d+,$"
    looped, numbers = ({name for text in sources for name in re.findall(p, text)} for p in (loop, parameter))
    assert {"extra_ids", "offset", "num_madeup_words"} <= looped & numbers
    assert not [name for name in looped & numbers if not MADE.fullmatch(name)]


TEXT, TOKEN = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
PAIR = [TEXT, {"Sequence": {"id": "B", "type_id": 1}}]


def around(*pieces, ids=1):
    known = {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    return {"type": "TemplateProcessing", "single": [*pieces], "pair": PAIR, "special_tokens": known}


def replaced(text, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": text}


def in_turn(kind, *steps):
    return {"type": "Sequence", kind: [*steps]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SLOW = {"type": "Split", "pattern": {"Regex": r"(?:.|.){22}\b\B"}, "behavior": "Isolated", "invert": False}
TABLE = base64.b64encode(b"\0\0\0\0" + b"a" * 2000 + b"\0").decode()
WORDS = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
RULES = [
    ("post_processor", around(*[TOKEN] * 40, TEXT, ids=40), "more than 1,000 tokens around a text"),
    ("post_processor", around(TEXT, TEXT), "or writes it twice"),
    ("normalizer", in_turn("normalizers", *[replaced("a" * 100, String="a")] * 4), "4 steps of its normalizer may"),
    ("normalizer", replaced("a" * 1000, Regex="x?"), "of its normalizer may make 1e.03 letters of one"),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": TABLE}, "of its normalizer may make 2e.03 letters"),
    ("pre_tokenizer", in_turn("pretokenizers", *[BYTES] * 40), "40 steps of its pre_tokenizer may make 1.1e.12"),
    ("pre_tokenizer", SLOW, "patterns of its pre_tokenizer might never end"),
    ("decoder", in_turn("decoders", *[replaced("a" * 100, String="a")] * 4), "4 steps of its decoder"),
    ("model", WORDS | {"max_input_chars_per_word": 10**9}, "max_input_chars_per_word is 1,000,000,000"),
    ("model", WORDS | {"continuing_subword_prefix": "#" * 101}, "continuing_subword_prefix has 101 letters"),
]


@pytest.mark.parametrize(("part", "rules", "said"), RULES, ids=[f"{part} {i}" for i, (part, *_) in enumerate(RULES)])
def test_a_tokenizer_s_rules_make_no_text_without_an_end(part, rules, said, base):
    """Each is a file of a few kB, and filled the memory, or took minutes for one text of a few words."""
    own = json.loads((base / "tokenizer.json").read_text())
    words = {"vocab": own["model"]["vocab"]} if part == "model" else {}
    settings(base / "tokenizer.json", **{part: rules | words})
    with pytest.raises(UserError, match=f"tokenizer.json of .*{said}"):
        load_tokenizer(str(base))


def test_a_token_has_no_number_without_an_end(base):
    """It is saved with each run, for which the library takes memory for every number below."""
    held = json.loads((base / "tokenizer.json").read_text())
    held["model"]["vocab"]["more"] = 4_000_000_000
    (base / "tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=r"a token of the number 4,000,000,000, expected at most 2,000,000"):
        load_tokenizer(str(base))


def test_nor_those_of_another_version_s_file(base):
    own = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.4.0.json").write_text(json.dumps(own | {"pre_tokenizer": SLOW}))
    settings(base / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"])
    with pytest.raises(UserError, match=r"tokenizer.4.0.json of .*might never end"):
        load_tokenizer(str(base))


def test_nor_those_that_come_from_other_files(base, monkeypatch):
    """As from a tokenizer.model or a GGUF file, whose rules transformers writes itself."""
    monkeypatch.setattr("dual_lora.lab.model.named_files._settings", lambda *_: {})
    settings(base / "tokenizer.json", post_processor=around(TEXT, TEXT))
    with pytest.raises(UserError, match="or writes it twice"):
        load_tokenizer(str(base))


GPT_4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def test_published_rules_are_taken(base):
    nmt_nfkc = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\0" * 4 + "x\0لله".encode()).decode()}
    steps = [replaced('"', String="``"), {"type": "NFKD"}, {"type": "Lowercase"}, replaced(" ", Regex=" {2,}")]
    parts = {
        "normalizer": in_turn("normalizers", *steps),
        "pre_tokenizer": in_turn("pretokenizers", SLOW | {"pattern": {"Regex": GPT_4}}, BYTES),
        "post_processor": around(TOKEN, TEXT, TOKEN),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    check_rules(parts | {"normalizer": in_turn("normalizers", nmt_nfkc, *steps), "model": WORDS}, "x")
    settings(base / "tokenizer.json", **parts)
    assert load_tokenizer(str(base))("The fire is warm").input_ids


@pytest.mark.parametrize(
    ("templates", "said"),
    [
        ([{"name": "../../mine", "template": "x"}], "a chat template named '../../mine'"),
        ([{"name": "default", "template": "x"}, {"name": "tool_use", "template": 5}], "tool_use of .* is no text"),
        ([{"name": f"t{i}", "template": "x"} for i in range(1000)], "1,000 chat templates"),
        ([{"name": "n" * 300, "template": "x"}], "a chat template named 'nnn"),
        (7, "default of .* is no text"),
    ],
)
def test_templates_that_could_not_be_saved_are_said_before_the_training(templates, said, base):
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings(base / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match=said):
        load_tokenizer(str(base))


def test_an_adapter_s_tokenizer_is_the_base_s_where_it_names_a_file(lm_values, secret, tmp_path):
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    only_settings(tmp_path / "run/adapter", vocab=secret)
    with pytest.warns(UserWarning, match=r"is not used, but its base's: .*names a file as vocab"):
        tuned = open_tuned(tmp_path / "run")
    assert "my-password" not in tuned.tokenizer.get_vocab()


def test_a_base_carries_no_adapter(base):
    values = {"peft_type": "LORA", "target_modules": "(.|.)*x", "base_model_name_or_path": str(base)}
    (base / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"has an adapter_config.json\. If it is an adapter, name its base"):
        load_model(ModelSection(path=str(base)))


@pytest.mark.parametrize(
    "name",
    ["deep/er/w.safetensors", "../w.safetensors", "/dev/stdin", "deep\\w.safetensors", "w.pt", "w.json", "safetensors"],
)
def test_weights_lie_next_to_their_index(name, base):
    (base / "deep/er").mkdir(parents=True)
    os.mkfifo(base / "deep/er/w.safetensors")
    (base / "model.safetensors").unlink()
    for index in ("model.safetensors.index.json", "Model.safetensors.INDEX.json"):  # where case does not count
        settings(base / index, metadata={}, weight_map={"lm_head.weight": name})
        with pytest.raises(UserError, match=r"names .*, expected files of weights that lie next to it"):
            load_model(ModelSection(path=str(base)))
        (base / index).unlink()
    settings(base / "config.json", transformers_weights=name)
    with pytest.raises(UserError, match="transformers_weights, names"):
        load_model(ModelSection(path=str(base)))


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "snapshot", "blob"])
def test_the_hub_s_cache_shows_no_file_from_outside(kind, tiny_lm, tmp_path, monkeypatch):
    """As an archive of it may, which was unpacked over the user's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "secret.jinja").write_text("my-password")
    folder = tmp_path / "hub/models--me--tiny"
    snapshot = folder / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_lm, mine / "model" if kind == "snapshot" else snapshot)
    for part in ("blobs", "refs", "snapshots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("a" * 40)
    locate("me/tiny")  # as it should be
    if kind == "link":
        (snapshot / "additional.jinja").symlink_to(mine / "secret.jinja")
    elif kind == "hard link":
        os.link(mine / "secret.jinja", snapshot / "additional.jinja")
    elif kind == "folder":
        (snapshot / "additional_chat_templates").symlink_to(mine)
    elif kind == "snapshot":
        snapshot.symlink_to(mine / "model")
    else:
        content = (snapshot / "config.json").read_bytes()
        blob = folder / "blobs" / hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (snapshot / "config.json").rename(blob)
        (snapshot / "config.json").symlink_to(f"../../blobs/{blob.name}")
        os.link(blob, tmp_path / "backup")  # of the same content: what saves room on a disk
        locate("me/tiny")
        locate(str(snapshot))
        blob.write_text("my-password")
    for path in ("me/tiny", *([str(snapshot)] if kind in ("link", "hard link", "blob") else [])):
        with pytest.raises(UserError, match=r"outside|has a second name elsewhere"):
            locate(path)


def test_weights_in_parts_are_read(base):
    model = load_model(ModelSection(path=str(base))).model
    model.save_pretrained(base, max_shard_size="20kB")
    assert len([*base.glob("model-*.safetensors")]) > 1
    again = load_model(ModelSection(path=str(base))).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


TRAP = "from transformers import PretrainedConfig, PreTrainedModel\nopen({mark!r}, 'w').close()\n"


def adapter(folder, base, **values):
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "adapter_model.safetensors")
    values = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)} | values
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_an_adapter_has_no_other_model_loaded(base, tmp_path, monkeypatch):
    """A shadow model with code of its own: transformers would take a line of standard input for the user's yes."""
    evil, mark = tmp_path / "evil", tmp_path / "was-run"
    evil.mkdir()
    settings(evil / "config.json", model_type="evil", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"})
    (evil / "code.py").write_text(TRAP.format(mark=str(mark)))
    (tmp_path / "yes").write_text("y\n" * 9)
    with (tmp_path / "yes").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        with pytest.raises(UserError, match=r"shadow_model names .*evil.*, which PEFT would load"):
            open_tuned(adapter(tmp_path / "adapter", base, peft_type="SHADOW", shadow_model=str(evil)))
    assert not mark.exists()


def test_nor_weights_of_a_repository_with_the_folder_s_name(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "me").mkdir()
    folder = adapter(tmp_path / "me/adapter", base, peft_type="LORA", target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        open_tuned("me/adapter")


def test_nor_another_adapter(base, tmp_path):
    inner = adapter(tmp_path / "inner", base, peft_type="LORA", target_modules="(.|.)*x")
    settings(base / "config.json", use_cache=False)
    with pytest.raises(UserError, match="adapters names"):
        open_tuned(adapter(tmp_path / "a", base, peft_type="XLORA", hidden_size=32, adapters={"0": str(inner)}))


def test_nor_a_module_of_megatron(base, tmp_path):
    more = {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "os"}
    with pytest.raises(UserError, match=r"megatron_config names .*, which PEFT would load or import"):
        open_tuned(adapter(tmp_path / "a", base, peft_type="LORA", target_modules=["q_proj"], **more))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha holds nan, expected a finite number"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
    ],
)
def test_a_strength_of_another_kind_is_not_taken(values, said, base, tmp_path):
    with pytest.raises(UserError, match=said):
        open_tuned(adapter(tmp_path / "a", base, peft_type="LORA", target_modules=["q_proj"], **values))


def test_nor_is_a_pipe_waited_for(base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    values = {
        "peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init": "ONLY_SOURCE_SHARED", "num_virtual_tokens": 2,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "pipe"),
    }  # fmt: skip
    for number, named in enumerate((values["prompt_tuning_init_state_dict_path"], {"no": "path"})):
        folder = adapter(tmp_path / str(number), base, **values | {"prompt_tuning_init_state_dict_path": named})
        with pytest.raises(UserError, match=r"prompt_tuning_init_state_dict_path .* no file"):
            open_tuned(folder)


@pytest.mark.parametrize("key", ["q_proj|alpha", "q_proj|seed", "(q_proj|step)"])
def test_a_rank_is_bounded_whatever_its_pattern(key, base, tmp_path):
    values = {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {key: 10**8}}
    with pytest.raises(UserError, match="rank_pattern holds 100,000,000, and no weight"):
        open_tuned(adapter(tmp_path / "a", base, **values))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokenizer_name_or_path": "elsewhere"}, "tokenizer_name_or_path is 'elsewhere', expected the base's own"),
        ({"tokenizer_kwargs": {"cache_dir": "elsewhere"}}, "tokenizer_kwargs may say where files are written"),
    ],
)
def test_a_prompt_of_words_is_cut_by_the_base_s_tokenizer(more, said, lm_values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = lm_values["model"]["path"]
    prompt = {"name": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}
    prompt |= {"prompt_tuning_init_text": "fire is warm", "tokenizer_name_or_path": base}
    lm_values["method"] = prompt | more
    with pytest.raises(UserError, match=said):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert not (tmp_path / "elsewhere").exists()
    lm_values["method"] = prompt
    run(build_recipe(lm_values), tmp_path / "good", progress=False)
    assert PeftConfig.from_pretrained(str(tmp_path / "good/adapter")).num_virtual_tokens == 2
