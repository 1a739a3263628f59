"""An analysis on a terminal: one line a run, then what each group contributes, and the notes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dual_lora.lab.analysis.analyze import Analysis
from dual_lora.lab.report.blocks import Table
from dual_lora.lab.report.columns import columns
from dual_lora.lab.report.insights import at_a_glance
from dual_lora.lab.terminal import Console, printed

MEASURES = (
    "zero positive negative start_direction_flipped start_switched_on start_switched_off norm_ratio rank_effective "
    "rank_stable rank_numerical share_direction cut cosine agreement_1 gradient_cosine"
)


def overview(analysis: Analysis) -> list[dict[str, Any]]:
    """One row a run: means over layers at its last state."""
    rows = at_a_glance(asdict(analysis)["runs"])
    return [
        {key: row[key] for key in ("run", "method", "step")}
        | {"notes": run.notes, **{key: row.get(key) for key in MEASURES.split()}}
        | {"magnitude_direction": run.magnitude_direction}
        for run, row in zip(analysis.runs, rows, strict=True)
    ]


def show(analysis: Analysis, console: Console | None = None) -> None:
    """Print the overview, the contribution of the groups and the notes."""
    console = console or Console()
    console = console if console.is_terminal else Console(width=190, file=console.file)
    title = "At the last state, means over layers"
    console.print(printed(Table(title, columns(f"run method step {MEASURES}"), overview(analysis))))
    rows = [{"run": run.name, **row} for run in analysis.runs for row in run.contribution]
    if rows:
        named = columns("run group what loss spread", what="what was done to it")
        console.print(printed(Table("Held-out loss with a group changed", named, rows)))
    for run in analysis.runs:
        for note in run.notes:
            console.print(f"• {run.name}: {note}")
