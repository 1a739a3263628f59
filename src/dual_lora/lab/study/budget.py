"""Budgets: the rank or the steps with which a method has as much of something as the others.

Parameters are counted on an empty model. Time and peak memory are measured: a few steps of every method tell how many
it gets, or at which rank.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.empty import adapted, count_of, empty_base, load_config, new_modules
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.progress import in_words
from dual_lora.lab.recipe.schema import DataSection, ModelSection, Recipe
from dual_lora.lab.study.cell import Cell, Size, fields_at, probe_job, rank_field
from dual_lora.lab.study.job import Job, Outcome, Training, data_digest
from dual_lora.lab.study.rank_rule import rank_denominator
from dual_lora.lab.study.study import MethodEntry, Study

_LINEAR = ("Linear", "Conv1D")  # torch's and transformers' names
# Dual LoRA's fields that no tensor's shape needs; frozen signs have no C and D.
_SHAPELESS = {"ste", "magnitude_activation", "direction_activation", "direction_seed", "plain_rank"}
UNKNOWN = Size(0, 0)  # until a cell has its rank
MEMORY_RANKS = 4  # the second probe of a memory budget has this many times the first one's rank

Measure = Callable[[Sequence[Job]], Sequence[Outcome]]  # does the jobs


def classes_of(recipe: Recipe) -> int | None:
    """Number of classes of the recipe's training records; None for a language model."""
    from dual_lora.lab.data.encode import class_names
    from dual_lora.lab.data.examples import load_split

    if recipe.model.head != "classification":
        return 1 if recipe.model.head == "regression" else None
    return len(class_names(load_split(recipe.data, "train")))


def planned_steps(recipe: Recipe, fetch: bool = False) -> int:
    """Optimizer steps of a recipe in one process; of epochs, by the training records that data.max_length leaves.

    A text is cut for a classifier, not left out. Without the model (a plan for another machine) all records count;
    fetch: its tokenizer is fetched instead, if that is possible.
    """
    if recipe.train.steps:
        return recipe.train.steps
    part = recipe.train
    from dual_lora.lab.model.location import is_here
    from dual_lora.lab.model.weights import folder_here

    model, held = recipe.model, tuple(data_digest(recipe).items())
    here = fetch or is_here(model.path) or folder_here(model.path, model.revision) is not None
    by, records = model.model_dump_json() if here and model.head == "causal" else "", recipe.data.model_dump_json()
    try:
        rows = _rows(by, records, held, recipe.objective.name == "dpo")
    except UserError:  # of a model on the hub its configuration may be all that is here
        rows = _rows("", records, held)
    return math.ceil(rows * part.epochs / (part.batch_size * part.accumulate))


@functools.lru_cache(maxsize=64)
def _rows(model: str, data: str, held: tuple[tuple[str, str], ...], pairs: bool = False) -> int:
    """Count the training records that are not left out as too long; without a model, all of them.

    held: what the files hold, so that changed ones are read again. pairs: as for `encode_all`.
    """
    from dual_lora.lab.data.encode import Prompter, encode_all
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.load import load_tokenizer
    from dual_lora.lab.model.location import locate

    records = DataSection.model_validate_json(data)
    examples = load_split(records, "train")
    if not model:
        return len(examples)
    part = ModelSection.model_validate_json(model)
    tokenizer = load_tokenizer(part.path, locate(part.path, part.revision))
    prompter = Prompter(tokenizer, records.template, records.learn_prompt)
    return len(encode_all(examples, prompter, records.max_length, pairs)[0])


