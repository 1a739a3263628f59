"""The top of a page of several studies: the pair that most of them compare, then each question with its answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dual_lora.lab.report.blocks import Answer, Axis, Block, Chart, Column, Row, Section, Table, Text, View, slug
from dual_lora.lab.report.studies import MOODS, place, verdict_title

BETTER, WORSE, *_ = MOODS
Studies = list[tuple[str, dict[str, Any]]]  # (its name on this page, results)


def overview_sections(studies: Studies) -> list[Section]:
    """What a reader should know first."""
    answers = [_answer(name, results) for name, results in studies]
    blocks: list[Block] = [*_main_pair(studies), answers, _table(studies, answers)]
    return [Section("Questions and answers", blocks, group="Overview")]


def _main_pair(studies: Studies) -> list[Block]:
    """The two methods that most studies compare: every verdict on them, in one picture. Nothing if no pair recurs."""
    found: dict[frozenset[str], list[tuple[str, Row]]] = {}
    for name, results in studies:
        for c in results["comparisons"]:
            found.setdefault(frozenset((c["candidate"], c["reference"])), []).append((name, c))
    spread = {pair: len({name for name, _ in members}) for pair, members in found.items()}
    pair = max(spread, key=lambda p: spread[p], default=frozenset())
    if spread.get(pair, 0) < 2:
        return []
    members = found[pair]
    (candidate, reference), _ = Counter((c["candidate"], c["reference"]) for _, c in members).most_common(1)[0]
    turned = [(name, c if c["candidate"] == candidate else _turned(c)) for name, c in members]
    words = _counted([c["verdict"] for _, c in turned])
    sure = [c["difference"] > 0 for _, c in turned if MOODS.get(c["verdict"]) == "same" and _sign_is_sure(c)]
    if sure:
        counts = {"better": sure.count(True), "worse": sure.count(False)}
        each = {f"{n} significantly {word}, by little" for word, n in counts.items() if n}
        words += f" (of those equivalent, {' and '.join(sorted(each))})"
    lead = Text(f"{candidate} against {reference}, compared in {spread[pair]} studies: {words}.", "lead")
    points = [
        {
            "label": f"{name} · {place(c)}, {c['metric']}",
            "x": c["difference"] / c["margin"],
            "low": c["low"] / c["margin"],
            "high": c["high"] / c["margin"],
            "mood": MOODS.get(c["verdict"], "open"),
            "note": f"{c['verdict']}; {c['metric']} {c['difference']:+.4g}, margin {c['margin']:g}",
        }
        for name, c in turned
        if c.get("margin") and c["difference"] is not None
    ]
    if not points:
        return [lead]
    axis = Axis(f"{candidate} − {reference}, in margins (right is better)")
    note = (
        "The unit is each study's own margin: the difference that is too small to matter. Bars are confidence "
        "intervals. Each row is a verdict of the study that it names; studies may share runs, so these are not so many "
        "independent proofs."
    )
    view = View("", axis, Axis(""), [{"name": candidate, "points": points}])
    title = f"Every study of {candidate} against {reference}"
    return [lead, Chart(title, "intervals", [view], None, note, (-1.0, 1.0), "within the margin", zero=True)]


def _turned(c: Row) -> Row:
    """The same comparison seen from its reference."""
    verdict = {BETTER: WORSE, WORSE: BETTER}.get(c["verdict"], c["verdict"])
    figures = {
        key: None if c[other] is None else -c[other]
        for key, other in (("difference", "difference"), ("low", "high"), ("high", "low"))
    }
    return {**c, "verdict": verdict, **figures}


def _sign_is_sure(c: Row) -> bool:
    return c.get("p_holm") is not None and c["p_holm"] < 1 - c["confidence"]


def _counted(verdicts: list[str]) -> str:
    return ", ".join(f"{n} × {verdict}" for verdict, n in sorted(Counter(verdicts).items(), key=lambda v: _sure(v[0])))


def _sure(verdict: str) -> int:
    return [*MOODS, verdict].index(verdict)


def _answer(name: str, results: dict[str, Any]) -> Answer:
    """The verdicts of a study, each with the methods that it was passed on; sure ones first."""
    comparisons = results["comparisons"]
    many = len({place(c) for c in comparisons}) > 1
    passed: dict[str, list[str]] = {}
    for c in comparisons:
        passed.setdefault(c["verdict"], []).append(f"{c['candidate']} on {place(c)}" if many else c["candidate"])
    against = " or ".join(dict.fromkeys(c["reference"] for c in comparisons))
    seeds = max((c["spread"]["seeds"] for c in comparisons), default=None)
    about = f"{name}: against {against}, {seeds} seeds" if comparisons else f"{name}: nothing to compare yet"
    about += "" if results.get("complete", True) else "; not complete"
    verdicts = [(v, MOODS.get(v, "open"), passed[v]) for v in sorted(passed, key=_sure)]
    return Answer(results["study"].get("question") or name, slug(verdict_title(name)), about, verdicts)


def _table(studies: Studies, answers: list[Answer]) -> Table:
    rows = [
        {
            "study": name,
            "question": answer.question,
            "about": answer.about.partition(": ")[2],
            "answer": "; ".join(f"{verdict}: {', '.join(who)}" for verdict, _, who in answer.verdicts),
        }
        for (name, _), answer in zip(studies, answers, strict=True)
    ]
    columns = [Column("study", "study"), Column("question", "question"), Column("about", "compared")]
    return Table("All studies", [*columns, Column("answer", "answer")], rows, folded=True)
