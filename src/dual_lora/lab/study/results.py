"""The results of a study from its finished runs: scores, comparisons, costs and Pareto fronts, as plain values."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.study import metrics, notes, verdicts
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.cell import Cell, Ended, Finished
from dual_lora.lab.study.conclude import about_pairs, conclude
from dual_lora.lab.study.job import Job, Outcome, Training, cell_name, read_scores, task_name
from dual_lora.lab.study.rows import AmendmentRow, MethodRow, ParetoRow, PointRow, Results, RunRow, UntrainedRow
from dual_lora.lab.study.study import Study

Tables = dict[tuple[str, str, str], stats.Table]  # (model, task, method) -> [S, N]
Reaches = dict[tuple[str, str], float | None]  # scenario -> `metrics.reach`
RESULTS_FORMAT = 2  # 1: verdicts by one pooled error; `rejudge` brings such a file up to date


class Cost(NamedTuple):
    """A cost's name for people, whether less of it is better, and what a run (and its training) says of it."""

    label: str
    less: bool
    of: Callable[[Outcome, Training], float | None]


COSTS = {
    "train_seconds": Cost("training time [s]", True, lambda _, training: training.seconds),
    "steps_per_second": Cost("steps a second", False, lambda run, _: run.steps_per_second),
    "tokens_per_second": Cost("tokens a second", False, lambda _, training: training.tokens_per_second),
    "peak_memory": Cost("peak memory [bytes]", True, lambda _, training: training.peak_memory),
    "trainable_parameters": Cost("trainable parameters", True, lambda *_: None),  # of the cell
    "adapter_bytes": Cost("adapter on disk [bytes]", True, lambda _, training: training.adapter_bytes),
    "merge_seconds": Cost("merge time [s]", True, lambda run, _: run.use.get("merge_seconds")),
    "forward_slowdown": Cost("slow-down of a forward pass", True, lambda run, _: run.use.get("forward_slowdown")),
    "decode_slowdown": Cost("slow-down of decoding", True, lambda run, _: run.use.get("decode_slowdown")),
}


def build_results(
    study: Study,
    finished: Sequence[Finished],
    runs: Path,
    untrained: Sequence[UntrainedRow] = (),
    amendments: Sequence[AmendmentRow] = (),
    plan: dict[str, Any] | None = None,
    bases: Sequence[Ended] = (),
) -> Results:
    """Return everything that the study says, ready for results.json. untrained: {"model", "task", "score"} a scenario.

    amendments, plan: as the study's folder has them. bases: runs of untrained models, for their warnings.
    """
    lost: list[str] = []
    tables, reaches = _score_tables(finished, runs, lost, len(study.seeds))
    methods = [
        _method(study, f, tables.get(f.cell.at), tables.get((*f.cell.scenario, study.baseline))) for f in finished
    ]
    pairs = _pairs(study, finished, tables, reaches)
    missing = _missing(study, finished)
    alone = dict.fromkeys(key[:2] for key, table in tables.items() if table.shape[1] == 1)
    pairs += _pairs(study, finished, _forgetting_tables(finished, runs, lost), {}, "forgetting")
    ended = [*(run for f in finished for run in f.finals), *bases, *(run for f in finished for run in f.trials)]
    conclusion = conclude(study, pairs, methods, untrained, amendments, missing)
    return {
        "format": RESULTS_FORMAT,
        "study": study.model_dump(mode="json"),
        "complete": all(f.complete for f in finished),
        "methods": methods,
        "comparisons": conclusion.comparisons,
        "false_alarm": conclusion.false_alarm,
        "pareto": pareto(methods),
        "plan": plan,
        "amendments": list(amendments),
        "notes": [
            *notes.unfinished(study, finished),
            *[f"p values are corrected for the {missing} comparison{'s'[: missing != 1]} still to come as well."]
            * bool(missing and pairs),
            *lost,
            *conclusion.notes,
            *notes.seen_before(plan, amendments),
            *(f"{task_name(*where)} has one test item: it says nothing about others." for where in alone),
            *["With one seed no winner can be called: give seeds: 5, or at least 2."] * (len(study.seeds) == 1),
            *dict.fromkeys(f.cell.overlap for f in finished if f.cell.overlap),
            *notes.unmeasured(finished),
            *notes.warned(ended),
            *notes.shared_machine(methods),
            *notes.devices(finished),
            *notes.precisions(finished),
        ],
    }


