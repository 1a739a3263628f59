"""Charts of small panels as SVG, from published files: `python -m scripts.pictures rates calibration`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent
CALIBRATION = ROOT / "docs" / "explanation" / "calibration.md"
COLOURS = ("#1d4ed8", "#b45309", "#047857", "#b91c1c", "#7c3aed", "#475569")
WIDTH, HIGH, LEFT, GAP, TOP = 820, 170, 44, 34, 58
LETTER = 6.6  # width of one at 12 pixels, about


@dataclass
class Panel:
    """title: above it. ticks: names of the places on the x axis. series: label -> height at each place, None for none.

    level: a dashed line there. dots: single points, label -> (place, height).
    """

    title: str
    ticks: Sequence[str]
    series: dict[str, list[float | None]]
    low: float
    high: float
    level: float | None = None
    dots: dict[str, list[tuple[int, float]]] | None = None
    notes: dict[str, list[str]] | None = None


def drawn(title: str, below: str, panels: Sequence[Panel], lines: bool = True) -> str:
    """Panels side by side. below: what the x axis is. lines: whether a series' points are connected."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    colour = dict(zip(labels, COLOURS * (1 + len(labels) // len(COLOURS)), strict=False))
    noted = max((len(panel.notes or {}) for panel in panels), default=0)
    legend, rows = _legend(labels if len(labels) > 1 else []), 0
    rows = 1 + max((row for _, _, row in legend), default=-1)
    height = TOP + HIGH + 44 + (18 * noted + 8 if noted else 0) + 20 * rows
    width = (WIDTH - 20) / len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-size="12" '
        f'font-family="system-ui, sans-serif"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#fbfbfa"/>',
        f'<text x="20" y="24" font-size="14">{escape(title)}</text>',
    ]
    for k, panel in enumerate(panels):
        parts += _panel(panel, 10 + k * width + LEFT, width - LEFT - GAP / 2, colour, below, lines)
    for label, x, row in legend:
        y = height - 20 * (rows - row) + 6
        parts.append(
            f'<rect x="{x:.0f}" y="{y - 9}" width="14" height="4" fill="{colour[label]}"/>'
            f'<text x="{x + 20:.0f}" y="{y - 3}" fill="#333">{escape(label)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _legend(labels: Sequence[str]) -> list[tuple[str, float, int]]:
    """Where each label stands: x and row."""
    placed, x, row = [], 20.0, 0
    for label in labels:
        wide = 38 + LETTER * len(label)
        if x + wide > WIDTH - 10 and x > 20:
            x, row = 20.0, row + 1
        placed.append((label, x, row))
        x += wide
    return placed


def _panel(p: Panel, left: float, wide: float, colour: dict[str, str], below: str, lines: bool) -> list[str]:
    bottom = TOP + HIGH
    step = wide / max(1, len(p.ticks))

    def x(place: float) -> float:
        return left + step * (place + 0.5)

    def y(value: float) -> float:
        return bottom - HIGH * (value - p.low) / (p.high - p.low)

    parts = [f'<text x="{left}" y="{TOP - 12}" fill="#333" font-weight="600">{escape(p.title)}</text>']
    for value in _round_values(p.low, p.high):
        parts.append(
            f'<line x1="{left:.1f}" x2="{left + wide:.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e5e7eb"/>'
            f'<text x="{left - 6:.1f}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#666">{value:g}</text>'
        )
    every = max(1, -(-len(p.ticks) // int(wide // 26)))
    for place, tick in enumerate(p.ticks):
        if tick and place % every == 0:
            parts.append(f'<text x="{x(place):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#666">{tick}</text>')
    parts.append(f'<text x="{left + wide / 2:.1f}" y="{bottom + 32}" text-anchor="middle" fill="#666">{below}</text>')
    if p.level is not None:
        parts.append(
            f'<line x1="{left:.1f}" x2="{left + wide:.1f}" y1="{y(p.level):.1f}" y2="{y(p.level):.1f}" stroke="#444" '
            'stroke-dasharray="4 3"/>'
        )
    sides = {label: 9 * (k - (len(p.dots) - 1) / 2) for k, label in enumerate(p.dots)} if p.dots else {}
    for label, points in (p.dots or {}).items():
        parts += [
            f'<circle cx="{x(place) + sides[label]:.1f}" cy="{y(value):.1f}" r="3" fill="{colour[label]}" '
            'fill-opacity="0.45"/>'
            for place, value in points
        ]
    for label, values in p.series.items():
        at = [(x(place) + sides.get(label, 0), y(v)) for place, v in enumerate(values) if v is not None]
        if lines and len(at) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour[label]}" stroke-width="2"/>')
        radius = 3.5 if p.dots is None else 0
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" fill="{colour[label]}"/>' for a, b in at if radius]
    for row, (label, said) in enumerate((p.notes or {}).items()):
        for place, note in enumerate(said):
            parts.append(
                f'<text x="{x(place):.1f}" y="{bottom + 52 + 18 * row}" text-anchor="middle" '
                f'fill="{colour[label]}">{escape(note)}</text>'
            )
    return parts


def _round_values(low: float, high: float) -> list[float]:
    step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if (high - low) / s <= 6)
    return [round(k * step, 4) for k in range(round(low / step), int(high / step + 1e-9) + 1)]


# Scores and failures by rate: (study, method, label, rate).
SST2 = [("learning-rate", f"{m} lr={r}", label, r) for m, label in (("lora", "LoRA"), ("dual_lora", "Dual LoRA"))
        for r in ("0.0001", "0.0003", "0.001", "0.003", "0.01", "0.03")]  # fmt: skip
COLA = [
    ("longer-cola-first", "lora", "LoRA", "0.0003"),
    ("cola-rate", "lora lr=0.0003", "LoRA", "0.0003"),
    ("longer-cola-first", "dual_lora", "Dual LoRA", "0.0003"),
    ("confirm-cola", "lora", "LoRA", "0.001"),
    ("longer-cola", "lora", "LoRA", "0.001"),
    ("surrogate-cola", "lora", "LoRA", "0.001"),
    ("frozen-sum-cola", "lora", "LoRA", "0.001"),
    ("strength-cola", "lora", "LoRA", "0.001"),
    ("sampled-gradient-cola", "lora", "LoRA", "0.001"),
    ("confirm-cola", "dual_lora", "Dual LoRA", "0.001"),
    ("longer-cola", "dual_lora", "Dual LoRA", "0.001"),
    ("surrogate-cola", "clip", "Dual LoRA", "0.001"),
]
CONSTANT = {"SST-2, accuracy": 0.5, "CoLA, Matthews": 0.0}  # what one answer to everything scores, about
LEARNED = 0.01  # a run within this of it learned nothing


def rates() -> str:
    """Every published final run of LoRA and of Dual LoRA from the paper's start, where a study tried several rates, or
    another study the next."""
    panels = []
    for (title, constant), runs, high in zip(CONSTANT.items(), (SST2, COLA), (0.9, 0.3), strict=True):
        places = sorted({rate for *_, rate in runs}, key=float)
        found: dict[str, list[list[float]]] = {label: [[] for _ in places] for label in ("LoRA", "Dual LoRA")}
        for name, method, label, rate in runs:
            found[label][places.index(rate)] += _scores(name, method, float(rate))
        panels.append(
            Panel(
                title,
                [f"{float(rate):.0e}".replace("e-0", "e-") for rate in places],
                {label: [fmean(own) if own else None for own in at] for label, at in found.items()},
                constant - 0.1 * (high - constant),
                high,
                constant,
                {label: [(k, v) for k, own in enumerate(at) for v in own] for label, at in found.items()},
                {label: [_failed(own, constant) for own in at] for label, at in found.items()},
            )
        )
    return drawn("Each dot a run, lines the means; below: runs that learned nothing, of all", "learning rate", panels)


def _scores(name: str, method: str, rate: float) -> list[float]:
    results = json.loads((ROOT / "results" / "studies" / name / "results.json").read_text(encoding="utf-8"))
    (found,) = [m for m in results["methods"] if m["method"] == method]
    chosen = found["settings"].get("train.learning_rate", rate)
    if chosen != rate:
        raise ValueError(f"{name}: the search gave {method} the rate {chosen}, and it is drawn at {rate}.")
    return [float(seed["score"]) for seed in found["seeds"]]


def _failed(own: list[float], constant: float) -> str:
    return f"{sum(abs(score - constant) < LEARNED for score in own)} of {len(own)}" if own else ""


def table(name: str) -> list[dict[str, str]]:
    """The rows of a table of the page on calibration, by its columns."""
    text = CALIBRATION.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.strip().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


Rows = list[dict[str, str]]


# Columns of the page's tables that are drawn: (name, top of the axis, level).
SHOWN = (
    ("alarm, one", 0.06, 0.05),
    ("alarm, ten", 0.14, 0.05),
    ("false *equivalent*", 0.06, 0.05),
    ("power, one", 1.0, None),
)


def _by(rows: Rows, label: str, at: str, what: str) -> dict[str, Any]:
    """label's values -> the column `what` at each value of the column `at`, None where the table has no such row."""
    places = list(dict.fromkeys(row[at] for row in rows))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row[label] for row in rows):
        own = {row[at]: float(row[what]) for row in rows if row[label] == name}
        found[name] = [own.get(place) for place in places]
    return found


