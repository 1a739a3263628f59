"""The page that quotes results is the one that the script writes, and no figure in its text is typed."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("pydantic")

from evidence import __main__ as evidence
from evidence import facts


def test_the_page_is_up_to_date():
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page(), "run python -m scripts.evidence --write"


def test_no_figure_of_a_result_is_typed():
    """Settings stand between backticks or as powers of ten; a decimal number elsewhere would be a result."""
    text = (evidence.HERE / "page.md").read_text(encoding="utf-8")
    text = re.sub(r"\{\{.+?\}\}|<!--.+?-->|`[^`]*`", "", text, flags=re.DOTALL)
    assert re.findall(r"\d*\.\d+", text) == []
    assert re.findall(r"\d+ ?%", text.replace("90 %", "").replace("largest 1 %", "")) == []


def test_every_study_is_quoted():
    text = evidence.page()
    for results in (facts.ROOT / "results" / "studies").glob("*/results.json"):
        assert f"`{results.parent.name}`" in text, results.parent.name


def test_words_that_the_results_do_not_bear_stop_the_script(monkeypatch):
    line = "<!-- holds: quick/dual_lora is equivalent; learning-rate/lora lr=0.003 is significantly worse -->\n"
    assert evidence.filled(line + "so {{quick/dual_lora/seeds}}\n") == "so 5\n"
    with pytest.raises(ValueError, match="rest on quick/dual_lora being significantly better, and it is equivalent"):
        evidence.filled(line.replace("is equivalent", "is significantly better"))
    for path in ("quick/nobody/score", "nowhere/lora/score", "quick/lora/nothing", "trajectory/lora/layers/nothing"):
        with pytest.raises(ValueError, match=r"leads nowhere|no study"):
            facts.quoted(path)


def test_a_difference_is_printed_in_its_metrics_own_direction():
    c = facts._comparison(facts.study("confirm-e2e"), "dual_lora")
    assert c["difference"] > 0, "better, and so less loss"
    assert facts.quoted("confirm-e2e/dual_lora/difference").startswith("−")
    low, _, high = facts.quoted("confirm-e2e/dual_lora/interval").partition(" to ")
    assert (low, high) == (facts.number(-c["high"], "+.4f"), facts.number(-c["low"], "+.4f"))
