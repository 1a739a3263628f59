"""What an adapter of any method may hold: floats where it was trained, counts and masks beside them."""

import peft
import pytest
import torch
from safetensors import safe_open
from tiny import Counted

from dual_lora import DualLoraConfig
from dual_lora.verify.numbers import all_finite, check_numbers

METHODS = {
    "dual_lora": lambda o: DualLoraConfig(r=4, **o),
    "lora": lambda o: peft.LoraConfig(r=4, **o),
    "loha": lambda o: peft.LoHaConfig(r=4, **o),
    "vera": lambda o: peft.VeraConfig(r=4, save_projection=True, **o),
    "shira": lambda o: peft.ShiraConfig(r=2, **o),
    "vblora": lambda o: peft.VBLoRAConfig(
        r=4, num_vectors=8, vector_length=4, topk=2, save_only_topk_weights=True, **o
    ),
    "ia3": lambda o: peft.IA3Config(feedforward_modules=[], **o),
    "oft": lambda o: peft.OFTConfig(r=0, oft_block_size=4, **o),
    "fourierft": lambda o: peft.FourierFTConfig(n_frequency=10, **o),
    "frod": lambda o: peft.FrodConfig(**o),
    "hra": lambda o: peft.HRAConfig(r=4, **o),
}


def kinds_of(method, folder):
    """The types of what PEFT saves, by name."""
    options = {"target_modules": ["body"], "modules_to_save": ["head"]}
    peft.get_peft_model(Counted(), METHODS[method](options)).save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_saves_is_taken_with_its_counts_and_masks(method, tmp_path):
    kinds = kinds_of(method, tmp_path)
    assert {"I64", "BOOL"} <= set(kinds.values())
    check_numbers(kinds, "it")


@pytest.mark.parametrize("kind", ["I8", "U8", "I32", "I64", "BOOL", "C64", "F4", "F8_E8M0"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_refused_as_other_numbers(method, kind, tmp_path):
    kinds = kinds_of(method, tmp_path)
    for name in [n for n, was in kinds.items() if was == "F32" and "running" not in n]:
        with pytest.raises(ValueError, match=rf"^it holds \S+ as {kind}, expected floating-point") as raised:
            check_numbers(kinds | {name: kind}, "it")
        assert name in str(raised.value)


@pytest.mark.parametrize("name", ["att.in_proj_weight", "att.in_proj_bias", "adaption_gate", "prefix_task_cols"])
def test_names_that_say_what_was_trained(name):
    for kind in ("I64", "BOOL"):
        with pytest.raises(ValueError, match="expected floating-point"):
            check_numbers({f"base_model.model.{name}": kind}, "it")


def test_a_layer_named_like_an_index_is_none():
    with pytest.raises(ValueError, match="expected floating-point"):
        check_numbers({"base_model.model.x_indices.q_proj.lora_A.weight": "U8"}, "it")


@pytest.mark.parametrize("kind", ["I8", "U8", "C64", "F8_E8M0"])
def test_no_counts_either_in_types_that_nobody_counts_in(kind):
    with pytest.raises(ValueError, match=r"it holds model.head.0.count and 1 more tensors as"):
        check_numbers({"model.head.0.count": kind, "model.head.1.count": kind}, "it")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_all_finite(kind):
    whole = torch.ones(3).to(kind)
    assert all_finite(whole)
    assert not all_finite(torch.tensor([1.0, float("nan")]).to(kind))
