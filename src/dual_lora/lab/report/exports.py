"""Tables as CSV (full precision), Markdown and LaTeX (as shown), for papers and spreadsheets.

The page has the same lines with it and saves those of the rows that a reader has filtered, in the order chosen.
"""

import re
from pathlib import Path

from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.report.blocks import Page, Table
from dual_lora.lab.run.results_file import FORMULA, as_markdown

FORMS = {"csv": "CSV", "md": "Markdown", "tex": "LaTeX"}
# What a line begins with, what stands between its cells, and what it ends with.
_LINE = {"csv": ('"', '","', '"\r\n'), "md": ("| ", " | ", " |\n"), "tex": ("  ", " & ", " \\\\\n")}
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$",
    "×": r"$\times$", "Δ": r"$\Delta$", "‖": r"$\|$", "λ": r"$\lambda$", "₀": "$_0$", "⊙": r"$\odot$", "✓": "", "✗": "",
    "\r": " ", "\n": " ", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def _safe(text: str, kind: str) -> str:
    """A text that stays one: a spreadsheet takes what begins like a formula for one, and Markdown makes links and
    pictures of addresses."""
    if kind == "csv":
        return "'" * bool(FORMULA.match(text)) + text.replace('"', '""')
    if kind == "md":
        return as_markdown(re.sub(r"[\r\n]", " ", text))
    return "".join(_LATEX.get(sign, sign) for sign in text)


def lines(table: Table, kind: str) -> tuple[str, list[str], str]:
    """A table as "csv", "md" or "tex": what comes before its rows, each row, what comes after."""
    opens, between, closes = _LINE[kind]
    heads = opens + between.join(_safe(c.label, kind) for c in table.columns) + closes
    rows = [
        opens + between.join(c.exact if c.exact and kind == "csv" else _safe(c.text, kind) for c in row) + closes
        for row in table.cells
    ]
    if kind == "md":
        return heads + "|" + "".join("---:|" if c.is_number else "---|" for c in table.columns) + "\n", rows, ""
    if kind == "tex":
        sides = "".join("r" if c.is_number else "l" for c in table.columns)
        heads = f"\\begin{{tabular}}{{{sides}}}\n  \\toprule\n{heads}  \\midrule\n"
        return heads, rows, "  \\bottomrule\n\\end{tabular}\n"
    return heads, rows, ""


def written(table: Table, kind: str) -> str:
    """The whole table in one of the forms."""
    heads, rows, end = lines(table, kind)
    return heads + "".join(rows) + end


def export(page: Page, folder: Path) -> list[Path]:
    """Write every table of the page in all three forms; returns the files."""
    make_folder(folder)
    files = []
    for table in (b for s in page.sections for b in s.blocks if isinstance(b, Table)):
        for kind in FORMS:
            files.append(folder / f"{table.id}.{kind}")
            write_output(files[-1], written(table, kind).encode("utf-8", "replace").decode())
    return files
