"""dual-lora analyze"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish
from dual_lora.lab.commands.parameters import Device, Json
from dual_lora.lab.files.folder import run_at
from dual_lora.lab.terminal import Console, printed

if TYPE_CHECKING:
    from dual_lora.lab.analysis.analyze import Analysis

MEASURES = (
    "zero positive negative start_direction_flipped start_switched_on start_switched_off norm_ratio rank_effective "
    "rank_stable rank_numerical share_direction cut cosine agreement_1 gradient_cosine"
)


def analyze(
    runs: Annotated[list[Path], Parameter(help="Run folders of `dual-lora train`.")],
    /,
    *,
    reference: Annotated[
        Path | None, Parameter(help="Run of full fine-tuning to compare with, on the same model and data.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="JSON file. [default: RUN/analysis/analysis.json of the first run]")
    ] = None,
    page: Annotated[Path | None, Parameter(help="Also write an HTML page with plots.")] = None,
    what: Annotated[
        Literal["update", "sampling", "all"],
        Parameter(
            help="The update and its gradients, or the variance that `token_sampling` would add to the gradient."
        ),
    ] = "update",
    states: Annotated[int, Parameter(help="Largest number of states of a run to analyse, start and end included.")] = 8,
    layers: Annotated[str | None, Parameter(help="Regular expression of layer names.")] = None,
    ranks: Annotated[
        Literal["ends", "all", "none"],
        Parameter(help="Compute ranks at start and end, at all states, or not at all (ranks are slow)."),
    ] = "ends",
    gradients: Annotated[bool, Parameter(help="Compute gradients at every state.", negative="--no-gradients")] = True,
    held_out: Annotated[
        int,
        Parameter(
            help="Records that were not trained on, to measure how much the loss changes if a group of factors "
            "(A and B, C and D) is set back to its start; 0: do not measure it."
        ),
    ] = 64,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure what runs did to the weights: signs, zeros, ranks, gradients, similarity to full fine-tuning.

    Example: `dual-lora analyze runs/dual runs/lora --reference runs/full`

    States are a run's checkpoints: train with `--train.checkpoint-every 20 --train.keep-checkpoints 20` to keep them.
    """
    for run in [*runs, *([reference] if reference else [])]:
        run_at(run)
    from dual_lora.lab.analysis.analyze import analyze as run_analysis
    from dual_lora.lab.analysis.analyze import check_free, save
    from dual_lora.lab.analysis.walk import Options
    from dual_lora.lab.model.device import use_device

    use_device(device)
    options = Options(states, layers, ranks, gradients, held_out, what=what)
    out = out or runs[0] / "analysis" / "analysis.json"
    check_free(out)
    analysis = run_analysis([*runs], reference, options)
    file, rows = save(analysis, out), _overview(analysis)
    result = {"file": str(file), "runs": rows}
    if page is not None:
        from dual_lora.lab.report.report import report

        result["page"] = report([file], page, f"Analysis of {', '.join(run.name for run in analysis.runs)}").file
    if json:
        finish(result, None, True)
        return
    _show(analysis, rows)
    Console().print(f"written to {file}" + (f" and {page}" if page else ""))


def _overview(analysis: Analysis) -> list[dict[str, Any]]:
    """One row a run: means over layers at its last state."""
    from dual_lora.lab.report.insights import at_a_glance, median_sampling

    rows = at_a_glance(asdict(analysis)["runs"])
    return [
        {key: row[key] for key in ("run", "method", "step")}
        | {"notes": run.notes, **{key: row.get(key) for key in MEASURES.split()}}
        | {"magnitude_direction": run.magnitude_direction, "sampling": median_sampling(run.sampling)}
        for run, row in zip(analysis.runs, rows, strict=True)
    ]


def _show(analysis: Analysis, overview: list[dict[str, Any]]) -> None:
    """Print one line a run, then what each group contributes, and the notes."""
    from dual_lora.lab.report.blocks import Table
    from dual_lora.lab.report.columns import columns
    from dual_lora.lab.report.insights import SAMPLING

    console = Console()
    console = console if console.is_terminal else Console(width=190)
    if analysis.options["what"] != "sampling":
        title = "At the last state, means over layers"
        console.print(printed(Table(title, columns(f"run method step {MEASURES}"), overview)))
    rows = [{"run": run.name, **row} for run in analysis.runs for row in run.contribution]
    if rows:
        named = columns("run group what loss spread", what="what was done to it")
        console.print(printed(Table("Held-out loss with a group changed", named, rows)))
    sampled = [{"run": run.name, **row} for run in analysis.runs for row in run.sampling]
    if sampled:
        medians = [{"run": row["run"], "layer": "median", **row["sampling"]} for row in overview if row["sampling"]]
        title = "Variance that sampled tokens add to G, over the batch's own"
        console.print(printed(Table(title, columns(f"run {SAMPLING}"), [*sampled, *medians])))
    for run in analysis.runs:
        for note in run.notes:
            console.print(f"• {run.name}: {note}")
