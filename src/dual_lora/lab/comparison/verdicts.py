"""From finished runs to what may be said: scores, comparisons, ranks, costs and Pareto fronts, as plain values."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora.lab.comparison import metrics, notes, stats
from dual_lora.lab.comparison.cell import Cell, Finished, place_name
from dual_lora.lab.comparison.perform import read_scores
from dual_lora.lab.comparison.ranking import rank_methods
from dual_lora.lab.comparison.study import Study

RESULTS_FORMAT = 1

# Cost -> (its name for people, whether less is better).
COSTS: dict[str, tuple[str, bool]] = {
    "train_seconds": ("training time [s]", True),
    "steps_per_second": ("steps a second", False),
    "tokens_per_second": ("tokens a second", False),
    "peak_memory": ("peak memory [bytes]", True),
    "trainable_parameters": ("trainable parameters", True),
    "adapter_bytes": ("adapter on disk [bytes]", True),
    "merge_seconds": ("merge time [s]", True),
    "forward_slowdown": ("slow-down of a forward pass", True),
    "decode_slowdown": ("slow-down of decoding", True),
}


def build_results(
    study: Study, finished: Sequence[Finished], runs: Path, untrained: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Everything that the study says, ready for results.json. untrained: {"model", "task", "score"} a place."""
    lost: list[str] = []
    tables = _score_tables(finished, runs, lost, len(study.seeds))
    methods = [_method(f, tables.get(_at(f))) for f in finished]
    ends = {_at(f): end for f, method in zip(finished, methods, strict=True) if (end := notes.end_of_search(method))}
    whys = [notes.why_unlearned(method, untrained) for method in methods]
    unlearned = {_at(f): why for f, why in zip(finished, whys, strict=True) if why}
    judged = _comparisons(study, finished, tables)
    comparisons = [_with_doubt(_nothing_learned(c, unlearned), ends) for c in judged]
    return {
        "format": RESULTS_FORMAT,
        "study": study.model_dump(mode="json"),
        "complete": all(f.complete for f in finished),
        "methods": methods,
        "comparisons": [_plain(c) for c in comparisons],
        "overall": _overall(comparisons),
        "ranking": _rankings(study, finished, tables),
        "pareto": _pareto(methods),
        "notes": notes.unfinished(study, finished)
        + lost
        + notes.ends_of_searches(ends)
        + notes.level_searches(methods)
        + notes.unlearned_notes(unlearned)
        + notes.single_items(tables)
        + notes.single_seed(study)
        + list(dict.fromkeys(f.cell.overlap for f in finished if f.cell.overlap))
        + notes.unmeasured(finished)
        + notes.warned(finished)
        + notes.shared_machine(methods)
        + notes.precisions(finished),
    }


def _at(f: Finished) -> tuple[str, str, str]:
    return (*f.cell.place, f.cell.method)


def _score_tables(
    finished: Sequence[Finished], runs: Path, said: list[str], seeds: int
) -> dict[tuple[str, str, str], stats.Table]:
    """Item shares [S, N], better is more, of every complete cell. A diverged run gets the worst score of its task."""
    raw: dict[tuple[str, str, str], list[Any]] = {}
    for f in finished:
        if f.complete:
            raw[_at(f)] = [None] * seeds if f.doomed else [_features(job, outcome, runs) for job, outcome in f.finals]
    tables = {}
    for place in dict.fromkeys(key[:2] for key in raw):
        here = {key: rows for key, rows in raw.items() if key[:2] == place}
        metric = next(f.cell.metric for f in finished if f.cell.place == place)
        good = {key: metrics.score_table(metric, alive) for key, rows in here.items() if (alive := _alive(rows))}
        if not good:
            said.append(f"Every run on {place_name(*place)} diverged: there is nothing to compare.")
            continue
        worst = min(table.mean(1).min() for table in good.values())
        items = next(iter(good.values())).shape[1]
        for key, rows in here.items():
            table = np.full((seeds, items), worst)
            if key in good:
                table[[i for i, row in enumerate(rows) if row is not None]] = good[key]
            lost = sum(row is None for row in rows)
            if lost == seeds:
                said.append(
                    f"Every run of {key[2]} on {place_name(*place)} diverged: it has no score there, and ranks last."
                )
            elif lost:
                said.append(
                    f"{lost} of {seeds} runs of {key[2]} on {place_name(*place)} diverged; each counts with the worst "
                    f"score of any run there ({metrics.sign(metric) * worst:.4g})."
                )
            tables[key] = table
    return tables


def _alive(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row is not None]


def _features(job: dict[str, Any], outcome: dict[str, Any] | None, runs: Path) -> Any:
    assert outcome is not None
    if outcome["status"] == "diverged":
        return None
    return read_scores(runs, job["key"])


