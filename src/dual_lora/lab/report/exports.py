"""Tables as CSV (full precision), Markdown and LaTeX (as shown), for papers and spreadsheets."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

from dual_lora.lab.folder import write_atomically
from dual_lora.lab.report.blocks import Page, Table

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$",
    "×": r"$\times$", "Δ": r"$\Delta$", "‖": r"$\|$", "λ": r"$\lambda$", "₀": "$_0$", "⊙": r"$\odot$", "✓": "", "✗": "",
}  # fmt: skip


def to_csv(table: Table) -> str:
    """Values in full precision. A text that a spreadsheet would take for a formula gets an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(c.label for c in table.columns)
    for row in table.rows:
        writer.writerow(
            "" if c.text(row) == "" else row[c.key] if c.is_number else _harmless(c.text(row)) for c in table.columns
        )
    return out.getvalue()


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def to_markdown(table: Table) -> str:
    """A pipe table with figures on the right."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |\n"

    def clean(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

    ruler = "|" + "".join("---:|" if c.is_number else "---|" for c in table.columns) + "\n"
    rows = "".join(line([clean(c.text(row)) for c in table.columns]) for row in table.rows)
    return line([clean(c.label) for c in table.columns]) + ruler + rows


def to_latex(table: Table) -> str:
    """A tabular with booktabs' rules; figures on the right, signs as mathematics."""

    def clean(text: str) -> str:
        return re.sub(r"[\\~^−±×Δ‖λ₀⊙✓✗]|[&%$#_{}]", lambda m: _LATEX.get(m[0], "\\" + m[0]), text)

    def line(cells: list[str]) -> str:
        return "  " + " & ".join(map(clean, cells)) + " \\\\\n"

    kinds = "".join("r" if c.is_number else "l" for c in table.columns)
    rows = "".join(line([c.text(row) for c in table.columns]) for row in table.rows)
    head = line([c.label for c in table.columns])
    return f"\\begin{{tabular}}{{{kinds}}}\n  \\toprule\n{head}  \\midrule\n{rows}  \\bottomrule\n\\end{{tabular}}\n"


WRITERS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex}


def export(page: Page, folder: Path) -> list[Path]:
    """Write every table of the page in all three forms; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written, used = [], set()
    for table in page.tables():
        name, number = table.slug, 2
        while name in used:
            name, number = f"{table.slug}-{number}", number + 1
        used.add(name)
        for kind, write in WRITERS.items():
            written.append(folder / f"{name}.{kind}")
            write_atomically(written[-1], write(table))
    return written
