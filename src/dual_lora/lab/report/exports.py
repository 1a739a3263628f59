"""Tables as CSV (full precision), Markdown and LaTeX (as shown), for papers and spreadsheets.

The forms are data: the page's script writes the rows that a reader has filtered and sorted by the same rules.
"""

import re
from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Page, Table
from dual_lora.lab.run.write import write_atomically

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$",
    "×": r"$\times$", "Δ": r"$\Delta$", "‖": r"$\|$", "λ": r"$\lambda$", "₀": "$_0$", "⊙": r"$\odot$", "✓": "", "✗": "",
}  # fmt: skip
# rules: (what in a text, by what else, before anything else), in order. exact: figures are written in full precision.
# A spreadsheet takes a text that begins like a formula for one; Markdown makes links and pictures of addresses.
FORMS: dict[str, dict[str, Any]] = {
    "csv": {
        "type": "text/csv", "exact": True, "line": ['"', '","', '"\r\n'], "marks": ["", ""], "layout": ["HEAD", "ROWS"],
        "rules": [["^[ \\n]*[=+\\-@\\t\\r＝＋－＠]", {}, "'"], ['"', {'"': '""'}, ""]],
    },
    "md": {
        "type": "text/markdown", "exact": False, "line": ["| ", " | ", " |\n"], "marks": ["---|", "---:|"],
        "layout": ["HEAD", "|", "MARKS", "\n", "ROWS"],
        "rules": [["[\\r\\n]", {"\r": " ", "\n": " "}, ""],
                  ["[\\\\`*_\\[\\]<>|!~:@&]|www(?=\\.)", {"www": "www\\"}, "\\"]],
    },
    "tex": {
        "type": "text/x-tex", "exact": False, "line": ["  ", " & ", " \\\\\n"], "marks": ["l", "r"],
        "layout": ["\\begin{tabular}{", "MARKS", "}\n  \\toprule\n", "HEAD", "  \\midrule\n", "ROWS",
                   "  \\bottomrule\n\\end{tabular}\n"],
        "rules": [["[\\r\\n]", {"\r": " ", "\n": " "}, ""], ["[\\\\~^−±×Δ‖λ₀⊙✓✗&%$#_{}]", _LATEX, "\\"]],
    },
}  # fmt: skip


def written(table: Table, kind: str) -> str:
    """A table as "csv", "md" or "tex"."""
    form = FORMS[kind]

    def safe(text: str) -> str:
        for pattern, other, before in form["rules"]:
            parts = re.split(f"({pattern})", text)
            text = "".join(other.get(part, before + part) if i % 2 else part for i, part in enumerate(parts))
        return text

    opens, between, closes = form["line"]

    def line(cells: list[str]) -> str:
        return f"{opens}{between.join(cells)}{closes}"

    parts = {
        "HEAD": line([safe(c.label) for c in table.columns]),
        "MARKS": "".join(form["marks"][c.is_number] for c in table.columns),
        "ROWS": "".join(
            line(
                [
                    cell.exact.replace("Infinity", "inf") if cell.exact and form["exact"] else safe(cell.text)
                    for cell in r
                ]
            )
            for r in table.cells
        ),
    }
    return "".join(parts.get(part, part) for part in form["layout"])


def export(page: Page, folder: Path) -> list[Path]:
    """Write every table of the page in all three forms; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for table in (b for s in page.sections for b in s.blocks if isinstance(b, Table)):
        for kind in FORMS:
            files.append(folder / f"{table.id}.{kind}")
            write_atomically(files[-1], written(table, kind).encode("utf-8", "replace").decode())
    return files
