"""Budgets: the rank or the steps with which a method has as much of something as the others.

Parameters are counted. Time and peak memory are measured: a few steps of every method tell how many it gets, or at
which rank.
"""

from collections.abc import Callable, Sequence

from dual_lora.lab.errors import UserError
from dual_lora.lab.progress import in_words
from dual_lora.lab.recipe.read import build_recipe, merged
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study.budget import Scale, Size, planned_steps, rank_field, solve_rank
from dual_lora.lab.study.cell import Cell, fields_at, probe_job
from dual_lora.lab.study.job import Job, Outcome, Training
from dual_lora.lab.study.study import MethodEntry, Study, rank_denominator

UNKNOWN = Size(0, 0)  # until a cell has its rank
MEMORY_RANKS = 4  # the second probe of a memory budget has this many times the first one's rank

Measure = Callable[[Sequence[Job]], Sequence[Outcome]]  # does the jobs


def fit_parameters(study: Study, scale: Scale, cell: Cell, target: float | None) -> None:
    """Give the cell its method, at the rank that the budget allows."""
    entry, name = cell.entry, cell.method
    field_name = rank_field(entry.name)
    rank = entry.fields.get(field_name) if field_name else None
    if rank is None and field_name and entry.name == "dual_lora":
        whole = [part for name in ("r1", "r2") if isinstance(part := entry.fields.get(name), int)]
        rank = sum(whole) if len(whole) == 2 else None
    anchor = study.budget.like is not None and study.origin(name) == study.budget.like
    if target is None or entry.unmatched or anchor:
        size = set_rank(cell, rank if isinstance(rank, int) else None, scale)
        cell.notes = ["outside the budget"] if entry.unmatched and target else []
        cell.mismatch = size.trainable / target - 1 if target and anchor else None
        return
    if rank is not None and field_name in entry.fields:
        raise UserError(
            f"methods.{name}: {field_name} is written, but the budget solves for it. Leave it out, or set "
            "unmatched: true to run this method outside the budget."
        )
    if rank is None and field_name:
        step = rank_step(entry)
        top = max(study.budget.max_rank, step)
        rank = solve_rank(lambda r: set_rank(cell, r, scale).trainable, target, step, top)
    size = set_rank(cell, rank, scale)
    cell.mismatch = size.trainable / target - 1
    found = f"the nearest is {size.trainable:,} at {field_name} {rank}" if field_name else f"it has {size.trainable:,}"
    check_match(study, cell, f"{target:,.0f} trainable parameters", found)


def rank_step(entry: MethodEntry) -> int:
    """The method's rank has to be a multiple of this, so that its parts and what follows from it are whole numbers."""
    least = 2 if entry.name == "dual_lora" and "r1" not in entry.fields else 1
    return rank_denominator(entry.fields.values(), least)


def check_match(study: Study, cell: Cell, budget: str, nearest: str) -> None:
    """Raise UserError where the cell's mismatch is not within the tolerance of the study's budget."""
    if cell.mismatch is not None and abs(cell.mismatch) > study.budget.tolerance:
        raise UserError(
            f"methods.{cell.method}: the budget of {budget} cannot be matched within {study.budget.tolerance:.0%}: "
            f"{nearest} ({cell.mismatch:+.1%}). Set unmatched: true to run it outside the budget, or raise "
            "budget.tolerance."
        )


def set_rank(cell: Cell, rank: int | None, scale: Scale | None = None) -> Size:
    """Give the cell its method at this rank, and return its size."""
    values = cell.recipe.model_dump(mode="json")
    values["method"] = {"name": cell.entry.name, **fields_at(cell.entry, rank)}
    over = {"train": cell.entry.train, "name": "run", "about": ""}
    cell.recipe, cell.rank = build_recipe(merged(values, over), "the study's recipe"), rank
    cell.size = counted(scale or Scale(), cell, cell.recipe)
    return cell.size


def counted(scale: Scale, cell: Cell, recipe: Recipe) -> Size:
    """What would train under the recipe, with what the cell holds still from the start left out."""
    frozen = [pattern for pattern, share in cell.entry.freeze.items() if share == 0]
    return scale.size(recipe, cell.classes, frozen)


def match_by_probes(study: Study, cells: Sequence[Cell], measure: Measure) -> None:
    """Give every cell the steps or the rank that its budget allows. Raises UserError where none does."""
    like = [cell for cell in cells if study.origin(cell.method) == study.budget.like]
    matched = [cell for cell in cells if not cell.entry.unmatched]
    probed = {cell.at: cell for cell in [*like, *matched]}
    first = dict(zip(probed, _measured(measure, [probe_job(study, cell) for cell in probed.values()]), strict=True))
    for cell in matched:
        target = study.budget.value
        if target is None:
            model = next(c for c in like if c.scenario == cell.scenario)
            memory, its = study.budget.match == "memory", first[model.at]
            target = _peak(its) if memory else _a_step(its) * planned_steps(model.recipe, fetch=True)
        if study.budget.match == "time":
            _fit_steps(study, cell, first[cell.at], target)
        else:
            _fit_rank(study, cell, first[cell.at], target, measure)


def _measured(measure: Measure, jobs: Sequence[Job]) -> list[Training]:
    return [outcome.training or Training() for outcome in measure(jobs)]


def _a_step(training: Training) -> float:
    assert training.seconds is not None
    return training.seconds / training.steps


def _peak(training: Training) -> float:
    assert training.peak_memory is not None
    return training.peak_memory


def _fit_steps(study: Study, cell: Cell, training: Training, seconds: float) -> None:
    a_step = _a_step(training)
    steps = max(1, round(seconds / a_step))
    cell.mismatch = steps * a_step / seconds - 1
    nearest = f"the nearest is {in_words(steps * a_step)} with {steps} steps"
    check_match(study, cell, f"{in_words(seconds)} of training", nearest)
    cell.recipe = cell.recipe.model_copy(update={"train": cell.recipe.train.model_copy(update={"steps": steps})})
    cell.notes.append(f"{steps} steps fit into {in_words(seconds)}")


def _fit_rank(study: Study, cell: Cell, training: Training, target: float, measure: Measure) -> None:
    """Peak memory grows linearly with the rank: two probes give the line, a third one checks the answer."""
    peak = _peak(training)
    if abs(peak / target - 1) > 0.005 and cell.rank is not None:
        (wide,) = _measured(measure, [probe_job(study, cell, cell.rank * MEMORY_RANKS)])
        slope = (_peak(wide) - peak) / (cell.rank * (MEMORY_RANKS - 1))
        rank = round(cell.rank + (target - peak) / slope) if slope > 0 else cell.rank
        step = rank_step(cell.entry)
        rank = max(step, min(rank, study.budget.max_rank) // step * step)
        (check,) = _measured(measure, [probe_job(study, cell, rank)])
        set_rank(cell, rank)
        peak = _peak(check)
    cell.mismatch = peak / target - 1
    nearest = f"the nearest is {peak / 2**20:,.0f} MiB" + (f" at rank {cell.rank}" if cell.rank is not None else "")
    check_match(study, cell, f"{target / 2**20:,.0f} MiB peak memory", nearest)