class Scale:
    """Counts methods on models; each model is built once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str | None, str, int | None], Any] = {}
        self._sizes: dict[str, Size] = {}

    def size(
        self,
        recipe: Recipe,
        classes: int | None,
        frozen: Iterable[str] = (),
        named: Mapping[str, Iterable[str]] | None = None,
    ) -> Size:
        """Count what would train under the recipe. frozen: regular expressions of parameters that never move.

        named: field -> its regular expressions, which have to fit a trainable parameter. Raises UserError otherwise.
        """
        from dual_lora.lab.model.methods import method_config

        still, named = list(frozen), {field: list(patterns) for field, patterns in (named or {}).items()}
        model, method = recipe.model, recipe.method
        if method["name"] == "dual_lora":
            method_config(method, model.head, recipe.train.steps or 100, [])  # is what is left out of the key right?
            if method.get("direction_activation") != "frozen":
                method = {field: value for field, value in method.items() if field not in _SHAPELESS}
        values = [model.path, model.revision, model.head, classes, method, still, named]
        asked = json.dumps(values, sort_keys=True)
        if asked not in self._sizes:
            self._sizes[asked] = self._count(recipe, classes, still, named)
        return self._sizes[asked]

    def _count(
        self, recipe: Recipe, classes: int | None, frozen: list[str], named: Mapping[str, Iterable[str]]
    ) -> Size:
        from dual_lora.lab.run.loop import check_patterns

        part = recipe.model
        base = self._base(part, classes)
        multiplied = sum(m.weight.numel() for m in base.modules() if type(m).__name__ in _LINEAR) + _routed(base)
        fresh = new_modules(base) if part.head != "causal" else []
        model = adapted(base, recipe.method, part.head, part.path, recipe.train.steps or 100, fresh)
        for field, patterns in named.items():
            check_patterns(field, patterns, model)
        still = [Pattern(text, "freeze") for text in frozen]
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        trainable = sum(p.numel() for n, p in trained if not any(s.search(n) for s in still))
        return Size(trainable, count_of(base), multiplied, getattr(base.config.get_text_config(), "hidden_size", 0))

    def _base(self, part: ModelSection, classes: int | None) -> Any:
        key = (part.path, part.revision, part.head, classes)
        if key not in self._models:
            labels = {"num_labels": classes} if classes else {}
            self._models[key] = empty_base(load_config(part.path, part.revision, **labels), part.head, part.path)
        return self._models[key]


def _routed(base: Any) -> int:
    """Weights of experts that a token meets, where all experts of a layer are one parameter."""
    config = base.config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    chosen = next((value for name in names if (value := getattr(config, name, None))), 1)
    chosen = max(chosen) if isinstance(chosen, list) else chosen  # of each layer
    experts = [p for name, p in base.named_parameters() if p.ndim == 3 and ".experts." in name]
    return sum(p.numel() // p.shape[0] * min(chosen, p.shape[0]) for p in experts)


def solve_rank(size: Callable[[int], int], target: float, step: int, top: int, first: int | None = None) -> int:
    """The rank (a multiple of `step`, at most `top`) whose size is nearest to the target.

    first: the rank that the target comes from. A method that has just the target there is asked for no other.

    Sizes should rise or fall with the rank all the way. RandLoRA's fall on the whole only, and LoKr's end in a plateau:
    of all that were asked the nearest counts, of equal ones that of the smallest rank.
    """
    if first and first % step == 0 and first <= top and size(first) == target:
        return first
    known: dict[int, int] = {}

    def at(multiple: int) -> int:
        rank = multiple * step
        if rank not in known:
            known[rank] = size(rank)
        return known[rank]

    low, upper, high = 1, None, max(1, top // step)
    rising = at(min(2, high)) >= at(1)
    guess = _interpolated_rank(1, at(1), min(2, high), at(min(2, high)), target)
    while low < high and (upper is None or upper - low > 1) and target not in known.values():
        # Sizes are nearly linear in the rank, so the line through two of them almost always hits; halving never fails.
        middle = (low + (upper or high)) // 2 if len(known) > 8 else guess
        at_most = high if upper is None else upper - 1
        tried = min(max(middle, low + 1), at_most)
        if (at(tried) < target) == rising:
            low = tried
        else:
            upper = tried
        guess = _interpolated_rank(1, at(1), tried, at(tried), target)
    return min(known, key=lambda rank: (abs(known[rank] - target), rank))


def _interpolated_rank(a: int, size_a: int, b: int, size_b: int, target: float) -> int:
    """Return the rank where the line through two sizes meets the target."""
    return b if size_a == size_b else round(a + (target - size_a) * (b - a) / (size_b - size_a))


def fit_parameters(study: Study, scale: Scale, cell: Cell, target: float | None, at: int | None) -> None:
    """Give the cell its method, at the rank that the budget allows. at: the rank that the target comes from."""
    entry, name = cell.entry, cell.method
    field_name, rank = rank_field(entry.name), written_rank(entry)
    anchor = study.budget.like is not None and study.origin(name) == study.budget.like
    if target is None or entry.unmatched or anchor:
        size = set_rank(cell, rank, scale)
        cell.notes = ["outside the budget"] if entry.unmatched and target else []
        cell.mismatch = size.trainable / target - 1 if target and anchor else None
        return
    if field_name and entry.fields.get(field_name) is not None:
        raise UserError(
            f"methods.{name}: {field_name} is written, but the budget solves for it. Leave it out, or set "
            "unmatched: true to run this method outside the budget."
        )
    if rank is None and field_name:
        step = rank_step(entry)
        top = max(study.budget.max_rank, step)
        rank = solve_rank(lambda r: set_rank(cell, r, scale).trainable, target, step, top, at)
    size = set_rank(cell, rank, scale)
    cell.mismatch = size.trainable / target - 1
    found = f"the nearest is {size.trainable:,} at {field_name} {rank}" if field_name else f"it has {size.trainable:,}"
    like = study.budget.like if field_name else None
    finer = f"Give {like} a higher rank, where the steps are smaller, " if like else ""
    check_match(study, cell, f"{target:,.0f} trainable parameters", found, finer)


def written_rank(entry: MethodEntry) -> int | None:
    """The rank that the method is given by the study, Dual LoRA also by its parts; None without one."""
    rank = entry.fields.get(rank_field(entry.name) or "")
    if rank is None and entry.name == "dual_lora":
        parts = [part for name in ("r1", "r2") if isinstance(part := entry.fields.get(name), int)]
        return sum(parts) if len(parts) == 2 else None
    return rank if isinstance(rank, int) else None


def rank_step(entry: MethodEntry) -> int:
    """The method's rank has to be a multiple of this, so that its parts and what follows from it are whole numbers."""
    one_group = "r1" in entry.fields or entry.fields.get("direction_activation") == "frozen"
    least = 2 if entry.name == "dual_lora" and not one_group else 1
    return rank_denominator(entry.fields.values(), least)


