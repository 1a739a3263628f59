"""One question that several studies asked: all of their seeds together, in place of votes.

`python -m dual_lora.lab.study.pooled results/pooled/questions.yaml` writes pooled.json next to it, which the forest
plot draws. A question is a list of STUDY/CANDIDATE/REFERENCE.

A seed counts once, by its number: where several studies have it, its difference is the mean of theirs. Such runs have
the same start and order, and mostly the same records, so that they are not independent. Of the seeds the differences
and their spread are known exactly. Items' scores are not in results.json, so the items' part of the error is bounded:
the test records of one task are taken as the same ones, so their parts add up as the weights of the studies do; where
two methods were compared with a third one only, their difference varies no more than the sum of the two differences.

The studies are taken as they are: the interval is for other seeds of them, and not for studies with other searches.
Whether they agree is tested by their seeds (Alexander and Govern 1994: equal means without equal variances).

    δ = mean over all seeds ± √(t²[S - 1] seeds' part² + t²[N - 1] items' part²)       as in `statistics`

Across questions (tasks), in units of each margin: a mean with random effects, its interval by Hartung and Knapp 2001.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import write_json
from dual_lora.lab.module_command import run_module
from dual_lora.lab.read import parse_yaml, read_json
from dual_lora.lab.study import metrics
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.rows import ComparisonRow, MethodRow, Results


@dataclass(frozen=True)
class Pooled:
    """The answer to one question. asked: by which studies, and with how many seeds that no earlier one had.

    error: of the whole; bounded: whether the items' part is a bound as the two were compared with a third one only.
    disagree_p: how likely studies with one true difference lie so far apart; None for one study.
    """

    question: str
    metric: str
    difference: float
    low: float
    high: float
    error: float
    p: float
    seeds: int
    asked: list[list[Any]]
    margin: float
    bounded: bool = False
    disagree_p: float | None = None
    claimed: float | None = None


def pooled(question: str, asked: Sequence[tuple[Results, str, str]], margin: float | None = None) -> Pooled:
    """The answer from (results, candidate, reference) of several studies of one task and metric.

    Raises UserError for a study without the pair, for several metrics, and for fewer than two seeds in all.
    """
    by_seed: dict[int, list[tuple[float, int]]] = {}  # of each seed the differences, and the studies that have them
    parts, counted, kinds = list[tuple[float, int, bool]](), list[list[Any]](), set[tuple[str, str]]()
    for k, (results, candidate, reference) in enumerate(asked):
        name = results["study"]["name"]
        two = [_method_row(results, name, m) for m in (candidate, reference)]
        kinds.add((two[0]["task"], two[0]["metric"]))
        if len(seeds := {tuple(run["seed"] for run in method["seeds"]) for method in two}) > 1:
            raise UserError(f"{name}: {candidate} and {reference} have other seeds, {seeds}: no run has its pair.")
        sign, known = metrics.direction(two[0]["better"]), len(by_seed)
        for a, b in zip(two[0]["seeds"], two[1]["seeds"], strict=True):
            if a["score"] is None or b["score"] is None:
                raise UserError(f"{name}: a run of {candidate} or {reference} diverged, and can not be pooled.")
            by_seed.setdefault(a["seed"], []).append((sign * (a["score"] - b["score"]), k))
        counted.append([name, candidate, reference, len(by_seed) - known])
        parts.append(_items(results, candidate, reference))
    if len({metric for _, metric in kinds}) != 1:
        raise UserError(f"{question}: {kinds} are several metrics, which have no mean.")
    metric = next(iter(kinds))[1]
    d = np.array([np.mean([difference for difference, _ in had]) for had in by_seed.values()])
    if len(d) < 2:
        raise UserError(f"{question}: one seed gives no estimate for other seeds; at least two are needed.")
    item_error = sum(parts[k][0] / len(had) for had in by_seed.values() for _, k in had) / len(d)
    seed_error = float(d.std(ddof=1)) / math.sqrt(len(d))
    items = min(items for _, items, _ in parts)
    s = stats.Spread(float(d.mean()), math.hypot(seed_error, item_error), seed_error, len(d), items)
    low, high = stats.interval(s, 0.95)
    margin = margin or asked[0][0]["study"]["margin"][metric]
    bounded = any(bound for *_, bound in parts)
    p = stats.difference_p(s)
    return Pooled(
        question, metric, s.difference, low, high, s.error, p, len(d), counted, margin, bounded, disagreement(by_seed)
    )


def disagreement(by_seed: Mapping[int, Sequence[tuple[float, int]]]) -> float | None:
    """p of one mean behind all studies, from each seed's differences and the studies that have them.

    Studies that share seeds are one there. None where fewer than two have three seeds, or no spread: with two
    seeds a study it would be found in 10 to 15 % of cases at 5 %. The level of Alexander and Govern's test is 8 %
    with three seeds in one study and eight in the other, if the smaller varies three times as much.
    """
    groups: dict[tuple[int, ...], list[float]] = {}
    for had in by_seed.values():
        groups.setdefault(tuple(k for _, k in had), []).append(float(np.mean([difference for difference, _ in had])))
    several = [group for group in groups.values() if len(group) > 2 and np.ptp(group) > 1e-9]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy speaks of lost precision where the means are the same
        return float(scipy_stats.alexandergovern(*several).pvalue) if len(several) > 1 else None


def disagree(p: float | None) -> bool:
    """Whether studies with this `disagree_p` are said to disagree."""
    return p is not None and p < 0.05


def _method_row(results: Results, name: str, method: str) -> MethodRow:
    found = [m for m in results["methods"] if m["method"] == method]
    if len(found) != 1:
        raise UserError(f"{name} has {len(found)} methods called {method}, expected one, on one task.")
    return found[0]


def _items(results: Results, a: str, b: str) -> tuple[float, int, bool]:
    """The items' part of the error of a against b, how many items there were, and whether it is a bound."""

    def part(c: ComparisonRow) -> float:
        return math.sqrt(max(c["spread"]["error"] ** 2 - c["spread"]["seed_error"] ** 2, 0.0))

    for c in results["comparisons"]:
        if {c["candidate"], c["reference"]} == {a, b}:
            return part(c), c["spread"]["items"], False
    both = [c for c in results["comparisons"] if c["candidate"] in (a, b)]
    if len(both) != 2 or len({c["reference"] for c in both}) != 1:
        raise UserError(f"{results['study']['name']} compares {a} and {b} neither with each other nor with a third.")
    return sum(map(part, both)), both[0]["spread"]["items"], True


