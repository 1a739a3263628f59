"""The top of a page of several studies: the pair that most of them compare, then each question with its answer."""

from collections import Counter
from operator import itemgetter
from typing import Any

from dual_lora.lab.report.blocks import MOODS, Axis, Block, Cards, Chart, Section, Table, Text, View, mood, place, slug
from dual_lora.lab.report.columns import Row, columns, grouped
from dual_lora.lab.report.studies import scenario, verdict_title

BETTER, WORSE, *_ = MOODS
Studies = list[tuple[str, dict[str, Any]]]  # (its name on this page, results)
NOTE = (
    "The unit is each study's own margin: the difference that is too small to matter. Bars are confidence intervals. "
    "Each row is a verdict of the study that it names; studies may share runs, so these are not so many independent "
    "proofs. Shaded: within the margin."
)


def overview_sections(studies: Studies) -> list[Section]:
    """Return the sections that a reader should see first."""
    answers = [_answer(name, results) for name, results in studies]
    table = Table("All studies", columns("study question compared answer"), answers, folded=True)
    return [Section("Questions and answers", [*_main_pair(studies), Cards(answers, "answers"), table], "Overview")]


def _main_pair(studies: Studies) -> list[Block]:
    """The two methods that most studies compare: every verdict on them, in one picture. Nothing if no pair recurs."""
    compared: list[tuple[str, Row]] = [(name, c) for name, results in studies for c in results["comparisons"]]
    found = grouped(compared, lambda each: frozenset((each[1]["candidate"], each[1]["reference"])))
    spread = {pair: len({name for name, _ in members}) for pair, members in found.items()}
    pair = max(spread, key=lambda p: spread[p], default=frozenset())
    if spread.get(pair, 0) < 2:
        return []
    (candidate, reference), _ = Counter((c["candidate"], c["reference"]) for _, c in found[pair]).most_common(1)[0]
    turned = [(name, c if c["candidate"] == candidate else _swapped(c)) for name, c in found[pair]]
    counts = Counter(c["verdict"] for _, c in turned)
    words = ", ".join(f"{counts[verdict]} × {verdict}" for verdict in sorted(counts, key=place))
    alike = [c for _, c in turned if mood(c["verdict"]) == "same" and c.get("p_holm") is not None]
    sure = [c["difference"] > 0 for c in alike if c["p_holm"] < 1 - c["confidence"]]
    if sure:
        counted = {"better": sure.count(True), "worse": sure.count(False)}
        each = [f"{n} significantly {word}, by little" for word, n in counted.items() if n]
        words += f" (of those equivalent, {' and '.join(each)})"
    lead = Text(f"{candidate} against {reference}, compared in {spread[pair]} studies: {words}.", "lead")
    ends = (("x", "difference"), ("low", "low"), ("high", "high"))
    points = [
        {key: None if c[of] is None else c[of] / c["margin"] for key, of in ends}
        | {"label": f"{name} · {scenario(c)}, {c['metric']}", "mood": mood(c["verdict"])}
        | {"note": f"{c['verdict']}; {c['metric']} {c['difference']:+.4g}, margin {c['margin']:g}"}
        for name, c in turned
        if c.get("margin") and c["difference"] is not None
    ]
    if not points:
        return [lead]
    view = View("", Axis(f"{candidate} − {reference}, in margins (right is better)"), Axis(""), points)
    title = f"Every study of {candidate} against {reference}"
    return [lead, Chart(title, "intervals", [view], NOTE, (-1.0, 1.0), zero=True)]


def _swapped(c: Row) -> Row:
    """The same comparison seen from its reference."""
    sides = {"difference": "difference", "low": "high", "high": "low"}
    figures = {key: None if c[other] is None else -c[other] for key, other in sides.items()}
    return {**c, "verdict": {BETTER: WORSE, WORSE: BETTER}.get(c["verdict"], c["verdict"]), **figures}


def _answer(name: str, results: dict[str, Any]) -> Row:
    """The verdicts of a study, each with the methods that it was passed on; sure ones first."""
    comparisons = results["comparisons"]
    tasks = {scenario(c) for c in comparisons}
    several = len({(scenario(c), c["metric"]) for c in comparisons}) > len(tasks)
    references = dict.fromkeys(c["reference"] for c in comparisons)

    def who(c: Row) -> str:
        against = f" against {c['reference']}" * (len(references) > 1)
        return str(c["candidate"]) + against + f" on {scenario(c)}" * (len(tasks) > 1) + f" by {c['metric']}" * several

    passed = grouped(comparisons, itemgetter("verdict"))
    against = " or ".join(references)
    seeds = max((c["spread"]["seeds"] for c in comparisons), default=None)
    compared = f"against {against}, {seeds} seeds" if comparisons else "nothing to compare yet"
    compared += "" if results.get("complete", True) else "; not complete"
    verdicts = [(v, mood(v), ", ".join(map(who, passed[v]))) for v in sorted(passed, key=place)]
    return {
        "study": name,
        "question": results["study"].get("question") or name,
        "anchor": slug(verdict_title(name)),
        "compared": compared,
        "verdicts": verdicts,
        "answer": "; ".join(f"{verdict}: {methods}" for verdict, _, methods in verdicts),
    }
