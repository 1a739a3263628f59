"""The end of every command: a card to read, or one line of JSON on standard output."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dual_lora.lab.files.write import json_text
from dual_lora.lab.terminal import Console, figures
from dual_lora.lab.terminal import duration as duration
from dual_lora.lab.terminal import size as size

if TYPE_CHECKING:
    from dual_lora.lab.study.forecast import Forecast


def finish(result: Mapping[str, Any], card: Any, as_json: bool) -> None:
    """Print ``result`` as one line if ``as_json``, else the card; of several processes only the first one speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json_text(result))
    else:
        Console().print(card)


def finish_forecast(expected: Forecast, as_json: bool) -> None:
    """Print what a study would do (`--dry-run`), as one line if ``as_json``, else as a table."""
    from dual_lora.lab.report.tables import show_forecast

    if as_json:
        finish(dataclasses.asdict(expected) | {"study": expected.study.name}, None, True)
    else:
        show_forecast(expected)


def facts_card(title: str, facts: Mapping[str, str]) -> Panel:
    """A card of named facts, as they are: a folder's name may look like markup."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(value, overflow="fold"))
    return Panel(grid, title=Text(title), title_align="left", expand=False, border_style="green")


def figures_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with the first column on the left and figures on the right."""
    return figures(title, columns[:1], columns[1:], rows, box=box.SIMPLE_HEAD)
