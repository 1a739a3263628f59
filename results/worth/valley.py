"""How wide is each method's valley of learning rates? Run: python results/worth/valley.py STUDY_FOLDER

Reads the trials of `dual-lora compare valley --out STUDY_FOLDER`: the loss on held-out records at nine rates, with
three seeds each. A valley is the range of rates whose loss is at most 0.03 above that seed's best, by lines between the
logarithms of the rates that were tried; its width is in decades. Writes STUDY_FOLDER/widths.csv, one width a method, α
and seed, and middles.csv (the logarithm of the valley's middle); `dual-lora judge FILE --reference lora` compares
the two methods at each α.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

ABOVE = 0.03


def valley(losses: dict[float, float]) -> tuple[float, float]:
    """Width in decades, and log10 of the middle, of the range around the best rate that stays near the best loss."""
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    limit = losses[best] + ABOVE

    def end(outwards: list[float]) -> float:
        inside = best
        for rate in outwards:
            if losses[rate] > limit:
                a, b = math.log10(inside), math.log10(rate)
                rise = (limit - losses[inside]) / (losses[rate] - losses[inside])
                return a + (b - a) * rise
            inside = rate
        return math.log10(inside)  # the valley goes on beyond the grid

    low, high = end([r for r in reversed(rates) if r < best]), end([r for r in rates if r > best])
    return high - low, (high + low) / 2


def main() -> None:
    """Print each method's widths, and write what `judge` reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    folder = parser.parse_args().study
    results = json.loads((folder / "results.json").read_text())
    tables = {name: (folder / f"{name}.csv").open("w", newline="") for name in ("widths", "middles")}
    writers = {name: csv.writer(file) for name, file in tables.items()}
    for writer in writers.values():
        writer.writerow(("method", "task", "seed", "score", "metric"))
    for method in results["methods"]:
        by_seed: dict[int, dict[float, float]] = defaultdict(dict)
        for trial in method["trials"]:
            score = trial["score"] if trial["status"] == "done" and trial["score"] is not None else math.inf
            by_seed[trial.get("seed", 0)][trial["settings"]["train.learning_rate"]] = score
        for seed, losses in by_seed.items():
            width, middle = valley(losses)
            family, alpha = method["method"].split()
            where = family, f"α = {alpha}", seed
            writers["widths"].writerow((*where, f"{width:.4f}", "decades"))
            writers["middles"].writerow((*where, f"{middle:.4f}", "decades"))
            print(f"{method['method']}, seed {seed}: {width:.2f} decades around {10**middle:.2g}", file=sys.stderr)
    for file in tables.values():
        file.close()


if __name__ == "__main__":
    main()
