"""Budgets in time or peak memory: a few measured steps of every method tell how many it gets, or at which rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dual_lora.lab.progress import in_words
from dual_lora.lab.study.cell import Cell, probe_job
from dual_lora.lab.study.job import Job, Outcome, Training
from dual_lora.lab.study.plan import check_match, planned_steps, set_rank
from dual_lora.lab.study.study import Study

MEMORY_RANKS = 4  # the second probe of a memory budget has this many times the first one's rank

Measure = Callable[[Sequence[Job]], Sequence[Outcome]]  # does the jobs


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
            target = _peak(its) if memory else _a_step(its) * planned_steps(model.recipe)
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
        step = 2 if cell.entry.name == "dual_lora" else 1
        rank = min(max(step, rank // step * step), study.budget.max_rank)
        (check,) = _measured(measure, [probe_job(study, cell, rank)])
        set_rank(cell, rank)
        peak = _peak(check)
    cell.mismatch = peak / target - 1
    nearest = f"the nearest is {peak / 2**20:,.0f} MiB" + (f" at rank {cell.rank}" if cell.rank is not None else "")
    check_match(study, cell, f"{target / 2**20:,.0f} MiB peak memory", nearest)
