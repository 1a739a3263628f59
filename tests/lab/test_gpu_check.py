"""`dual-lora gpu-check`: what it finds with a card (a planted one) and without, and that a wrong kernel shows."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from dual_lora.core import dispatch
from dual_lora.core.kernels import check as triton_check
from dual_lora.core.reference import Adapter
from dual_lora.lab import gpu_check, gpu_trials
from dual_lora.lab.cli import main
from dual_lora.lab.gpu_trials import sign_flips

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def few(monkeypatch):
    """Two launches in the place of all of them."""
    every = gpu_trials.all_launches
    monkeypatch.setattr(gpu_trials, "all_launches", lambda *a: list(every(*a))[:2])


def run(*options):
    try:
        main(["gpu-check", *options])
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("sm_75", "PyTorch's own.*sm_80"),
        ("sm_89", "tiles of sm_80"),
        ("sm_100", "tiles of sm_90"),
        ("gfx90a", "gfx942"),
    ],
)
def test_what_would_be_chosen(card, said):
    assert re.search(said, gpu_check.chosen(card))


def test_the_switch_chooses_for_every_card(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "plain")
    assert all("plain" in gpu_check.chosen(card) for card in gpu_check.CARDS)


def test_launches_are_measured_against_fp64(few):
    found = gpu_trials.launches(DEVICE, torch.float32)
    assert [line["kernel"] for line in found] == ["compose", "gradient"]
    assert all(line["right"] and line["error"] <= line["limit"] for line in found)


def test_an_error_is_said_in_the_place_of_a_figure(few, monkeypatch):
    def broken(launch):
        raise RuntimeError("PTXAS error")

    monkeypatch.setattr(triton_check, "error", broken)
    found = gpu_trials.launches(DEVICE, torch.float32)
    assert all(line["error"] == "RuntimeError: PTXAS error" and not line["right"] for line in found)


def test_what_is_measured_besides(monkeypatch):
    monkeypatch.setattr(gpu_trials, "SIZE", 40)
    found = gpu_trials.measured(DEVICE)
    assert found["signs"].keys() == {"ieee", "tf32x3"}
    assert found["signs"]["ieee"] <= 1
    assert found["same bits twice"]["deterministic"]
    if not torch.cuda.is_available():
        why = found["memory and time"]  # what breaks is said in its place: by torch for CPUs, or for cards without one
        assert "CUDA" in why or "NVIDIA" in why


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_without_a_card(right, as_json, monkeypatch, capsys):
    asked = []
    line = {"kernel": "compose", "dtype": "float32", "tile": "64×64", "aligned": True, "deterministic": False}

    def process(*arguments, **environment):
        asked.append(arguments)
        if arguments[0] == "interpret":
            return [{**line, "error": 1e-7 if right else 0.5, "limit": 1e-5, "right": right}]
        return [{**line, "error": None, "right": True, "shared": 8192}]

    monkeypatch.setattr(gpu_check, "_process", process)
    code = run("--targets", "sm_90", "gfx942", *(["--json"] if as_json else []))
    assert code == (0 if right else 1)
    assert asked == [("interpret",), ("compile", "sm_90"), ("compile", "gfx942")]
    said = capsys.readouterr().out
    if as_json:
        result = json.loads(said)
        assert result["right"] == right
        assert result["versions"]["torch"] == torch.__version__.split("+")[0] or result["versions"]["torch"]
        assert result["compiled"]["gfx942"][0]["shared"] == 8192
    else:
        for words in (
            "who computes on",
            "compiled for gfx942",
            "8 KiB shared",
            "every kernel" if right else "✗ compose",
        ):
            assert words in said


@pytest.mark.parametrize(
    ("triton", "reason"),
    [("None", "triton"), ("types.SimpleNamespace(__version__='3.2.0')", "Triton is 3.2.0, and they need 3.4 or later")],
)
def test_without_a_triton_of_use_it_says_what_computes(triton, reason):
    code = f"""
import sys, types
sys.modules["triton"] = {triton}
from dual_lora.lab import gpu_check
result = gpu_check.check()
assert result["right"] is None and not result["compiled"]
print(result["interpreter"], result["chosen"]["sm_90"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "PyTorch's own operations" in done.stdout
    assert done.stdout.count(reason) == 2


def test_a_process_that_breaks_is_not_right():
    assert not gpu_check._findings("Killed")[0]["right"]


CARD = {
    "device": "cuda:0",
    "name": "A card",
    "memory": 80e9,
    "path": "kernels",
    "launches": [
        {"kernel": "compose", "dtype": "bfloat16", "tile": "64×64", "aligned": False, "deterministic": False}
        | {"error": 1e-3, "limit": 1e-2, "right": True}
    ],
    "signs": {"ieee": 0},
    "same bits twice": {"atomic": False, "deterministic": True},
    "CUDA graph": gpu_trials.AS_EAGER,
    "memory and time": "OutOfMemoryError: none left",
}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"CUDA graph": "RuntimeError: no"}, 1),
        ({"same bits twice": {"atomic": True, "deterministic": False}}, 1),
        ({"launches": [], "path": "Triton is too old"}, 2),  # nothing was tried
    ],
)
def test_with_a_card(changed, code, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    monkeypatch.setattr(gpu_check, "on_card", lambda device, tell: CARD | changed)
    assert run() == code
    said = capsys.readouterr().out
    assert "A card, 80.0 GB" in said
    assert (CARD | changed)["path"] in said
    assert "none left" in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, whose driver would be asked")
def test_the_kernels_compile_for_a_card_that_is_not_there():
    code = """
from dual_lora.lab import gpu_trials
every = gpu_trials.all_launches
gpu_trials.all_launches = lambda *a: list(every(*a))[:1]
gpu_trials.main("compile", "sm_90")
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = map(json.loads, done.stdout.splitlines())
    assert line["right"]
    assert line["shared"] > 0


def test_wrong_signs_are_counted(monkeypatch):
    device = torch.device("cpu")
    assert sign_flips(device, "ieee", size=128) <= 1
    compose = gpu_trials.compose

    def from_bf16(weight, adapters, **options):
        ((factors, *rest),) = adapters
        low = factors._replace(C=factors.C.bfloat16().float(), D=factors.D.bfloat16().float())
        return compose(weight, [Adapter(low, *rest)], **options)

    monkeypatch.setattr(gpu_trials, "compose", from_bf16)
    assert 3 <= sign_flips(device, "ieee", size=128) <= 50  # of 16,384; 670 in a million are expected
