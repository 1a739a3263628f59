"""Every number in a configuration of any method of PEFT has a bound, or costs nothing however large it is."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, OFTConfig, PrefixTuningConfig, VBLoRAConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from dual_lora._time_limit import ENDS_BY_ITSELF
from dual_lora.verify.bounds import FREE, check_bounds, check_kinds
from dual_lora.verify.patterns import check_patterns

CONFIGS = sorted({config for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()}, key=lambda config: config.__name__)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])


class Made:
    """A configuration as a file may have it: PEFT's own checks are not asked."""

    def __init__(self, kind, **values):
        self.__class__ = dataclasses.make_dataclass("Made", [(f.name, f.type) for f in dataclasses.fields(kind)])
        own = {f.name: f.default if f.default is not dataclasses.MISSING else None for f in dataclasses.fields(kind)}
        self.__dict__ |= own | values
        self.__class__.to_dict = lambda made: dict(vars(made))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_methods_own_defaults_are_welcome(kind, model):
    check_bounds(Made(kind), model)
    check_kinds(Made(kind))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha holds nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha holds inf"),
        ({"alpha_pattern": {"q_proj": float("-inf")}}, "alpha_pattern holds -inf"),
        ({"lora_alpha": True}, "lora_alpha holds True, expected a number"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern holds True, expected a number"),
        ({"lora_alpha": "8"}, "lora_alpha holds '8', expected a number"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or false"),
        ({"fan_in_fan_out": 0.5}, "fan_in_fan_out is 0.5, expected true or false"),
    ],
)
def test_what_is_of_another_kind_is_not_taken_for_it(values, said):
    with pytest.raises(ValueError, match=said):
        check_kinds(Made(LoraConfig, **values))


@pytest.mark.parametrize("number", [10**9, 10**30, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_whole_number_has_a_bound_or_is_free(kind, number, model):
    fields = [f.name for f in dataclasses.fields(kind) if "int" in str(f.type) or "Any" in str(f.type)]
    for name in fields:
        for value in (number, [number], {"q_proj": number}):
            if FREE.search(name):
                check_bounds(Made(kind, **{name: value}), model)
                continue
            with pytest.raises(ValueError, match=name):
                check_bounds(Made(kind, **{name: value}), model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OFTConfig(num_cayley_neumann_terms=10**9), "num_cayley_neumann_terms holds 1,000,000,000, and expected at mo"),
        (LoraConfig(init_lora_weights="pissa_niter_999999999"), "expected at most 100 iterations"),
        (LoraConfig(init_lora_weights="pissa_niter_" + "9" * 900), "expected at most 100 iterations"),
        (
            Made(LoraConfig, init_lora_weights="loftq", loftq_config={"loftq_iter": 10**9}),
            "holds loftq_iter: 1,000,000,000",
        ),
        (LoraConfig(rank_pattern={"q_proj": 10**8}), "rank_pattern holds 100,000,000, and no weight of this model has"),
        (LoraConfig(layer_replication=[[0, 10**9]]), "makes a model of 1,000,000,000 layers"),
        (VBLoRAConfig(num_vectors=10**7, vector_length=4096), "num_vectors × vector_length is 40,960,000,000 numbers"),
        (PrefixTuningConfig(num_virtual_tokens=10, token_dim=10**12), "token_dim holds 1,000,000,000,000"),
        (
            PrefixTuningConfig(num_virtual_tokens=4000, token_dim=4000, num_layers=900, num_transformer_submodules=1),
            "num_virtual_tokens × num_transformer_submodules × num_layers × token_dim is",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_would_build_without_an_end(config, said, model):
    with pytest.raises(ValueError, match=said):
        check_bounds(config, model)


def test_seeds_and_names_of_modules_have_no_bound(model):
    kind = PEFT_TYPE_TO_CONFIG_MAPPING["VERA"]
    check_bounds(Made(kind, projection_prng_key=2**40), model)
    check_bounds(LoraConfig(lora_alpha=10**9, init_lora_weights="pissa_niter_16", loftq_config={}), model)
    check_bounds(Made(PEFT_TYPE_TO_CONFIG_MAPPING["ADALORA"], rank_pattern={"x": [True] * 20_000}), model)


def test_many_names_with_a_rank_of_their_own_are_compiled_once(monkeypatch):
    """Each layer is looked for among all of them: `re` keeps few patterns, and would compile each anew every time."""
    from peft.utils.other import get_pattern_key

    names = {f"model.layers.{i}.self_attn.q_proj": 8 for i in range(600)}
    check_patterns({"rank_pattern": names, "alpha_pattern": names}, nn.Linear(2, 2))
    made = []
    compiler = re._compiler.compile
    monkeypatch.setattr(re._compiler, "compile", lambda *given: made.append(given) or compiler(*given))
    for i in range(3):
        assert get_pattern_key(names, f"x.{i}") == f"x.{i}"
    assert len(made) <= len(names)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_names_with_a_rank_of_their_own_have_a_bound(field):
    with pytest.raises(ValueError, match="have 4,000,000 characters, at most 200,000 are looked for"):
        check_patterns({field: {f"{i:04}" + "x" * 3996: 8 for i in range(1000)}}, nn.Linear(2, 2))


@pytest.mark.parametrize("indices", [[0] * 5000, {"embed_tokens": [0] * 3000, "lm_head": [1] * 3000}])
def test_a_token_that_trains_stands_there_once(indices, model):
    """Each has a row of the embeddings, drawn before the file is looked at: 2 MB of zeros asked for gigabytes."""
    with pytest.raises(ValueError, match=r"trainable_token_indices names \d,000 tokens, expected at most 4,096"):
        check_bounds(LoraConfig(target_modules=["q"], trainable_token_indices=indices), model)
    check_bounds(LoraConfig(target_modules=["q"], trainable_token_indices=[10**6] * 4000), model)


def test_layers_to_transform_have_a_bound(model):
    with pytest.raises(ValueError, match="layers_to_transform names 1,000,000 layers"):
        check_bounds(LoraConfig(target_modules=["q"], layers_to_transform=[0] * 10**6), model)


@pytest.mark.skipif(sys.platform == "win32", reason="no alarms")
def test_a_trial_ends_where_nobody_can_end_it():
    """Its command may have been killed; `re` never comes back from such a search."""
    search = f"{ENDS_BY_ITSELF.replace('60', '1')}import re; re.match('(a*)*$', 'a' * 40 + 'b')"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", search], timeout=50, check=False).returncode < 0
