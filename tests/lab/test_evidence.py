"""The pages that quote results are those that the script writes, and no figure in their texts is typed."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("pydantic")

from dual_lora.lab.study.statistics import Spread
from dual_lora.lab.study.verdicts import compare_spread, judge
from evidence import __main__ as evidence
from evidence import facts, ledger

PAGE = facts.ROOT / "docs" / "explanation" / "evidence.md"
QUESTIONS = facts.ROOT / "results" / "pages" / "questions.md"
WORTH = facts.ROOT / "results" / "worth"
SIDES = ("candidate", "reference")


def test_the_pages_are_up_to_date():
    assert len(evidence.pages()) == 3 + 8
    for file, text in evidence.pages().items():
        assert file.read_text(encoding="utf-8") == text, "run python -m scripts.evidence --write"


@pytest.mark.parametrize("name", [str(file.relative_to(facts.ROOT)) for file in evidence.pages()])
def test_no_figure_of_a_result_is_typed(name):
    """Settings stand between backticks or as powers of ten; a decimal number elsewhere would be a result."""
    text = (evidence.HERE / name).read_text(encoding="utf-8")
    text = re.sub(r"\{\{.+?\}\}|<!--.+?-->|`[^`]*`", "", text, flags=re.DOTALL)
    assert re.findall(r"\d*\.\d+", text) == []
    assert re.findall(r"\d+ ?%", re.sub("9[05] %|largest 1 %", "", text)) == []


def test_every_study_has_a_line_and_a_page_that_tells_it():
    lines = ledger.studies().splitlines()[2:]
    assert "\n".join(lines) in PAGE.read_text(encoding="utf-8")
    names = sorted(file.parent.name for file in (facts.ROOT / "results" / "studies").glob("*/results.json"))
    assert [line.split("`")[1] for line in lines] == names
    at = dict(zip(names, lines, strict=True))
    assert "against-lora.md" in at["quick"]
    assert "settings.md" in at["estimators"], "capacity-estimators is another one"
    assert (
        "[1 worse, 1 equivalent, 1 inconclusive](../../results/studies/activations-e2e/results.json)"
        in at["activations-e2e"]
    )
    for name in names:
        told = [page for page in QUESTIONS.parent.glob("*.md") if f"`{name}`" in page.read_text(encoding="utf-8")]
        assert told, name
    with pytest.raises(ValueError, match="says anything of the study nobody"):
        ledger._page("nobody")


def test_published_results_name_no_folder_of_a_machine():
    for file in (facts.ROOT / "results").rglob("*.json"):
        assert not re.search(r'[" =]/(?!/)\w+/', file.read_text(encoding="utf-8")), file


def test_studies_without_results_are_named():
    listed = ledger.waiting()
    assert "`start-again-cola`" in listed
    assert "`start-again`" not in listed
    assert listed in PAGE.read_text(encoding="utf-8")


def test_the_answer_is_short_and_so_is_the_table_of_situations():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.split("**")[1].split()) <= 60
    assert text.index("forest.svg") < text.index("## ")
    page = (PAGE.parent / "when-to-use.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8
    for cell in (cell for row in rows for cell in row):
        assert len(re.sub(r"\]\([^)]*\)", "]", cell).split()) <= 25, cell


def test_a_claim_is_answered_contradicted_or_open():
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    states = [row[1] for row in rows if len(row) == 4 and row[1] != "answer"]
    assert len(states) >= 20
    assert all(re.match(r"\*(answered|contradicted|open)\*", state) for state in states)


def test_a_pooled_answer_is_quoted_in_its_metrics_own_direction():
    assert facts.quoted("pooled/E2E/change").startswith("−"), "less loss"
    assert facts.quoted("pooled/SST-2/seeds") == "29"
    assert facts.verdicts("pooled", "E2E") == ["inside the margin, better"]
    assert facts.verdicts("pooled", "across") == ["beyond, open"]
    assert evidence.filled("<!-- holds: pooled/SST-2 is inside the margin, open -->\n") == ""
    with pytest.raises(ValueError, match="rest on pooled/BoolQ being beyond, better, and it is beyond, open"):
        evidence.filled("<!-- holds: pooled/BoolQ is beyond, better -->\n")
    with pytest.raises(ValueError, match="leads nowhere"):
        facts.quoted("pooled/no such question/change")


def test_the_false_alarms_to_expect_are_the_sum_of_the_studies_chances():
    chances = [facts.study(name)["false_alarm"] or 0 for name in facts._names()]
    assert facts.quoted("count/false alarms") == f"{sum(chances):.1f}"
    assert all(chance <= 0.0501 for chance in chances)


def test_words_that_the_results_do_not_bear_stop_the_script(monkeypatch):
    line = "<!-- holds: quick/dual_lora is equivalent; learning-rate/lora lr=0.003 is significantly worse -->\n"
    assert evidence.filled(line + "so {{quick/dual_lora/seeds}}\n") == "so 5\n"
    with pytest.raises(ValueError, match="rest on quick/dual_lora being significantly better, and it is equivalent"):
        evidence.filled(line.replace("is equivalent", "is significantly better"))
    for path in ("quick/nobody/score", "nowhere/lora/score", "quick/lora/nothing", "trajectory/lora/layers/nothing"):
        with pytest.raises(ValueError, match=r"leads nowhere|no study"):
            facts.quoted(path)


def test_seeds_that_are_called_fresh_are():
    line = "<!-- fresh: longer-cola after confirm-cola; surrogate-cola after {} -->\n"
    assert evidence.filled(line.format("longer-cola")) == ""
    with pytest.raises(ValueError, match=r"surrogate-cola after confirm-cola: seeds \[21, .*\] are not fresh"):
        evidence.filled(line.format("confirm-cola"))


def test_verdicts_on_different_runs_are_counted():
    scaling = facts.study("scaling")["comparisons"]
    same = [c for c in scaling if len({facts._runs(facts._method(facts.study("scaling"), c[s])) for s in SIDES}) == 1]
    assert len(same) == 2, "at r = 16 all three rules are the default"
    every = sum(len(facts.study(name)["comparisons"]) for name in facts._names())
    assert int(facts.quoted("count/comparisons")) == every - len(same)
    assert int(facts.quoted("count/repeated")) >= 3, "e2e-again-estimators has those of e2e-again"


def test_a_range_leaves_out_times_of_which_nobody_knows_whether_they_compare(monkeypatch):
    known = facts.quoted("range/language model/studies")
    real = facts.study

    def doubted(name):
        said = {note for note in real(name)["notes"] if note.startswith("How many runs went side by side was not")}
        return {**real(name), "notes": [note for note in real(name)["notes"] if note not in said]}

    assert any(doubted(name) != real(name) for name in ("methods-e2e", "methods-cola"))
    monkeypatch.setattr(facts, "study", doubted)
    assert int(facts.quoted("range/language model/studies")) == int(known) + 1


def test_the_page_names_the_studies_outside_the_range_that_it_does_not_count():
    """Sweeps name their methods otherwise; those outside are learning-rate, ranks at r = 16 and cola-rate's memory."""
    time, memory = ([float(x) for x in facts.quoted(f"range/encoder/{kind}").split(" to ")] for kind in facts.COSTS)
    pairs = {"valley": [(f"dual {r}", f"lora {r}") for r in ("r", "2r", "4r")], "sampled-gradient": [("exact", "lora")]}
    pairs |= {"ranks": [(f"dual_lora r={r}", f"lora r={r}") for r in (2, 8, 32, 128, 256)]}
    for study, methods in pairs.items():
        for dual, lora in methods:
            for kind, (low, high) in (("time", time), ("memory", memory)):
                assert low <= float(facts.quoted(f"{study}/{dual} vs {lora}/{kind}")) <= high
    assert float(facts.quoted("ranks/dual_lora r=16 vs lora r=16/time")) > time[1]
    assert facts.quoted("ranks/dual_lora r=16 vs lora r=16/time") == facts.quoted("ranks/dual_lora r=16/time")
    assert float(facts.quoted("cola-rate/dual_lora vs lora lr=0.0003/memory")) > memory[1]
    page = (facts.ROOT / "docs" / "explanation" / "cost.md").read_text(encoding="utf-8")
    small, large = facts.quoted("range/encoder/time"), facts.quoted("range/language model/time")
    rounded = [" to ".join(f"{float(x):.1f}".removesuffix(".0") for x in text.split(" to ")) for text in (large, small)]
    assert f"took {rounded[0]} times LoRA's time on SmolLM2, and {rounded[1]} times on MiniLM" in page


