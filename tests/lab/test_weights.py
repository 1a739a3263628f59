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
        return weights.have_changed(config_of(tmp_path, **before), config_of(tmp_path, **after))

    layers = [["full_attention"] * 40, ["full_attention"] * 39 + ["sliding_attention"]]
    assert differ(*({"layer_types": types} for types in layers))
    factors = [{"rope_parameters": {"rope_type": "longrope", "long_factor": [1, 2.0, last]}} for last in (3, 3.5)]
    assert differ(*factors)
    assert not differ(factors[0], {"rope_scaling": {"type": "longrope", "long_factor": [1.0, 2, 3.0]}})
    assert not differ({"architectures": ["GPT2Model"]}, {"architectures": ["GPT2LMHeadModel"]})
    for kind, counts in (("dynamic", True), ("yarn", False), ("default", False)):
        rope = {"rope_parameters": {"rope_type": kind, "factor": 2.0}}
        longer = ({**rope, "max_position_embeddings": length} for length in (64, 128))
        assert differ(*longer) is counts, kind
    for damaged in ("[" * 100_000, '{"x": 1' + "0" * 400 + "}", "[1]", "{"):
        (tmp_path / "config.json").write_text(damaged)
        assert weights._numbers_of(tmp_path / "config.json") == {}


def deep(layers, prefix="model."):
    """Tensors of a model of some layers, each with a norm, nine matrices and a buffer."""
    names = [f"{prefix}layers.{i}.{part}.weight" for i in range(layers) for part in ("norm", *map(str, range(9)))]
    tensors = {name: torch.randn(16 if "norm" in name else (16, 40)) for name in names}
    tensors |= {f"{prefix}layers.{i}.rotary.inv_freq": torch.randn(4) for i in range(layers)}
    return tensors | {f"{prefix}embed.weight": torch.randn(50, 16), "lm_head.weight": torch.randn(50, 16)}


def print_of(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return weights._tensors_in(folder)


def test_each_layer_of_a_deep_base_is_looked_at(tmp_path):
    tensors = deep(40)
    before = print_of(tmp_path, tensors)
    assert before.keys() == {f"layers.{i}" for i in range(40)} | {"model.embed.weight", "lm_head.weight"}
    for i in range(40):
        other = {n: t + 1 if f"layers.{i}." in n and "norm" not in n else t for n, t in tensors.items()}
        assert weights.is_another(before, print_of(tmp_path, other)), f"layer {i} was replaced"
    merged = {n: t + 1 if ".3.weight" in n else t for n, t in tensors.items()}
    assert weights.is_another(before, print_of(tmp_path, merged)), "one kind of matrix in all layers"


def test_a_base_with_a_head_and_one_without_have_the_same_layers(tmp_path):
    tensors = deep(3)
    before = print_of(tmp_path, tensors)
    bare = {n.removeprefix("model."): t for n, t in tensors.items() if not re.search("lm_head|inv_freq", n)}
    assert weights.is_another(before, print_of(tmp_path, bare)) is False
    assert weights.is_another(before, print_of(tmp_path, {n: t * 2 for n, t in bare.items()})) is True
    two = {f"{side}.{n}": t for side in ("encoder", "decoder") for n, t in deep(2, "").items()}
    assert {"encoder.layers.0", "decoder.layers.0"} <= print_of(tmp_path, two).keys()
