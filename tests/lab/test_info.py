"""`dual-lora info`: what is installed against the stated ranges, devices, and the table that tries everything."""

import contextlib
import json
import tomllib
from pathlib import Path

import pytest

from dual_lora.lab.cli import main
from dual_lora.lab.commands import info


def test_ranges_are_those_of_pyproject():
    stated = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {p.name: p for p in info.packages()}
    for line in stated:
        name = line.split(">=")[0]
        assert found[name].version
        assert found[name].fits
        assert set(found[name].range.split(",")) == set(line.removeprefix(name).split(","))


def test_a_version_outside_the_range_is_said(monkeypatch):
    monkeypatch.setattr(info.metadata, "version", lambda name: "1.13.0")
    torch = next(p for p in info.packages() if p.name == "torch")
    assert not torch.fits


def test_every_device_says_who_computes():
    assert "blocks of the weight" in info.devices()["cpu"]


@pytest.mark.parametrize("options", [["--json"], ["--why"]])
def test_the_command(options, capsys):
    with contextlib.suppress(SystemExit):
        main(["info", *options])
    said = capsys.readouterr().out
    if options == ["--json"]:
        result = json.loads(said)
        assert {"torch", "peft", "transformers"} <= {p["name"] for p in result["packages"]}
        assert result["capabilities"]["table"]["nn.Linear"]["Dual LoRA"] == ["yes", ""]
    else:
        for words in (
            "transformers",
            "blocks of the weight",
            "tried with torch 2.",
            "add_weighted_adapter, a sum in one, Dual LoRA: ",
        ):
            assert words in said
