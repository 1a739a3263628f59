"""What a base is known by: samples of its layers and the values of its configuration that change what it computes."""

import json
import re

import torch
from safetensors.torch import save_file

from dual_lora.lab.model import weights


def config_of(tmp_path, **values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return weights._numbers_of(tmp_path / "config.json")


def test_lists_of_a_configuration_count_and_lengths_where_positions_are_stretched_by_them(tmp_path):
    def differ(before, after):
        return bool(weights.other_settings(config_of(tmp_path, **before), config_of(tmp_path, **after)))

    layers = [["full_attention"] * 40, ["full_attention"] * 39 + ["sliding_attention"]]
    assert differ(*({"layer_types": types} for types in layers))
    factors = [{"rope_parameters": {"rope_type": "longrope", "long_factor": [1, 2.0, last]}} for last in (3, 3.5)]
    assert differ(*factors)
    assert not differ(factors[0], {"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2, 3.0]}})
    assert not differ({"architectures": ["GPT2Model"]}, {"architectures": ["GPT2LMHeadModel"]})
    for kind, counts in (("dynamic", True), ("yarn", True), ("llama3", False), ("default", False)):
        rope = {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
        longer = ({**rope, "max_position_embeddings": length} for length in (64, 128))
        assert differ(*longer) is counts, kind
    stretched = ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": at}} for at in (8, 32))
    assert differ(*stretched)
    rope = {"rope_parameters": {"rope_type": "longrope"}}
    parts = ({"text_config": rope | {"max_position_embeddings": length}} for length in (64, 128))
    assert differ(*parts), "of a part"
    assert not differ({"auto_map": {"AutoModel": "m.X"}}, {"auto_map": {"AutoModel": "org/repo--m.X"}})
    for damaged in ("[" * 100_000, '{"x": 1' + "0" * 400 + "}", "[1]", "{"):
        (tmp_path / "config.json").write_text(damaged)
        assert weights._numbers_of(tmp_path / "config.json") == {}


def test_positions_of_a_part_are_not_those_of_the_whole(tmp_path):
    """Earlier versions write a model's with pictures at the top, today's in its text part."""
    seen = {"vision_config": {"rope_parameters": {"rope_theta": 10000.0}}}
    earlier = config_of(tmp_path, rope_theta=1e6, vision_config={})
    now = config_of(tmp_path, text_config={"rope_parameters": {"rope_theta": 1e6}}, **seen)
    assert not weights.other_settings(earlier, now)
    other = config_of(tmp_path, text_config={"rope_parameters": {"rope_theta": 5e3}}, **seen)
    assert weights.other_settings(now, other) == ["text_config.rope_theta was 1000000.0 and is 5000.0"]


def deep(layers, prefix="model.", experts=0):
    """Tensors of a model of some layers, each with a norm, nine matrices, a buffer and experts."""
    parts = ["norm", *map(str, range(9)), *(f"experts.{e}.up" for e in range(experts))]
    names = [f"{prefix}layers.{i}.{part}.weight" for i in range(layers) for part in parts]
    tensors = {name: torch.randn(16 if "norm" in name else (16, 20)) for name in names}
    tensors |= {f"{prefix}layers.{i}.rotary.inv_freq": torch.randn(4) for i in range(layers)}
    return tensors | {f"{prefix}embed.weight": torch.randn(50, 16), "lm_head.weight": torch.randn(50, 16)}


def print_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return weights._tensors_in(folder)


def changed(tensors, words):
    return {name: tensor + 1 if re.search(words, name) else tensor for name, tensor in tensors.items()}


def test_each_layer_of_a_deep_base_is_looked_at_and_every_kind_of_tensor(tmp_path):
    tensors = deep(40, experts=16)
    before = print_of(tmp_path, tensors)
    assert len(before) == 512
    assert weights.is_other_base(before, print_of(tmp_path, tensors)) is False
    changes = [rf"layers\.{i}\." for i in range(40)]
    changes += [r"\.3\.weight", "norm", "experts", r"experts\.7\.up", "embed", "lm_head", r"layers\.(4|5)\.0\.weight"]
    for words in changes:
        assert weights.is_other_base(before, print_of(tmp_path, changed(tensors, words))), words


def test_what_one_of_two_files_alone_has_tells_nothing(tmp_path):
    """Buffers that some versions save, and experts that some keep in one tensor."""
    tensors = deep(3, experts=4)
    before = print_of(tmp_path, tensors)
    fewer = {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name and "experts" not in name}
    masks = {f"model.layers.{i}.attn.bias": torch.zeros(4, dtype=torch.bool) for i in range(3)}
    before |= print_of(tmp_path, tensors | {name: mask.float() for name, mask in masks.items()})
    fewer |= masks | {f"model.layers.{i}.experts.up_proj": torch.randn(4, 16, 20) for i in range(3)}
    assert weights.is_other_base(before, print_of(tmp_path, fewer)) is False


def test_a_base_with_a_head_and_one_without_have_the_same_tensors(tmp_path):
    tensors = deep(3)
    before = print_of(tmp_path, tensors)
    bare = {n.removeprefix("model."): t for n, t in tensors.items() if not re.search("lm_head|inv_freq", n)}
    for one, other in ((before, print_of(tmp_path, bare)), (print_of(tmp_path, bare), before)):
        assert weights.is_other_base(one, other) is False
    assert weights.is_other_base(before, print_of(tmp_path, {n: t * 2 for n, t in bare.items()})) is True
    two = {f"{side}.{n}": t for side in ("encoder", "decoder") for n, t in deep(2, "").items()}
    assert weights.is_other_base(before, print_of(tmp_path, {n: t.clone() for n, t in two.items()})) is True, (
        "of others"
    )
    unknown = {f"x.y.{n}": t for n, t in tensors.items()}
    assert weights.is_other_base(before, print_of(tmp_path, unknown)) is None


def test_a_print_of_any_number_of_names_is_compared_in_one_pass():
    """One comes with somebody else's adapter: for each first part of a name there was a copy of the whole."""
    strange = {f"a{i}.w": "0" for i in range(200_000)}
    now = {f"layers.{i}.w": "0" for i in range(500)}
    assert weights.is_other_base(strange, now) is None
    assert weights.is_other_base(strange | {f"model.{name}": value for name, value in now.items()}, now) is False
    assert weights.is_other_base(now, {f"model.{name}": "1" for name in now}) is True
