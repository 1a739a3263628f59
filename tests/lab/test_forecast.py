"""What `compare --dry-run` says beforehand: runs that are left, and their time."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("peft")

from tiny_study import SHORT, write_study
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from dual_lora.lab.cost.calibrate import calibration_options, flops_a_weight, training_step
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import simulate
from dual_lora.lab.model import precision
from dual_lora.lab.report.tables import show_forecast
from dual_lora.lab.study import forecast as module
from dual_lora.lab.study import plan
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.job import Outcome


def test_forecast_counts_and_learns(tiny, whole, tmp_path, capsys):
    study = write_study(tiny)
    fresh = forecast(study, tmp_path / "nothing")
    assert (fresh.runs, fresh.done) == (9, 0)
    assert fresh.seconds > 0
    assert not (tmp_path / "nothing").exists(), "a dry run leaves nothing behind"
    finished = forecast(study, tiny / "whole")
    assert (finished.runs, finished.done, finished.seconds) == (9, 9, 0.0)
    show_forecast(fresh)
    assert "Nothing was run" in " ".join(capsys.readouterr().out.split())


def test_forecast_takes_the_machine_s_calibration(tiny, tmp_path, monkeypatch):
    """A study's time and an estimate's come from the same two measured numbers."""
    study, seconds = write_study(tiny, search=None), {}
    for rate in (1e6, 2e6, 4e6):
        measured = {method: [[64, rate, 0.0]] for method in ("lora", "dual_lora", "full")}
        costs = {"float32": measured, "bfloat16": measured}  # either is what `auto` stands for, by processor
        known = {"on": "cpu", "date": "2026-01-02", "costs": costs}
        monkeypatch.setattr(module, "known_rates", lambda known=known: known)
        found = forecast(study, tmp_path / "nothing")
        assert found.basis == "arithmetic and this machine's calibration of 2026-01-02"
        seconds[rate] = found.seconds
    # What is no arithmetic is the same for all rates.
    computed = [seconds[rate] - seconds[2 * rate] for rate in (1e6, 2e6)]
    assert computed[0] == pytest.approx(2 * computed[1], rel=1e-6)
    assert computed[1] > 0


@pytest.mark.parametrize("method", ["lora", "dual_lora", "dora", "randlora", "full"])
def test_arithmetic_of_a_study_is_the_estimate_s(method):
    """Two blocks stand for the model: per weight and token they cost what all of it does, whatever the method."""
    how = {"name": method} if method == "full" else {"name": method, "r": 8}
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, vocab_size=64
    )
    step = simulate(StepOptions("llama", config, method=how, dtype="float32", batch=8, length=64, on="cpu"))
    weights = step.base_parameters - 64 * 256
    assert flops_a_weight(how, 256, 512) == pytest.approx(step.flops / 512 / weights, rel=0.05)


def test_a_method_without_an_estimate_counts_like_lora():
    """PEFT's VB-LoRA chooses by the values of its tensors."""
    counted = {name: flops_a_weight({"name": name, "r": 16}, 128, 256) for name in ("vblora", "lora")}
    assert counted["vblora"] == counted["lora"] > 0


@pytest.mark.parametrize("method", ["lora", "hira", "loha", "lokr"])
@pytest.mark.parametrize("tokens", [16, 95, 512])
def test_arithmetic_is_what_torch_counts_in_a_real_step(method, tokens):
    """`FlopCounterMode` sees every product of PEFT's own methods, but not the CPU's attention (a tenth at most)."""
    how = {"name": method, "r": 8}
    options = calibration_options("float32", "lora", 256, "cpu", 512)
    options.config.vocab_size = 64
    shape = {"batch": 1, "length": tokens} if tokens < 128 else {}
    step = training_step(replace(options, method=how, **shape), "cpu")
    with FlopCounterMode(display=False) as counter:
        step()
    weights = 2 * (4 * 256 * 256 + 3 * 256 * options.config.intermediate_size)
    assert 0.98 < flops_a_weight(how, 256, tokens) / (counter.get_total_flops() / tokens / weights) < 1.1


SHORT_ROWS = {"data": {"max_length": 32}}  # the model takes 64 tokens


def test_a_card_s_time_does_not_follow_from_runs_here(tiny, tmp_path, monkeypatch):
    study = write_study(tiny, overrides=SHORT_ROWS)
    before = forecast(study, tmp_path / "x", on="h100-80gb")
    done = lambda _: lambda job: Outcome(key=job.key, status="done", seconds=50.0)  # noqa: E731
    monkeypatch.setattr(module, "outcomes_here", done)
    here, there = forecast(study, tmp_path / "x"), forecast(study, tmp_path / "x", on="h100-80gb")
    assert here.basis == "finished runs of this study"
    assert all(row["seconds"] >= 150 for row in here.rows)
    assert there.basis == before.basis
    assert "published figures" in there.basis
    assert max(row["seconds"] for row in there.rows) < 50


def test_on_a_card_auto_is_bf16(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "fast_precision", lambda: precision.Fast("fp32", "here"))
    peaks = {}
    for dtype in ("auto", "bfloat16", "float32"):
        study = write_study(tiny, **SHORT, overrides=SHORT_ROWS | {"model": {"dtype": dtype}})
        peaks[dtype] = [row["peak_memory"] for row in forecast(study, tmp_path / "x", on="h100-80gb").rows]
    assert peaks["auto"] == peaks["bfloat16"] != peaks["float32"]