def calibration() -> dict[str, str]:
    """The file's name and text of each picture of the page on calibration."""
    made = {"rules": _rules, "families": _families, "crossed": _crossed, "kinds": _kinds, "few": _few, "real": _real}
    made |= {"tuning": _tuning, "studies": _studies}
    return {f"calibration-{name}.svg": draw(table(name)) for name, draw in made.items()}


def _places(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _plain(text: str) -> str:
    return re.sub(r"[*]", "", text)


def _rules(rows: Rows) -> str:
    places = [column for column in rows[0] if column.startswith("S = ")]
    series: dict[str, Any] = {_plain(row["rule"]): [float(row[column]) for column in places] for row in rows}
    panel = Panel("", [place[4:] for place in places], series, 0.0, 0.1, 0.005)
    return drawn("False alarms of six rules at a level of 0.005 (dashed), worst of 72 cells", "seeds", [panel])


def _families(rows: Rows) -> str:
    def both(*columns: str) -> dict[str, Any]:
        return {label: [float(r[c]) for r in rows] for label, c in zip(("former rule", "now"), columns, strict=True)}

    ticks = _places(rows, "methods")
    panels = [
        Panel(
            "studies with a wrong word, worst mixture",
            ticks,
            both("wrong word, former", "wrong word, now"),
            0.0,
            0.12,
            0.05,
        ),
        Panel("right words that are said, mean", ticks, both("right words, former", "now"), 0.0, 1.0),
    ]
    return drawn("All words of a study together", "methods", panels)


def _crossed(rows: Rows) -> str:
    named = [{**row, "seeds": f"{row['seeds']} seeds"} for row in rows]
    panels = [
        Panel(_plain(what), _places(rows, "ρ"), _by(named, "seeds", "ρ", what), 0.0, high, level)
        for what, high, level in SHOWN
    ]
    return drawn("Without tuning, worst cell: errors at 5 % (dashed) and power", "ρ: noise of seeds", panels)


def _kinds(rows: Rows) -> str:
    named = [{**row, "seeds": f"{row['seeds']} seeds"} for row in rows]
    panels = [
        Panel(
            metric,
            _places(own, "items"),
            _by(own, "seeds", "items", "alarm, one"),
            0.0,
            0.06,
            0.05,
        )
        for metric in _places(rows, "metric")
        if (own := [row for row in named if row["metric"] == metric])
    ]
    return drawn("False alarms in one comparison at 5 % (dashed), simulated scores", "items", panels)


def _few(rows: Rows) -> str:
    places = _places(rows, "items")
    columns = [column for column in rows[0] if column not in ("items", "seeds")]
    by = {c: [max(float(r[c]) for r in rows if r["items"] == place) for place in places] for c in columns[:-1]}
    right = [min(float(r[columns[-1]]) for r in rows if r["items"] == place) for place in places]
    panels = [
        Panel("wrongly", places, {c: list(values) for c, values in by.items()}, 0.0, 0.08, 0.05),
        Panel("rightly", places, {columns[-1]: list(right)}, 0.0, 1.0),
    ]
    return drawn("Studies that say equivalent where few answers differ, worst of 3, 5 and 8 seeds", "items", panels)


def _real(rows: Rows) -> str:
    panels = [
        Panel(_plain(what), _places(rows, "seeds"), _by(rows, "task · metric", "seeds", what), 0.0, high, level)
        for what, high, level in SHOWN
    ]
    return drawn("With the noise of published runs: errors at 5 % (dashed) and power", "seeds", panels)


def _tuning(rows: Rows) -> str:
    panels = [
        Panel(
            {"lora": "LoRA's curve", "dual_lora": "Dual LoRA's curve"}[curve],
            _places(rows, "seeds"),
            _by([row for row in rows if row["curve of"] == curve], "tuned by", "seeds", "alarm"),
            0.0,
            0.2,
            0.05,
        )
        for curve in _places(rows, "curve of")
    ]
    return drawn("False claims about two equal methods, each tuned by itself", "final seeds", panels)


def _studies(rows: Rows) -> str:
    values = sorted(float(row["any false alarm"]) for row in rows)
    panel = Panel("", ["" for _ in values], {"a study": list(values)}, 0.0, 0.06, 0.05)
    return drawn(
        f"The chance of any false alarm in each of {len(values)} studies; {sum(values):.1f} false ones to expect",
        "studies, by their chance",
        [panel],
        lines=False,
    )
