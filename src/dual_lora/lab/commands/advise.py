"""dual-lora advise"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish, finish_forecast, size
from dual_lora.lab.commands.parameters import Device, DryRun, Json
from dual_lora.lab.interrupt import resumable
from dual_lora.lab.terminal import figures

if TYPE_CHECKING:
    from dual_lora.lab.advise.advice import Advice


def advise(
    recipe: Annotated[
        str | None, Parameter(help="Recipe file, shipped recipe, or run folder. [default: written from the options]")
    ] = None,
    *,
    base: Annotated[str | None, Parameter(help="Model to use instead of the recipe's.")] = None,
    data: Annotated[str | None, Parameter(help="Training records to use instead of the recipe's.")] = None,
    test: Annotated[str | None, Parameter(help="Test records to use instead of the recipe's.")] = None,
    minutes: Annotated[float, Parameter(help="Approximate time limit; the command fits steps and seeds to it.")] = 20,
    out: Annotated[Path | None, Parameter(help="Folder of the study. [default: studies/advise-NAME]")] = None,
    metric: Annotated[
        str | None, Parameter(help="Metric for tuning and for the comparison. [default: the recipe's first evaluation]")
    ] = None,
    margin: Annotated[
        float | None,
        Parameter(help="Difference too small to matter. [default: accuracy 0.01, loss 0.02, matthews 0.03, bleu 1]"),
    ] = None,
    device: Device = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find out whether to use LoRA or Dual LoRA, by a small paired study on your own data.

    Example: `dual-lora advise sst2-minilm --minutes 20`

    Your recipe or run: `dual-lora advise mine.yaml --minutes 60 --margin 0.005`

    No recipe: `dual-lora advise --base my-model --data my.csv --test my-test.csv`

    LoRA, Dual LoRA and Dual LoRA without Sign get equal parameters, equal tuning and the same seeds. After a
    stop, the same command continues where it was; with more minutes it adds seeds. `dual-lora report` shows the study
    with all its figures.
    """
    from dual_lora.lab.advise.advise import advise as run
    from dual_lora.lab.advise.advise import plan
    from dual_lora.lab.advise.source import source_of
    from dual_lora.lab.model.device import use_device

    use_device(device)
    source = source_of(recipe, base, data, test, out)
    question: dict[str, Any] = {"metric": metric, "margin": margin}
    if dry_run:
        finish_forecast(plan(source, minutes, out, **question), json)
        return
    with resumable():
        advice = run(source, minutes, out, **question)
    finish(advice.plain(), _card(advice), json)


def _card(advice: Advice) -> Any:
    from rich.console import Group
    from rich.text import Text

    from dual_lora.lab.progress import in_words

    answer, *others = advice.sentences
    after = [
        f"{advice.out}: the study, {in_words(advice.seconds)} of runs (dual-lora report {quote(str(advice.out))})."
    ]
    after += [f"Go on with: {advice.next}"] if advice.next else []
    return Group(
        Text(f"\n{answer}\n", style="bold"),
        *others,
        "",
        _table(advice),
        "",
        Text("How it was decided", style="bold"),
        *(Text(f"• {line}") for line in [*advice.how, *advice.notes]),
        "",
        *(Text(line) for line in after),
    )


def _table(advice: Advice) -> Any:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [
            m["method"].replace("Dual LoRA without", "without"),
            number(m["score"], ".4f"),
            number(m["difference"], "+.3f") + ("" if m["low"] is None else f" [{m['low']:.3f}, {m['high']:.3f}]"),
            number(m["step_seconds"], ".3g"),
            number(m["times_lora"], ".2f"),
            "" if m["peak_memory"] is None else size(m["peak_memory"]),
            ", ".join(f"{value:g}" for value in (m["settings"] or {}).values()),
        ]
        for m in advice.methods
    ]
    share = next((m["confidence"] for m in advice.methods if m["confidence"]), 0.95)
    titles = ("", "score", f"better by [{share:.0%}]", "s/step", "× LoRA", "peak", "rate")
    table = figures("", titles[:1], titles[1:], rows, box=None)
    for column in table.columns:
        column.no_wrap = True
    return table