def _score_tables(finished: Sequence[Finished], runs: Path, remarks: list[str], seeds: int) -> tuple[Tables, Reaches]:
    """Item shares [S, N], better is more, of every complete cell, and how far an answer moves each scenario's metric.

    A diverged run has NaN for each item: what it counts with depends on the other method (`stats.with_lost`).
    """
    tables: Tables = {}
    reaches: Reaches = {}
    for scenario in dict.fromkeys(f.cell.scenario for f in finished if f.complete):
        here = [f for f in finished if f.complete and f.cell.scenario == scenario]
        metric = here[0].cell.metric
        came: dict[tuple[str, str, str], dict[int, Any]] = {}  # what every item adds, by the seed
        for f in here:
            done = [i for i, (_, end) in enumerate(f.finals) if end and end.status == "done"]
            came[f.cell.at] = {i: read_scores(runs, f.finals[i][0].key) for i in done if not f.diverged_in_search}
        if len(counts := sorted({len(row) for rows in came.values() for row in rows.values()})) > 1:
            raise UserError(
                f"Runs on {task_name(*scenario)} were tested on different numbers of items "
                f"({', '.join(map(str, counts))}), so they cannot be paired: their test records are not the same."
            )
        good = {key: metrics.score_table(metric, list(rows.values())) for key, rows in came.items() if rows}
        if not good:
            remarks.append(f"Every run on {task_name(*scenario)} diverged: there is nothing to compare.")
            continue
        reaches[scenario] = metrics.reach(metric, [row for rows in came.values() for row in rows.values()])
        for key, rows in came.items():
            tables[key] = np.full((seeds, counts[0]), np.nan)
            if rows:
                tables[key][list(rows)] = good[key]
            lost = seeds - len(rows)
            if lost == seeds:
                remarks.append(f"Every run of {cell_name(*key)} diverged: it has no score there, and ranks last.")
            elif lost:
                remarks.append(
                    f"{lost} of {seeds} runs of {cell_name(*key)} diverged; each counts with the worst score of the "
                    "two methods' runs in a comparison."
                )
    return tables, reaches


def _pairs(
    study: Study,
    finished: Sequence[Finished],
    tables: Tables,
    reaches: Reaches,
    metric: str = "",
) -> list[verdicts.Comparison]:
    """The pairs of every scenario that have tables. metric: of the tables, each task's own unless told."""
    pairs = []
    for scenario in dict.fromkeys(f.cell.scenario for f in finished):
        here = [f.cell for f in finished if f.cell.scenario == scenario and f.cell.at in tables]
        about = about_pairs(study, scenario, metric or here[0].metric) if here else {}
        about["reach"] = reaches.get(scenario)
        pairs += [
            verdicts.compare_pair(
                *stats.with_lost_runs(tables[(*scenario, a)], tables[(*scenario, b)]), names=(a, b), **about
            )
            for a, b in wanted_pairs(study, [cell.method for cell in here])
        ]
    return pairs


