"""The training runs of a cell: the trials of its search, the probes of its budget, its final runs.

A job is one of them as plain values: it can be hashed, kept in a database and sent to another process. Equal jobs have
equal keys, so nothing that is finished is ever run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dual_lora.lab.recipe.read import build_recipe, identity, merged
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study import metrics
from dual_lora.lab.study.cell import Cell, fields_at
from dual_lora.lab.study.search import dotted
from dual_lora.lab.study.study import MethodEntry, Study, rank_rule

JOB_FORMAT = 1  # part of every key: raised when the meaning of a job changes
PROBE_STEPS = 8
UNTRAINED = "(untrained)"


def trial_jobs(study: Study, cell: Cell) -> list[dict[str, Any]]:
    """The search of one cell."""
    if study.search is None:
        return []
    search = study.search
    metric = search.metric or cell.metric
    return [
        _job(
            cell,
            "trial",
            search.seed + again,
            _override(cell, {f"train.{k}": v for k, v in search.train.items()} | point),
            metric,
            "validation",
            settings=point,
            trial=number,
        )
        for number, point in enumerate(search.points(cell.entry.search or None))
        for again in range(search.seeds)
    ]


def choose(trials: Sequence[dict[str, Any]], outcomes: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The settings of the best trial ({} without a search), by the mean over the search's seeds.

    None when a trial is missing or failed (the search was not equal to the others'), and when all of them diverged.
    Settings with which one seed diverged are not chosen.
    """
    if not trials:
        return {}
    if any(outcome is None for outcome in outcomes):
        return None
    means = mean_scores([{"settings": job["settings"], **(o or {})} for job, o in zip(trials, outcomes, strict=True)])
    better = metrics.sign(trials[0]["metric"])
    return max(means, key=lambda pair: better * pair[1])[0] if means else None


def mean_scores(trials: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Settings that were tried, with the mean score over their seeds; without those with which one seed diverged."""
    found: list[tuple[dict[str, Any], list[Any]]] = []
    for t in trials:
        scores = next((scores for settings, scores in found if settings == t["settings"]), None)
        if scores is None:
            found.append((t["settings"], scores := []))
        scores.append(t["score"] if t["status"] == "done" else None)
    return [(settings, sum(scores) / len(scores)) for settings, scores in found if None not in scores]


def final_jobs(study: Study, cell: Cell, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that are compared, with the settings that the search chose."""
    return [
        _job(
            cell,
            "final",
            seed,
            _override(cell, settings),
            cell.metric,
            "test",
            settings=settings,
            cost=study.cost and i == 0,
        )
        for i, seed in enumerate(study.seeds)
    ]


def probe_job(study: Study, cell: Cell, rank: int | None = None) -> dict[str, Any]:
    """A few steps, to learn what a step costs; with another rank than the cell's if given."""
    over: dict[str, Any] = {"train": {"steps": PROBE_STEPS}}
    if rank is not None:
        over["method"] = fields_at(cell.entry, rank)
    return _job(cell, "probe", study.seeds[0], over, cell.metric, "none", settings={}, rank=rank)


def base_jobs(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The untrained language model on each task; a classifier has none (its head is drawn at random)."""
    first = {cell.place: cell for cell in reversed(list(cells)) if cell.recipe.model.head == "causal"}
    return [
        _job(
            Cell(
                c.model,
                c.task,
                UNTRAINED,
                MethodEntry.model_validate({"name": "full"}),
                c.recipe,
                c.metric,
                c.size,
                None,
            ),
            "base",
            0,
            {"method": {"name": "full"}, "train": {}},
            c.metric,
            "test",
            settings={},
        )
        for c in first.values()
    ]


def _override(cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    over: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, key = dotted(name).partition(".")
        over.setdefault(part, {})[key] = rank_rule(value, cell.rank, name) if part == "method" else value
    return over


def settings_in_words(settings: dict[str, Any] | None) -> str:
    """What a search tries or chose (None: nothing), as people read it."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in (settings or {}).items()
    )


def _job(
    cell: Cell, kind: str, seed: int, over: dict[str, Any], metric: str, split: str, **more: Any
) -> dict[str, Any]:
    values = merged(cell.recipe.model_dump(mode="json"), over)
    values["train"]["seed"] = seed
    values["evaluate"] |= {
        "tasks": [metrics.evaluation(metric, cell.recipe.model.head)],
        "split": split if split != "none" else "test",
        "base": False,
    }
    if kind != "final":
        values["evaluate"]["forgetting"] = None
    work = {
        "format": JOB_FORMAT,
        "kind": kind,
        "recipe": build_recipe(values, f"{cell.method} on {cell.task}").model_dump(mode="json"),
        "data": fingerprint(cell.recipe) | _print_of_texts(values["evaluate"].get("forgetting")),
        "freeze": cell.entry.freeze,
        "round": cell.entry.round,
        "metric": metric,
        "split": split,
        "cost": more.pop("cost", False),
    }
    same = {**work, "recipe": identity(build_recipe(work["recipe"]))}
    key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
    return {"key": key, **work, "model": cell.model, "task": cell.task, "method": cell.method, "seed": seed, **more}


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """What the data files held: a changed file makes another run."""
    from dual_lora.lab.data.records import find

    prints = {}
    for split in ("train", "validation", "test"):
        source = getattr(recipe.data, split)
        files = [name.strip() for name in (source or "").split(" + ")]
        if found := [_file_print(find(name)) for name in files if name and not name.startswith("hub:")]:
            prints[split] = "+".join(found)
    return prints


def _print_of_texts(source: str | None) -> dict[str, str]:
    from dual_lora.lab.data.records import find

    return {"forgetting": _file_print(find(source))} if source and not source.startswith("hub:") else {}


_prints: dict[tuple[Path, int, int], str] = {}


def _file_print(path: Path) -> str:
    stat = path.stat()
    at = (path.resolve(), stat.st_size, stat.st_mtime_ns)
    if at not in _prints:
        _prints[at] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _prints[at]
