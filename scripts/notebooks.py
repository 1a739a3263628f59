"""Run the quick start's notebook and keep what it printed: `python -m scripts.notebooks`. A test compares.

The outputs are text that is the same on every machine, so that a reader sees what they will see.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parent.parent / "docs" / "tutorials" / "quickstart.ipynb"


def executed(book: dict[str, Any]) -> dict[str, Any]:
    """The notebook with its outputs, run from top to bottom in a folder of its own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for count, cell in enumerate(book["cells"], 1):
                if cell["cell_type"] != "code":
                    cells.append(cell)
                    continue
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
                lines = said.getvalue().splitlines(keepends=True)
                outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
                cells.append({**cell, "outputs": outputs})
        finally:
            os.chdir(before)
    return {**book, "cells": cells}


def main() -> int:
    """Write the notebook anew; returns 0."""
    book = executed(json.loads(QUICKSTART.read_text(encoding="utf-8")))
    QUICKSTART.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
