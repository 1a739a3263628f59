"""From a study to its runs: every method checked, its rank solved for, its validation kept apart from its test.

A cell is one method on one task with one model. A job is one training run of a cell (a trial of the search, a probe
of the budget, or a final run with one seed), as plain values: it can be hashed, kept in a database and sent to
another process. Equal jobs have equal keys, so nothing that is finished is ever run again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_lora.lab.comparison import metrics
from dual_lora.lab.comparison.budget import Scale, Size, classes_of, rank_field, solve_rank
from dual_lora.lab.comparison.study import PRESETS, MethodEntry, Study, dotted, rank_denominator, rank_rule
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.recipe import Recipe, build_recipe, identity, merged, read_recipe

JOB_FORMAT = 1  # part of every key: raised when the meaning of a job changes
PROBE_STEPS = 8


@dataclass
class Cell:
    """One method on one task with one model, ready to run."""

    model: str
    task: str
    method: str
    entry: MethodEntry
    recipe: Recipe
    metric: str
    size: Size
    classes: int | None
    rank: int | None = None
    mismatch: float | None = None  # relative, to the budget; None outside a budget
    notes: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, str]:
        """Model and task: the cells of one place are compared with each other."""
        return self.model, self.task


def place_name(model: str, task: str) -> str:
    """How a task with a model is called in sentences."""
    return f"{task} ({model})" if model else task


def cell_id(cell: Cell) -> str:
    """The cell's name among the study's cells."""
    return json.dumps([cell.model, cell.task, cell.method])


def lay_out(study: Study) -> list[Cell]:
    """The study's cells, budgets in parameters matched. Raises UserError for everything that can be known now."""
    scale = Scale()
    cells = []
    entries = {name: _resolved(name, entry) for name, entry in study.variants().items()}
    for model, task, base in places(study):
        metric, classes = _metric(study, task, base), classes_of(base)
        _keep_test_apart(study, task, base)
        target = _target(study, scale, base, classes)
        for name, entry in entries.items():
            cell = _cell(study, scale, base, classes, name, entry, target)
            cells.append(Cell(model, task, name, entry, cell[0], metric, cell[1], classes, *cell[2:]))
    return cells


def places(study: Study) -> Iterator[tuple[str, str, Recipe]]:
    """Every model with every task, as a recipe that has no method yet."""
    for model, over_model in (study.models or {"": {}}).items():
        for task, entry in study.tasks.items():
            over_task = {k: v for k, v in entry.model_dump(exclude={"recipe", "metric"}).items() if v}
            over = merged(merged(study.overrides, over_task), over_model)
            if study.search and study.search.holdout:
                data = read_recipe(entry.recipe, over).data
                if not data.validation and not data.holdout:
                    over = merged(over, {"data": {"holdout": study.search.holdout}})
            yield model, task, read_recipe(entry.recipe, over)


def _resolved(name: str, entry: MethodEntry) -> MethodEntry:
    """The entry with its preset filled in and its fields known to PEFT."""
    from dual_lora.lab.methods import method_fields, method_names

    plain = (entry.name or name).lower().replace("-", "_").replace("+", "plus")
    preset = PRESETS.get(plain, {"name": plain})
    known = sorted({*method_names(), *PRESETS})
    if plain not in known:
        raise UserError(f"methods.{name}: there is no method {entry.name or name!r}.{suggest(plain, known)}")
    needed = {"galore": "galore_torch", "apollo": "apollo_torch"}.get(plain)
    if needed and importlib.util.find_spec(needed) is None:
        raise UserError(
            f"methods.{name}: {plain} needs the package {needed}: `pip install {needed.replace('_', '-')}`."
        )
    values = entry.model_dump()
    values |= {"name": preset["name"], "unmatched": entry.unmatched or preset.get("unmatched", False)}
    values["train"] = merged(preset.get("train", {}), entry.train)
    for key in entry.fields:
        fields = method_fields(preset["name"])
        if key not in fields:
            own = [k for k in MethodEntry.model_fields if k != "name"]
            hint = suggest(key, [*fields, *own])
            raise UserError(f"methods.{name}: method {preset['name']} has no field {key!r}.{hint}")
    return MethodEntry.model_validate(values)


def _metric(study: Study, task: str, recipe: Recipe) -> str:
    head = recipe.model.head
    metric = study.tasks[task].metric or metrics.default_metric(recipe.evaluate.tasks, head)
    for name in (metric, study.search.metric if study.search else None):
        if name:
            try:
                metrics.evaluation(name, head)
            except UserError as error:
                raise UserError(f"tasks.{task}: {error}") from None
    return metric