def test_a_range_holds_every_study_of_its_model():
    low, high = map(float, facts.quoted("range/encoder/time").split(" to "))
    for name in ("quick", "methods-encoder", "longer-cola"):
        assert low <= float(facts.quoted(f"{name}/dual_lora/time")) <= high
    low, high = map(float, facts.quoted("range/language model/memory").split(" to "))
    assert low <= float(facts.quoted("methods-boolq/dual_lora/memory")) <= high
    low, high = map(float, facts.quoted("range/language model/time").split(" to "))
    for task in ("20 steps", "60 steps"):
        assert low <= float(facts.quoted(f"domain/clip@{task}/time")) <= high, "a study of results/worth counts as well"
    notes = facts.study("confirm-e2e")["notes"]
    assert any(note.startswith("Times and speeds are not comparable") for note in notes)
    assert low > float(facts.quoted("confirm-e2e/dual_lora/time")), "which says so itself"
    assert facts.quoted("range/language model/time") != facts.quoted("range/encoder/time")
    with pytest.raises(ValueError, match="leads nowhere"):
        facts.quoted("range/encodr/time")


def test_studies_whose_seeds_have_training_sets_of_their_own_are_named():
    own = {name for name in facts._names() if facts.study(name)["study"].get("subsets", "one") == "own"}
    said = evidence.pages()[QUESTIONS.parent / "settings.md"].partition("In most studies")[2].partition("|")[0]
    assert set(re.findall(r"`([a-z-]+)`", said)) == own


