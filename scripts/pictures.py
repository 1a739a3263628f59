"""The documentation's pictures: `python -m scripts.pictures` draws them all, `… forest demo` some.

matrices  the factors' products, ΔW and an update of LoRA's, entry by entry
forest    Dual LoRA minus LoRA on each task, from results/pooled/pooled.json
rates     scores and failures by learning rate, from the studies that tried several (charts.py)
calibration  the tables of docs/explanation/calibration.md (charts.py)
demo      the demo's last screen, from the record of a real one (docs/pictures/demo.json; a new one: `… demo FOLDER`)
report    the report of today's results as Chromium shows it, if Chromium is installed
costs     the ledger's curves
badges    Python, licence and paper, from pyproject.toml: files of ours, which load nothing from elsewhere
The two diagrams, update.svg and gradient.svg, are written as SVG.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
POOLED = ROOT / "results" / "pooled" / "pooled.json"
REPORTED = (ROOT / "results", ROOT / "benchmarks" / "ledger.jsonl")

ALL = ("matrices", "forest", "rates", "calibration", "demo", "report", "costs", "badges")
WIDTH, LEFT, RIGHT, TOP, LINE = 640, 118, 226, 72, 44  # narrow: a phone shows it with letters that can be read
DASHED = ' stroke-dasharray="5 3"'
BOLD = ' font-weight="600"'


def forest(found: dict[str, Any]) -> str:
    """Dual LoRA minus LoRA, a line a task, in units of that task's margin, all tasks together, and what the paper
    reports. A line that the mean leaves out is hollow. found: results/pooled/pooled.json."""
    rows = [q for q in found["questions"] if q.get("forest")]
    lines = [
        {
            "name": q["question"].split(", ")[-1 if q["forest"] == "beside" else 0],
            "hollow": q["forest"] == "beside",
            "seeds": f"{q['seeds']} seeds",
            "figure": f"{'reduction of ' if q['metric'] == 'loss' else ''}{q['metric']} {q['difference']:+.4f}",
            **{end: q[end] / q["margin"] for end in ("difference", "low", "high")},
            "claimed": q["claimed"] / q["margin"] if q.get("claimed") and q["forest"] is True else None,
        }
        for q in rows
    ]
    whole = found["across"]
    lines.append(
        {"name": "all tasks", "seeds": f"{whole['of']} tasks", "figure": f"{whole['margins']:+.2f} margins"}
        | {"difference": whole["margins"], "low": whole["low"], "high": whole["high"], "claimed": None, "hollow": False}
    )
    reach = 1.05 * max(1.5, *(abs(line[end]) for line in lines for end in ("low", "high")))
    bottom = TOP + LINE * len(lines)
    height = bottom + 104

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value + reach) / (2 * reach)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img" font-size="15" font-family="system-ui, sans-serif">',
        "<title>Dual LoRA minus LoRA on each task, in margins</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#fbfbfa"/>',
        '<text x="20" y="28" font-size="18">Dual LoRA minus LoRA, in margins, with 95% intervals</text>',
        '<text x="20" y="52" fill="#666">Same number of parameters and trials; right is better for Dual LoRA</text>',
        f'<rect x="{x(-1):.1f}" y="{TOP}" width="{x(1) - x(-1):.1f}" height="{bottom - TOP}" fill="#e5e7eb"/>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP}" y2="{bottom}" stroke="#444"/>',
    ]
    for k, line in enumerate(lines):
        y, last = TOP + LINE * (k + 0.5), k == len(lines) - 1
        colour = "#1d4ed8" if line["low"] > 0 else "#b91c1c" if line["high"] < 0 else "#444"
        middle = x(line["difference"])
        mark = (
            f'<path d="M{middle - 8:.1f} {y}L{middle:.1f} {y - 7}L{middle + 8:.1f} {y}L{middle:.1f} {y + 7}Z" '
            f'fill="{colour}"/>'
            if last
            else f'<circle cx="{middle:.1f}" cy="{y}" r="4.5" fill="{"#fff" if line["hollow"] else colour}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end"{BOLD * last}>{escape(line["name"])}</text>',
            f'<line x1="{x(line["low"]):.1f}" x2="{x(line["high"]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
            f'stroke-width="2.5"{DASHED if line["hollow"] else ""}/>',
            mark,
            f'<text x="{WIDTH - RIGHT + 14}" y="{y - 2}" fill="{colour}">{escape(line["figure"])}</text>',
            f'<text x="{WIDTH - RIGHT + 14}" y="{y + 15}" fill="#666">{escape(line["seeds"])}</text>',
        ]
        if line["claimed"] is not None:
            at = x(line["claimed"])
            parts.append(f'<path d="M{at:.1f} {y - 9}L{at + 5:.1f} {y - 16}L{at - 5:.1f} {y - 16}Z" fill="#b45309"/>')
    for value in range(-int(reach), int(reach) + 1):
        shown = f"{value:+d}".replace("-", "−") if value else "0"
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#666">{shown}</text>')
    parts.append(
        f'<text x="20" y="{bottom + 42}" fill="#666">grey: within the margin, too small to matter</text>'
        f'<text x="20" y="{bottom + 64}" fill="#666"><tspan fill="#b45309">▼</tspan> what the paper reports, over its '
        f'tasks</text><text x="20" y="{bottom + 86}" fill="#666">dashed: CoLA, LoRA at a third of its rate; not in the '
        "mean</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def matrices() -> str:
    """ReLU(BA), Sign(DC), their product and a BA of LoRA's with as many parameters, of random factors."""
    import torch

    from dual_lora.core.reference import Factors, Form, delta_weight, direction, magnitude

    n, generator = 24, torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def about(matrix: torch.Tensor) -> str:
        return f"rank {torch.linalg.matrix_rank(matrix)}, {(matrix == 0).double().mean():.0%} zeros"

    A, B, C, D = factors = Factors(factor(2, n), factor(n, 2), factor(2, n), factor(n, 2))
    update, lora, form = delta_weight(factors, 1.0, Form()), factor(n, 4) @ factor(4, n), Form()
    shown = [
        ("ReLU(BA)", magnitude(B @ A, form), "how far"),
        ("Sign(DC)", direction(D @ C, form), "which way"),
        ("ΔW", update, about(update)),
        ("LoRA's BA, r = 4", lora, about(lora)),
    ]
    size, gap = 7, 22
    side = size * n
    step = side + gap
    width, height = step * len(shown) + gap, side + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="13" '
        'text-anchor="middle" font-family="system-ui, sans-serif"><title>An update of Dual LoRA with r1 = r2 = 2, '
        "entry by entry, and one of LoRA</title>",
        f'<rect width="{width}" height="{height}" rx="12" fill="#fbfbfa"/>',
    ]
    for k, (name, matrix, below) in enumerate(shown):
        left, top, middle = gap + k * step, 36, gap + k * step + side / 2
        strength = (matrix.abs() / matrix.abs().max()).mul(4).ceil()  # 0 to 4: an entry that is not zero shows
        parts += [
            f'<text x="{middle}" y="24" fill="#222">{escape(name)}</text>',
            f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="#fff" stroke="#999"/>',
        ]
        for colour, sign in (("#1d4ed8", 1), ("#b91c1c", -1)):
            for level in range(1, 5):
                entries = ((matrix.sign() == sign) & (strength == level)).nonzero().tolist()
                path = "".join(f"M{left + size * j} {top + size * i}h{size}v{size}h-{size}z" for i, j in entries)
                parts += [f'<path d="{path}" fill="{colour}" opacity="{level / 4}"/>'] if path else []
        y = top + side + 20
        parts.append(f'<text x="{middle}" y="{y}" fill="#666">{escape(below)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def demo(record: dict[str, Any]) -> str:
    """The demo's last screen as rich draws terminals, without the fonts that it would load from a network."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI

    from dual_lora.lab.commands.demo import _card
    from dual_lora.lab.demo import DemoResult

    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=108, file=nowhere, force_terminal=True)
        console.print("$ make demo", style="bold")
        console.print(_card(DemoResult(**record)))
    return console.export_svg(title="dual-lora demo", theme=MONOKAI, code_format=_without_fonts())


def _without_fonts() -> str:
    """Rich's frame of a terminal, without its `@font-face` rules."""
    import re

    from rich._export_format import CONSOLE_SVG_FORMAT

    plain = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)
    plain = plain.replace("<!-- Generated with Rich https://www.textualize.io -->", "")
    return plain.replace("font-family: Fira Code, monospace", "font-family: ui-monospace, monospace")


