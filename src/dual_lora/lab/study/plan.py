"""The cells of a study: every method checked, its rank solved for, its validation kept apart from its test.

One precision holds for the whole study: what `auto` stands for is chosen when the study is made, and kept with it.
Times, scores and job keys depend on it, so a study never mixes runs of two choices, wherever it goes on.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.model.precision import (
    AUTO,
    DTYPES,
    FIELDS,
    Fast,
    Short,
    fast_precision,
    is_auto,
    with_device_precision,
    with_precision,
)
from dual_lora.lab.recipe.read import changed, recipe_values, recipe_with
from dual_lora.lab.recipe.schema import Recipe, TrainSection
from dual_lora.lab.study import metrics
from dual_lora.lab.study.budget import UNKNOWN, Scale, classes_of, fit_parameters, set_rank, size_of_cell, written_rank
from dual_lora.lab.study.cell import Cell, trial_jobs
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.job import Settings
from dual_lora.lab.study.study import PRESETS, MethodEntry, Study

Scenario = tuple[str, str]  # the names of a model and a task
MOST_CELLS = 1000  # methods times tasks times models: each is built once, to count its parameters
MOST_IN_ALL = 50_000  # runs, of tuning and final ones


@dataclass(frozen=True)
class Plan:
    """A study with its recipes, which are read once."""

    study: Study
    recipes: dict[Scenario, Recipe]  # of no method yet, in the study's precision
    precision: dict[str, Any] = field(default_factory=dict)  # what `auto` stands for, and what the choice followed from

    @classmethod
    def read(cls, study: Study) -> "Plan":
        """The plan of a study in its own precision, or in the one that this device is fast in."""
        short = None if study.precision == AUTO else study.precision
        recipes = _recipes_of(study)
        return cls(
            study, {at: with_precision(r, short) if short else with_device_precision(r) for at, r in recipes.items()}
        )


def lay_out(plan: Plan, scale: Scale | None = None) -> list[Cell]:
    """The study's cells, budgets in parameters matched. Raises UserError for everything that can be known now.

    scale: what has been counted for other studies, which is not counted again.
    """
    study, scale = plan.study, scale or Scale()
    cells = []
    entries = {name: _resolved(name, entry) for name, entry in study.variants().items()}
    for (model, task), base in plan.recipes.items():
        metric = _metric(study, task, base)
        overlap = _keep_test_apart(study, task, base, metric)
        _check_subsets(study, task, base)
        classes = classes_of(base)
        target, at = _target(study, scale, base, classes)
        for name, entry in entries.items():
            cell = Cell(
                model,
                task,
                name,
                entry,
                _with_training_settings(entry, base),
                metric,
                UNKNOWN,
                classes,
                overlap=overlap,
            )
            fit_parameters(study, scale, cell, target, at)
            _check_training(study, scale, cell)
            cells.append(cell)
    return cells


def _recipes_of(study: Study) -> dict[Scenario, Recipe]:
    """The recipe of every model with every task, with `auto` where it says so."""
    _check_size(study)
    recipes = {}
    for model, over_model in (study.models or {"": {}}).items():
        for task, entry in study.tasks.items():
            over_task = {k: v for k, v in entry.model_dump(exclude={"recipe", "metric"}).items() if v}
            over = Recipe.merged(Recipe.merged(study.overrides, over_task), over_model)
            values, where = recipe_values(entry.recipe)
            if study.search and study.search.holdout:
                data = Recipe.merged(values, over).get("data") or {}
                own = (data.get("validation") or data.get("holdout")) if isinstance(data, dict) else None
                if not own:
                    over = Recipe.merged(over, {"data": {"holdout": study.search.holdout}})
                elif isinstance(own, int) and own != study.search.holdout:
                    where_from = f"the recipe's own data.holdout: {own}, not search.holdout: {study.search.holdout}"
                    warn(f"tasks.{task}: the search takes {where_from}.", stacklevel=2)
            recipes[model, task] = recipe_with(values, over, where)
    return recipes


def _check_size(study: Study) -> None:
    """Raise UserError where few lines ask for more than can be planned in minutes."""
    cells = len(study.variants()) * study.scenarios
    trials = study.search.count * study.search.seeds if study.search else 0
    what = {"methods times tasks times models": (cells, MOST_CELLS)}
    what["runs"] = cells * (trials + len(study.seeds)), MOST_IN_ALL
    for name, (asked, most) in what.items():
        if asked > most:
            raise UserError(
                f"{study.name} has {asked:,} {name}, expected at most {most:,}: make several studies of it."
            )


def _resolved(name: str, entry: MethodEntry) -> MethodEntry:
    """The entry with its preset filled in and its fields known to PEFT."""
    from dual_lora.lab.model.methods import method_fields, method_names, plain_name

    written = entry.name or name
    plain = plain_name(written).replace("+", "plus")
    preset = PRESETS.get(plain, {"name": written if ":" in written else plain})
    known = sorted({*method_names(), *PRESETS})
    if plain not in known:
        raise UserError(f"methods.{name}: there is no method {written!r}.{suggest(plain, known)}")
    needed = {"galore": "galore_torch", "apollo": "apollo_torch"}.get(plain)
    if needed and importlib.util.find_spec(needed) is None:
        raise UserError(
            f"methods.{name}: {plain} needs the package {needed}: `pip install {needed.replace('_', '-')}`."
        )
    values = entry.model_dump()
    values |= {"name": preset["name"], "unmatched": entry.unmatched or preset.get("unmatched", False)}
    values["train"] = TrainSection.merged(preset.get("train", {}), entry.train)
    for key in entry.fields:
        fields = method_fields(preset["name"])
        if key not in fields:
            own = [k for k in MethodEntry.model_fields if k != "name"]
            hint = suggest(key, [*fields, *own])
            raise UserError(f"methods.{name}: method {preset['name']} has no field {key!r}.{hint}")
    return MethodEntry.model_validate(values)


def _with_training_settings(entry: MethodEntry, base: Recipe) -> Recipe:
    """The recipe with the method's settings of the training loop; its fields follow with its rank."""
    return changed(base, {"train": entry.train, "name": "run", "about": ""}, "the study's recipe")


