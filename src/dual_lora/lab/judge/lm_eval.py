"""Scores from per-sample logs of the lm-evaluation-harness (`lm_eval --log_samples --output_path FOLDER`).

FOLDER/METHOD/SEED/**/samples_TASK_DATE.jsonl   SEED: seed-1, seed1, run-1 or 1, also further down
FOLDER/METHOD/**/samples_TASK_DATE.jsonl        one seed

The harness's own folder of the model's name may lie below. results_DATE.json next to the samples says which way a
metric is better, how many documents there were, and what the harness made of their scores. A metric that is not the
mean of them is left out: lambada's perplexity is logged as a log-likelihood, of which more is better.

Items are documents, known by their number and hash: two runs that saw other documents do not pair.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.copies import copies_of_items
from dual_lora.lab.judge.scores import Score, Scores, number
from dual_lora.lab.read import opened, parse_json, read_object, unlinked

_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d\-:.]+)\.jsonl$")
_SEED = re.compile(r"(?:seed|run)?[-_ ]?(\d+)$", re.IGNORECASE)
NEEDED = ("doc_id", "doc_hash", "metrics")


def sample_files(folder: Path) -> list[Path]:
    """The logs under a folder."""
    return sorted(folder.rglob("samples_*.jsonl"))


def read_lm_eval(folder: Path) -> Scores:
    """All scores under the folder. Raises UserError for files that do not lie as the module says, or are damaged."""
    scores = Scores([])
    seen: dict[tuple[str, int, str], Path] = {}
    prompts: dict[tuple[str, str], dict[str, str]] = {}
    repeated: dict[str, None] = {}
    aside: dict[str, None] = {}
    as_told: dict[str, dict[bool, Path]] = {}  # whether its mean is the harness's figure -> a log where it is so
    for file in sample_files(folder):
        method, seed = _run_of(folder, file)
        if (named := _SAMPLES.match(file.name)) is None:
            raise UserError(f"{file} is not named as the harness names its logs: samples_TASK_DATE.jsonl.")
        task = named["task"]
        if (other := seen.setdefault((method, seed, task), file)) != file:
            raise UserError(f"{other} and {file} are two evaluations of one run on {task}: remove one of them.")
        results = _results(file.parent, task, named["date"])
        rows = list(_rows(file, method, seed, task, aside))
        items, wanted = {row.item for row, _ in rows}, _part(results, "n-samples", task).get("effective")
        if isinstance(wanted, int) and items and len(items) != wanted:
            raise UserError(f"{file} holds {len(items)} documents, and the harness scored {wanted}.")
        repeated |= dict.fromkeys(copies_of_items(task, (item.partition(" ")[2] for item in items), len(items)))
        for metric, is_mean in _means(task, [row for row, _ in rows], results).items():
            as_told.setdefault(f"{metric} on {task}", {}).setdefault(is_mean, file)
        for row, prompt in rows:
            scores.rows.append(row)
            if prompt:
                prompts.setdefault((task, f"{row.seed} {row.item}"), {})[method] = prompt
        for name, way in _directions(results, task).items():
            if scores.better.setdefault((task, name), way) != way:
                raise UserError(
                    f"Whether more or less {name} is better: the results in the folder of {file} and others "
                    "disagree. Give --better."
                )
    for name, files in as_told.items():
        if len(files) == 2:
            raise UserError(
                f"The mean of {name} in {files[False]} differs from the one in its results_*.json. In other logs they "
                "agree, so one of the two files was changed."
            )
        aside |= {name: None} if False in files else {}
    scores.rows = [row for row in scores.rows if f"{row.metric} on {row.scenario[1]}" not in aside]
    if aside:
        scores.notes.append(f"Left out, as they are no means over items: {', '.join(aside)}.")
    scores.notes += repeated
    differing = Counter(task for (task, _), own in prompts.items() if len(set(own.values())) > 1)
    for task in dict.fromkeys(task for task, _ in prompts):
        if differ := differing[task]:
            scores.notes.append(
                f"On {task} the methods were asked {differ} of the items in different words (other examples or another "
                "template): their difference is one of the prompts too."
            )
    return scores


def _run_of(folder: Path, file: Path) -> tuple[str, int]:
    """Return method and seed, from the folders between."""
    parts = file.relative_to(folder).parts[:-1]
    if not parts:
        raise UserError(f"{file} lies in {folder} itself: expected {folder}/METHOD/SEED/…/{file.name}.")
    seed = next((found for part in parts[1:] if (found := _SEED.match(part))), None)
    return parts[0], int(seed[1]) if seed else 0


def _rows(file: Path, method: str, seed: int, task: str, aside: dict[str, None]) -> Iterator[tuple[Score, str]]:
    """Scores with their prompts' hashes. aside: takes the metrics that are no mean over items."""
    with opened(file, linked=False) as lines:
        for count, line in enumerate(lines, 1):
            where = f"{file}, line {count}"
            try:
                sample = parse_json(line)
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({error}).") from None
            if not isinstance(sample, dict) or any(name not in sample for name in NEEDED):
                raise UserError(f"{where} is no sample of the harness: expected {', '.join(NEEDED)} in each.")
            if not (isinstance(sample["metrics"], list) and all(isinstance(name, str) for name in sample["metrics"])):
                raise UserError(f"{where} is no sample of the harness: its metrics are no list of names.")
            item = f"{sample['doc_id']} {str(sample['doc_hash'])[:8]}"
            variant = sample.get("filter") or "none"
            for name in sample["metrics"]:
                if isinstance(value := sample.get(name), list | dict | str):
                    aside[f"{name} on {task}"] = None  # gold and guess, or sums, of one such as mcc or perplexity
                    continue
                metric = name if variant == "none" else f"{name},{variant}"
                score = Score(("", task), method, seed, item, metric, number(value, where, metric), where)
                yield score, str(sample.get("prompt_hash") or "")