def wanted_pairs(study: Study, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of candidate and reference, of these methods of one scenario."""
    if study.pairs == "all":
        return [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]
    return [(name, study.baseline) for name in names if name != study.baseline and study.baseline in names]


def _missing(study: Study, finished: Sequence[Finished]) -> int:
    """Return how many pairs wait for runs that have not ended, those in forgetting counted too."""
    count = 0
    for scenario in dict.fromkeys(f.cell.scenario for f in finished):
        here = [f for f in finished if f.cell.scenario == scenario]
        whole = {f.cell.method for f in here if f.complete}
        forgetting = {f.cell.method for f in here if f.cell.recipe.evaluate.forgetting is not None}
        for pair in wanted_pairs(study, [f.cell.method for f in here]):
            if not whole.issuperset(pair):
                count += 1 + forgetting.issuperset(pair)
    return count


def _method(study: Study, f: Finished, table: stats.Table | None, reference: stats.Table | None) -> MethodRow:
    """One method on one task: what it was, what was tried, what came out, what it cost. reference: the table of the
    method that all are compared with, by which lost runs count."""
    cell, sign = f.cell, metrics.sign(f.cell.metric)
    done = [outcome for _, outcome in f.finals if outcome and outcome.status == "done"]
    diverged = sum(outcome is not None and outcome.status == "diverged" for _, outcome in f.finals)
    scored = not f.diverged_in_search and diverged < len(f.finals)
    known = [t for t in (table, reference) if t is not None]
    means = sign * stats.with_lost_runs(*known)[0].mean(1) if table is not None and scored else None
    grid = study.search.points(cell.entry.search or None) if study.search and f.trials else []
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
        "trials": [
            {
                "settings": job.settings,
                "beyond": job.settings not in grid,
                **_run(job, outcome),
                "figures": outcome.figures if outcome else None,
            }
            for job, outcome in f.trials
        ],
        "seeds": [
            {
                **_run(job, outcome),
                "figures": outcome.figures if outcome else None,
                "code": outcome.code if outcome else None,
            }
            for job, outcome in f.finals
        ],
        "score": None if means is None else float(means.mean()),
        "score_deviation": float(means.std(ddof=1)) if means is not None and len(means) > 1 else None,
        "items": None if table is None else table.shape[1],
        "forgetting": _mean([((outcome and outcome.figures) or {}).get("forgetting") for _, outcome in f.finals]),
        "diverged": diverged,
        "diverged_in_search": f.diverged_in_search,
        "cost": _cost(cell, done),
        # How many runs at a time there were when these were measured; None where a run does not say.
        "measured_beside": sorted({outcome.runs_at_a_time for outcome in done}, key=lambda n: n or 0),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _run(job: Job, outcome: Outcome | None) -> RunRow:
    status, score, seconds = (outcome.status, outcome.score, outcome.seconds) if outcome else ("missing", None, None)
    return {"seed": job.seed, "key": job.key, "status": status, "score": score, "seconds": seconds}


def _cost(cell: Cell, runs: Sequence[Outcome]) -> dict[str, float | None]:
    """Return the medians over the seeds; what is measured once is taken from where it was measured."""
    medians: dict[str, float | None] = {}
    for name, cost in COSTS.items():
        known = [value for run in runs if (value := cost.of(run, run.training or Training())) is not None]
        medians[name] = float(statistics.median(known)) if known else None
    return medians | {"trainable_parameters": float(cell.size.trainable)}


def pareto(methods: Sequence[MethodRow]) -> list[ParetoRow]:
    """Return for every task and cost each method's quality and cost, and whether no other is better in both."""
    fronts: list[ParetoRow] = []
    for model, task in dict.fromkeys((m["model"], m["task"]) for m in methods):
        here = [m for m in methods if (m["model"], m["task"]) == (model, task) and m["score"] is not None]
        for cost, (label, less, _) in COSTS.items():
            points: list[PointRow] = [
                {"method": m["method"], "quality": m["score"], "cost": spent, "front": False}
                for m in here
                if m["score"] is not None and (spent := m["cost"][cost]) is not None
            ]
            if not points:
                continue
            sign = metrics.direction(here[0]["better"])
            turned = [(sign * p["quality"], -p["cost"] if less else p["cost"]) for p in points]
            for point, mine in zip(points, turned, strict=True):
                point["front"] = not any(
                    other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in turned
                )
            metric = here[0]["metric"]
            fronts.append(ParetoRow(model=model, task=task, metric=metric, cost=cost, label=label, points=points))
    return fronts


def _forgetting_tables(finished: Sequence[Finished], runs: Path, remarks: list[str]) -> Tables:
    """Item shares [seeds, texts] of every cell that has them for all of its runs."""
    tables: Tables = {}
    for f in finished:
        if f.cell.recipe.evaluate.forgetting is None or not f.complete or f.diverged_in_search:
            continue
        try:
            if any(outcome is None or outcome.status != "done" for _, outcome in f.finals):
                raise ValueError("A run without an end has no figure.")
            features = [read_scores(runs, job.key, "forgetting") for job, _ in f.finals]
        except (OSError, ValueError):
            remarks.append(f"Forgetting of {f.cell} is not compared: not every run of it came to an end with a figure.")
            continue
        tables[f.cell.at] = metrics.score_table("forgetting", features)
    return tables