def _metric(study: Study, task: str, recipe: Recipe) -> str:
    """Return the task's metric. Raises UserError for a search by another metric that does not say why."""
    head, search = recipe.model.head, study.search
    metric = study.tasks[task].metric or metrics.default_metric(recipe.evaluate.tasks, head)
    tuned_by = (search and search.metric) or metric
    for name in (metric, tuned_by):
        try:
            metrics.evaluation(name, head)
        except UserError as error:
            raise UserError(f"tasks.{task}: {error}") from None
    if (metrics.is_right_or_wrong(metric) or metric == "pearson") and (margin := study.margin.get(metric, 0.0)) >= 1:
        raise UserError(
            f"tasks.{task}: the margin for {metric} is {margin:g}, and it is never above 1: nearly everything would be "
            "equivalent. Give it in the metric's unit: 0.01 is one point of a hundred."
        )
    if search and tuned_by != metric and not search.why.strip():
        raise UserError(
            f"tasks.{task} compares by {metric}, but the search uses {tuned_by}: what is best by one may be worst "
            f"by the other. Leave search.metric out to tune by {metric}, or give a reason in search.why."
        )
    return metric


def _keep_test_apart(study: Study, task: str, recipe: Recipe, metric: str) -> str:
    """Raise UserError for records in two sets. Returns a note on overlaps that the recipe declares."""
    from dual_lora.lab.data.overlap import shared, undeclared
    from dual_lora.lab.data.records import find, hub_split, joined, same_records

    data = recipe.data
    if data.tests and not metrics.is_share(metric):
        raise UserError(
            f"tasks.{task}: the recipe has several test sets ({', '.join(data.tests)}), and {metric} has no "
            "mean over them: make each a task of its own, "
            f"NAME: {{recipe: {study.tasks[task].recipe}, data: {{test: FILE}}}}."
        )
    tests = list(data.tests.values()) or [data.test or ""]
    if not all(tests):
        raise UserError(f"tasks.{task}: the recipe names no test records: set data.test.")

    def files(source: str) -> set[str]:
        return {hub_split(one) if one.startswith("hub:") else str(find(one).resolve()) for one in joined(source)}

    def tested(source: str | None) -> str:
        """Return the test records that are those of this source, "" if none are. A whole split has each of its
        slices."""
        mine = files(source) if source else set()
        theirs = {test: files(test) for test in tests}
        return next((t for t in tests if any(same_records(a, b) for a in mine for b in theirs[t])), "")

    if data.overlap != "all" and (same := tested(data.train)):
        raise UserError(f"tasks.{task}: data.train and data.test are the same records, {same}.")
    if study.search is not None and not data.validation and not data.holdout:
        raise UserError(
            f"tasks.{task}: a search needs validation records: set search.holdout (or data.holdout) to the number of "
            "records to take out of training, or name data.validation."
        )
    if study.search is not None and (same := tested(data.validation)):
        raise UserError(
            f"tasks.{task}: data.validation and data.test are the same records, {same}. Tuning on test records "
            "makes every comparison worthless: use data.holdout to take validation records out of training."
        )
    found = shared(data)
    if why := undeclared(data, found):
        raise UserError(f"tasks.{task}: {why}")
    return f"Of {task}, {' and '.join(each.words for each in found)}; the recipe declares it." if found else ""


