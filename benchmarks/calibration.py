"""How often the laboratory's verdicts are wrong, by simulation through its own functions.

python -m benchmarks.calibration              # print the tables; some minutes on one core
python -m benchmarks.calibration --write      # ... into docs/explanation/calibration.md

Every table of differences is drawn without a true difference, or with a known one. Levels are those of one comparison
at 5 %, and of a study of ten: ten times the level at 0.5 %, which bounds the correction whatever comparisons share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora.lab.study import metrics
from dual_lora.lab.study import statistics as stats

from . import families, rules

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "calibration.md"
SEEDS, ITEMS = (2, 3, 5, 8), (20, 200, 2000)
SEED_SQUARES = (
    0.0,
    1.0,
    2.0,
    4.0,
    20.0,
    100.0,
    700.0,
)  # mean square of seeds : of the rest; below 1 seeds are stratified
ITEM_SQUARES = (1.0, 2.0, 4.0, 50.0)  # mean square of items : of the rest
FAMILY = 10
Array = np.ndarray[Any, Any]


def allowed(studies: int, level: float) -> float:
    """How many false alarms there may be by luck: three sampling errors more than the level says."""
    return studies * level + 3 * np.sqrt(studies * level) + 1


class Tally:
    """Counts of what went wrong in studies of one kind."""

    def __init__(self) -> None:
        self.studies = self.alarms = self.strict = self.same = 0
        self.found = self.found_strict = 0.0

    def add(self, mean: Array, error: Array, seed_error: Array, seeds: int, items: int, true_error: float) -> None:
        """mean: of differences whose truth is 0; one of three standard errors is laid over it for the power, and one of
        the whole margin, which is six of them, for false equivalence."""
        item_error = np.sqrt(np.maximum(error**2 - seed_error**2, 0))
        half, strict, same = (
            stats.half_width(level, seed_error, item_error, seeds, items) for level in (0.05, 0.05 / FAMILY, 0.1)
        )
        self.studies += len(mean)
        self.alarms += int((np.abs(mean) > half).sum())
        self.strict += int((np.abs(mean) > strict).sum())
        margin = 6 * true_error
        self.same += int((np.abs(mean + margin) + same < margin).sum())
        self.found += int((mean + 3 * true_error > half).sum())
        self.found_strict += int((mean + 3 * true_error > strict).sum())

    def shares(self) -> dict[str, float]:
        """As shares of the studies."""
        n = self.studies
        return {
            "one": self.alarms / n,
            "ten": FAMILY * self.strict / n,
            "coverage": 1 - self.alarms / n,
            "same": self.same / n,
            "power": self.found / n,
            "power ten": self.found_strict / n,
            "drawn": n,
            "over": int(self.alarms > allowed(n, 0.05) or self.strict > allowed(n, 0.05 / FAMILY)),
        }


def crossed(studies: int, random: np.random.Generator) -> Iterator[tuple[int, float, float, int, dict[str, float]]]:
    """The crossed model on the whole grid, drawn as mean squares, which are all that the rule sees of a table."""
    for seeds in SEEDS:
        for seed_square in SEED_SQUARES:
            for item_square in ITEM_SQUARES:
                for items in ITEMS:
                    S, N = seeds - 1, items - 1
                    true = float(
                        np.sqrt((max(seed_square, 1) + item_square - (2 - (seed_square >= 1))) / (seeds * items))
                    )
                    if true == 0:
                        continue
                    seed = seed_square * random.chisquare(S, studies) / S
                    item = item_square * random.chisquare(N, studies) / N
                    rest = random.chisquare(S * N, studies) / (S * N)
                    tally = Tally()
                    mean = true * random.standard_normal(studies)
                    tally.add(mean, *stats.standard_errors(seed, item, rest, seeds, items), seeds, items, true)
                    yield seeds, seed_square, item_square, items, tally.shares()


def right_answers(random: np.random.Generator, shape: tuple[int, int, int], luck: float, taste: float) -> Array:
    """Right and wrong answers: items differ in difficulty, runs in luck, methods in the items that they like."""
    studies, seeds, items = shape
    ease = random.normal(1.0, 1.5, (studies, 1, items))
    two = []
    for _ in range(2):
        chance = ease + luck * random.standard_normal((studies, seeds, 1))
        chance = chance + taste * random.standard_normal((studies, 1, items))
        two.append((random.random(shape) < 1 / (1 + np.exp(-chance))).astype(np.float64))
    return two[0] - two[1]


def losses(random: np.random.Generator, shape: tuple[int, int, int], luck: float, taste: float) -> Array:
    """Two methods' losses: long-tailed over items, and now and then a run is much worse (exponential luck)."""
    studies, seeds, items = shape
    size = np.exp(random.standard_normal((studies, 1, items)))
    two = []
    for _ in range(2):
        factor = 1 + luck * random.exponential(1.0, (studies, seeds, 1)) + 0.1 * random.standard_normal(shape)
        two.append(size * (factor + taste * random.standard_normal((studies, 1, items))))
    return two[0] - two[1]


