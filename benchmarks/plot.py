"""The newest curves of the ledger as one SVG each: `python -m benchmarks.plot [folder]`. Needs nothing but Python."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from . import ledger
from .measure import QUIET_SHARE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 56, 16, 40, 44
LINES = {"measured": "#2563eb", "limit by flops": "#9ca3af"}
UNITS = {"tokens": "tokens T", "size": "size O = I", "rank": "r1 + r2 (and LoRA's r)", "adapters": "active adapters"}


def newest(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each curve the points of one measurement, on one machine: the last one that was quiet, if any was."""
    curves: dict[str, dict[tuple[str, str], dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] == "curve":
            curves.setdefault(row["work"], {}).setdefault((row["date"], row["device"]), {})[row["at"]] = row
    chosen = {}
    for name, measured in curves.items():
        quiet = [points for points in measured.values() if not busy(points.values())]
        points = (quiet or list(measured.values()))[-1]
        chosen[name] = [points[at] for at in sorted(points)]
    return chosen


def busy(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether the process had to share its cores at any of these points."""
    return any(row["share_of_cores"] < QUIET_SHARE for row in rows)


def where(rows: list[dict[str, Any]]) -> str:
    """On which machine, when, and whether it was busy."""
    return f"{rows[0]['device']}, {rows[0]['date'][:10]}{', a busy machine' if busy(rows) else ''}"


def draw(name: str, rows: list[dict[str, Any]]) -> str:
    """One curve as an SVG: the ratio to LoRA with its interval, and what the flops allow."""
    xs = [row["at"] for row in rows]
    top = max(max(row["interval"][1], row["limit"]) for row in rows) * 1.05
    low = min(1.0, *(row["limit"] for row in rows)) * 0.9

    def x(at: float) -> float:
        span = math.log2(xs[-1] / xs[0]) or 1
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(at / xs[0]) / span

    def y(ratio: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - ratio) / (top - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" '
        f'font-size="12"><title>Cost against PEFT LoRA by {escape(UNITS[name])}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">forward + backward against PEFT LoRA, fp32, one thread</text>',
        f'<text x="{LEFT}" y="34" font-size="10" fill="#6b7280">{escape(where(rows))}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(UNITS[name])}</text>',
    ]
    step = next(s for s in (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100) if (top - low) / s <= 8)
    for k in range(math.ceil(low / step), math.floor(top / step) + 1):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(k * step):.1f}" y2="{y(k * step):.1f}" stroke="#eee"/>'
            f'<text x="{LEFT - 6}" y="{y(k * step) + 4:.1f}" text-anchor="end">{k * step:g}</text>'
        )
    for row in rows:
        parts.append(
            f'<text x="{x(row["at"]):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{row["at"]}</text>'
            f'<line x1="{x(row["at"]):.1f}" x2="{x(row["at"]):.1f}" y1="{y(row["interval"][0]):.1f}" '
            f'y2="{y(row["interval"][1]):.1f}" stroke="{LINES["measured"]}" stroke-width="4" opacity="0.3"/>'
        )
    for k, (label, key) in enumerate((("measured", "ratio"), ("limit by flops", "limit"))):
        points = " ".join(f"{x(row['at']):.1f},{y(row[key]):.1f}" for row in rows)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{LINES[label]}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 155 + 68 * k}" y="34" fill="{LINES[label]}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(folder: Path) -> None:
    """Draw every curve that the ledger has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in newest(list(ledger.read())).items():
        (folder / f"cost-{name}.svg").write_text(draw(name, rows), encoding="utf-8")
        print(folder / f"cost-{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "pictures")
