"""dual-lora demo"""

from __future__ import annotations

import json as json_module
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dual_lora.lab.commands.card import duration, facts_card, finish, size
from dual_lora.lab.commands.parameters import Device, Json
from dual_lora.lab.terminal import figures

if TYPE_CHECKING:
    from dual_lora.lab.demo import DemoResult

SETS = {
    "combinations": "known sentences and values, put together anew",
    "values": "names, words and numbers never seen in training",
    "phrasings": "sentences never seen in training",
}
LONGEST = 200  # characters of an answer that are shown


def demo(
    *,
    ask: Annotated[str | None, Parameter(help="A request of your own for the fine-tuned model.")] = None,
    seed: Annotated[int, Parameter(help="Seed for the factors and for the order of the examples.")] = 0,
    out: Annotated[Path | None, Parameter(help="Folder of the demo. [default: demo-output/seed-SEED]")] = None,
    overwrite: Annotated[bool, Parameter(help="Start from the beginning, even if there are results.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fine-tune a small model to turn English requests into JSON tool calls, in minutes on a CPU.

    Example: `dual-lora demo`

    Then: `dual-lora demo --ask "Set a timer for 12 minutes for the soup."`

    Shows answers before and after, exact match on three test sets, and merges. Reuses results that are in
    the folder.
    """
    from dual_lora.lab import demo as work
    from dual_lora.lab.model.device import use_device

    use_device(device)
    folder = out or Path("demo-output") / f"seed-{seed}"
    if ask is None or overwrite or work.read_result(folder) is None:
        result = work.run(folder, seed=seed, overwrite=overwrite)
        if ask is None:
            finish(vars(result), _card(result), json)
            return
    answer = work.ask(folder, ask)
    finish({"request": ask, "answer": answer}, Text(_readable(answer)), json)


def _readable(answer: str) -> str:
    """A JSON answer in lines, any other text as it is."""
    try:
        return json_module.dumps(json_module.loads(answer), indent=2, ensure_ascii=False)
    except json_module.JSONDecodeError:
        return answer


def _card(result: DemoResult) -> Group:
    return Group(_before_after(result), _scores(result), _facts(result))


def _before_after(result: DemoResult) -> Table:
    table = Table(
        title="Before and after", title_justify="left", box=box.SIMPLE_HEAD, show_header=False, show_lines=True
    )
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for row in result.shown:
        right = row["after"] == row["expected"]
        table.add_row("request", Text(row["request"], style="bold"))
        table.add_row("before", Text(_short(row["before"]), style="dim"))
        after = Text(_short(row["after"]), style="green" if right else "red")
        table.add_row("after", after.append(" ✓" if right else f" ✗ expected {row['expected']}"), end_section=True)
    table.show_lines = False
    return table


def _scores(result: DemoResult) -> Table:
    rows = []
    for name, about in SETS.items():
        pair = (result.exact_match[variant][name] for variant in ("base", "tuned"))
        rows.append([name, about, *(f"{right}/{count} = {right / count:.0%}" for right, count in pair)])
    return figures("Exact match", ("test set", "what is new in it"), ("before", "after"), rows, box=box.SIMPLE_HEAD)


def _facts(result: DemoResult) -> Panel:
    share = result.trainable_parameters / result.base_parameters
    same, count = result.merged_same
    spent = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in result.seconds.items())
    facts = {
        "trained on": f"{result.examples:,} examples, seed {result.seed}",
        "parameters": f"{result.trainable_parameters:,} trained, {result.base_parameters:,} frozen ({share:.1%})",
        "time": f"{duration(result.total_seconds)}: {spent}",
        "memory": f"{size(result.training_memory)} at the peak of training, {size(result.peak_memory)} over all stages",
        "merged": f"{result.merged}: {same} of {count} answers are the adapter's, letter by letter",
        "ask": f'{_command_name()} demo --ask "Tell Nora that the cake is in the fridge."'
        + (f" --seed {result.seed}" if result.seed else ""),
    }
    if result.reused:
        facts["reused"] = f"{result.folder}, nothing was trained this time (--overwrite starts again)"
    return facts_card("Dual LoRA · tool calls", facts)


def _command_name() -> str:
    """Return the name to call this command by: `make demo` has no environment active, and then the name alone finds
    nothing."""
    called = Path(sys.argv[0])
    return quote(str(called)) if called.name == "dual-lora" and shutil.which("dual-lora") is None else "dual-lora"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"
