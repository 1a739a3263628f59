"""dual-lora analyze"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish
from dual_lora.lab.commands.parameters import Json


def analyze(
    runs: Annotated[list[Path], Parameter(help="Run folders of `dual-lora train`.")],
    /,
    *,
    reference: Annotated[
        Path | None, Parameter(help="Run of full fine-tuning, same model and data, to compare with.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="JSON file. [default: RUN/analysis/analysis.json of the first run]")
    ] = None,
    page: Annotated[Path | None, Parameter(help="Also write an HTML page with plots.")] = None,
    states: Annotated[int, Parameter(help="At most so many states of a run, start and end among them.")] = 8,
    layers: Annotated[str | None, Parameter(help="Regular expression of layer names.")] = None,
    ranks: Annotated[
        Literal["ends", "all", "none"], Parameter(help="Ranks at start and end, at all states, or not (the slow part).")
    ] = "ends",
    gradients: Annotated[
        bool, Parameter(help="Take a gradient pass at every state.", negative="--no-gradients")
    ] = True,
    held_out: Annotated[int, Parameter(help="Records for what each group contributes; 0: leave that out.")] = 64,
    device: Annotated[str | None, Parameter(help="Where to compute. [default: the best there is]")] = None,
    json: Json = False,
) -> None:
    """Look into what runs did to the weights: signs, zeros, ranks, gradients, likeness to full fine-tuning.

    Example: `dual-lora analyze runs/dual runs/lora --reference runs/full --page analysis.html`

    States are a run's checkpoints: train with `--train.checkpoint-every 20 --train.keep-checkpoints 20` to keep them.
    """
    from dual_lora.lab.analysis.analyze import analyze as run_analysis
    from dual_lora.lab.analysis.analyze import check_free, save
    from dual_lora.lab.analysis.show import overview, show
    from dual_lora.lab.analysis.walk import Options
    from dual_lora.lab.terminal import Console

    options = Options(states, layers, ranks, gradients, held_out)
    out = out or runs[0] / "analysis" / "analysis.json"
    check_free(out)
    analysis = run_analysis([*runs], reference, options, device)
    file = save(analysis, out)
    result = {"file": str(file), "runs": overview(analysis)}
    if page is not None:
        from dual_lora.lab.report.report import report

        result["page"] = report([file], page, f"Analysis of {', '.join(run.name for run in analysis.runs)}").file
    if json:
        finish(result, None, True)
        return
    show(analysis)
    Console().print(f"written to {file}" + (f" and {page}" if page else ""))