def test_searches_that_ended_at_an_end_of_their_rates_are_named():
    """A verdict on such a method is one on the rates that were tried, and the page is all that most people read."""
    listed, text = facts.quoted("ends"), evidence.pages()[QUESTIONS]
    assert "`start` sigma 0.05 (smallest)" in listed
    assert "dual_lora r=256 (smallest)" in listed
    assert listed in text
    notes = [note for name in facts._names() for note in facts.study(name)["notes"] if "learning_rate tried" in note]
    assert len(notes) == listed.count("(smallest)") + listed.count("(largest)")


def test_a_difference_is_printed_in_its_metrics_own_direction():
    c = facts._comparison(facts.study("confirm-e2e"), "dual_lora")
    assert c["difference"] > 0, "better, and so less loss"
    assert facts.quoted("confirm-e2e/dual_lora/difference").startswith("−")
    low, _, high = facts.quoted("confirm-e2e/dual_lora/interval").partition(" to ")
    assert (low, high) == (facts.number(-c["high"], "+.4f"), facts.number(-c["low"], "+.4f"))


def test_a_task_is_chosen_by_its_name():
    light, heavy = (float(facts.quoted(f"capacity/LoRA@{load} bits/score")) for load in ("0.25", "1"))
    assert light > heavy
    for path in ("capacity/LoRA@9 bits/score", "capacity/Dual LoRA, clip/size"):  # no such task; two of them
        with pytest.raises(ValueError, match="leads nowhere"):
            facts.quoted(path)


