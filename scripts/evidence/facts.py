"""What a page may quote: a figure by its path, from results/studies, results/worth and results/trajectory.

STUDY/METHOD/FIELD           score, deviation, rate, time (against the reference), memory, and of its comparison:
                             verdict, difference, interval, same (90 %), visible, p, seeds, items, margin,
                             change (with its interval), size (with its metric), sure; (untrained): score, constant
                             METHOD@TASK where a study has several tasks, METHOD vs REFERENCE where all are paired,
                             METHOD by forgetting for what it forgot
range/MODEL/FIELD            time or memory of Dual LoRA against LoRA, smallest to largest of the studies of one model
                             ("encoder", "language model") whose times compare; studies: how many, those with the same
                             runs and costs once
pooled/QUESTION/FIELD        of results/pooled: difference, change (with its interval), size, seeds, margin; of the mean
                             over tasks pooled/across/change
count/WHAT                   studies, comparisons (count/comparisons/VERDICT), repeated, amended, false alarms to expect
ends                         which methods of which studies did best at an end of the learning rates that were tried
trajectory/RUN/TABLE/COLUMN  mean over layers after training; contribution/WHAT GROUP for held-out losses
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from dual_lora.lab.report.columns import number
from dual_lora.lab.results import last_state, mean_over_layers, with_sizes
from dual_lora.lab.study.pooled import disagree

ROOT = Path(__file__).parents[2]
DECIMALS = {"accuracy": 4, "loss": 4}  # else 3
COSTS = {"time": "train_seconds", "memory": "peak_memory"}
MODELS = {  # MiniLM's and SmolLM2's tasks
    "encoder": ("sst2", "cola"),
    "language model": ("e2e", "arc-easy", "boolq", "20 steps", "60 steps"),
}
_NO_TIMES = re.compile(r"[Tt]imes and speeds (are not|may not be) comparable")
_STEPS = re.compile(r"(\d+) steps fit into")
_END = re.compile(r"(.+) on \S+ did best with the (smallest|largest) train\.learning_rate tried")


@functools.cache
def study(name: str) -> dict[str, Any]:
    """A published study's results, or the verdicts on a script's scores. Raises ValueError for what is not there."""
    files = ROOT / "results" / "studies" / name / "results.json", ROOT / "results" / "worth" / f"{name}.json"
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise ValueError(f"There is no study {name!r} in results/studies or results/worth.")
    results = json.loads(file.read_text(encoding="utf-8"))
    if "studies" in file.parts and results["study"]["name"] != name:
        raise ValueError(f"{file} holds the results of {results['study']['name']}.")
    return results


@functools.cache
def trajectory() -> dict[str, Any]:
    """The published analysis of one trajectory."""
    return with_sizes(json.loads((ROOT / "results" / "trajectory" / "analysis.json").read_text(encoding="utf-8")))


def quoted(path: str) -> str:
    """The figure at a path, as it is printed. Raises ValueError for a path that leads nowhere."""
    name, *rest = path.strip().split("/")
    try:
        if name == "trajectory":
            return _of_trajectory(*rest)
        if name == "ends":
            return _ends()
        if name == "count":
            return _count(*rest)
        if name == "pooled":
            return _pooled(*rest)
        if name == "range":
            return _range(*rest)
        return _of_study(name, *rest)
    except (KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path!r} leads nowhere in the results: {error!r}.") from None


def verdicts(name: str, candidate: str) -> list[str]:
    """The verdict on a candidate of a study, or on every one for *. A pooled answer is "inside the margin" or "beyond",
    and "better", "worse" or "open": where its interval lies; "disagreeing" where its studies do, at 5 %."""
    if name == "pooled":
        return [_lies(candidate)]
    results = study(name)
    found = results["comparisons"] if candidate == "*" else [_comparison(results, candidate)]
    return [str(c["verdict"]) for c in found]


def _method(results: dict[str, Any], name: str) -> dict[str, Any]:
    method, _, task = name.partition("@")
    return next(m for m in results["methods"] if m["method"] == method and task in ("", m["task"]))


def _comparison(results: dict[str, Any], name: str) -> dict[str, Any]:
    name, _, metric = name.partition(" by ")
    pair, _, task = name.partition("@")
    candidate, _, reference = pair.partition(" vs ")
    found = [
        c
        for c in results["comparisons"]
        if c["candidate"] == candidate
        and reference in ("", c["reference"])
        and task in ("", c["task"])
        and (c["metric"] == metric if metric else c["metric"] != "forgetting")
    ]
    if len(found) != 1:
        raise KeyError(f"{len(found)} comparisons of {candidate}")
    return found[0]


def _of_study(name: str, method: str, field: str) -> str:
    results = study(name)
    if method == "(untrained)":
        return number(results["untrained"][0][field], ".3f")
    if field == "score" and method.endswith(" by forgetting"):
        seeds = _method(results, method.removesuffix(" by forgetting"))["seeds"]
        return number(fmean(seed["figures"]["forgetting"] for seed in seeds), "+.3f")
    if field in ("score", "deviation", "rate", "seconds", "steps"):
        m = _method(results, method)
        decimals = DECIMALS.get(m["metric"], 3)
        if field == "rate":
            return f"{m['settings']['train.learning_rate']:g}"
        if field == "steps":  # of a study at equal time
            return next(found[1] for note in m["notes"] if (found := _STEPS.match(note)))
        if field == "seconds":
            return f"{m['cost']['train_seconds']:.0f}"
        return number(m["score" if field == "score" else "score_deviation"], f".{decimals}f")
    if field in COSTS and " vs " in method:  # whether or not their scores were compared
        return f"{_ratio(*(_method(results, name) for name in method.split(' vs ')), field):.2f}"
    c = _comparison(results, method)
    if field in COSTS:
        return f"{_ratio(*(_method(results, c[side]) for side in ('candidate', 'reference')), field):.2f}"
    return FIELDS[field](c)


def _ratio(mine: dict[str, Any], other: dict[str, Any], field: str) -> float:
    return float(mine["cost"][COSTS[field]] / other["cost"][COSTS[field]])


def _runs(m: dict[str, Any]) -> frozenset[tuple[str, float | None]]:
    """The final runs of a method, with their scores: a key says what was run, and it may have been run twice."""
    return frozenset((seed["key"], seed.get("score")) for seed in m["seeds"])


def _range(model: str, field: str) -> str:
    pairs = {}
    for name in _published():
        results = study(name)
        busy = any(_NO_TIMES.search(note) for note in results["notes"])
        if busy or results["study"].get("cost") is False:  # registered without: other programs ran at the same time
            continue
        for task in MODELS[model]:
            methods = {m["method"]: m for m in study(name)["methods"] if m["task"] == task}
            dual, lora = methods.get("dual_lora", methods.get("clip")), methods.get("lora")
            if dual and lora:
                pairs[_runs(dual), str(dual["cost"])] = name, dual, lora
    if field == "studies":
        return str(len({name for name, _, _ in pairs.values()}))
    ratios = [_ratio(dual, lora, field) for _, dual, lora in pairs.values()]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _answer(question: str) -> dict[str, Any]:
    found = json.loads((ROOT / "results" / "pooled" / "pooled.json").read_text(encoding="utf-8"))
    if question == "across":
        return {**found["across"], "margin": 1.0}
    return next(q for q in found["questions"] if q["question"] == question)


def _lies(question: str) -> str:
    q = _answer(question)
    inside = -q["margin"] < q["low"] and q["high"] < q["margin"]
    side = "better" if q["low"] > 0 else "worse" if q["high"] < 0 else "open"
    apart = ", disagreeing" if disagree(q.get("disagree_p")) else ""
    return f"{'inside the margin' if inside else 'beyond'}, {side}{apart}"


def _pooled(question: str, field: str) -> str:
    q = _answer(question)
    if question == "across":
        return f"{number(q['margins'], '+.2f')} margins [{number(q['low'], '+.2f')} to {number(q['high'], '+.2f')}]"
    if field in ("seeds", "margin"):
        return f"{q[field]:g}"
    q = {**q, "better": "less" if q["metric"] == "loss" else "more", "verdict": ""}
    return FIELDS[field](q)


def _ends() -> str:
    found: dict[str, list[str]] = {}
    for name in _published():
        for note in study(name)["notes"]:
            if match := _END.match(note):
                found.setdefault(name, []).append(f"{match[1]} ({match[2]})")
    return "; ".join(f"`{name}` {', '.join(methods)}" for name, methods in found.items())


def _own(c: dict[str, Any], value: float, sign: bool = True) -> str:
    """A difference in the metric's own direction: negative where there is less of it."""
    turned = value if c["better"] == "more" else -value
    return number(turned + 0.0, f"{'+' * sign}.{DECIMALS.get(c['metric'], 3)}f")


