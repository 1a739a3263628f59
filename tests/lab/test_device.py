"""--device: the device that is named, or a clear error; one name for one option in all commands."""

import os

import pytest
import torch

from dual_lora.lab import cli
from dual_lora.lab.errors import UserError
from dual_lora.lab.model import device
from dual_lora.lab.model.precision import fast_precision


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What --device sets is set back."""
    for name in (device.ASKED, device.VISIBLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def cards(monkeypatch):
    """Function: so many cards of CUDA, none of which is used."""

    def make(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(device, "check_device", lambda _: None)

    return make


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "cpu:0", "xpu"])
def test_another_name_is_an_error(name):
    with pytest.raises(UserError, match="Expected the device cpu, cuda, cuda:1"):
        device.use_device(name)


def test_the_cpu_hides_the_cards(cards):
    cards(2)
    assert device.best_device() == "cuda:0"
    device.use_device("cpu")
    assert device.best_device() == "cpu"
    assert os.environ[device.VISIBLE] == ""


@pytest.mark.parametrize(
    ("visible", "asked", "left"),
    [(None, "cuda:1", "1"), (None, "cuda", "0"), ("5,7", "cuda:1", "7"), ("GPU-a,GPU-b", "cuda:0", "GPU-a")],
)
def test_one_card_of_several_is_left(visible, asked, left, cards, monkeypatch):
    cards(2)
    if visible:
        monkeypatch.setenv(device.VISIBLE, visible)
    device.use_device(asked)
    assert os.environ[device.VISIBLE] == left
    assert device.best_device() == "cuda:0"


@pytest.mark.parametrize(
    ("count", "asked", "said"),
    [
        (0, "cuda", r"There is no device 'cuda': found: no CUDA card\. Give --device cpu"),
        (1, "cuda:1", r"one CUDA card, cuda:0\. Give --device cuda, or"),
        (2, "cuda:2", r"2 CUDA cards, from cuda:0 on"),
    ],
)
def test_a_card_that_is_not_there(count, asked, said, cards):
    cards(count)
    with pytest.raises(UserError, match=said):
        device.use_device(asked)
    assert device.ASKED not in os.environ


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is there")
def test_no_device_of_apples():
    with pytest.raises(UserError, match="no device 'mps'"):
        device.use_device("mps")


def test_a_launcher_gives_each_process_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device is for one process"):
        device.use_device("cpu")


def test_the_precision_is_that_of_the_device(cards, monkeypatch):
    cards(1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    fast_precision.cache_clear()
    assert fast_precision().precision == "bf16"
    fast_precision.cache_clear()
    monkeypatch.setattr("dual_lora.lab.model.precision.measure_products", lambda: {"fp32": 1.0, "bf16": 30.0})
    device.use_device("cpu")
    assert fast_precision().precision == "fp32"
    fast_precision.cache_clear()


def test_a_command_says_so_before_it_loads_anything(call, tmp_path):
    code, _, err = call("evaluate", tmp_path, "--device", "gpu")
    assert code == 1
    assert "Expected the device cpu, cuda, cuda:1 (the second card) or mps, not 'gpu'" in " ".join(err.split())


def test_earlier_names_of_options_work(call):
    old = ["estimate", "qwen3-4b", "--batch=1", "--length", "8", "--checkpointing", "--quantisation", "nf4"]
    new = ["estimate", "qwen3-4b", "--batch-size=1", "--max-length", "8", "--gradient-checkpointing"]
    given = cli._with_new_option_names(old, cli.RENAMED["estimate"])
    assert given == [*new, "--quantize", "nf4"]


def test_train_takes_the_short_names(call, lm_values, write_recipe, tmp_path):
    from dual_lora.lab.run.resume import recipe_of_run

    values = lm_values | {"train": lm_values["train"] | {"steps": 1}}
    options = ["--dtype", "bfloat16", "--gradient-checkpointing", "--device", "cpu"]
    code, _, err = call("train", write_recipe(values), "--out", tmp_path / "run", *options)
    assert code == 0, err
    made = recipe_of_run(tmp_path / "run")
    assert (made.model.dtype, made.train.gradient_checkpointing) == ("bfloat16", True)


def test_weights_that_are_trained_stay_whole(lm_values, monkeypatch):
    from dual_lora.lab.model import precision
    from dual_lora.lab.recipe.read import build_recipe

    monkeypatch.setattr(precision, "fast_precision", lambda *_: precision.Fast("bf16", "a test"))
    values = lm_values | {"model": {"path": lm_values["model"]["path"]}}
    assert build_recipe(values).model.dtype == "auto"
    assert precision.with_device_precision(build_recipe(values)).model.dtype == "bfloat16"
    assert precision.with_device_precision(build_recipe(values | {"method": {"name": "full"}})).model.dtype == "float32"