def check_match(study: Study, cell: Cell, budget: str, nearest: str, finer: str = "") -> None:
    """Raise UserError where the cell's mismatch is not within the tolerance of the study's budget. finer: a way to come
    nearer."""
    if cell.mismatch is not None and abs(cell.mismatch) > study.budget.tolerance:
        raise UserError(
            f"methods.{cell.method}: the budget of {budget} cannot be matched within {study.budget.tolerance:.0%}: "
            f"{nearest} ({cell.mismatch:+.1%}). {finer}{'set' if finer else 'Set'} unmatched: true to run it outside "
            "the budget, or raise budget.tolerance."
        )


def set_rank(cell: Cell, rank: int | None, scale: Scale | None = None) -> Size:
    """Give the cell its method at this rank, and return its size."""
    method = {"name": cell.entry.name, **fields_at(cell.entry, rank)}
    cell.recipe, cell.rank = cell.recipe.replaced(method=method), rank
    cell.size = size_of_cell(scale or Scale(), cell, cell.recipe)
    return cell.size


def size_of_cell(scale: Scale, cell: Cell, recipe: Recipe) -> Size:
    """Count the parameters that would train in the cell, without those that are frozen from the start."""
    frozen = [pattern for pattern, share in cell.entry.freeze.items() if share == 0]
    return scale.size(recipe, cell.classes, frozen)


def match_by_probes(study: Study, cells: Sequence[Cell], measure: Measure) -> None:
    """Give every cell the steps or the rank that its budget allows. Raises UserError where none does."""
    if study.budget.match not in ("time", "memory"):
        return
    like = [cell for cell in cells if study.origin(cell.method) == study.budget.like]
    matched = [cell for cell in cells if not cell.entry.unmatched]
    probed = {cell.at: cell for cell in [*like, *matched]}
    outcomes = measure([probe_job(study, cell) for cell in probed.values()])
    memory, warm = study.budget.match == "memory", all(outcome.step_seconds for outcome in outcomes)
    costs = [_peak(outcome) if memory else _step_seconds(outcome, warm) for outcome in outcomes]
    cost_of = dict(zip(probed, costs, strict=True))
    for cell in matched:
        target = study.budget.value
        if target is None:
            model = next(c for c in like if c.scenario == cell.scenario)
            target = cost_of[model.at] * (1 if memory else planned_steps(model.recipe, fetch=True))
        if memory:
            _fit_rank(study, cell, cost_of[cell.at], target, measure)
        else:
            _fit_steps(study, cell, cost_of[cell.at], target)


def _step_seconds(outcome: Outcome, warm: bool) -> float:
    """Seconds of a step. warm: without the first ones, which also warm up; not known of an earlier version's probes."""
    training = outcome.training or Training()
    seconds = outcome.step_seconds if warm else (training.seconds or 0.0) / training.steps
    assert seconds
    return seconds


def _peak(outcome: Outcome) -> float:
    assert outcome.training is not None
    assert outcome.training.peak_memory is not None
    return outcome.training.peak_memory


def _fit_steps(study: Study, cell: Cell, a_step: float, seconds: float) -> None:
    steps = max(1, round(seconds / a_step))
    cell.mismatch = steps * a_step / seconds - 1
    nearest = f"the nearest is {in_words(steps * a_step)} with {steps} steps"
    check_match(study, cell, f"{in_words(seconds)} of training", nearest)
    cell.recipe = cell.recipe.model_copy(update={"train": cell.recipe.train.model_copy(update={"steps": steps})})
    cell.notes.append(f"{steps} steps fit into {in_words(seconds)}")


def _fit_rank(study: Study, cell: Cell, peak: float, target: float, measure: Measure) -> None:
    """Find the rank for a peak memory, which grows linearly with the rank: two probes give the line, a third one checks
    the answer."""
    if abs(peak / target - 1) > 0.005 and cell.rank is not None:
        (wide,) = measure([probe_job(study, cell, cell.rank * MEMORY_RANKS)])
        slope = (_peak(wide) - peak) / (cell.rank * (MEMORY_RANKS - 1))
        rank = round(cell.rank + (target - peak) / slope) if slope > 0 else cell.rank
        step = rank_step(cell.entry)
        rank = max(step, min(rank, study.budget.max_rank) // step * step)
        (check,) = measure([probe_job(study, cell, rank)])
        set_rank(cell, rank)
        peak = _peak(check)
    cell.mismatch = peak / target - 1
    nearest = f"the nearest is {peak / 2**20:,.0f} MiB" + (f" at rank {cell.rank}" if cell.rank is not None else "")
    check_match(study, cell, f"{target / 2**20:,.0f} MiB peak memory", nearest)
