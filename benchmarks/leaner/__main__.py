"""`python -m benchmarks.leaner [--only NAME]`: every idea next to the present code, judged before it is timed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .finding import Finding, show

FAMILIES = ("products", "passes", "factors", "signs", "shared", "checkpoints", "accumulation", "optimizer", "compiled")


def main(argv: list[str] | None = None) -> int:
    """Run the families, print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaner", description=__doc__)
    parser.add_argument("--only", default="", help=f"families, separated by commas: {', '.join(FAMILIES)}")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the single weights")
    parser.add_argument("--seconds", type=float, default=10, help="time for one comparison")
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name] or FAMILIES
    if unknown := set(names) - set(FAMILIES):
        parser.error(f"unknown families {', '.join(sorted(unknown))}: choose from {', '.join(FAMILIES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    findings: list[Finding] = []
    for name in names:
        print(f"… {name}", file=sys.stderr, flush=True)
        findings += importlib.import_module(f"{__package__}.{name}").findings(args.size, args.seconds)
    show(findings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
