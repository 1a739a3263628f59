"""Run the notebooks and keep what they showed: `python -m scripts.notebooks`. Tests compare.

The outputs are the same on every machine, so that a reader sees what they will see.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def executed(book: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its outputs, run from top to bottom in a folder of its own with the project's results."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, before = [], Path.cwd()
    with tempfile.TemporaryDirectory() as space:
        here = Path(space, "docs", "tutorials")
        here.mkdir(parents=True)
        for folder in ("results", "benchmarks"):
            Path(space, folder).symlink_to(ROOT / folder)
        os.chdir(here)
        try:
            for cell in book["cells"]:
                cells.append({**cell, "outputs": _outputs(cell, names)} if cell["cell_type"] == "code" else cell)
        finally:
            os.chdir(before)
    return {**book, "cells": cells}


def _outputs(cell: dict[str, Any], names: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell prints, and the value of its last line, a table as HTML."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    said, value = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        exec(compile(tree, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    outputs = []
    if said.getvalue():
        lines = said.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        table = hasattr(value, "_repr_html_")  # pandas fits its text to the terminal
        kind, text = ("text/html", value._repr_html_()) if table else ("text/plain", repr(value))
        data = {kind: text.splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main() -> int:
    """Write the notebooks anew; returns 0."""
    for file in NOTEBOOKS:
        book = executed(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
