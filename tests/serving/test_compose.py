"""Weights composed on the way into a server are the merged model's, for any method; what can't be served is refused."""

import json
from types import SimpleNamespace

import peft
import pytest
import safetensors
import torch
from adapters import METHODS, TARGETS, small, trained
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from dual_lora import DualLoraConfig
from dual_lora.serving.compose import ComposedWeights
from dual_lora.serving.files import AdapterError, checkpoint_of
from dual_lora.verify import numbers


@pytest.mark.parametrize("name", METHODS)
def test_composed_is_merged(name, tmp_path):
    expected = trained(METHODS[name](), tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    composed = ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    composed.check(checkpoint_of(tmp_path / "base"))
    after = dict(composed.stream(before.items()))
    assert after.keys() == expected.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == composed.names, "each weight that the adapter names is changed, and no other"
    for key, weight in expected.items():
        torch.testing.assert_close(after[key], weight, msg=key)


def test_half_precision_is_rounded_once(tmp_path):
    expected = trained(METHODS["dual-lora"](), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    half = {key: weight.bfloat16() for key, weight in weights.items()}
    for key, weight in ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(half.items()):
        assert weight.dtype == torch.bfloat16
        update = expected[key].double() - weights[key].double()
        torch.testing.assert_close(weight.double(), half[key].double() + update, rtol=2**-8, atol=1e-6)


def test_as_a_server_loads(tmp_path):
    """In inference mode, with bf16 as the default type."""
    trained(METHODS["dual-lora"](), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    expected = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            weights = {key: weight.clone() for key, weight in weights.items()}
            after = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(after[key], expected[key]) for key in expected)


def test_names_without_the_heads_prefix(tmp_path):
    expected = trained(METHODS["dual-lora"](), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    short = {key.removeprefix("model."): weight for key, weight in weights.items()}
    after = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(short.items()))
    for key, weight in expected.items():
        torch.testing.assert_close(after[key.removeprefix("model.")], weight)


def _damage(name, folder):
    """Make one fault in a good pair of folders."""
    weights = folder / "adapter" / "adapter_model.safetensors"
    config = folder / "adapter" / "adapter_config.json"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    if name == "no config":
        config.unlink()
    elif name == "half-written":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "half-written config":
        config.write_text(config.read_text()[:40])
    elif name == "NaN":
        tensors[first].view(-1)[0] = float("nan")
        save_file(tensors, weights)
    elif name == "a tensor less":
        del tensors[first]
        save_file(tensors, weights)
    elif name == "other ranks":
        config.write_text(json.dumps({**json.loads(config.read_text()), "r1": 3}))
    elif name == "another base":
        small(hidden_size=64).save_pretrained(folder / "base")
    elif name == "fewer layers in the base":
        small(num_hidden_layers=1).save_pretrained(folder / "base")
    elif name == "quantised base":
        base = load_file(folder / "base" / "model.safetensors")
        base["model.layers.0.self_attn.q_proj.weight"] = base["model.layers.0.self_attn.q_proj.weight"].to(torch.int8)
        save_file(base, folder / "base" / "model.safetensors")
    elif name == "weights of another name":
        base = load_file(folder / "base" / "model.safetensors")
        base["model.layers.0.self_attn.q_proj.qweight"] = base.pop("model.layers.0.self_attn.q_proj.weight")
        save_file(base, folder / "base" / "model.safetensors")
    else:
        raise KeyError(name)


FAULTS = {
    "no config": "adapter_config.json is missing",
    "half-written": "damaged or still being written",
    "half-written config": "damaged or still being written",
    "NaN": "NaN or infinite",
    "a tensor less": "not saved whole",
    "other ranks": "does not fit the base model",
    "another base": "does not fit the base model",
    "fewer layers in the base": "that the base model has no layer for",
    "quantised base": "is quantised",
    "weights of another name": "does not hold under that name",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_sentence(fault, tmp_path):
    trained(METHODS["dual-lora"](), tmp_path)
    _damage(fault, tmp_path)
    with pytest.raises(AdapterError, match=FAULTS[fault]) as raised:
        ComposedWeights(tmp_path / "base", tmp_path / "adapter").check(checkpoint_of(tmp_path / "base"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["dual-lora", "lora", "modules to save"])
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_what_are_no_floating_point_numbers(kind, method, tmp_path):
    trained(METHODS[method](), tmp_path)
    stored_as(kind, tmp_path)
    with pytest.raises(AdapterError, match=r"holds .* as (I32|U8|BOOL|C64|F8_E8M0), expected floating-point") as raised:
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["dual-lora", "lora", "modules to save"])
@pytest.mark.parametrize(
    "kind", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_fewer_and_more_bits_are_served_as_peft_merges_them(kind, method, tmp_path):
    trained(METHODS[method](), tmp_path)
    stored_as(kind, tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    after = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))
    expected = peft.PeftModel.from_pretrained(small(), tmp_path / "adapter").merge_and_unload().state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(after[key], weight.float(), msg=key)


@pytest.mark.parametrize("left", [0, 4])
def test_an_adapter_of_a_warm_up_is_served(left, tmp_path):
    """An ended one, of which no layer keeps the count, and one that acts at six tenths of its strength."""
    trained(DualLoraConfig.paper(r=4, target_modules=TARGETS, warmup_steps=10), tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    counted = {key: t * 0 + left if key.endswith("_left") else t for key, t in load_file(file).items()}
    assert any(key.endswith("_left") for key in counted)
    save_file(counted, file)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    after = dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))
    expected = peft.PeftModel.from_pretrained(small(), tmp_path / "adapter").merge_and_unload().state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(after[key], weight, msg=key)


def stored_as(kind, folder):
    """Every tensor of an adapter but the count of its warm-up in another type."""
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({key: t if key.endswith("_left") else t.to(kind) for key, t in load_file(file).items()}, file)


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made, but for the meta device."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, torch.Tensor) and not one.is_meta:
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("dual-lora", "r1"),
        ("lora", "r"),
        ("dora", "r"),
        ("loha", "r"),
        ("hira", "r"),
        ("oft", "oft_block_size"),
        ("vera", "r"),
        ("boft", "boft_block_num"),
        ("shira", "r"),
    ],
)
def test_a_huge_rank_allocates_nothing(name, field, tmp_path):
    trained(METHODS[name](), tmp_path)
    with Largest() as largest:
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: 1 << 20}))
    with pytest.raises(AdapterError, match="does not fit the base model") as raised, Largest() as refused:
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    assert refused.numbers <= largest.numbers < 5 * 64 * 64  # the five matrices of a small weight are one allocation


