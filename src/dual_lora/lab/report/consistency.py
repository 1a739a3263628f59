"""Whether a study's verdicts follow from its own figures: its file may have been edited, or be of another version."""

import math
from collections.abc import Iterator

from dual_lora.lab.errors import described
from dual_lora.lab.study import metrics
from dual_lora.lab.study.rejudge import NEW_WORDS, rejudge
from dual_lora.lab.study.rows import ComparisonRow, Results

LISTED = 3


def inconsistencies(results: Results) -> list[str]:
    """Say in a sentence which verdicts and scores do not follow from the figures in the same file; [] if all do."""
    if not results["comparisons"]:
        return []
    try:
        found = [*_score_inconsistencies(results), *_verdict_inconsistencies(results)]
    except Exception as error:  # whatever a stranger's file makes the statistics raise
        reason = described(error)[:200]
        return [f"Whether these verdicts follow from the file's figures could not be computed ({reason})."]
    if not found:
        return []
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return [
        f"This file contradicts itself: {'; '.join(found[:LISTED])}{more}. It was edited by hand, or made by another "
        "version (`python -m dual_lora.lab.study.rejudge FILE` computes the verdicts anew)."
    ]


def _verdict_inconsistencies(results: Results) -> Iterator[str]:
    for stated, follows in zip(results["comparisons"], rejudge(results)["comparisons"], strict=True):
        if NEW_WORDS.get(stated["verdict"], stated["verdict"]) != follows["verdict"]:
            yield f"{_pair(stated)} is called {stated['verdict']}, and by its figures it is {follows['verdict']}"
        elif not all(_same(stated[key], follows[key]) for key in ("low", "high", "p_holm", "p_same_holm")):
            yield f"the interval or p of {_pair(stated)} is another than its spread gives"


def _score_inconsistencies(results: Results) -> Iterator[str]:
    """Check each comparison's difference with its scores, and each method's score there with that in its row and the
    mean of its runs."""
    at = {(m["model"], m["task"], m["method"]): m for m in results["methods"]}
    for c in results["comparisons"]:
        sign = metrics.direction(c["better"])
        own = (c["candidate_score"], c["reference_score"])
        if None not in own and not _same(c["difference"], sign * (own[0] - own[1])):  # type: ignore[operator]
            yield f"the difference of {_pair(c)} is {c['difference']:.4g}, its scores are {own[0]:.4g} and {own[1]:.4g}"
        if not _same(c["difference"], c["spread"]["difference"]):
            yield f"the difference of {_pair(c)} is stored as two numbers"
        two = [at[c["model"], c["task"], c[side]] for side in ("candidate", "reference")]
        if c["metric"] != two[0]["metric"] or any(m["diverged"] for m in two):  # lost runs count by both methods
            continue
        for method, score in zip(two, own, strict=True):
            if not _same(method["score"], score):
                yield f"{method['method']} has the score {method['score']} in one table and {score} in another"
    for method in results["methods"]:
        runs = [run["score"] for run in method["seeds"]]
        if method["diverged"] or not runs or None in runs:
            continue
        if not _same(method["score"], math.fsum(runs) / len(runs)):  # type: ignore[arg-type]
            yield f"the score of {method['method']} is {method['score']}, the mean of its runs is another"


def _pair(c: ComparisonRow) -> str:
    return f"{c['candidate']} against {c['reference']} on {c['task']}"


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
