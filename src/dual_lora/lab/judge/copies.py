"""Scores that are others' to the last digit: models evaluated again and copied runs are no further seeds."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.scores import Runs, Scenario
from dual_lora.lab.study.job import task_name

ENOUGH = 20  # items: answers to as many do not agree by chance in every method


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


def _first_alike(table: NDArray[np.float64]) -> list[int]:
    """Return for each row [S, N] the index of the first row that is equal to it."""
    first: dict[bytes, int] = {}
    return [first.setdefault(row.tobytes(), i) for i, row in enumerate(table)]
