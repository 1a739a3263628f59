"""What a method costs in use, measured once a method: merging, forward, decoding, bytes, memory."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from tiny_study import write_study

from dual_lora.lab.study import use_cost as cost
from dual_lora.lab.study.compare import compare


def test_cost_of_use_is_measured_once(tiny, tmp_path):
    results = compare(write_study(tiny, search=None, seeds=1, cost=True), tmp_path / "out", progress=False)
    for m in results["methods"]:
        assert m["cost"]["merge_seconds"] > 0
        assert m["cost"]["forward_slowdown"] > 0
        assert m["cost"]["adapter_bytes"] > 0
        assert m["cost"]["peak_memory"] > 2**20
    fronts = [p for p in results["pareto"] if p["cost"] == "train_seconds"]
    assert any(point["front"] for point in fronts[0]["points"])


@pytest.mark.parametrize("broken", ["_decode", "_merge_seconds"])
def test_a_cost_that_cannot_be_measured_loses_no_run(broken, tiny, tmp_path, monkeypatch):
    def failing(*_):
        raise IndexError("not with this cache")

    monkeypatch.setattr(cost, broken, failing)
    study = write_study(tiny, search=None, seeds=1, cost=True, methods={"lora": {"r": 4}}, budget=None)
    results = compare(study, tmp_path / "out", progress=False)
    assert results["complete"]
    assert results["failed"] == []
    measured, name = results["methods"][0]["cost"], {"_decode": "decode_slowdown"}.get(broken, "merge_seconds")
    assert measured[name] is None
    assert measured["forward_slowdown"] > 0
    what = name.replace("_", " ")
    assert f"{what} of lora on letters could not be measured: IndexError: not with this cache" in results["notes"]