def _check_subsets(study: Study, task: str, recipe: Recipe) -> None:
    """Raise UserError where seeds cannot draw training records of their own and share the test records."""
    data = recipe.data
    if study.subsets != "own":
        return
    if data.train_limit is None:
        raise UserError(
            f"tasks.{task}: subsets: own needs data.train_limit, the number of training records that each seed draws."
        )
    if data.test_limit or data.test_prompts:
        name = "test_limit" if data.test_limit else "test_prompts"
        raise UserError(
            f"tasks.{task}: subsets: own draws by data.seed, and data.{name} draws the test records by it too, so that "
            f"seeds would be tested on different ones. Leave data.{name} out, or name a test file of that size."
        )


def _target(study: Study, scale: Scale, base: Recipe, classes: int | None) -> tuple[float | None, int | None]:
    """The budget in parameters, and the rank of the method that it is taken from."""
    budget = study.budget
    if budget.match != "parameters":
        return None, None
    if budget.value is not None:
        return budget.value, None
    assert budget.like is not None
    entry = _resolved(budget.like, study.methods[budget.like])
    cell = Cell("", "", budget.like, entry, _with_training_settings(entry, base), "", UNKNOWN, classes)
    rank = written_rank(entry)
    return set_rank(cell, rank, scale).trainable, rank


_LENGTH = ("train.steps", "train.epochs", "train.batch_size", "train.accumulate")  # what a run's time follows from


