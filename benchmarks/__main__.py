"""`python -m benchmarks`: the gates. `curves`, `blocks`: costs as they grow, and the block sizes. `estimate`: foretold
and measured peaks of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from . import gates, ledger, verdict
from .measure import Measured, Unavailable

# A measurement that is too noisy to judge is repeated so often.
REPEATS = 2


def main(argv: list[str] | None = None) -> int:
    """Parse, run, print; the exit code says whether the gates hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "command", nargs="?", default="gates", choices=["gates", "curves", "blocks", "estimate", "list"]
    )
    parser.add_argument("--only", default="", help="run the works whose name contains this (a comma separates several)")
    parser.add_argument("--threads", default=None, help="numbers of threads, e.g. 1 or 1,2; default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=20, help="time for one work on one number of threads")
    parser.add_argument("--no-ledger", action="store_true", help="append nothing to the ledger")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    only = [word for word in args.only.split(",") if word]
    if args.command == "list":
        from .works import WORKS

        print("\n".join(name for work in WORKS for name in work.names))
        return 0
    if args.command == "gates":
        return run_gates(only, _threads(args.threads), args.seconds, not args.no_ledger)
    if args.command == "estimate":
        from . import estimate

        return estimate.run(only, not args.no_ledger)
    from . import curves

    run = curves.run if args.command == "curves" else curves.run_blocks
    run(only, args.seconds, not args.no_ledger)
    return 0


def _threads(text: str | None) -> list[int]:
    cores = len(os.sched_getaffinity(0))
    return sorted({1, cores}) if text is None else [int(n) for n in text.split(",")]


def run_gates(only: list[str], threads: list[int], seconds: float, write: bool, ledger_path: Path = ledger.PATH) -> int:
    """Measure what the gates name, print the table, append to the ledger."""
    from .works import WORKS

    source, verdicts, shares = ledger.provenance(), [], []
    for work in WORKS:
        if only and not any(word in name for word in only for name in work.names):
            continue
        for n in threads if work.threads is None else [work.threads]:
            for attempt in range(1 + REPEATS):
                start = time.perf_counter()
                print(f"… {work.names[0]}, {n} thread{'s' * (n > 1)}", end="", file=sys.stderr, flush=True)
                try:
                    results: dict[str, Measured | str] = dict(work.run(n, seconds))
                except Unavailable as reason:
                    results = dict.fromkeys(work.names, str(reason))
                print(f" ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
                found = [
                    verdict.judge(gate, n, results[gate.work], source["bf16_units"])
                    for gate in gates.GATES
                    if gate.work in results and gate.threads in (None, n)
                ]
                if not any(v.mark is verdict.Mark.NOISY for v in found):
                    break
                print(f"  too noisy to judge; attempt {attempt + 1} of {1 + REPEATS}", file=sys.stderr)
            verdicts += found
            shares += [m.share for m in results.values() if isinstance(m, Measured) and m.unit == "s"]
            if write:
                ledger.append(_rows(source, work.shape, found), ledger_path)
    verdict.show(verdicts, noise(shares))
    return verdict.exit_code(verdicts)


def _rows(source: dict, shape: dict, found: list[verdict.Verdict]) -> list[dict]:
    rows = []
    for v in found:
        for limit, _, mark in v.lines:
            if v.measured is not None:
                row = ledger.row(source, "gate", v.gate.work, shape, v.measured, v.gate.subject, limit.against)
                rows.append({**row, "at_most": round(limit.at_most, 4), "mark": mark.value})
    return rows


def noise(shares: list[float]) -> str:
    """One sentence on how far the run can be trusted."""
    load = os.getloadavg()[0]
    if not shares:
        return f"Load average {load:.1f} on {os.cpu_count()} cores."
    low = min(shares)
    return (
        f"This process had {low:.0%} to {max(shares):.0%} of the cores it asked for (load average {load:.1f} on "
        f"{os.cpu_count()} cores). One thread is measured by processor time, which neighbours disturb through the "
        "caches; several threads by wall time."
    )


if __name__ == "__main__":
    sys.exit(main())
