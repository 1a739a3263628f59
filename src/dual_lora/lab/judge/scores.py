"""Scores of runs that were made elsewhere, read from a table, checked and put into paired tables [seeds, items]."""

import csv
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import delimiter_of, opened
from dual_lora.lab.study.job import task_name

BEARABLE = 1e100  # the largest score, and the inverse of the smallest that a task's largest may be
WHOLE = ""  # the item of a run that has one score for all of its test items
Scenario = tuple[str, str]  # model ("" where there is one) and task
# Columns of a table, and what stands for those that are left out.
NEEDED = ("method", "seed", "score")
OPTIONAL = ("item", "task", "model", "metric")
NAMELESS = {"task": "task", "metric": "score", "model": "", "item": WHOLE}


class Score(NamedTuple):
    """One figure, and where it stands (for errors)."""

    scenario: Scenario
    method: str
    seed: int
    item: str
    metric: str
    value: float
    where: str


@dataclass
class Scores:
    """The scores that a reader found. better: (task, metric) -> "more" or "less", as far as the source says; task "":
    of any.

    costs: (scenario, method) -> what the source knows of cost; notes: what has to be said of the source.
    """

    rows: list[Score]
    better: dict[tuple[str, str], str] = field(default_factory=dict)
    costs: dict[tuple[Scenario, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Runs(NamedTuple):
    """One method on one task: scores [seeds, items] in the order of `seeds` and `items`."""

    seeds: list[int]
    items: list[str]
    table: NDArray[np.float64]


def number(text: Any, where: str, what: str = "score") -> float:
    """A finite number, or a UserError that says what to do instead."""
    try:
        value = float("none" if "_" in str(text) else text)  # Python reads 1_0 as 10, a table means something else
    except (TypeError, ValueError, OverflowError):  # JSON's whole numbers have no end
        raise UserError(f"{where}: the {what} {str(text)[:40]!r} is no number.") from None
    if not math.isfinite(value):
        raise UserError(
            f"{where}: the {what} is {text}. Give a diverged run the worst score of its task, do not leave it out."
        )
    return value


def seed_number(text: Any, where: str) -> int:
    """A seed: a whole number from 0 on."""
    try:
        seed = -1 if "_" in str(text) else int(str(text))
    except ValueError:
        seed = -1
    if seed < 0:
        raise UserError(f"{where}: the seed {str(text)[:40]!r} is no whole number from 0 on.")
    return seed


def one_metric(scores: Scores, wanted: str | None) -> dict[Scenario, str]:
    """The metric by which each scenario is compared; rows of others are dropped, and runs that have no other are named.

    Raises UserError where a scenario has several and none is asked for, and where it lacks the one that is.
    """
    found: dict[Scenario, dict[str, None]] = {}
    for row in scores.rows:
        found.setdefault(row.scenario, {})[row.metric] = None
    chosen = {}
    for scenario, names in found.items():
        if wanted is None and len(names) > 1:
            raise UserError(
                f"{task_name(*scenario)} has scores of {len(names)} metrics, {', '.join(names)}: choose one with "
                "--metric."
            )
        if wanted is not None and wanted not in names:
            why = "".join(f" {note}" for note in scores.notes)
            raise UserError(f"{task_name(*scenario)} has no metric {wanted!r}.{suggest(wanted, names)}{why}")
        chosen[scenario] = wanted or next(iter(names))
    left = [row for row in scores.rows if row.metric == chosen[row.scenario]]
    known = {(row.scenario, row.method, row.seed) for row in left}
    lost = dict.fromkeys(
        f"{row.method}, seed {row.seed}, on {task_name(*row.scenario)}"
        for row in scores.rows
        if (row.scenario, row.method, row.seed) not in known
    )
    if lost:
        scores.notes.append(f"Runs left out, as they have no score of the metric: {'; '.join(lost)}.")
    scores.rows = left
    return chosen


def tables(rows: Iterable[Score]) -> dict[Scenario, dict[str, Runs]]:
    """Scenario -> method -> its runs. Seeds and items are the same for all methods of a scenario.

    Raises UserError for two scores of one run and item, and for pairs of which one half is missing.
    """
    cells: dict[Scenario, dict[str, dict[tuple[int, str], Score]]] = {}
    for row in rows:
        own = cells.setdefault(row.scenario, {}).setdefault(row.method, {})
        if (twice := own.get((row.seed, row.item))) is not None:
            raise UserError(
                f"{row.where}: {row.method}, seed {row.seed}{_item(row.item)}, {task_name(*row.scenario)} has a score "
                f"already ({twice.where}). Keep one of them."
                + (" Without a column item a run has one score." if row.item == WHOLE else "")
            )
        own[row.seed, row.item] = row
    return {scenario: _paired(scenario, methods) for scenario, methods in cells.items()}


def _paired(scenario: Scenario, methods: dict[str, dict[tuple[int, str], Score]]) -> dict[str, Runs]:
    every = dict.fromkeys(key for own in methods.values() for key in own)
    seeds = sorted({seed for seed, _ in every})
    items = list(dict.fromkeys(item for _, item in every))
    # Counted, not listed: of a thousand scores that have nothing in common a thousand million are missing.
    missing = len(methods) * len(seeds) * len(items) - sum(map(len, methods.values()))
    if missing:
        method, seed, item = next(
            (method, seed, item) for method, own in methods.items() for seed in seeds for item in items
            if (seed, item) not in own
        )  # fmt: skip
        raise UserError(
            f"{method} has no score for seed {seed}{_item(item)} of {task_name(*scenario)}, where other runs have one "
            f"({missing:,} missing in all): every method needs the same seeds and the same items."
        )
    runs = {
        method: Runs(seeds, items, np.array([[own[seed, item].value for item in items] for seed in seeds]))
        for method, own in methods.items()
    }
    largest = max(float(np.abs(own.table).max()) for own in runs.values())
    if largest and not 1 / BEARABLE <= largest <= BEARABLE:
        raise UserError(
            f"The scores of {task_name(*scenario)} are of the order of {largest:.0e}, too far from 1 to be squared: "
            "give them in another unit."
        )
    return runs


def reference_of(methods: Sequence[str], wanted: str | None) -> str:
    """The method that all others are compared with: the one asked for, or the first. Raises UserError for no other."""
    if wanted is not None and wanted not in methods:
        raise UserError(f"--reference {wanted!r} is no method of these scores.{suggest(wanted, methods)}")
    if len(methods) < 2:
        raise UserError(f"There is one method only, {methods[0]}: a comparison needs two.")
    return wanted if wanted is not None else methods[0]


def _item(item: str) -> str:
    return "" if item == WHOLE else f", item {item}"


def read_table(file: Path) -> Scores:
    """The scores of a .csv or .tsv file with a header line.

    Raises UserError for unknown or missing columns, with file and line for a wrong row.
    """
    try:
        with opened(file) as lines:
            return Scores(list(_rows(file, lines)))
    except csv.Error as error:
        raise UserError(f"{file} is no table: {error}.") from None


def _rows(file: Path, lines: Iterator[str]) -> Iterator[Score]:
    first = next(lines, "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else delimiter_of(first)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)  # else a lone quote joins lines
    names = [name.strip() for name in next(reader, [])]
    _check_columns(file, names)
    filled: dict[str, tuple[bool, str]] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{file}, line {reader.line_num}"
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} columns, expected {len(names)} ({', '.join(names)}).")
        row = {name: unicodedata.normalize("NFC", cell.strip()) for name, cell in zip(names, cells, strict=True)}
        for name in names:
            if not row[name] and name not in ("model", "task", "metric"):
                raise UserError(f"{where}: the {name} is empty.")
            before, line = filled.setdefault(name, (bool(row[name]), where))
            if before != bool(row[name]):
                empty, full = (where, line) if before else (line, where)
                raise UserError(f"{empty}: the {name} is empty, and it is not at {full}: fill it in, or leave it out.")
        row = NAMELESS | {name: cell for name, cell in row.items() if cell}
        value, seed = number(row["score"], where), seed_number(row["seed"], where)
        yield Score((row["model"], row["task"]), row["method"], seed, row["item"], row["metric"], value, where)


def _check_columns(file: Path, names: list[str]) -> None:
    known = (*NEEDED, *OPTIONAL)
    for name in names:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"{file} has an unknown column {name!r}.{hint} Rename or remove it.")
        if names.count(name) > 1:
            raise UserError(f"{file} has two columns {name!r}: keep one of them.")
    if lacking := [name for name in NEEDED if name not in names]:
        raise UserError(
            f"{file} lacks the column {lacking[0]}: expected {', '.join(NEEDED)}, and as far as there are such "
            f"{', '.join(OPTIONAL)}."
        )