def badge(name: str, value: str, width: float = 6.7) -> str:
    """Two words side by side. width: of a letter at this size, about."""
    left, right = (round(width * len(word) + 16) for word in (name, value))
    words = ((left / 2, name), (left + right / 2, value))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" font-size="11" '
            f'font-family="system-ui, sans-serif" text-anchor="middle"><title>{escape(name)}: {escape(value)}</title>',
            f'<rect width="{left + right}" height="20" rx="3" fill="#444"/>',
            f'<path d="M{left} 0h{right - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1 -3 3h-{right - 3}z" fill="#00796b"/>',
            *(f'<text x="{x}" y="14" fill="#fff">{escape(word)}</text>' for x, word in words),
            "</svg>",
            "",
        ]
    )


def badges() -> dict[str, str]:
    """The file's name and text of each badge."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith("Programming Language")]
    versions = [version for version in named if version.startswith("3.")]
    shown = {
        "python": f"{versions[0]} – {versions[-1]}",
        "license": project["license"],
        "arXiv": project["urls"]["Paper"].rpartition("/")[2],
    }
    return {f"badge-{name.lower()}.svg": badge(name, value) for name, value in shown.items()}


def report(target: Path) -> bool:
    """Write the report into a folder that goes again, and draw its first screen; False without Chromium."""
    from dual_lora.lab.report.report import report as write

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return False
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1280,900", "--virtual-time-budget=8000"]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write([*REPORTED], page)
        subprocess.run(
            [chromium, *flags, f"--screenshot={target}", page.as_uri()], check=True, capture_output=True, timeout=120
        )
    return True


def main(wanted: list[str]) -> int:
    """Draw what is asked for; returns 0, or 1 if something could not be drawn."""
    names = wanted or [*ALL]
    PICTURES.mkdir(parents=True, exist_ok=True)
    if "matrices" in names:
        (PICTURES / "matrices.svg").write_text(matrices(), encoding="utf-8")
    if "forest" in names:
        text = forest(json.loads(POOLED.read_text(encoding="utf-8")))
        (PICTURES / "forest.svg").write_text(text, encoding="utf-8")
    if {"rates", "calibration"} & {*names}:
        from scripts import charts
    if "rates" in names:
        (PICTURES / "rates.svg").write_text(charts.rates(), encoding="utf-8")
    if "calibration" in names:
        for name, text in charts.calibration().items():
            (PICTURES / name).write_text(text, encoding="utf-8")
    if "demo" in names:
        record = PICTURES / "demo.json"
        if names[-1] not in ALL:
            shutil.copy(Path(names[-1]) / "demo.json", record)
        (PICTURES / "demo.svg").write_text(demo(json.loads(record.read_text(encoding="utf-8"))), encoding="utf-8")
    if "costs" in names:
        from benchmarks import plot

        plot.main(PICTURES)
    if "badges" in names:
        for name, text in badges().items():
            (PICTURES / name).write_text(text, encoding="utf-8")
    if "report" in names and not report(PICTURES / "report.png"):
        print("The report was not drawn: it needs Chromium (apt-get install chromium).", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