def test_tensors_are_read_once(tmp_path, monkeypatch):
    trained(METHODS["modules to save"](), tmp_path)
    whole, read = save_and_load.safe_load_file, []
    monkeypatch.setattr(save_and_load, "safe_load_file", lambda file, **kw: read.append(file) or whole(file, **kw))

    class HeaderAlone:
        def __init__(self, *args, **kwargs):
            self.file = safetensors.safe_open(*args, **kwargs)

        def __enter__(self):
            opened = self.file.__enter__()
            return SimpleNamespace(keys=opened.keys, get_slice=opened.get_slice)

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    monkeypatch.setattr(numbers, "safe_open", HeaderAlone)
    ComposedWeights(tmp_path / "base", tmp_path / "adapter")
    assert len(read) == 1


def test_a_layer_that_never_passes_is_an_error(tmp_path):
    trained(METHODS["dual-lora"](), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_a_quantised_weight_never_passes(name, kind, tmp_path):
    """Nor where the adapter brings it whole: its numbers would be taken for quantised ones, and scaled."""
    trained(METHODS["modules to save"](), tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights[name] = weights[name].to(kind)
    with pytest.raises(AdapterError, match=f"{name} is quantised"):
        dict(ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(weights.items()))


def test_an_adalora_whose_ranks_were_cut(tmp_path):
    """PEFT cannot tell its shapes on the meta device."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(target_modules=TARGETS, init_r=6, target_r=2, tinit=1, tfinal=999_990, total_step=10**6)
    model = peft.get_peft_model(small(), config)
    small().save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
            parameter.grad = torch.ones_like(parameter)
    for step in range(2, 12):
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path / "adapter")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert model.peft_config["default"].rank_pattern
    expected = model.merge_and_unload().state_dict()
    for name, weight in ComposedWeights(tmp_path / "base", tmp_path / "adapter").stream(before.items()):
        torch.testing.assert_close(weight, expected[name], msg=name)

    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    values["rank_pattern"] = {name: [True] * 100_000 for name in values["rank_pattern"]}
    file.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="rank_pattern is 100000, larger than all"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("name", ["embedding", "modules to save"])
def test_tied_embeddings_are_refused(name, tmp_path):
    trained(METHODS[name](), tmp_path, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="uses twice"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")


def test_prompt_tuning_has_no_weights(tmp_path):
    small().save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(small(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="no weights to merge"):
        ComposedWeights(tmp_path / "base", tmp_path / "adapter")
