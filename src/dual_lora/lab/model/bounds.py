"""Checks of what a method's configuration asks for, before PEFT does it: what it has PEFT load, its patterns, its
numbers, and its ranks by the file that is to hold the factors.

A configuration may come with somebody else's adapter. PEFT draws every factor before it compares it with the file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dual_lora.lab.errors import UserError
from dual_lora.verify.bounds import check_bounds, check_kinds
from dual_lora.verify.numbers import all_finite, check_numbers, header
from dual_lora.verify.patterns import check_patterns
from dual_lora.verify.sources import check_sources

MOST_OF_FILE = 100  # an adapter may become so many times as large as its file
SMALL = 10**8  # numbers that fit into any memory
MOST_TENSORS, FEW = 100, 10_000  # of a file, for each module of the base, which a method gives some ten; of any file

_RANKS = ("r", "r1", "r2", "init_r", "rank_pattern")
_FACTORED = ("LORA", "DUAL_LORA", "ADALORA")  # every layer has factors of its own, and all of them are saved


def check_config(config: Any, model: Any, where: str, file: Path | None = None) -> None:
    """Raise UserError for a configuration that would load something else, or search, build or draw without an end.

    where: how a sentence names the configuration. file: the adapter's weights, which a rank must fit.
    """
    values = config.to_dict()
    try:
        check_kinds(config)
        check_sources(config, model)
        check_patterns(values, model)
        check_bounds(config, model)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    ranks = ((field, rank) for field in _RANKS for rank in _numbers(values.get(field)))
    field, rank = max(ranks, key=lambda found: found[1], default=("r", 0))
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if file is None or not file.is_file():
        return
    _check_count(file, model, where)
    if kind not in _FACTORED:
        return
    asked, held = rank * sum(shape[0] + shape[1] for shape in shapes if len(shape) == 2), file.stat().st_size
    if asked > SMALL and asked > MOST_OF_FILE * held:
        raise UserError(
            f"{where}: {field} holds {rank:,}, which may take {asked:,} numbers, and {file.name} has {held:,} bytes: "
            "the configuration and the weights do not belong together."
        )


def _check_count(file: Path, model: Any, where: str) -> None:
    """Raise UserError for more tensors than any method has: each is looked up by its name, an empty one too. A damaged
    file is left to whoever reads it."""
    try:
        count = len(header(file))
    except (OSError, SafetensorError):
        return
    most = max(FEW, MOST_TENSORS * sum(1 for _ in model.modules()))
    if count > most:
        raise UserError(
            f"{where}: {file.name} holds {count:,} tensors, and at most {most:,} are read for a model of this size: it "
            "is no adapter of this base."
        )


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def check_stored_numbers(file: Path, what: str) -> None:
    """Raise UserError if an adapter's file holds what are no floating-point numbers. what: its name in a sentence.

    A file that is missing or damaged is left to whoever reads it.
    """
    try:
        kinds = {name: kind for name, (kind, _) in header(file).items()}
    except (OSError, SafetensorError):
        return
    try:
        check_numbers(kinds, what)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_finite_weights(weights: Mapping[str, Any], what: str) -> None:
    """Raise UserError if a weight that a run or an adapter brought along holds NaN or infinity. what: its name."""
    bad = [name for name, weight in weights.items() if weight.is_floating_point() and not all_finite(weight)]
    if bad:
        raise UserError(
            f"{what} holds NaN or infinity in {len(bad)} of {len(weights)} weights (the first is {bad[0]}): its "
            "training diverged or its file is damaged, so its outputs are worthless. Take an earlier "
            "checkpoint, or train again with a lower train.learning_rate."
        )