def _keep_test_apart(study: Study, task: str, recipe: Recipe) -> None:
    """Refuse to tune on test records."""
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.data.records import find

    data = recipe.data
    if not data.test:
        raise UserError(f"tasks.{task}: the recipe names no test records: set data.test.")

    def same(a: str, b: str) -> bool:
        return a == b or (not a.startswith("hub:") and not b.startswith("hub:") and find(a) == find(b))

    if data.train and same(data.train, data.test):
        raise UserError(f"tasks.{task}: data.train and data.test are the same records, {data.test}.")
    if study.search is None:
        return
    if not data.validation and not data.holdout:
        raise UserError(
            f"tasks.{task}: a search needs validation records: set search.holdout (or data.holdout) to the number of "
            "records to take out of training, or name data.validation."
        )
    if data.validation and same(data.validation, data.test):
        raise UserError(
            f"tasks.{task}: data.validation and data.test are the same records, {data.test}. Tuning on test records "
            "makes every comparison worthless: use data.holdout to take validation records out of training."
        )
    if data.test.startswith("hub:"):
        return  # its splits are separate by name; reading them here would mean a download
    everything = data.model_copy(update={"test_limit": None, "train_limit": None})
    tested = {(e.messages and repr(e.messages)) or repr((e.text, e.label)) for e in load_split(everything, "test")}
    tuned_on = [(e.messages and repr(e.messages)) or repr((e.text, e.label)) for e in load_split(data, "validation")]
    shared = sum(example in tested for example in tuned_on)
    if shared * 2 > len(tuned_on):
        raise UserError(
            f"tasks.{task}: {shared} of {len(tuned_on)} validation records are test records too. Tuning on test "
            "records makes every comparison worthless: use data.holdout to take validation records out of training."
        )


def _with_method(base: Recipe, entry: MethodEntry, fields: dict[str, Any]) -> Recipe:
    values = base.model_dump(mode="json")
    values["method"] = {"name": entry.name, **fields}
    return build_recipe(merged(values, {"train": entry.train, "name": "run", "about": ""}), "the study's recipe")


def _target(study: Study, scale: Scale, base: Recipe, classes: int | None) -> float | None:
    """The budget in parameters."""
    budget = study.budget
    if budget.match != "parameters":
        return None
    if budget.value is not None:
        return budget.value
    assert budget.like is not None
    entry = _resolved(budget.like, study.methods[budget.like])
    field_name = rank_field(entry.name)
    rank = entry.fields.get(field_name) if field_name else None
    return _size(scale, base, classes, entry, rank).trainable


def _size(scale: Scale, base: Recipe, classes: int | None, entry: MethodEntry, rank: int | None) -> Size:
    frozen = [pattern for pattern, share in entry.freeze.items() if share == 0]
    return scale.size(_with_method(base, entry, _fields(entry, rank)), classes, frozen)


def _fields(entry: MethodEntry, rank: int | None) -> dict[str, Any]:
    fields = dict(entry.fields)
    name = rank_field(entry.name)
    if rank is not None and name:
        fields[name] = rank
    return {key: rank_rule(value, rank, f"{entry.name}.{key}") for key, value in fields.items()}


def _cell(
    study: Study, scale: Scale, base: Recipe, classes: int | None, name: str, entry: MethodEntry, target: float | None
) -> tuple[Recipe, Size, int | None, float | None, list[str]]:
    """Recipe, size, rank, mismatch and notes of one method under the budget."""
    field_name = rank_field(entry.name)
    written = entry.fields.get(field_name) if field_name else None
    if written is None and field_name and entry.name == "dual_lora" and {"r1", "r2"} <= set(entry.fields):
        written = _sum_of(entry.fields)
    anchor = study.budget.like is not None and study.origin(name) == study.budget.like
    free = target is None or entry.unmatched
    if free or anchor:
        rank = written if isinstance(written, int) else None
        size = _size(scale, base, classes, entry, rank)
        notes = ["outside the budget"] if entry.unmatched and target else []
        mismatch = size.trainable / target - 1 if target and anchor else None
        return _with_method(base, entry, _fields(entry, rank)), size, rank, mismatch, notes
    assert target is not None
    if written is not None and field_name in entry.fields:
        raise UserError(
            f"methods.{name}: {field_name} is written, but the budget solves for it. Leave it out, or set "
            "unmatched: true to run this method outside the budget."
        )
    rank = written
    if written is None and field_name:
        step = rank_denominator(
            entry.fields.values(), 2 if entry.name == "dual_lora" and "r1" not in entry.fields else 1
        )
        top = max(study.budget.max_rank, step)
        rank = solve_rank(lambda r: _size(scale, base, classes, entry, r).trainable, target, step, top).rank
    size = _size(scale, base, classes, entry, rank)
    mismatch = size.trainable / target - 1
    if abs(mismatch) > study.budget.tolerance:
        nearest = (
            f"the nearest is {size.trainable:,} at {field_name} {rank}" if field_name else f"it has {size.trainable:,}"
        )
        raise UserError(
            f"methods.{name}: the budget of {target:,.0f} trainable parameters cannot be matched within "
            f"{study.budget.tolerance:.0%}: {nearest} ({mismatch:+.1%}). Set unmatched: true to run it outside the "
            "budget, or raise budget.tolerance."
        )
    return _with_method(base, entry, _fields(entry, rank)), size, rank, mismatch, []