@pytest.mark.parametrize("name", [str(file.relative_to(facts.ROOT)) for file in evidence.pages()])
def test_words_around_a_comparison_are_tied_to_its_verdict(name):
    """A figure moves with the results; "none is shown to differ" beside it has to be checked."""
    text = (evidence.HERE / name).read_text(encoding="utf-8")
    held = {path for path, _ in evidence.claims(text)}
    about = ("difference", "interval", "same", "change", "size", "sure", "p", "visible")
    quoted = [path.rpartition("/") for path in re.findall(r"\{\{(.+?)\}\}", text)]
    for path in dict.fromkeys(path for path, _, field in quoted if field in about):
        study, _, method = path.partition("/")
        assert held & {path, f"{study}/*", f"{study}/{method.partition('@')[0]}"}, path


def test_a_claim_may_be_of_all_comparisons_or_of_none():
    assert evidence.filled("<!-- holds: methods-e2e/* is inconclusive; quick/* is not significantly -->\n") == ""
    with pytest.raises(ValueError, match=r"rest on longer-cola/\* being inconclusive, and it is significantly better"):
        evidence.filled("<!-- holds: longer-cola/* is inconclusive -->\n")
    with pytest.raises(ValueError, match="rest on quick/dual_lora being not equivalent, and it is equivalent"):
        evidence.filled("<!-- holds: quick/dual_lora is not equivalent -->\n")


def test_results_under_another_study_s_name_stop_the_script(tmp_path, monkeypatch):
    (tmp_path / "results" / "studies" / "quick").mkdir(parents=True)
    results = (facts.ROOT / "results" / "studies" / "groups" / "results.json").read_text()
    (tmp_path / "results" / "studies" / "quick" / "results.json").write_text(results)
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    facts.study.cache_clear()
    try:
        with pytest.raises(ValueError, match="holds the results of groups"):
            facts.study("quick")
    finally:
        facts.study.cache_clear()


def test_the_published_scores_of_scripts_are_judged_by_todays_rule():
    """`rejudge` leaves them to `dual-lora judge`, which needs a table that is not published: nothing else sees it."""
    files = [file for file in WORTH.glob("*.json") if "judged_from" in facts.study(file.stem)]
    assert len(files) >= 24
    for file in files:
        comparisons = facts.study(file.stem)["comparisons"]
        for c, again in zip(comparisons, judge([of_row(c) for c in comparisons]), strict=True):
            where = f"{file.name}: {c['candidate']}, {c['task']}"
            assert c["verdict"] == again.verdict, where
            assert c["p_holm"] == pytest.approx(again.p_holm), where
            assert c["p_same_holm"] == (c["p_same_holm"] and pytest.approx(again.p_same_holm)), where
            assert (c["low"], c["same_low"]) == (pytest.approx(again.low), pytest.approx(again.same_low)), where


def test_the_searches_on_cola_share_the_seed_that_chose_lora_s_rate():
    """The page says so: the two gains on CoLA have fresh final seeds, and no independent choice of LoRA's rate."""
    best = {}
    for name in ("confirm-cola", "longer-cola", "surrogate-cola"):
        trials = facts._method(facts.study(name), "lora")["trials"]
        for seed in {t["seed"] for t in trials}:
            own = {t["settings"]["train.learning_rate"]: t["score"] for t in trials if t["seed"] == seed}
            best[name, seed] = max(own, key=own.get)
    assert best == {
        ("confirm-cola", 1000): 1e-3,
        ("confirm-cola", 1001): 3e-4,
        ("longer-cola", 1000): 1e-3,
        ("surrogate-cola", 1000): 1e-3,
    }


def of_row(c):
    """A published comparison before it was judged. One answer moves a recall by one of the items."""
    spread = Spread(**{"reach": 1.0 if c["metric"] == "recall" else None} | c["spread"])
    scores, names = (c["candidate_score"], c["reference_score"]), (c["candidate"], c["reference"])
    return compare_spread(spread, scores, names, margin=c["margin"], confidence=c["confidence"])
