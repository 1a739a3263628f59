"""An analysis on a terminal: one line a run, then ranks, likeness and contribution."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dual_lora.lab.analysis.analyze import Analysis
from dual_lora.lab.analysis.walk import RunAnalysis
from dual_lora.lab.results import last_state, mean_over_layers
from dual_lora.lab.terminal import Console, figures

# Key -> (table, heading, how it is written). Means over layers at the last state.
_OVERVIEW: dict[str, tuple[str, str, str]] = {
    "zero": ("layers", "zero", ".1%"),
    "positive": ("layers", "+", ".1%"),
    "negative": ("layers", "−", ".1%"),
    "start_direction_flipped": ("layers", "Sign flipped", ".1%"),
    "start_switched_on": ("layers", "on", ".1%"),
    "start_switched_off": ("layers", "off", ".1%"),
    "norm_ratio": ("layers", "‖ΔW‖/‖W₀‖", ".2%"),
    "rank_effective": ("layers", "eff. rank", ".1f"),
    "rank_stable": ("layers", "stable", ".2f"),
    "rank_numerical": ("layers", "numerical", ".1f"),
    "share_direction": ("gradients", "grad. dir.", ".4%"),
    "cut": ("gradients", "cut", ".3%"),
    "cosine": ("likeness", "cos. full", ".3f"),
    "agreement_1": ("likeness", "signs as full", ".1%"),
    "gradient_cosine": ("first_step", "step · −G", ".3f"),
}


def overview(analysis: Analysis) -> list[dict[str, Any]]:
    """One row a run: means over layers at its last state."""
    return [
        {"run": run.name, "method": run.method["name"], "step": max(run.steps), "notes": run.notes}
        | {key: _mean(run, table, key) for key, (table, _, _) in _OVERVIEW.items()}
        | {"magnitude_direction": run.magnitude_direction}
        for run in analysis.runs
    ]


def _mean(run: RunAnalysis, table: str, key: str) -> float | None:
    rows = getattr(run, table)
    return mean_over_layers(rows if table == "first_step" else last_state(rows), key)


def show(analysis: Analysis, console: Console | None = None) -> None:
    """Print the overview, the contribution of the groups and the notes."""
    console = console or Console()
    console = console if console.is_terminal else Console(width=190, file=console.file)
    rows = overview(analysis)
    kept = {key: value for key, value in _OVERVIEW.items() if any(row[key] is not None for row in rows)}
    table = [
        [f"{row['run']} ({row['method']})", str(row["step"])]
        + [_written(row[key], kind) for key, (_, _, kind) in kept.items()]
        for row in rows
    ]
    headings = ["step", *(heading for _, heading, _ in kept.values())]
    console.print(figures("At the last state, means over layers", ["run"], headings, table))
    contributing = [run for run in analysis.runs if run.contribution]
    if contributing:
        console.print(_contribution_table(contributing))
    for run in analysis.runs:
        for note in run.notes:
            console.print(f"• {run.name}: {note}")


def _contribution_table(runs: list[RunAnalysis]) -> Table:
    rows = [
        [run.name, row["group"], row["what"], _written(row["loss"], ".4f"), _written(row["spread"], ".4f")]
        for run in runs
        for row in run.contribution
    ]
    left, right = ("run", "group", "what"), ("loss", "± over draws")
    return figures("Held-out loss with a group changed", left, right, rows)


def _written(value: float | None, kind: str) -> str:
    return "" if value is None or value != value else format(value, kind)
