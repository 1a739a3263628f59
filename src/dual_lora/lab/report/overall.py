"""Several tasks at once: how often each method beats the reference, how scores are spread, which ranks differ."""

from collections import Counter
from typing import Any, NamedTuple

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Source, Table, Text, View
from dual_lora.lab.report.columns import Row, columns, grouped
from dual_lora.lab.report.studies import scenario
from dual_lora.lab.study import aggregates

Studies = list[tuple[str, dict[str, Any]]]  # (its name on this page, results)
MOST_SEEDS = 1000  # of a method, of which every pair is compared
MOST_POINTS = 60  # of a profile's curve
CHANCE = (
    "Chance that a run of the method beats one of the reference on a task drawn at random; half is no difference. "
    "Intervals (95 %) are by a bootstrap of the seeds (rliable): they say nothing about other tasks, and are too short "
    "where seeds and tasks are few, above all near 0 and 1. Methods are told by their names; of each task the study "
    "with the most scores counts."
)
PROFILE = "Share of runs, over tasks, whose score is above the reference's mean by so many margins; bands as above."


class _Task(NamedTuple):
    """A task's final scores, more is better: of each method one for each seed."""

    name: str
    scores: dict[str, list[float]]
    margin: float | None
    reference: str


def overall_sections(studies: Studies, source: Source | None = None) -> list[Section]:
    """Return one section, if methods of one name were run on two tasks or more. source: of a single study."""
    tasks = _tasks(studies)
    if not tasks:
        return []
    reference = Counter(task.reference for task in tasks).most_common(1)[0][0]
    tasks = [task for task in tasks if reference in task.scores]
    counts = Counter(name for task in tasks for name in task.scores if name != reference)
    others = [name for name, n in counts.items() if n > 1]
    if not others:
        return []
    rows: list[Row] = []
    for name in others:
        own = {task.name: task.scores for task in tasks if name in task.scores}
        chance = aggregates.improvement(own, name, reference)
        rows.append(
            {"method": name, "tasks": len(own), "chance": chance.value}
            | {"chance_low": chance.low, "chance_high": chance.high}
        )
    methods = [reference, *others]
    whole = [task for task in tasks if all(name in task.scores for name in methods)]
    scores = {task.name: {name: task.scores[name] for name in methods} for task in whole}
    names = ", ".join(task.name for task in tasks if any(name in task.scores for name in others))
    blocks: list[Block] = [
        Text(f"Against {reference}, on {names}.", "lead"),
        Table("How often a run is better", columns("method tasks chance chance_low chance_high"), rows, CHANCE),
        *_profiles(whole, methods, reference),
        *_ranks(scores),
    ]
    return [Section("Over all tasks", blocks, "Overview", source=source)]


def _tasks(studies: Studies) -> list[_Task]:
    """Return each task from the study with the most scores of it."""
    found = [task for _, results in studies for task in _study_tasks(results)]
    sizes = grouped(found, lambda task: task.name)
    return [max(some, key=lambda task: sum(map(len, task.scores.values()))) for some in sizes.values()]


def _study_tasks(results: dict[str, Any]) -> list[_Task]:
    references = Counter(c["reference"] for c in results["comparisons"]).most_common(1)
    if not references:
        return []
    (reference, _), tasks = references[0], []
    margins = {(scenario(c), c["metric"]): c.get("margin") for c in results["comparisons"]}
    for where, rows in grouped(results["methods"], scenario).items():
        sign = -1.0 if rows[0]["better"] == "less" else 1.0
        every = [s["score"] for m in rows for s in m["seeds"] if s.get("score") is not None]
        if not every or max(len(m["seeds"]) for m in rows) > MOST_SEEDS:
            continue
        worst = min(every, key=lambda score: sign * score)  # of a run that is lost
        scores = {
            m["method"]: [
                sign * (worst if s.get("score") is None else s["score"]) for s in m["seeds"] if s["status"] != "missing"
            ]
            for m in rows
        }
        scores = {name: own for name, own in scores.items() if own}
        tasks.append(_Task(where, scores, margins.get((where, rows[0]["metric"])), reference))
    return tasks


def _profiles(tasks: list[_Task], methods: list[str], reference: str) -> list[Block]:
    """Chart the profiles of those tasks that have a margin, the unit in which they are put together."""
    known = [task for task in tasks if task.margin]
    if len(known) < 2:
        return []
    scaled = {}
    for task in known:
        mean = sum(task.scores[reference]) / len(task.scores[reference])
        scaled[task.name] = {name: [(s - mean) / (task.margin or 1.0) for s in task.scores[name]] for name in methods}
    every = sorted(s for own in scaled.values() for name in methods for s in own[name])
    at = sorted({every[round(i * (len(every) - 1) / MOST_POINTS)] for i in range(MOST_POINTS + 1)})
    points = [
        {"series": name, "x": x, "y": share.value, "low": share.low, "high": share.high}
        for name in methods
        for x, share in zip(at, aggregates.profile(scaled, name, at), strict=True)
    ]
    view = View("", Axis(f"score above {reference}'s mean, in margins"), Axis("share of runs", form="%"), points)
    return [Chart("Performance profile", "lines", [view], PROFILE)]


def _ranks(scores: dict[str, dict[str, list[float]]]) -> list[Block]:
    """Mean ranks and groups that are not told apart; of three methods on two tasks at least."""
    if len(scores) < 2 or len(next(iter(scores.values()))) < 3:
        return []
    found = aggregates.ranks(scores)
    rows = [{"method": name, "mean_rank": rank} for name, rank in found.mean.items()]
    groups = "; ".join(" and ".join(group) for group in found.groups) or "none"
    few = f" On {len(scores)} tasks no ranks can lie that far apart." if found.critical > len(found.mean) - 1 else ""
    note = (
        f"By the means over the seeds, 1 is best. Two methods differ whose ranks are {found.critical:.2f} apart or "
        f"more (Nemenyi; Friedman's test that none differ: p = {found.p:.2g}). Not told apart: {groups}.{few}"
    )
    return [Table("Mean ranks", columns("method mean_rank"), rows, note)]
