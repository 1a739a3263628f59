"""Scores that are others' to the last digit: models evaluated again and copied runs are no further seeds, records that
are there several times no further items, and one method under two names is not two."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.scores import WHOLE, Runs, Scenario
from dual_lora.lab.study.job import task_name

ENOUGH = 20  # items: answers to as many do not agree by chance in every method
ENOUGH_WHOLE = 3  # the same of scores of whole test sets
ENOUGH_PATTERNS = 14  # of scores over runs: by luck as many come a multiple of k times in one file of 2^14
MANY = 0.05  # the share of copies among the items from which on they are named


def repeated(paired: dict[Scenario, dict[str, Runs]], against: str) -> Iterator[str]:
    """Pairs whose seeds changed nothing: models that were evaluated again, and not trained again, are one seed."""
    for scenario, own in paired.items():
        fixed = [method for method, runs in own.items() if len(runs.seeds) > 1 and not np.ptp(runs.table, axis=0).any()]
        reference = own[against].table
        same = [m for m in fixed if against in fixed and not np.array_equal(own[m].table, reference)]
        if same:
            yield (
                f"On {task_name(*scenario)} every seed of {', '.join([against, *same])} has the same scores, to the "
                "last digit. If these are evaluations of one trained model each, there is one seed and no verdict."
            )


def copied(paired: dict[Scenario, dict[str, Runs]]) -> Iterator[str]:
    """Seeds whose scores are another seed's, to the last digit: a run that was copied counts as one more seed.

    Raises UserError where all methods' are, and so many answers do not agree by chance. What may is a note.
    """
    for scenario, own in paired.items():
        seeds = next(iter(own.values())).seeds
        twins = {method: _first_alike(runs.table) for method, runs in own.items()}
        if all(not any(first) for first in twins.values()):
            continue  # each method has one row: `repeated` speaks of it
        alike = zip(*twins.values(), strict=True)
        everywhere = [i for i, first in enumerate(alike) if len(set(first)) == 1 and first[0] != i]
        varied = all(len(runs.items) >= ENOUGH and np.ptp(runs.table, axis=1).all() for runs in own.values())
        of_all = len(everywhere) * 2 >= len(seeds) > 3
        if everywhere and (varied or of_all):
            first = next(iter(twins.values()))
            pairs = ", ".join(f"{seeds[i]} of {seeds[first[i]]}" for i in everywhere)
            raise UserError(
                f"On {task_name(*scenario)} seeds have the same scores in every method, to the last digit: {pairs}. "
                "Copies are no further seeds: leave them out."
            )
        for method, first in twins.items():
            pairs = ", ".join(f"{seeds[i]} as {seeds[j]}" for i, j in enumerate(first) if i != j)
            if pairs and any(first):
                yield (
                    f"On {task_name(*scenario)} seeds of {method} have the same scores, to the last digit: {pairs}. If "
                    "runs were copied, leave the copies out: they make every verdict too sure."
                )


def one_under_several_names(paired: dict[Scenario, dict[str, Runs]]) -> Iterator[str]:
    """Methods that have each other's scores in every run: one that was copied, or a base without its adapter twice."""
    found: dict[tuple[str, ...], list[str]] = {}
    for scenario, own in paired.items():
        alike: dict[bytes, list[str]] = {}
        for method, runs in own.items():
            nothing = not np.ptp(runs.table) and runs.table.flat[0] in (0, 1, 100)  # all wrong or all right
            if not nothing and runs.table.size >= (ENOUGH_WHOLE if runs.items == [WHOLE] else ENOUGH):
                alike.setdefault(runs.table.tobytes(), []).append(method)
        for methods in alike.values():
            if len(methods) > 1:
                found.setdefault(tuple(methods), []).append(task_name(*scenario))
    for names, tasks in found.items():
        yield (
            f"On {', '.join(tasks)} {' and '.join(names)} have the same scores in every run, to the last digit. If one "
            "is a copy of another, or their adapters were not on, the verdict compares a model with itself."
        )


def repeated_items(paired: dict[Scenario, dict[str, Runs]]) -> Iterator[str]:
    """Tasks of which many items have another one's scores in every run.

    Of measured scores each such item counts. Answers that are right or wrong agree by chance: they show copies only
    where every item is there as many times.
    """
    for scenario, own in paired.items():
        columns = np.concatenate([runs.table for runs in own.values()]).T
        ordered = np.sort(columns, axis=1)
        measured = columns[(np.diff(ordered, axis=1) != 0).all(1)] if columns.shape[1] >= ENOUGH_WHOLE else columns[:0]
        found = list(copies_of_items(task_name(*scenario), (row.tobytes() for row in measured), len(columns)))
        yield from found or _every_item_again(task_name(*scenario), columns)


def _every_item_again(task: str, columns: NDArray[np.float64]) -> Iterator[str]:
    """A note where each pattern of scores over the runs, [items, runs], comes a multiple of k times."""
    counts = Counter(row.tobytes() for row in columns)
    times = math.gcd(*counts.values())
    if times > 1 and len(counts) >= ENOUGH_PATTERNS:
        yield (
            f"On {task} each item seems to be there {times} times: {len(counts)} different rows of scores over "
            f"the runs all come a multiple of {times} times. Leave the copies out: they make every verdict too sure."
        )


def copies_of_items(task: str, prints: Iterable[bytes | str], items: int) -> Iterator[str]:
    """A note where many of the items are there several times. prints: of those that may be, what tells them apart."""
    every = list(prints)
    copies = len(every) - len(set(every))
    if copies >= MANY * items and copies:
        yield (
            f"On {task} {copies} of {items} items are copies of others. Leave them out: items that count several times "
            "make every verdict too sure."
        )


def _first_alike(table: NDArray[np.float64]) -> list[int]:
    """Return for each row [S, N] the index of the first row that is equal to it."""
    first: dict[bytes, int] = {}
    return [first.setdefault(row.tobytes(), i) for i, row in enumerate(table)]