def _comparisons(
    study: Study, finished: Sequence[Finished], tables: dict[tuple[str, str, str], stats.Table]
) -> list[stats.Comparison]:
    pairs = []
    for place in dict.fromkeys(f.cell.place for f in finished):
        here = [f.cell for f in finished if f.cell.place == place and _at(f) in tables]
        names = [cell.method for cell in here]
        if study.pairs == "all":
            wanted = [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
        else:
            wanted = [(name, study.baseline) for name in names if name != study.baseline and study.baseline in names]
        lost = {f.cell.method: _lost(f) for f in finished if f.cell.place == place}
        for a, b in wanted:
            metric = here[0].metric
            pair = stats.compare_pair(
                tables[(*place, a)],
                tables[(*place, b)],
                names=(a, b),
                task=place_name(*place),
                metric=metric,
                margin=study.margin.get(metric),
                confidence=1 - study.level,
                wanted_power=study.power,
                counted=metrics.counted(metric),
            )
            pair = dataclasses.replace(pair, place=place, better=metrics.better(metric))
            pairs.append(_as_far_as_it_goes(pair, lost))
    return stats.judge(pairs, study.level)


def _lost(f: Finished) -> int | None:
    """How many final runs diverged; None if all did."""
    lost = sum(outcome is not None and outcome["status"] == "diverged" for _, outcome in f.finals)
    return None if f.doomed or lost == len(f.finals) else lost


def _as_far_as_it_goes(c: stats.Comparison, lost: dict[str, int | None]) -> stats.Comparison:
    """Without a p, and so without a verdict, where all runs of a method diverged, or one item stands for all others.

    The score that a diverged run counts with says only that it is no better than that: no ground for equivalence.
    """
    silent: dict[str, Any] = {"p": None, "p_same": None, "visible": None}
    gone = [name for name in (c.candidate, c.reference) if lost[name] is None]
    if gone:
        note = f"No run of {' or '.join(gone)} came to an end with a score."
        return dataclasses.replace(c, verdict=stats.Verdict.DIVERGED, note=note, **silent)
    if c.items == 1 and c.seeds > 1:
        return dataclasses.replace(c, verdict=stats.Verdict.ONE_ITEM, **silent)
    some = [f"{n} of {name}" for name in (c.candidate, c.reference) if (n := lost[name])]
    if some and c.seeds > 1:
        note = f"Of {c.seeds} runs each, {' and '.join(some)} diverged" + (
            ": equivalence is not claimed." if c.margin is not None else "."
        )
        return dataclasses.replace(c, p_same=None, note=note)
    return c


def _plain(c: stats.Comparison) -> dict[str, Any]:
    sign = metrics.sign(c.metric)
    scores = {"candidate_score": sign * c.candidate_score, "reference_score": sign * c.reference_score}
    model, task = c.place
    values = dataclasses.asdict(c) | scores | {"sentence": c.sentence, "model": model, "task": task}
    del values["place"]
    if c.verdict is stats.Verdict.DIVERGED:  # figures of a method that has none
        absent = ("candidate_score", "reference_score", "difference", "low", "high", "p_seeds", "p_items")
        values |= dict.fromkeys(absent) | {"spread": values["spread"] | dict.fromkeys(("difference", "error"))}
    return values


def _method(f: Finished, table: stats.Table | None) -> dict[str, Any]:
    """One method on one task: what it was, what was tried, what came out, what it cost."""
    cell = f.cell
    sign = metrics.sign(cell.metric)
    seeds = [
        {"seed": job["seed"], "key": job["key"], **_outcome(outcome), "figures": (outcome or {}).get("figures")}
        for job, outcome in f.finals
    ]
    scored = table is not None and _lost(f) is not None
    means = sign * table.mean(1) if table is not None and scored else None
    return {
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "about": cell.entry.about,
        "peft_method": cell.recipe.method,
        "metric": cell.metric,
        "better": metrics.better(cell.metric),
        "rank": cell.rank,
        "trainable_parameters": cell.size.trainable,
        "base_parameters": cell.size.base,
        "mismatch": cell.mismatch,
        "notes": cell.notes,
        "settings": f.chosen,
        "trials": [{"settings": j["settings"], "key": j["key"], **_outcome(o)} for j, o in f.trials],
        "seeds": seeds,
        "score": None if means is None else float(means.mean()),
        "score_deviation": float(means.std(ddof=1)) if means is not None and len(means) > 1 else None,
        "items": None if table is None else table.shape[1],
        "diverged": sum(s["status"] == "diverged" for s in seeds),
        "diverged_in_search": f.doomed,
        "cost": _cost(cell, [o for _, o in f.finals if o and o["status"] == "done"]),
        "measured_beside": _beside(o for _, o in f.finals if o and o["status"] == "done"),
    }


def _outcome(outcome: dict[str, Any] | None) -> dict[str, Any]:
    if outcome is None:
        return {"status": "missing", "score": None, "seconds": None}
    return {"status": outcome["status"], "score": outcome.get("score"), "seconds": outcome.get("seconds")}


def _cost(cell: Cell, outcomes: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the seeds; what is measured once is taken from where it was measured."""

    def median(get: Callable[[dict[str, Any]], Any]) -> float | None:
        values = [v for o in outcomes if (v := get(o)) is not None]
        return float(statistics.median(values)) if values else None

    cost: dict[str, float | None] = {
        "train_seconds": median(lambda o: o["training"]["seconds"]),
        "steps_per_second": median(lambda o: o["steps_per_second"]),
        "tokens_per_second": median(lambda o: o["training"]["tokens_per_second"]),
        "peak_memory": median(lambda o: o["training"]["peak_memory"]),
        "trainable_parameters": float(cell.size.trainable),
        "adapter_bytes": median(lambda o: o["training"]["adapter_bytes"]),
    }
    for name in ("merge_seconds", "forward_slowdown", "decode_slowdown"):
        cost[name] = median(lambda o, name=name: o.get("use", {}).get(name))  # type: ignore[misc]
    return cost


def _beside(outcomes: Iterable[dict[str, Any]]) -> list[int | None]:
    """How many runs at a time there were when these were measured; None where a run does not say."""
    return sorted({o.get("runs_at_a_time") for o in outcomes}, key=lambda n: n or 0)


def _overall(comparisons: Sequence[stats.Comparison]) -> list[dict[str, Any]]:
    """The mean difference over the tasks of one model that share a metric."""
    groups: dict[tuple[str, str, str, str], list[stats.Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.place[0], c.candidate, c.reference, c.metric), []).append(c)
    rows = []
    for (model, candidate, reference, metric), members in groups.items():
        if len(members) < 2 or any(c.p is None for c in members):
            continue
        s = stats.over_tasks(members)
        low, high = stats.student_interval(s, members[0].confidence)
        rows.append(
            {
                "model": model,
                "candidate": candidate,
                "reference": reference,
                "metric": metric,
                "tasks": [c.place[1] for c in members],
                "difference": s.difference,
                "low": low,
                "high": high,
                "p": stats.difference_p(s),
            }
        )
    return rows


def _rankings(
    study: Study, finished: Sequence[Finished], tables: dict[tuple[str, str, str], stats.Table]
) -> list[dict[str, Any]]:
    rankings = []
    lost = {_at(f) for f in finished if _lost(f) is None}
    for model in dict.fromkeys(f.cell.model for f in finished):
        tasks = list(dict.fromkeys(f.cell.task for f in finished if f.cell.model == model))
        names = dict.fromkeys(f.cell.method for f in finished if f.cell.model == model)
        scores = {
            name: [
                -math.inf if (model, task, name) in lost else float(tables[(model, task, name)].mean())
                for task in tasks
            ]
            for name in names
            if all((model, task, name) in tables for task in tasks)
        }
        if len(scores) >= 2 and len(tasks) >= 2:
            rankings.append({**dataclasses.asdict(rank_methods(scores, study.level)), "model": model, "tasks": tasks})
    return rankings


def _pareto(methods: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every task and cost: each method's quality and cost, and whether no other is better in both."""
    fronts = []
    for model, task in dict.fromkeys((m["model"], m["task"]) for m in methods):
        here = [m for m in methods if (m["model"], m["task"]) == (model, task) and m["score"] is not None]
        for cost, (label, less) in COSTS.items():
            points = [
                {"method": m["method"], "quality": m["score"], "cost": m["cost"][cost]}
                for m in here
                if m["cost"][cost] is not None
            ]
            if not points:
                continue
            sign = metrics.sign(here[0]["metric"])
            turned = [(sign * p["quality"], -p["cost"] if less else p["cost"]) for p in points]
            for point, mine in zip(points, turned, strict=True):
                point["front"] = not any(
                    other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in turned
                )
            fronts.append(
                {
                    "model": model,
                    "task": task,
                    "metric": here[0]["metric"],
                    "cost": cost,
                    "label": label,
                    "points": points,
                }
            )
    return fronts


def _nothing_learned(c: stats.Comparison, unlearned: dict[tuple[str, str, str], str]) -> stats.Comparison:
    """Two methods that did not learn the task are alike in nothing that anybody asked about."""
    why = [unlearned[key] for name in (c.candidate, c.reference) if (key := (*c.place, name)) in unlearned]
    if len(why) < 2:
        return c
    reason = f"Of both, {why[0]}." if why[0] == why[1] else f"Of {c.candidate}, {why[0]}; of {c.reference}, {why[1]}."
    if c.verdict is stats.Verdict.EQUIVALENT:
        return dataclasses.replace(c, verdict=stats.Verdict.UNLEARNED, note=reason)
    return dataclasses.replace(c, note=f"{c.note} Neither learned the task. {reason}".strip())


def _with_doubt(c: stats.Comparison, ends: dict[tuple[str, str, str], str]) -> stats.Comparison:
    """A verdict on a method that was not searched to its best says so."""
    loser = {stats.Verdict.WORSE: c.candidate, stats.Verdict.BETTER: c.reference}.get(c.verdict)
    end = ends.get((*c.place, loser)) if loser else None
    return dataclasses.replace(c, note=f"{c.note} {loser} did best with {end}.".strip()) if end else c
