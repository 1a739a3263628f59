"""Two methods at the same learning rates, without a search. Run: python results/worth/rates.py STUDY_FOLDER

Reads the results of a study that sweeps `learning_rate` (`dual-lora compare cola-rates --out STUDY_FOLDER`). Prints a
line for each method and rate: the mean score with its 95 % interval over seeds (Student's t), and the share of runs
that learned nothing (a score below 0.02) with Wilson's interval. Writes STUDY_FOLDER/rates.csv, in which every rate is
a task: `dual-lora judge rates.csv --reference lora` compares the two at each rate, paired by seed. Writes
STUDY_FOLDER/best.csv too: each method at the rate with the best mean over the first half of the seeds, with the scores
of the other half, because the seeds that choose a rate flatter it.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import stats

NOTHING = 0.02  # a Matthews correlation below it: all sentences but a few get one answer
Row = tuple[str, str, int, float, str]  # method, task, seed, score, metric


def described(scores: np.ndarray) -> str:
    """The mean of one method at one rate, and how many of its runs learned nothing."""
    low, high = stats.t.interval(0.95, len(scores) - 1, scores.mean(), stats.sem(scores))
    nothing = int((scores < NOTHING).sum())
    share = stats.binomtest(nothing, len(scores)).proportion_ci(method="wilson")
    return (
        f"{scores.mean():.3f} [{low:.3f} to {high:.3f}], deviation {scores.std(ddof=1):.3f}, "
        f"{nothing} of {len(scores)} learned nothing [{share.low:.0%} to {share.high:.0%}]"
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as `dual-lora judge` reads them."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("method", "task", "seed", "score", "metric"), *rows])


def main() -> None:
    """Print every method and rate, and write what `judge` reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    folder = parser.parse_args().study
    results = json.loads((folder / "results.json").read_text())
    rows: list[Row] = []
    for cell in results["methods"]:
        method, rate = cell["method"].split(" lr=")
        runs = [(run["seed"], run["score"] if run["status"] == "done" else 0.0) for run in cell["seeds"]]
        rows += [(method, f"lr={rate}", seed, score, cell["metric"]) for seed, score in runs]
        scores = np.array([score for _, score in runs])
        print(f"{method:10} {rate:>7}  {described(scores)}")
    seeds = sorted({seed for _, _, seed, _, _ in rows})
    choosing = set(seeds[: len(seeds) // 2])
    totals: dict[str, Counter[str]] = {}
    for method, rate, seed, score, _ in rows:
        totals.setdefault(method, Counter())[rate] += score * (seed in choosing)
    best = {method: by_rate.most_common(1)[0][0] for method, by_rate in totals.items()}
    write(folder / "rates.csv", rows)
    chosen = [row for row in rows if row[1] == best[row[0]] and row[2] not in choosing]
    write(folder / "best.csv", [(name, "best rate", seed, score, metric) for name, _, seed, score, metric in chosen])
    print(
        "best mean over the first half of the seeds:",
        ", ".join(f"{method} at {rate[3:]}" for method, rate in best.items()),
    )


if __name__ == "__main__":
    main()
