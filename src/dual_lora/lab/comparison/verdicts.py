"""From finished runs to what may be said: scores, comparisons, ranks, costs and Pareto fronts, as plain values."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora.lab.comparison import metrics, stats
from dual_lora.lab.comparison.perform import scores_file
from dual_lora.lab.comparison.plan import Cell, place_name
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


@dataclasses.dataclass
class Finished:
    """A cell with what came of it. `finals` in the order of the study's seeds; None where a run is missing."""

    cell: Cell
    trials: list[tuple[dict[str, Any], dict[str, Any] | None]]  # job, outcome
    chosen: dict[str, Any] | None
    finals: list[tuple[dict[str, Any], dict[str, Any] | None]]
    doomed: bool = False  # every trial diverged: the finals count as diverged without being run

    @property
    def complete(self) -> bool:
        """Whether every final run has an outcome."""
        return self.doomed or (bool(self.finals) and all(outcome is not None for _, outcome in self.finals))


def build_results(study: Study, finished: Sequence[Finished], runs: Path) -> dict[str, Any]:
    """Everything that the study says, ready for results.json."""
    notes: list[str] = []
    tables = _score_tables(finished, runs, notes, len(study.seeds))
    methods = [_method(f, tables.get(_at(f))) for f in finished]
    ends = {_at(f): end for f, method in zip(finished, methods, strict=True) if (end := _end_of_search(method))}
    comparisons = [_with_doubt(c, ends) for c in _comparisons(study, finished, tables)]
    return {
        "format": RESULTS_FORMAT,
        "study": study.model_dump(mode="json"),
        "complete": all(f.complete for f in finished),
        "methods": methods,
        "comparisons": [_plain(c) for c in comparisons],
        "overall": _overall(comparisons),
        "ranking": _rankings(study, finished, tables),
        "pareto": _pareto(methods),
        "notes": notes + _edge_notes(ends) + _seed_note(study),
    }


def _at(f: Finished) -> tuple[str, str, str]:
    return (*f.cell.place, f.cell.method)


def _score_tables(
    finished: Sequence[Finished], runs: Path, notes: list[str], seeds: int
) -> dict[tuple[str, str, str], stats.Table]:
    """Item shares [S, N], better is more, of every complete cell. A diverged run gets the worst score of its task."""
    raw: dict[tuple[str, str, str], list[Any]] = {}
    for f in finished:
        if f.complete:
            raw[_at(f)] = [None] * seeds if f.doomed else [_features(job, outcome, runs) for job, outcome in f.finals]
    tables = {}
    for place in {key[:2] for key in raw}:
        here = {key: rows for key, rows in raw.items() if key[:2] == place}
        metric = next(f.cell.metric for f in finished if f.cell.place == place)
        good = {key: metrics.score_table(metric, alive) for key, rows in here.items() if (alive := _alive(rows))}
        if not good:
            notes.append(f"Every run on {place_name(*place)} diverged: there is nothing to compare.")
            continue
        worst = min(table.mean(1).min() for table in good.values())
        items = next(iter(good.values())).shape[1]
        for key, rows in here.items():
            table = np.full((seeds, items), worst)
            if key in good:
                table[[i for i, row in enumerate(rows) if row is not None]] = good[key]
            lost = sum(row is None for row in rows)
            if lost:
                notes.append(
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
    return json.loads(scores_file(runs, job["key"]).read_text(encoding="utf-8"))


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
        metric = here[0].metric if here else ""
        for a, b in wanted:
            pairs.append(
                dataclasses.replace(
                    stats.compare_pair(
                        tables[(*place, a)],
                        tables[(*place, b)],
                        names=(a, b),
                        task=place_name(*place),
                        metric=metric,
                        margin=study.margin.get(metric),
                        confidence=1 - study.level,
                        wanted_power=study.power,
                    ),
                    place=place,
                )
            )
    return stats.judge(pairs, study.level)


def _plain(c: stats.Comparison) -> dict[str, Any]:
    sign = metrics.sign(c.metric)
    scores = {"candidate_score": sign * c.candidate_score, "reference_score": sign * c.reference_score}
    model, task = c.place
    values = dataclasses.asdict(c) | scores | {"sentence": c.sentence, "model": model, "task": task}
    del values["place"]
    return values


def _method(f: Finished, table: stats.Table | None) -> dict[str, Any]:
    """One method on one task: what it was, what was tried, what came out, what it cost."""
    cell = f.cell
    sign = metrics.sign(cell.metric)
    seeds = [
        {"seed": job["seed"], "key": job["key"], **_outcome(outcome), "figures": (outcome or {}).get("figures")}
        for job, outcome in f.finals
    ]
    means = sign * table.mean(1) if table is not None else None
    return {
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "about": cell.entry.about,
        "peft_method": cell.recipe.method,
        "metric": cell.metric,
        "better": "more" if sign > 0 else "less",
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


def _overall(comparisons: Sequence[stats.Comparison]) -> list[dict[str, Any]]:
    """The mean difference over the tasks of one model that share a metric."""
    groups: dict[tuple[str, str, str, str], list[stats.Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.place[0], c.candidate, c.reference, c.metric), []).append(c)
    rows = []
    for (model, candidate, reference, metric), members in groups.items():
        if len(members) < 2 or members[0].spread.freedom == 0:
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
    for model in dict.fromkeys(f.cell.model for f in finished):
        tasks = list(dict.fromkeys(f.cell.task for f in finished if f.cell.model == model))
        names = dict.fromkeys(f.cell.method for f in finished if f.cell.model == model)
        scores = {
            name: [float(tables[(model, task, name)].mean()) for task in tasks]
            for name in names
            if all((model, task, name) in tables for task in tasks)
        }
        if len(scores) >= 2 and len(tasks) >= 2:
            rankings.append(
                {**dataclasses.asdict(stats.rank_methods(scores, study.level)), "model": model, "tasks": tasks}
            )
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


def _end_of_search(method: dict[str, Any]) -> str:
    """Which value chosen for a method lies at an end of what was tried: it might do better outside. "" if none does."""
    for name, value in (method["settings"] or {}).items():
        tried = [t["settings"][name] for t in method["trials"] if isinstance(t["settings"].get(name), int | float)]
        if len(set(tried)) > 2 and value in (min(tried), max(tried)):
            return f"the {'smallest' if value == min(tried) else 'largest'} {name} tried ({value:g})"
    return ""


def _with_doubt(c: stats.Comparison, ends: dict[tuple[str, str, str], str]) -> stats.Comparison:
    """A verdict on a method that was not searched to its best says so."""
    loser = {stats.Verdict.WORSE: c.candidate, stats.Verdict.BETTER: c.reference}.get(c.verdict)
    end = ends.get((*c.place, loser)) if loser else None
    return dataclasses.replace(c, note=f"{c.note} {loser} did best with {end}.".strip()) if end else c


def _edge_notes(ends: dict[tuple[str, str, str], str]) -> list[str]:
    return [
        f"{method} on {place_name(model, task)} did best with {end}: it may do better beyond."
        for (model, task, method), end in ends.items()
    ]


def _seed_note(study: Study) -> list[str]:
    if len(study.seeds) > 1:
        return []
    return ["With one seed no winner can be called: give seeds: 5, or at least 2."]
