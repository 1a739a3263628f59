"""A cell is one method on one task with one model: what a study's table is made of. From it follow its runs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dual_lora.lab.recipe.read import changed
from dual_lora.lab.recipe.schema import Recipe, normalised_name
from dual_lora.lab.study import metrics
from dual_lora.lab.study.job import Job, Kind, Outcome, Settings, Split, cell_name, data_digest
from dual_lora.lab.study.rank_rule import rank_rule
from dual_lora.lab.study.search import choose, dotted, next_beyond_grid
from dual_lora.lab.study.study import MethodEntry, Study

# The field that sets a method's size, where it is not "r".
RANK_FIELDS = {
    "adalora": "init_r",
    "fourierft": "n_frequency",
    "waveft": "n_frequency",
    "prompt_tuning": "num_virtual_tokens",
    "prefix_tuning": "num_virtual_tokens",
    "p_tuning": "num_virtual_tokens",
    "cpt": "num_virtual_tokens",
    "adaption_prompt": "adapter_len",
}
PROBE_STEPS = 8
PROBE_RECORDS = 64
UNTRAINED = "(untrained)"
Ended = tuple[Job, Outcome | None]


@dataclass(frozen=True)
class Size:
    """Parameters that train (those of a frozen group are not among them), and all of the base model's."""

    trainable: int
    base: int
    multiplied: int = 0  # weights of linear layers: what costs arithmetic; embeddings do not
    width: int = 0  # of the model


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
    overlap: str = ""  # what validation and test records have in common, in a sentence

    @property
    def scenario(self) -> tuple[str, str]:
        """Model and task: the cells of one scenario are compared with each other."""
        return self.model, self.task

    @property
    def at(self) -> tuple[str, str, str]:
        """Model, task and method: the cell's name among the study's cells."""
        return self.model, self.task, self.method

    def __str__(self) -> str:
        return cell_name(*self.at)


@dataclass
class Finished:
    """A cell with what came of it. `finals` in the order of the study's seeds; None where a run is missing."""

    cell: Cell
    trials: list[Ended]
    chosen: Settings | None
    finals: list[Ended]

    @property
    def diverged_in_search(self) -> bool:
        """Whether every trial diverged: the finals count as diverged without being run."""
        outcomes = [outcome for _, outcome in self.trials]
        return bool(outcomes) and all(outcome and outcome.status == "diverged" for outcome in outcomes)

    @property
    def complete(self) -> bool:
        """Whether every final run has an outcome."""
        return self.diverged_in_search or (bool(self.finals) and all(outcome for _, outcome in self.finals))


def rank_field(method: str) -> str | None:
    """The field of a method that sets its size, None if it has none."""
    from dual_lora.lab.model.methods import method_fields

    field = RANK_FIELDS.get(normalised_name(method), "r")
    return field if field in method_fields(method) else None


def fields_at(entry: MethodEntry, rank: int | None) -> dict[str, Any]:
    """The fields of the method's PEFT configuration at this rank, rules such as 2r worked out."""
    fields = dict(entry.fields)
    name = rank_field(entry.name)
    if rank is not None and name:
        fields[name] = rank
    return {key: rank_rule(value, rank, f"{entry.name}.{key}") for key, value in fields.items()}


def trial_jobs(study: Study, cell: Cell, outcome: Callable[[Job], Outcome | None] = lambda _: None) -> list[Job]:
    """The search of one cell: its grid, and what follows beyond the grid's end from the outcomes that are there."""
    search = study.search
    if search is None:
        return []

    def at(point: Settings) -> list[Job]:
        over = _override(cell, {f"train.{k}": v for k, v in search.train.items()} | point)
        seeds = range(search.seed, search.seed + search.seeds)
        return [_job(cell, "trial", seed, over, search.metric or cell.metric, "validation", point) for seed in seeds]

    points = search.points(cell.entry.search or None)
    jobs = [job for point in points for job in at(point)]
    for _ in range(search.extend):
        best = choose([(job, outcome(job)) for job in jobs], search.decide)
        further = next_beyond_grid(best, points) if best else None
        if further is None:
            break
        points.append(further)
        jobs += at(further)
    return jobs


def final_jobs(study: Study, cell: Cell, settings: Settings) -> list[Job]:
    """The runs that are compared, with the settings that the search chose."""
    over = _override(cell, settings)
    jobs = []
    for i, seed in enumerate(study.seeds):
        drawn = {"data": {"seed": seed}} if study.subsets == "own" else {}
        cost = study.cost and i == 0
        jobs.append(_job(cell, "final", seed, over | drawn, cell.metric, "test", settings, cost=cost))
    return jobs


def probe_job(study: Study, cell: Cell, rank: int | None = None) -> Job:
    """Make a job of a few steps that measures the cost of a step, at the cell's rank or the given one."""
    over: dict[str, Any] = {"train": {"steps": PROBE_STEPS}}
    if rank is not None:
        over["method"] = fields_at(cell.entry, rank)
    return _job(cell, "probe", study.seeds[0], over, cell.metric, "none")


def pace_job(study: Study, cell: Cell) -> Job:
    """Make a job of a few steps and validation records that measures the cost of a whole run.

    It logs, so that its first steps, which warm up, can be left out.
    """
    limit = min(PROBE_RECORDS, cell.recipe.data.test_limit or PROBE_RECORDS)
    over = {"train": {"steps": PROBE_STEPS, "log_every": PROBE_STEPS // 4}, "data": {"test_limit": limit}}
    return _job(cell, "probe", study.seeds[0], over, cell.metric, "validation")


def base_jobs(cells: Iterable[Cell]) -> list[Job]:
    """The untrained language model on each task; a classifier has none (its head is drawn at random)."""
    first = {cell.scenario: cell for cell in reversed(list(cells)) if cell.recipe.model.head == "causal"}
    full = MethodEntry.model_validate({"name": "full"})
    bases = [Cell(c.model, c.task, UNTRAINED, full, c.recipe, c.metric, c.size, None) for c in first.values()]
    return [_job(c, "base", 0, {"method": {"name": "full"}, "train": {}}, c.metric, "test") for c in bases]


def _override(cell: Cell, settings: Settings) -> dict[str, Any]:
    over: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, key = dotted(name).partition(".")
        over.setdefault(part, {})[key] = rank_rule(value, cell.rank, name) if part == "method" else value
    return over


def _job(
    cell: Cell,
    kind: Kind,
    seed: int,
    over: dict[str, Any],
    metric: str,
    split: Split,
    settings: Settings | None = None,
    cost: bool = False,
) -> Job:
    evaluate: dict[str, Any] = {
        "tasks": [metrics.evaluation(metric, cell.recipe.model.head)],
        "split": split if split != "none" else "test",
        "base": False,
    }
    if kind != "final":
        evaluate["forgetting"] = None
    run = {"train": {"seed": seed}, "evaluate": evaluate}
    recipe = changed(cell.recipe, Recipe.merged(over, run), f"{cell.method} on {cell.task}")
    held = dict(cell.entry.freeze), cell.entry.round
    return Job(kind, recipe, *cell.at, seed, metric, split, settings or {}, data_digest(recipe), *held, cost)
