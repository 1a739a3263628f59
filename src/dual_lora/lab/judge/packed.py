"""Items' scores of a study's final runs, packed for publication: half of each error rests on them.

    python -m dual_lora.lab.judge.packed studies/mine results/studies/mine

writes results.json and scores.json.gz there: {key of a run: [N, K] what each test item adds to the metric}. Then
`dual-lora judge results/studies/mine` compares any two of its methods by items as well. Studies that were published
before 2026-11-30 have none: their items' scores are not available.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.judge.scores import Score, Scores, number, seed_number
from dual_lora.lab.module_command import run_module
from dual_lora.lab.read import parse_json, read_json, unlinked
from dual_lora.lab.study import metrics
from dual_lora.lab.study.job import read_scores
from dual_lora.lab.study.rows import Results

PACKED = "scores.json.gz"
LARGEST = 50_000_000  # bytes, unpacked; the largest published has a tenth of that
MOST_SCORES = 5_000_000  # of all runs and items
DIGITS = 9  # of an item's share; verdicts need no more


def pack(study: Path, out: Path) -> int:
    """Write the study's results and the scores of its finished final runs into `out`; returns how many runs.

    Raises UserError for a folder that is no study's, or whose runs have gone.
    """
    results = _results(study)
    keys = [s["key"] for m in results["methods"] for s in m["seeds"] if s["status"] == "done"]
    try:
        found = {key: np.round(np.asarray(read_scores(study / "runs", key)), DIGITS).tolist() for key in keys}
    except (OSError, ValueError) as error:
        raise UserError(f"{study} lacks the scores of a run ({error}): they lie in the folder of its runs.") from None
    make_folder(out)
    text = json.dumps(found, separators=(",", ":"), sort_keys=True)
    write_output(out / PACKED, gzip.compress(text.encode(), mtime=0))
    if out.resolve() != study.resolve():
        write_output(out / "results.json", (study / "results.json").read_text(encoding="utf-8"))
    return len(found)


def _results(folder: Path) -> Results:
    try:
        results: Results = read_json(unlinked(folder / "results.json"))
        assert results["methods"], "no methods"
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{folder} is no study's folder: {error}.") from None
    return results


def read_packed(folder: Path) -> Scores:
    """A published study as scores to judge: what each item adds, by run. Lost runs are named, and their seed is left
    out of all methods.

    Raises UserError for a file that is damaged or too large, or that lacks a run.
    """
    results = _results(folder)
    file = folder / PACKED
    try:
        with gzip.open(unlinked(file)) as packed:
            content = packed.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
        known: dict[str, Any] = parse_json(content.decode())
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    try:
        return _scores(results, known, str(file))
    except UserError:
        raise
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} does not fit the results.json next to it: {error!r:.200}.") from None


def _scores(results: Results, known: dict[str, Any], file: str) -> Scores:
    rows: list[Score] = []
    notes = []
    lost = {(m["model"], m["task"], s["seed"]) for m in results["methods"] for s in m["seeds"] if s["status"] != "done"}
    for m in results["methods"]:
        if not all(isinstance(m[name], str) for name in ("model", "task", "method", "metric")):
            raise TypeError("a model, task, method or metric that is no text")
        for s in m["seeds"]:
            if (m["model"], m["task"], s["seed"]) in lost:
                continue
            if s["key"] not in known:
                raise UserError(f"{file} lacks the scores of {m['method']}, seed {s['seed']}: pack the study again.")
            shares = metrics.sign(m["metric"]) * metrics.score_table(m["metric"], [known[s["key"]]])[0]
            if len(rows) + len(shares) > MOST_SCORES:  # of runs that share a key there are more than the file holds
                raise UserError(f"{file} and the results next to it make more than {MOST_SCORES:,} scores.")
            where, seed = f"{file}, {s['key']}", seed_number(s["seed"], file)
            rows += [
                Score((m["model"], m["task"]), m["method"], seed, str(i), m["metric"], number(x, where), where)
                for i, x in enumerate(shares.tolist())
            ]
    if lost:
        named = ", ".join(f"{seed} on {task}" for _, task, seed in sorted(lost))
        notes.append(f"Left out for all methods, as a run of them did not end well: seed {named}.")
    better = {("", m["metric"]): metrics.better(m["metric"]) for m in results["methods"]}  # whatever the file says
    return Scores(rows, better=better, notes=notes)


def main(arguments: list[str]) -> int:
    """Pack the study that is named first into the folder that is named last."""
    if len(arguments) != 2:
        raise UserError("Give two folders: a study's, and one for what is published.")
    study, out = map(Path, arguments)
    print(f"{pack(study, out)} runs in {out}")
    return 0


if __name__ == "__main__":
    run_module(main)