def correlations(random: np.random.Generator, shape: tuple[int, int, int], luck: float, taste: float) -> Array:
    """Items' shares in two methods' Matthews correlation, as `metrics.pseudo_values` has them."""
    studies, seeds, items = shape
    labels = (random.random((studies, 1, items)) < 0.7).astype(int)
    ease = random.standard_normal((studies, 1, items)) + 2 * labels - 1
    two = []
    for _ in range(2):
        lean = ease + luck * random.standard_normal((studies, seeds, 1))
        lean = lean + taste * random.standard_normal((studies, 1, items)) + 0.5 * random.standard_normal(shape)
        cells = [metrics.confusion_cells(y[0], g, 2) for y, g in zip(labels, (lean > 0).astype(int), strict=True)]
        two.append(np.stack([metrics.pseudo_values("matthews", c) for c in cells]))
    return two[0] - two[1]


Draw = Callable[[np.random.Generator, tuple[int, int, int], float, float], Array]
KINDS: dict[str, tuple[Draw, int]] = {  # name -> (how it is drawn, table entries of a cell; 0: 3 studies)
    "right answers": (right_answers, 40_000),
    "losses": (losses, 40_000),
    "Matthews": (correlations, 0),
}


def tables(work: int, random: np.random.Generator) -> Iterator[tuple[str, int, int, float, float, dict[str, float]]]:
    """Whole tables of scores of each kind; luck: deviation of runs, taste: of methods on single items."""
    for kind, (drawn, entries) in KINDS.items():
        for seeds in SEEDS:
            for items in ITEMS[:2] if kind == "Matthews" else ITEMS:
                for luck in (0.0, 0.3, 2.0):
                    for taste in (0.0, 1.0):
                        studies = work * min(entries // (seeds * items), 1000) if entries else 3 * work
                        parts = []
                        chunk = max(1, 2_000_000 // (seeds * items))
                        for start in range(0, studies, chunk):
                            d = drawn(random, (min(chunk, studies - start), seeds, items), luck, taste)
                            parts.append(stats.error_parts(d))
                        mean, error, seed_error = (np.concatenate(p) for p in zip(*parts, strict=True))
                        tally = Tally()
                        tally.add(mean, error, seed_error, seeds, items, float(mean.std()))
                        yield kind, seeds, items, luck, taste, tally.shares()


MARGIN = 0.01  # of accuracy, as in the shipped studies
# Of an answer's chance to differ, what runs share: none (each by itself), half, all (the same in every run).
SHARED = (0.0, 0.5, 1.0)


FEW = ("each run by itself", "half and half", "the same in every run", "with noise", "small set", "truly alike")


def few(
    studies: int, random: np.random.Generator, items: tuple[int, ...] = (100, 300, 400, 800, 1600)
) -> Iterator[tuple[int, int, tuple[float, ...]]]:
    """Right and wrong answers of which few differ: items, seeds, and the share of studies that say *equivalent*.

    First where all that differ are better, and they are as many as the margin says, so it is wrong: for each of
    `SHARED`; then the same in every run with noise in each; then all in a small test set that counts as much as a large
    one. Last where as many are better as are worse, so it is right.
    """
    for many in items:
        for seeds in (3, 5, 8):
            shape, whole, shares = (studies, seeds, many), (studies, 1, many), []
            for shared in SHARED:
                chance = np.full(whole, MARGIN)
                if shared == 1:
                    chance = (random.random(whole) < MARGIN).astype(np.float64)
                elif shared:
                    left = 1 / shared - 1
                    chance = random.beta(MARGIN * left, (1 - MARGIN) * left, whole)
                shares.append(equivalent((random.random(shape) < chance).astype(np.float64)))
            gain = np.broadcast_to(random.random(whole) < MARGIN / 0.99, shape).astype(np.float64)
            sides = random.choice([-1.0, 1.0], shape)
            shares.append(equivalent(np.where(random.random(shape) < 0.01, sides, gain)))
            small = many // 11
            weight = many / (2 * small)  # of an answer in the small set, 1 in the mean of all
            gain = np.where(np.arange(many) < small, weight * (random.random(whole) < 2 * MARGIN), 0.0)
            shares.append(equivalent(np.broadcast_to(gain, shape), weight))
            sides = random.choice([-1.0, 1.0], whole) * (random.random(whole) < MARGIN)
            yield many, seeds, (*shares, equivalent(np.broadcast_to(sides, shape)))


def equivalent(d: Array, reach: float = 1.0) -> float:
    """The share of the tables d [studies, S, N] that are called equivalent."""
    p = [stats.same_p(replace(stats.spread(each), reach=reach), MARGIN) for each in d]
    return float((np.array(p) < 0.05).mean())


def committed(folder: Path = ROOT / "results" / "studies") -> list[dict[str, Any]]:
    """The results of every published study."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/results.json"))]


def run_to_run(results: list[dict[str, Any]]) -> dict[str, tuple[Array, Array]]:
    """Task · metric -> what its final runs lay off their mean, of all methods together, and the items' errors seen."""
    off: dict[str, list[float]] = {}
    items: dict[str, list[float]] = {}
    for r in results:
        for m in r["methods"]:
            scores = np.array([s["score"] for s in m["seeds"] if s["score"] is not None])
            if len(scores) > 1:
                scale = np.sqrt(len(scores) / (len(scores) - 1))
                off.setdefault(f"{m['task']} · {m['metric']}", []).extend(scale * (scores - scores.mean()))
        for c in r["comparisons"]:
            s = c["spread"]
            if s["error"] is not None:
                part = np.sqrt(max(s["error"] ** 2 - s["seed_error"] ** 2, 0.0))
                items.setdefault(f"{c['task']} · {c['metric']}", []).append(float(part))
    return {name: (np.array(values), np.array(items[name])) for name, values in off.items() if name in items}


def real(
    studies: int, results: list[dict[str, Any]], random: np.random.Generator
) -> Iterator[tuple[str, int, int, dict[str, float]]]:
    """Runs drawn from the published ones: failed seeds among them, so their noise has long tails.

    Two seeds with the same score are taken to agree on every item, as those that answer all records alike do.
    """
    for name, (off, items) in run_to_run(results).items():
        for seeds in SEEDS:
            rows = random.choice(off, (studies, seeds)) - random.choice(off, (studies, seeds))
            item_error = random.choice(items, studies)
            mean = rows.mean(1) + item_error * random.standard_normal(studies)
            seed_error = rows.std(1, ddof=1) / np.sqrt(seeds)
            tally = Tally()
            seed_error = np.hypot(seed_error, stats.unseen_error(mean, seed_error == 0, seeds))
            error = np.hypot(seed_error, item_error)
            tally.add(mean, error, seed_error, seeds, 1000, float(mean.std()))
            yield name, len(off), seeds, tally.shares()


def measured_curve(results: list[dict[str, Any]], method: str) -> tuple[Array, ...]:
    """Mean and deviation of the loss, and of the accuracy, at the three rates of the usual grid (`learning-rate`)."""
    (study,) = [r for r in results if r["study"]["name"] == "learning-rate"]
    rows = {m["method"]: m["seeds"] for m in study["methods"]}
    seeds = [rows[f"{method} lr={rate}"] for rate in ("0.0003", "0.001", "0.003")]
    loss = np.array([[s["figures"]["loss"] for s in at] for at in seeds])
    score = np.array([[s["score"] for s in at] for at in seeds])
    return loss.mean(1), loss.std(1, ddof=1), score.mean(1), score.std(1, ddof=1)


DESIGNS = {
    "one search, one seed": (1, False),
    "one search, mean of three seeds": (3, False),
    "one search, mean of five seeds": (5, False),
    "a search for every final seed": (1, True),
}
TWO = {"one search, mean of two seeds": (2, False)}  # as most published studies have; drawn by itself
TUNING_HEAD = ("curve of", "tuned by", "seeds", "chosen differently", "alarm", "alarm if alike")
TUNED = [*(first := list(DESIGNS))[:1], *TWO, *first[1:]]  # the order on the page


def tuning(
    studies: int, results: list[dict[str, Any]], random: np.random.Generator, designs: dict[str, tuple[int, bool]]
) -> Iterator[tuple[str, str, int, float, float, float]]:
    """Two methods that are the same, each tuned by itself: method, design, seeds, and the shares of studies that choose
    different rates, that find a significant difference, and that find one among those that chose alike."""
    item_error = float(np.median(run_to_run(results)["sst2 · accuracy"][1]))
    for method in ("lora", "dual_lora"):
        loss, loss_off, score, score_off = measured_curve(results, method)
        for design, (searches, each) in designs.items():
            for seeds in (3, 5, 8):
                means, chosen = [], []
                for _ in range(2):
                    many = seeds if each else 1
                    trials = loss + loss_off / np.sqrt(searches) * random.standard_normal((studies, many, len(loss)))
                    rate = np.broadcast_to(trials.argmin(2), (studies, seeds))
                    means.append(score[rate] + score_off[rate] * random.standard_normal((studies, seeds)))
                    chosen.append(rate)
                d = means[0] - means[1]
                off = item_error * random.standard_normal(studies)
                half = stats.half_width(0.05, d.std(1, ddof=1) / np.sqrt(seeds), item_error, seeds, 1821)
                alarm = np.abs(d.mean(1) + off) > half
                alike = (chosen[0] == chosen[1]).all(1)
                yield method, design, seeds, float((~alike).mean()), float(alarm.mean()), float(alarm[alike].mean())


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


WORST = (
    "alarm, one",
    "alarm, ten",
    "coverage of 95 %",
    "false *equivalent*",
    "power, one",
    "power, ten",
    "drawn",
    "over",
)


def worst(cells: list[dict[str, float]]) -> tuple[str, ...]:
    """The worst cell of each column, and how many cells are over the level by more than luck."""
    most, least = (lambda key: max(c[key] for c in cells)), (lambda key: min(c[key] for c in cells))
    figures = (most("one"), most("ten"), least("coverage"), most("same"), least("power"), least("power ten"))
    return (
        *(f"{x:.3f}" for x in figures),
        str(sum(int(c["drawn"]) for c in cells)),
        str(sum(c["over"] for c in cells)),
    )


def mean(cells: list[dict[str, float]]) -> tuple[str, ...]:
    """The mean over cells, each of which has too few studies for a worst one to mean anything."""
    figures = [np.mean([c[key] for c in cells]) for key in ("one", "ten", "coverage", "same", "power", "power ten")]
    return (
        *(f"{x:.3f}" for x in figures),
        str(sum(int(c["drawn"]) for c in cells)),
        str(sum(c["over"] for c in cells)),
    )


Rows = Iterator[tuple[Any, ...]]


def grouped(rows: Rows, key: Callable[[tuple[Any, ...]], Any], summary: Any = worst) -> list[tuple[Any, ...]]:
    """One row a key, of the cells under it."""
    groups: dict[Any, list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row[-1])
    return [(*name, *summary(cells)) for name, cells in groups.items()]


def page_tables(work: int) -> dict[str, str]:
    """Every table of the page by its name. work: 100 for the published figures."""
    random, results = np.random.default_rng(2026), committed()
    studies = 4000 * work
    kinds = grouped(tables(work, random), lambda r: r[:3], mean)
    runs = grouped(real(studies, results, random), lambda r: r[:3])
    tuned = [*tuning(studies, results, random, DESIGNS), *tuning(studies, results, np.random.default_rng(22), TWO)]
    tuned = sorted(tuned, key=lambda row: (row[0] != "lora", TUNED.index(row[1])))
    levels = [
        (r["study"]["name"], len(r["comparisons"]), len(r["study"]["seeds"]), f"{r['false_alarm']:.3f}")
        for r in results
        if r["false_alarm"] is not None
    ]
    grid = (SEEDS, ITEMS, SEED_SQUARES, ITEM_SQUARES)
    tried = list(rules.worst_levels(600 * work, np.random.default_rng(600), *grid))  # drawn by itself
    return {
        "rules": table(("rule", *(f"S = {seeds}" for seeds in SEEDS), "comment"), tried),
        "families": table(families.HEAD, list(families.worst(200 * work, np.random.default_rng(0)))),
        "crossed": table(
            ("seeds", "ρ", *WORST), grouped(crossed(studies, random), lambda r: (r[0], f"{r[1]:g}"))
        ),
        "kinds": table(("metric", "seeds", "items", *WORST), kinds),
        "few": table(
            ("items", "seeds", *FEW),
            [(*at, *(f"{x:.3f}" for x in shares)) for *at, shares in few(20 * work, np.random.default_rng(17))],
        ),
        "real": table(("task · metric", "runs", "seeds", *WORST), runs),
        "fails": table(families.FAILS_HEAD, list(families.fails(400 * work, np.random.default_rng(21)))),
        "tuning": table(TUNING_HEAD, [(*row[:3], *(f"{x:.3f}" for x in row[3:])) for row in tuned]),
        "studies": table(("study", "comparisons", "seeds", "any false alarm"), levels),
    }  # fmt: skip


def filled(text: str, made: dict[str, str]) -> str:
    """The page with its tables put between <!-- NAME --> and <!-- end -->."""
    for name, content in made.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"{PAGE.name} has no place for the table {name}: expected a line <!-- {name} -->.")
        text = before + mark + content + "\n" + after[after.index("<!-- end -->") :]
    return text


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--work", type=int, default=100, help="how many studies are drawn; 1 is a quick look")
    args = parser.parse_args(argv)
    made = page_tables(args.work)
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{content}" for name, content in made.items()))


if __name__ == "__main__":
    main()
