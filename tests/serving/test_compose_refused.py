"""Adapters whose composed weights would not be the merged model's are refused as soon as they are opened."""

import json

import peft
import pytest
import torch
from adapters import TARGETS, small
from safetensors.torch import load_file

from dual_lora import DualLoraConfig
from dual_lora.serving.compose import ComposedWeights
from dual_lora.serving.files import CONFIG_BYTES, HEADER_BYTES, AdapterError

REFUSED = {
    "biases of its own": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    "biases beside trained ones": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, bias="all"),
    "biases times a factor": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "a bias where there is none": lambda: peft.LoraConfig(r=4, target_modules=["down_proj"], lora_bias=True),
    "norms in place of norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "a start from the base: psoft": lambda: peft.PsoftConfig(r=4, target_modules=TARGETS),
    "a start from the base: osf": lambda: peft.OSFConfig(target_modules=TARGETS),
    "a start from the base: frod": lambda: peft.FrodConfig(target_modules=TARGETS, progressbar=False),
    "a start from the base: pissa": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "a start from the base: olora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "a start from the base: lora_ga": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="lora_ga"),
    "layers in another order": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, layer_replication=[[1, 2], [0, 1]]),
    "fewer layers": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, layer_replication=[[0, 1]]),
    "no merge": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, alora_invocation_tokens=[5]),
}


def saved(config, folder, **other):
    """The adapter off its start, saved beside its base; the PEFT model."""
    small().save_pretrained(folder / "base")
    model = peft.get_peft_model(small(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "adapter", **other)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_never_something_else_in_silence(name, tmp_path):
    saved(REFUSED[name](), tmp_path)
    with pytest.raises(AdapterError) as raised:
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.timeout(60)
def test_a_pattern_without_an_end(field, tmp_path, monkeypatch):
    """Two ways for each character of a name: `re` would hold the whole server for longer than anybody waits."""
    monkeypatch.setattr("dual_lora.verify.patterns.SECONDS", 1.0)
    saved(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    trap = "(.|.)*x"
    changed(tmp_path, {field: {trap: 2} if field == "rank_pattern" else trap})
    with pytest.raises(AdapterError, match="takes too long on this model's names"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


def test_no_other_model_is_loaded(tmp_path, monkeypatch):
    """Its own code would be asked for, and what is piped into the server taken for the answer."""
    saved(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    changed(tmp_path, {"peft_type": "SHADOW", "shadow_model": str(tmp_path / "evil")})
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(AdapterError, match=r"shadow_model names .*evil"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


def test_no_part_of_the_base_asks_about_its_own_code(tmp_path, monkeypatch):
    """A tower with a configuration of its own: transformers does not hand it the no that it was given."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked for"))
    tower = {"model_type": "blip_vision_model", "auto_map": {"AutoModel": "code.M"}, "name_or_path": str(tmp_path)}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"num_hidden_layers": 1}}))
    saved(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    with pytest.raises(AdapterError, match="requires you to execute"):
        ComposedWeights(tmp_path, tmp_path / "adapter")


@pytest.mark.parametrize("key", ["q_proj|alpha", "(q_proj|seed)"])
def test_a_rank_is_bounded_whatever_its_pattern(key, tmp_path):
    saved(peft.LoHaConfig(r=4, target_modules=TARGETS), tmp_path)
    changed(tmp_path, {"rank_pattern": {key: 10**9}})
    with pytest.raises(AdapterError, match="rank_pattern holds 1,000,000,000"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


def test_patterns_that_end_are_served(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=r".*\.(q|v)_proj", rank_pattern={r"layers\.(0|1)\.self_attn\.q_proj": 2}
    )
    saved(config, tmp_path)
    assert len(ComposedWeights(tmp_path / "base", tmp_path / "adapter").names) == 4


def test_files_that_are_read_for_long(tmp_path):
    saved(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    good = (tmp_path / "adapter" / "adapter_config.json").read_text()
    changed(tmp_path, {"note": "x" * CONFIG_BYTES})
    with pytest.raises(AdapterError, match=r"adapter_config.json in .* has 4,\d+,\d+ bytes; at most"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(good)
    header = b"{" + b" " * HEADER_BYTES + b"}"
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterError, match=r"header of .* has 16,\d+,\d+ bytes; at most"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    weights.write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(AdapterError, match="damaged or still being written"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


def changed(folder, fields):
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_composition_leaves_nothing_for_the_next(tmp_path):
    """Neither the weights of the first stream, which would be held beside the model, nor its results."""
    saved(DualLoraConfig.paper(r=4, target_modules=TARGETS, warmup_steps=0), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    composed = ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    first = dict(composed.stream(weights.items()))
    second = dict(composed.stream((name, weight + 1) for name, weight in weights.items()))
    for name in composed.names:
        torch.testing.assert_close(second[name], first[name] + 1)


@pytest.mark.parametrize("adapted", [["q_proj"], ["embed_tokens"]], ids=["beside", "under the adapter"])
def test_embeddings_that_were_saved_with_the_adapter(adapted, tmp_path):
    model = saved(peft.LoraConfig(r=4, target_modules=adapted), tmp_path)
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        getattr(embedding, "base_layer", embedding).weight.add_(1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    after = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(after[name], weight, msg=name)


def test_what_half_precision_does_not_hold(tmp_path):
    model = saved(peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.fill_(1e5)
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"lm_head\.weight .*float16 holds"):
        dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream((n, w.half()) for n, w in weights.items()))


@pytest.mark.parametrize(
    "changed",
    [
        {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": None},
        {"vision_config": {"model_args": {"checkpoint_path": "a.pth"}}},
    ],
    ids=["code of its own", "no class of models", "another class", "none", "a part of timm's"],
)
def test_a_base_that_transformers_does_not_know(changed, tmp_path, monkeypatch):
    saved(peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to let a base's code run"))
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(AdapterError, match="describes no model of transformers"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"lora_alpha": True}, "lora_alpha holds True, expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha holds nan, expected a finite number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern holds inf, expected a finite number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_strength_of_another_kind_is_not_served(field, said, tmp_path):
    """PEFT takes each of them, and the update would have another size, or none."""
    saved(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    changed(tmp_path, field)
    with pytest.raises(AdapterError, match=said):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "field", "said"),
    [
        (
            lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=TARGETS),
            {"num_cayley_neumann_terms": 10**9},
            "terms",
        ),
        (lambda: peft.PeanutConfig(r=4, target_modules=TARGETS), {"depth": 10**8}, "depth holds 100,000,000"),
        (
            lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
            {"target_modules": [f"x{i}" for i in range(10**5)]},
            "names",
        ),
        (
            lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
            {"target_modules": "(?i)" + "[\x00-\U0010ffff]" * 5000},
            "1",
        ),
        (lambda: peft.LoraConfig(r=4, target_modules=TARGETS), {"r": 10**12}, "r holds"),
    ],
    ids=["terms", "depth", "names", "compiled", "rank"],
)
@pytest.mark.timeout(60)
def test_numbers_and_names_without_an_end(config, field, said, tmp_path):
    """They would hold the lock under which adapters are checked."""
    saved(config(), tmp_path)
    changed(tmp_path, field)
    with pytest.raises(AdapterError, match=said):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