def _check_training(study: Study, scale: Scale, cell: Cell) -> None:
    """Refuse what would only show in the middle of the study: settings that the method or the Trainer does not know,
    and a search that undoes the budget."""
    from dual_lora.lab.model.methods import method_fields
    from dual_lora.lab.run.loop import check_names

    where, match = f"methods.{cell.method}", study.budget.match
    known = method_fields(cell.entry.name)
    if not cell.size.trainable:
        raise UserError(f"{where}: it would train no parameter; its settings name none.")
    entry, rates = cell.entry, cell.recipe.train.rates
    named: dict[str, Iterable[str]] = {"freeze": entry.freeze, "round": entry.round, "train.rates": rates}
    if any(named.values()):
        try:
            scale.size(cell.recipe, cell.classes, named=named)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    planned: list[tuple[Recipe, Settings]] = [(job.recipe, job.settings) for job in trial_jobs(study, cell)]
    for recipe, settings in [(cell.recipe, {}), *planned]:
        try:
            check_names(recipe.train)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        varied = [name for name in settings if name.startswith("method.")]
        for name in varied:
            if name.removeprefix("method.") not in known:
                raise UserError(
                    f"{where}: the search varies {name}, which {cell.entry.name} does not have. A method may bring a "
                    "`search` of its own, with the same number of trials."
                )
        held = match != "none" and not cell.entry.unmatched
        resized = held and varied and size_of_cell(scale, cell, recipe) != cell.size
        relengthed = held and match == "time" and set(settings) & set(_LENGTH)
        if resized or relengthed:
            raise UserError(
                f"{where}: the search varies {', '.join(settings)}, and with it what the budget of {match} holds "
                "equal. Leave it out of the search, or set budget.match: none."
            )


def settled_plan(study: Study, folder: StudyFolder, on_card: Short | None = None) -> Plan:
    """The plan of the study with bf16 or fp32 instead of every `auto`.

    A study that was begun in `folder` keeps its choice, by `precision` in its study.yaml. Nothing is chosen where the
    study leaves nothing open. on_card: what another machine would choose, on which the study would begin.
    """
    for name, values in _varied_settings(study):
        if name.removeprefix("train.") == "autocast" and AUTO in values:
            raise UserError(f"{name}: auto is one choice for the whole study; write bf16 and none to compare the two.")
    recipes = _recipes_of(study)
    if study.precision != AUTO:
        return _with_precision(
            study, recipes, study.precision, {"asked": study.precision, "precision": study.precision}
        )
    if not any(map(is_auto, recipes.values())) and not any(_auto_in(_override_parts(study.model_dump(mode="json")))):
        return Plan(study, recipes)
    before: Any = folder.known.study.get("precision") if folder.known.study else AUTO
    if before not in (AUTO, *DTYPES):
        raise UserError(
            f"The study in {folder.path} was begun with precision {before}: write `precision: bf16` or "
            "`precision: fp32` into the study, as its runs have it (runs/*/recipe.yaml)."
        )
    if before != AUTO:
        found = Fast(before, "as the study was begun")
    else:
        found = Fast(on_card, "as on the card") if on_card else fast_precision()
    return _with_precision(study, recipes, found.precision, {"asked": AUTO, **asdict(found)})


def _varied_settings(study: Study) -> Iterator[tuple[str, list[Any]]]:
    """Yield every setting that the study varies, with its values."""
    yield from study.sweep.items()
    spaces = [study.search.space] if study.search else []
    for space in [*spaces, *(entry.search for entry in study.methods.values())]:
        yield from ((name, values) for name, values in space.items() if isinstance(values, list))


def _with_precision(study: Study, recipes: dict[Scenario, Recipe], short: Short, precision: dict[str, Any]) -> Plan:
    """The plan with the precision `short` instead of every `auto` of the study and of its recipes."""
    values = study.model_dump(mode="json")
    for part, name, laid in _auto_in(_override_parts(values)):
        laid[part][name] = FIELDS[part, name][short]
    chosen = {at: with_precision(recipe, short) for at, recipe in recipes.items()}
    return Plan(Study.model_validate(values | {"precision": short}), chosen, precision)


def _override_parts(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all parts of a written study that override its recipes."""
    return [values["overrides"], *values["models"].values(), *values["tasks"].values(), *values["methods"].values()]


def _auto_in(laid_over: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each `auto`: the part of a recipe, its field, and the mapping that has it."""
    for laid in laid_over:
        yield from ((part, name, laid) for part, name in FIELDS if (laid.get(part) or {}).get(name) == AUTO)