def across(answers: Sequence[Pooled], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean over questions, in margins, with its interval: random effects (DerSimonian and Laird), the interval by
    Hartung and Knapp. Raises UserError for fewer than two."""
    if len(answers) < 2:
        raise UserError(f"{len(answers)} answers: a mean over questions needs two at least.")
    y = np.array([a.difference / a.margin for a in answers])
    v = np.array([(a.error / a.margin) ** 2 for a in answers])
    w, k = 1 / v, len(y)
    fixed = (w * y).sum() / w.sum()
    excess = (w * (y - fixed) ** 2).sum() - (k - 1)
    between = max(0.0, excess / (w.sum() - (w**2).sum() / w.sum()))
    w = 1 / (v + between)
    mean = float((w * y).sum() / w.sum())
    factor = max(1.0, float((w * (y - mean) ** 2).sum() / (k - 1)))  # never shorter than with known errors
    half = float(scipy_stats.t.isf((1 - confidence) / 2, k - 1)) * math.sqrt(factor / float(w.sum()))
    return mean, mean - half, mean + half


def answered(questions: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All questions of the file, with the results of the studies in `folder`: what pooled.json holds."""
    answers = []
    for name, q in questions.items():
        asked = [entry.split("/") for entry in q["asked"]]
        read = [(read_json(folder / study / "results.json"), a, b) for study, a, b in asked]
        answers.append(asdict(pooled(name, read, q.get("margin"))) | {k: q[k] for k in ("claimed", "forest") if k in q})
    drawn = [Pooled(**{k: v for k, v in a.items() if k != "forest"}) for a in answers if a.get("forest") is True]
    mean, low, high = across(drawn)
    return {"questions": answers, "across": {"margins": mean, "low": low, "high": high, "of": len(drawn)}}


def main(arguments: list[str]) -> int:
    """Write the answers next to the questions, and print them."""
    file = Path(arguments[0])
    found = answered(parse_yaml(file.read_text(encoding="utf-8"), str(file)), file.parent.parent / "studies")
    write_json(file.with_name("pooled.json"), found)
    for a in found["questions"]:
        apart = f"; its studies disagree, p {a['disagree_p']:.2g}" if disagree(a["disagree_p"]) else ""
        print(f"{a['question']}: {a['metric']} {a['difference']:+.4f} [{a['low']:+.4f}, {a['high']:+.4f}], "
              f"{a['seeds']} seeds, p {a['p']:.2g}{apart}")  # fmt: skip
    print(json.dumps(found["across"]))
    return 0


if __name__ == "__main__":
    run_module(main)
