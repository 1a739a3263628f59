"""Equal search and fresh seeds for the scripts of this folder, as the laboratory's studies have them.

Each method's learning rate is the one with the best mean over tuning seeds (two, or as many as asked for), from a
grid, and up to two more where the best lies at an end. Eight other seeds are judged: OUT/scores.csv is what
`dual-lora judge` reads, and OUT/rates.json says what was tried and chosen. What is finished there is not run again.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

FIRST_TUNING_SEED, JUDGED = 101, 8

Run = Callable[[str, float, int], Sequence[float]]  # method, learning rate, seed → a score for each test item


class Comparison:
    """Methods on tasks, one after another; the files in `out` grow with each."""

    def __init__(self, out: Path, metric: str, better: str, tuning_seeds: int = 2, first_seed: int = 1):
        self.tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds)
        self.seeds = range(first_seed, first_seed + JUDGED)
        out.mkdir(parents=True, exist_ok=True)
        self.scores, self.rates = out / "scores.csv", out / "rates.json"
        self.metric, self.best_of = metric, max if better == "more" else min
        self.known = json.loads(self.rates.read_text()) if self.rates.exists() else {}
        if not self.scores.exists():
            self.scores.write_text("task,method,seed,item,score,metric\n")

    def add(self, task: str, method: str, grid: Sequence[float], run: Run) -> None:
        """Tune a method on a task, train it with the seeds that are judged, and write both down."""
        if method in self.known.get(task, {}):
            return

        def mean_at(rate: float) -> float:
            return fmean(fmean(run(method, rate, seed)) for seed in self.tuning_seeds)

        rate, tried = self._tuned(grid, mean_at)
        finals = {seed: run(method, rate, seed) for seed in self.seeds}
        with self.scores.open("a", newline="") as file:
            rows = csv.writer(file)
            for seed, items in finals.items():
                rows.writerows((task, method, seed, i, f"{s:.6g}", self.metric) for i, s in enumerate(items))
        means = [round(fmean(items), 5) for items in finals.values()]
        self.known.setdefault(task, {})[method] = {"rate": rate, "tried": tried, self.metric: means}
        self.rates.write_text(json.dumps(self.known, indent=1) + "\n")
        print(f"{task}, {method}: {fmean(means):.4f} at {rate:.2g} {tried}", file=sys.stderr, flush=True)

    def _tuned(self, grid: Sequence[float], mean_at: Callable[[float], float]) -> tuple[float, dict[float, float]]:
        """The best rate, and the mean score at each that was tried."""
        tried = {rate: mean_at(rate) for rate in grid}
        for _ in range(2):
            best, step = self.best_of(tried, key=lambda rate: tried[rate]), math.sqrt(10)
            beyond = best * step if best == max(tried) else best / step if best == min(tried) else None
            if beyond is None:
                break
            tried[beyond] = mean_at(beyond)
        return self.best_of(tried, key=lambda rate: tried[rate]), tried