def _between(c: dict[str, Any], low: str, high: str) -> str:
    ends = (c[low], c[high]) if c["better"] == "more" else (c[high], c[low])
    return " to ".join(_own(c, end) for end in ends)


def _change(c: dict[str, Any], metric: str = "") -> str:
    """The difference with the interval that its verdict rests on."""
    same = c["verdict"] == "equivalent within the margin"
    between = f"90 %: {_between(c, 'same_low', 'same_high')}" if same else _between(c, "low", "high")
    return f"{_own(c, c['difference'])}{metric} [{between}]"


def _sure(c: dict[str, Any]) -> str:
    """The verdict, its seeds, and what an open one would have found."""
    words = c["verdict"].replace("the margin", f"{c['margin']:g}")
    if c["verdict"] == "inconclusive" and c["visible"] is not None:
        words += f"; would have found {number(c['visible'], '.2g')}"
    return f"{words} ({c['spread']['seeds']} seeds)"


FIELDS = {
    "verdict": lambda c: str(c["verdict"]),
    "difference": lambda c: _own(c, c["difference"]),
    "interval": lambda c: _between(c, "low", "high"),
    "same": lambda c: _between(c, "same_low", "same_high"),
    "visible": lambda c: number(c["visible"], ".2g"),
    "p": lambda c: number(c["p_holm"], ".2g"),
    "seeds": lambda c: str(c["spread"]["seeds"]),
    "items": lambda c: f"{c['spread']['items']:,}",
    "margin": lambda c: f"{c['margin']:g}",
    "change": _change,
    "size": lambda c: _change(c, f" {c['metric']}"),
    "sure": _sure,
}


