"""Forgetting beside a study's tasks: compared and judged together with them where the recipe measures it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dual_lora.lab.study import metrics, verdicts
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.cell import Finished
from dual_lora.lab.study.conclude import about_pairs, in_scenario
from dual_lora.lab.study.job import read_scores, task_name
from dual_lora.lab.study.study import Study

METRIC: Literal["forgetting"] = "forgetting"


def forgetting_tables(
    finished: Sequence[Finished], runs: Path, said: list[str]
) -> dict[tuple[str, str, str], stats.Table]:
    """Item shares [seeds, texts] of every cell that has them for all of its runs."""
    tables = {}
    for f in finished:
        if f.cell.recipe.evaluate.forgetting is None or not f.complete or f.diverged_in_search:
            continue
        try:
            features = [read_scores(runs, job.key, METRIC) for job, _ in f.finals]
        except (OSError, ValueError):
            said.append(
                f"Forgetting of {f.cell.method} on {task_name(*f.cell.scenario)} is not compared: not every run of it "
                "came to an end with a figure."
            )
            continue
        tables[f.cell.at] = metrics.score_table(METRIC, features)
    return tables


def with_metric(
    pairs: Sequence[verdicts.Comparison], study: Study, tables: dict[tuple[str, str, str], stats.Table]
) -> list[verdicts.Comparison]:
    """The same pairs, in what they forget."""
    found = []
    for pair in pairs:
        a, b = (tables.get((*pair.scenario, name)) for name in (pair.candidate, pair.reference))
        if a is not None and b is not None:
            about = about_pairs(study, pair.scenario, METRIC)
            found.append(
                in_scenario(verdicts.compare_pair(a, b, names=(pair.candidate, pair.reference), **about), pair.scenario)
            )
    return found
