"""Measuring next to each other: variants interleaved in one process, ratios paired by round.

A cost is processor time where one thread works (other processes then matter little), wall time where several do. Every
round runs all variants, in turned order, and a ratio is the median over rounds of the ratio inside a round, so that a
machine that slows down for a while slows both sides. Rounds go on until the interval of the median is narrow, or the
time is used up; `Measured.share` tells how much of its cores the process really had.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

# Not by torch.utils.benchmark: its Timer takes one variant after the other, so no ratio is paired or has an interval.
# A sample shorter than this is repeated between the two readings of time.
SAMPLE_SECONDS = 0.03
# Half the width of a ratio's interval, relative, at which rounds end.
NARROW = 0.01
# Below this share of its cores, neighbours have a say: in wall time directly, in processor time through the caches.
QUIET_SHARE = 0.85


class Unavailable(RuntimeError):
    """What this installation cannot measure, with the reason."""


class Ratio(NamedTuple):
    """A median of paired ratios with its 95 % interval (order statistics; the range for few rounds).

    Rounds that end once it is narrow cost some of that: it holds the true median in 91 % at least (simulated).
    """

    median: float
    low: float
    high: float
    rounds: int

    @property
    def uncertainty(self) -> float:
        """Half the interval's width, relative to the median."""
        return (self.high - self.low) / 2 / self.median


class Measured(NamedTuple):
    """Costs of variants that were measured together; `costs[a][k]` and `costs[b][k]` belong to the same round."""

    costs: Mapping[str, Sequence[float]]
    unit: str  # "s" or "bytes"
    threads: int
    share: float = 1.0  # processor time used / (wall time × threads asked for); 1 for what is not timed

    def ratio(self, subject: str, against: str) -> Ratio:
        """How many times `against` the subject costs."""
        return median_ratio(self.costs[subject], self.costs[against])

    def median(self, variant: str) -> float:
        """Median cost of one variant, in `unit`."""
        return statistics.median(self.costs[variant])

    def spread(self, variant: str) -> float:
        """Range of the middle half of a variant's costs, relative to the median; 0 for a single round."""
        costs = sorted(self.costs[variant])
        if len(costs) < 3:
            return (costs[-1] - costs[0]) / costs[len(costs) // 2] if costs[-1] else 0.0
        low, _, high = statistics.quantiles(costs, n=4)
        return (high - low) / statistics.median(costs)

    @property
    def quiet(self) -> bool:
        """Whether the process had its cores to itself."""
        return self.share >= QUIET_SHARE


def median_ratio(subject: Sequence[float], against: Sequence[float]) -> Ratio:
    """Median of subject[k] / against[k]; 0 / 0 counts as 1 (nothing against nothing)."""
    if len(subject) != len(against) or not subject:
        raise ValueError(f"Paired costs need the same number of rounds, got {len(subject)} and {len(against)}.")
    ratios = sorted(1.0 if a == b else a / b if b else float("inf") for a, b in zip(subject, against, strict=True))
    n = len(ratios)
    below = _ranks_below(n)
    return Ratio(statistics.median(ratios), ratios[below], ratios[n - 1 - below], n)


def _ranks_below(n: int) -> int:
    """How many of n values lie below a distribution-free 95 % interval of their median, and as many above.

    0 below six values, where no such interval exists.
    """
    chances = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n))  # that so few lie below the median
    return max(sum(chance <= 0.025 for chance in chances) - 1, 0)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    pairs: Sequence[tuple[str, str]],
    threads: int,
    seconds: float,
    rounds: tuple[int, int] = (5, 60),
    threads_of: Mapping[str, int] | None = None,
) -> Measured:
    """Time the variants round by round until every pair's ratio is narrow, for about `seconds` at most.

    threads_of: of variants that set a number of threads of their own.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch_threads(threads):
        loops = {name: _loops(run) for name, run in variants.items()}
        costs: dict[str, list[float]] = {name: [] for name in variants}
        names = list(variants)
        asked, start, start_cpu = 0.0, time.perf_counter(), time.process_time()
        for done in range(1, rounds[1] + 1):
            for name in names:
                run, n = variants[name], loops[name]
                wall, before = time.perf_counter(), clock()
                for _ in range(n):
                    run()
                costs[name].append((clock() - before) / n)
                asked += (time.perf_counter() - wall) * (threads_of or {}).get(name, threads)
            names = names[1:] + names[:1]
            if done >= rounds[0]:
                narrow = all(median_ratio(costs[a], costs[b]).uncertainty < NARROW for a, b in pairs)
                if narrow or time.perf_counter() - start > seconds:
                    break
        cpu = time.process_time() - start_cpu
    return Measured(costs, "s", threads, min(cpu / asked, 1.0))


def _loops(run: Callable[[], object]) -> int:
    """Warm up, and find how many calls fill a sample."""
    for _ in range(2):
        before = time.perf_counter()
        run()
        taken = max(time.perf_counter() - before, 1e-7)
        if taken > 10 * SAMPLE_SECONDS:
            return 1
    return max(1, round(SAMPLE_SECONDS / taken))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's number of threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