def _results(folder: Path, task: str, date: str) -> dict[str, Any]:
    """Read what the harness wrote next to the samples, {} without such a file; of another date only which way is
    better."""
    own = folder / f"results_{date}.json"
    for file in dict.fromkeys([own, *sorted(folder.glob("results_*.json"), reverse=True)]):
        with contextlib.suppress(OSError, ValueError):
            found = read_object(unlinked(file))
            if file == own:
                return found
            if isinstance(ways := found.get("higher_is_better"), dict) and task in ways:
                return {"higher_is_better": ways}
    return {}


def _directions(results: dict[str, Any], task: str) -> dict[str, str]:
    """Return which way the task's metrics are better, as the harness says."""
    ways = _part(results, "higher_is_better", task)
    return {name: "more" if more else "less" for name, more in ways.items() if more is not None}


def _part(results: dict[str, Any], name: str, task: str) -> dict[str, Any]:
    """Return the part of the harness's results that is about a task; {} if there is none."""
    part = results.get(name)
    own = part.get(task) if isinstance(part, dict) else None
    return own if isinstance(own, dict) else {}


def _means(task: str, rows: list[Score], results: dict[str, Any]) -> dict[str, bool]:
    """Whether the harness's own figure of each metric is the mean of these rows, as far as it says one."""
    items: dict[str, dict[str, float]] = {}
    twice = set()
    for row in rows:
        own = items.setdefault(row.metric, {})
        twice |= {row.metric} if row.item in own else set()  # named later
        own[row.item] = row.value
    figures, found = _part(results, "results", task), {}
    for metric, values in items.items():
        figure = figures.get(metric if "," in metric else f"{metric},none")
        if isinstance(figure, int | float) and metric not in twice:
            mean = math.fsum(values.values()) / len(values)
            found[metric] = math.isclose(figure, mean, rel_tol=1e-6, abs_tol=1e-9)
    return found
