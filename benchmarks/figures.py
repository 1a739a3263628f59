"""The figures of docs/explanation/cost.md: `python -m benchmarks.figures` writes them from the ledger; a test looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import gates, ledger, plot
from .measure import QUIET_SHARE

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "cost.md"
BEGIN, END = "<!-- figures: written by python -m benchmarks.figures -->", "<!-- end of figures -->"
CURVES = "<!-- curves: written by python -m benchmarks.figures -->", "<!-- end of curves -->"
THREADS = 1

# What the reader sees, the work's name in the gates, and what it is compared with.
LINES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("training step, SmolLM2-135M, 4×256 tokens, fp32", gates.STEP, "dual", ("lora", "full", "dora", "hira", "naive")),
    ("peak memory growth in that step", "memory of that step", "dual", ("lora",)),
    ("linear 4096², 2,048 tokens, fp32", "linear 4096 T2048 fp32", "dual", ("lora", "full")),
    ("linear 4096², 512 tokens, bf16", "linear 4096 T512 bf16", "dual", ("lora",)),
    ("linear 4096², 2,048 tokens, NF4 base", "linear 4096 T2048 nf4", "dual", ("lora",)),
    ("generating a token, unmerged, warm cache", "decode 4096 T1 bf16", "dual", ("base",)),
    ("merge, 4096², bf16", "merge 4096 bf16", "dual", ("lora",)),
    ("exact unmerge, 4096², bf16", "unmerge 4096 bf16", "dual", ("lora",)),
)
NAMES = {"lora": "LoRA", "full": "full", "dora": "DoRA", "hira": "HiRA", "naive": "naive autograd", "base": "the base"}


def newest(rows: Iterable[Mapping[str, Any]], work: str, subject: str, against: str) -> Mapping[str, Any]:
    """The last gate row of that comparison on one thread, of a quiet machine if there ever was one.

    Raises ValueError if it was never measured.
    """
    wanted = ("gate", THREADS, work, subject, against)
    keys = ("kind", "threads", "work", "subject", "against")
    matching = [row for row in rows if tuple(row[k] for k in keys) == wanted]
    quiet = [row for row in matching if row["share_of_cores"] >= QUIET_SHARE]
    found = (quiet or matching or [None])[-1]
    if found is None:
        raise ValueError(f"The ledger has no row of {work!r}, {subject} against {against}: run `make bench`.")
    return found


def tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of each kind of machine, in the order in which they came into the ledger."""
    machines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "gate" and row["threads"] == THREADS and row["work"] in {line[1] for line in LINES}:
            machines.setdefault(row["device"], []).append(row)
    return "\n\n".join(f"On {device}:\n\n{table(own)}" for device, own in machines.items())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of one kind of machine in Markdown: a line of every work measured there, and when that was."""
    rows = list(rows)
    measured = {row["work"] for row in rows if row["kind"] == "gate" and row["threads"] == THREADS}
    lines = ["| cost of Dual LoRA, times that of | " + " | ".join(NAMES.values()) + " |"]
    lines.append("|---" * (1 + len(NAMES)) + "|")
    used = []
    for text, work, subject, others in LINES:
        if work not in measured:
            continue
        cells = dict.fromkeys(NAMES, "")
        for against in others:
            row = newest(rows, work, subject, against)
            used.append(row)
            cells[against] = f"{row['ratio']:.2f}"
        lines.append(f"| {text} | " + " | ".join(cells.values()) + " |")
    days = sorted({r["date"][:10] for r in used})
    days = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    lines += [
        "",
        f"Medians of paired ratios, one thread, r = 32 in all methods, {days} (`make bench`; every run is a row of",
        "[`benchmarks/ledger.jsonl`](../../benchmarks/ledger.jsonl)).",
    ]
    if not all(r.get("bf16_units", True) for r in used):
        lines += [
            "",
            "This processor has no units for bf16, so products take most of the time in bf16. Use fp32 on it.",
        ]
    if all(r.get("fp32_products") == "torch.mm" for r in used):
        lines += ["", "On this processor torch.mm computes the fp32 products of all methods, ours too."]
    if any(r.get("fp32_products") == "oneDNN" for r in used):
        lines += [
            "",
            "On this processor oneDNN computes our fp32 products, and torch's MKL those of the other methods. MKL is",
            "slower here, so a part of the gain comes from the library",
            "([how we separate the two](../../benchmarks/README.md)).",
        ]
    return "\n".join(lines)


def grown(rows: Iterable[dict[str, Any]]) -> str:
    """What the pictures show at their ends, and where that was measured."""
    curves = plot.newest(list(rows))
    tokens, rank = ({row["at"]: row["ratio"] for row in curves[name]} for name in ("tokens", "rank"))
    by_tokens, by_rank = plot.where(curves["tokens"]), plot.where(curves["rank"])
    first = "" if by_tokens == by_rank else f" ({by_tokens})"
    return (
        f"The ratio to LoRA's time for one layer of 2048² in fp32 is {tokens[16]:.2f} at 16 tokens, {tokens[512]:.2f} "
        f"at 512 and {tokens[4096]:.2f} at 4,096{first}.\nWith the rank it goes from "
        f"{rank[4]:.2f} at 4 to {rank[256]:.2f} at 256 ({by_rank})."
    )


def written(page: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The page's text with what stands between its marks replaced. Raises ValueError where a mark is missing."""
    kept = [dict(row) for row in rows]
    for (begin, end), text in (((BEGIN, END), tables(kept)), (CURVES, grown(kept))):
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{PAGE.name} needs the lines {begin!r} and {end!r} once each.")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return page


def main() -> int:
    """Write the page's figures; returns 0."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(text, ledger.read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