def _sum_of(fields: dict[str, Any]) -> int | None:
    ranks = fields["r1"], fields["r2"]
    return ranks[0] + ranks[1] if all(isinstance(r, int) for r in ranks) else None


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
            search.seed,
            _override({f"train.{k}": v for k, v in search.train.items()} | point),
            metric,
            "validation",
            settings=point,
            trial=number,
        )
        for number, point in enumerate(search.points(cell.entry.search or None))
    ]


def choose(trials: Sequence[dict[str, Any]], outcomes: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The settings of the best trial ({} without a search).

    None when a trial is missing or failed (the search was not equal to the others'), and when all of them diverged.
    """
    if not trials:
        return {}
    if any(outcome is None for outcome in outcomes):
        return None
    scored = [(o["score"], job) for o, job in zip(outcomes, trials, strict=True) if o and o["status"] == "done"]
    if not scored:
        return None
    better = metrics.sign(trials[0]["metric"])
    return max(scored, key=lambda pair: better * pair[0])[1]["settings"]


def final_jobs(study: Study, cell: Cell, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that are compared, with the settings that the search chose."""
    return [
        _job(
            cell, "final", seed, _override(settings), cell.metric, "test", settings=settings, cost=study.cost and i == 0
        )
        for i, seed in enumerate(study.seeds)
    ]


def probe_job(study: Study, cell: Cell, rank: int | None = None) -> dict[str, Any]:
    """A few steps, to learn what a step costs; with another rank than the cell's if given."""
    over: dict[str, Any] = {"train": {"steps": PROBE_STEPS}}
    if rank is not None:
        over["method"] = _fields(cell.entry, rank)
    return _job(cell, "probe", study.seeds[0], over, cell.metric, "none", settings={}, rank=rank)


def set_rank(cell: Cell, rank: int) -> None:
    """Give the cell another rank, found by probes."""
    cell.recipe = _with_method(cell.recipe, cell.entry, _fields(cell.entry, rank))
    cell.size = Scale().size(cell.recipe, cell.classes, [p for p, share in cell.entry.freeze.items() if share == 0])
    cell.rank = rank


def base_jobs(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """The untrained language model on each task; a classifier has none (its head is drawn at random)."""
    first = {cell.place: cell for cell in reversed(list(cells)) if cell.recipe.model.head == "causal"}
    return [
        _job(
            Cell(
                c.model,
                c.task,
                "(untrained)",
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


def _override(settings: dict[str, Any]) -> dict[str, Any]:
    over: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, key = dotted(name).partition(".")
        over.setdefault(part, {})[key] = value
    return over


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
    work = {
        "format": JOB_FORMAT,
        "kind": kind,
        "recipe": build_recipe(values, f"{cell.method} on {cell.task}").model_dump(mode="json"),
        "data": fingerprint(cell.recipe),
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
        if source and not source.startswith("hub:"):
            prints[split] = _file_print(find(source))
    return prints


_prints: dict[tuple[Path, int, int], str] = {}


def _file_print(path: Path) -> str:
    stat = path.stat()
    at = (path.resolve(), stat.st_size, stat.st_mtime_ns)
    if at not in _prints:
        _prints[at] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _prints[at]


def planned_steps(recipe: Recipe) -> int:
    """Optimizer steps of a recipe, by the number of its training records."""
    from dual_lora.lab.data.examples import load_split

    if recipe.train.steps:
        return recipe.train.steps
    rows = len(load_split(recipe.data, "train"))
    return math.ceil(rows * recipe.train.epochs / (recipe.train.batch_size * recipe.train.accumulate))
