"""One margin a metric; which studies had another; the preset of a thorough search."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pydantic")

from dual_lora.lab.study.read import build_study, read_study, shipped_studies
from dual_lora.lab.study.search import RATE
from dual_lora.lab.study.study import usual_margins


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_a_shipped_study_has_the_margin_of_the_table_or_is_listed(name):
    table = usual_margins()
    for metric, margin in read_study(name).margin.items():
        usual = table["margins"][metric]["margin"]
        listed = name in table["before"].get(metric, {}).get(margin, [])
        inherited = name.startswith(("sampled-gradient", "e2e-again"))  # extend one that is listed
        assert margin == usual or listed or inherited, f"{metric} {margin}, the table has {usual}"
        assert not (margin == usual and listed), "listed without need"


def test_each_margin_has_its_reason_and_a_study_takes_it():
    table = usual_margins()["margins"]
    assert all(entry["why"] and entry["margin"] > 0 for entry in table.values())
    study = build_study({"name": "s", "tasks": ["t"], "methods": {"lora": {}}, "margin": "usual"})
    assert study.margin == {metric: entry["margin"] for metric, entry in table.items()}


def test_a_thorough_search_is_what_it_says():
    sweep = {"method.r": [4, 16]}
    study = build_study({"name": "s", "tasks": ["t"], "methods": {"lora": {}}, "search": "thorough", "sweep": sweep})
    rates = np.array([point[RATE] for point in study.search.points()])
    assert np.log10(rates[-1] / rates[0]) == pytest.approx(2.5, abs=0.01)
    assert np.diff(np.log10(rates)) == pytest.approx(0.25, abs=0.02)
    assert (study.search.seeds, study.search.decide) == (3, "worst")
    assert len(study.variants()) == 2, "each rank is a method, with a search of its own"