def _of_trajectory(run: str, table: str, column: str, form: str = "") -> str:
    found = next(r for r in trajectory()["runs"] if r["name"] == run)
    if table == "run":
        return number(found[column], form or ".2f")
    rows = found[table]
    if table == "contribution":
        what, _, group = column.partition(",")
        (row,) = [r for r in rows if r["what"] == what and r["group"] == group]
        return number(row["loss"], form or ".3f")
    value = mean_over_layers(rows if table == "first_step" else last_state(rows), column)
    if value is None:
        raise KeyError(column)
    return number(value, form or "g")


def _count(what: str, verdict: str = "") -> str:
    """How many published studies there are, comparisons of different runs in them (with a verdict), of these such that
    an earlier study in the alphabet had made, or verdicts that were amended, those of scripts' scores as well; how many
    studies would have a false alarm, if no method differed anywhere."""
    if what == "studies":
        return str(len(_names()))
    if what == "amended":
        return str(sum(len(a.get("changed", ())) for name in _published() for a in study(name).get("amendments", ())))
    if what == "false alarms":
        return number(sum(study(name)["false_alarm"] or 0.0 for name in _names()), ".1f")
    seen: set[tuple[Any, ...]] = set()
    found, repeated = 0, 0
    for name in _names():
        results = study(name)
        for c in results["comparisons"]:
            pair = {_runs(_method(results, f"{c[side]}@{c['task']}")) for side in ("candidate", "reference")}
            key = (frozenset(pair), c["metric"])
            if len(pair) == 2 and verdict in ("", c["verdict"]):
                found += 1
                repeated += key in seen
                seen.add(key)
    return str(repeated if what == "repeated" else found)


def _names() -> list[str]:
    return sorted(file.parent.name for file in (ROOT / "results" / "studies").glob("*/results.json"))


def _published() -> list[str]:
    """The studies, and what else has comparisons."""
    files = sorted((ROOT / "results" / "worth").glob("*.json"))
    return [*_names(), *(file.stem for file in files if not file.stem.endswith(".rates"))]
