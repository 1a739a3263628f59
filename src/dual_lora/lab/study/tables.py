"""A study's results on a terminal: verdicts first, then scores, then what they cost."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from dual_lora.lab.progress import in_words
from dual_lora.lab.study.forecast import Forecast
from dual_lora.lab.study.job import settings_in_words, task_name
from dual_lora.lab.study.notes import amended, at_a_time, numbers_at_a_time
from dual_lora.lab.terminal import Console

_COLOURS = {"significantly better": "green", "significantly worse": "red", "equivalent within the margin": "cyan"}


def wide_console() -> Console:
    """Standard output; wide enough for whole words in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print everything that a person wants to see of results.json."""
    console = console or wide_console()
    study = results["study"]
    console.print(f"\n{study['name']}: {study['question']}", style="bold")
    if results["comparisons"]:
        console.print(verdict_table(results))
    console.print(score_table(results))
    if any(value is not None for m in results["methods"] for value in m["cost"].values()):
        console.print(cost_table(results))
    for note in [*amended(results), *results["notes"], *(f"failed: {text}" for text in results["failed"])]:
        console.print(f"• {note}")
    if not results["complete"]:
        console.print("Not complete: start the same command again to do what is missing.", style="yellow")


def verdict_table(results: dict[str, Any]) -> Table:
    """One line a comparison."""
    first = results["comparisons"][0]
    title = f"Verdicts (family-wise level {results['study']['level']:g}; a positive difference is better)"
    table = Table(title=title, title_justify="left")
    for column in ("method", "against", "task", "verdict"):
        table.add_column(column)
    for column in ("difference", f"{first['confidence']:.0%} interval", "p (Holm)", f"visible at {first['power']:.0%}"):
        table.add_column(column, justify="right")
    for c in results["comparisons"]:
        table.add_row(
            c["candidate"],
            c["reference"],
            task_name(c["model"], c["task"]) + f" · {c['metric']}",
            Text(c["verdict"], style=_COLOURS.get(c["verdict"], "yellow")),
            _number(c["difference"], "+.4f"),
            "" if c["low"] is None else f"{c['low']:+.4f} … {c['high']:+.4f}",
            _number(c["p_holm"], ".3g"),
            _number(c["visible"], ".4f"),
        )
    return table


def score_table(results: dict[str, Any]) -> Table:
    """Mean and deviation over the seeds, size and chosen settings of every method."""
    table = Table(title="Scores", title_justify="left")
    for column in ("task", "method"):
        table.add_column(column)
    for column in ("score", "± seeds", "seeds", "diverged", "rank", "trainable", "mismatch"):
        table.add_column(column, justify="right")
    if forgets := any(m.get("forgetting") is not None for m in results["methods"]):
        table.add_column("forgetting", justify="right")
    table.add_column("chosen")
    for row in results.get("untrained", []):
        table.add_row(
            task_name(row["model"], row["task"]) + f" · {row['metric']}", "(untrained)", f"{row['score']:.4f}"
        )
    for m in results["methods"]:
        chosen = settings_in_words(m["settings"])
        diverged = "all trials" if m["diverged_in_search"] else str(m["diverged"] or "")
        table.add_row(
            task_name(m["model"], m["task"]) + f" · {m['metric']}",
            m["method"],
            _number(m["score"], ".4f"),
            _number(m["score_deviation"], ".4f"),
            str(sum(s["status"] != "missing" for s in m["seeds"])),
            diverged,
            "" if m["rank"] is None else str(m["rank"]),
            _number(m["trainable_parameters"], ",.0f"),
            _number(m["mismatch"], "+.1%") or ", ".join(m["notes"]),
            *([_number(m.get("forgetting"), "+.4f")] if forgets else []),
            chosen,
        )
    return table


def cost_table(results: dict[str, Any]) -> Table:
    """What training and use of every method cost."""
    table = Table(title="Cost (medians over seeds)", title_justify="left")
    for column in ("task", "method"):
        table.add_column(column)
    for column in ("train", "steps/s", "tokens/s", "peak MiB", "adapter MiB", "merge s", "forward ×", "decode ×"):
        table.add_column(column, justify="right")
    if beside := len(numbers_at_a_time(results["methods"])) > 1:
        table.add_column("runs at a time")  # or times and speeds would be compared that can't be
    for m in results["methods"]:
        c = m["cost"]
        table.add_row(
            task_name(m["model"], m["task"]),
            m["method"],
            in_words(c["train_seconds"]) if c["train_seconds"] is not None else "",
            _number(c["steps_per_second"], ".2f"),
            _number(c["tokens_per_second"], ".0f"),
            _number(c["peak_memory"] and c["peak_memory"] / 2**20, ",.0f"),
            _number(c["adapter_bytes"] and c["adapter_bytes"] / 2**20, ",.1f"),
            _number(c["merge_seconds"], ".2f"),
            _number(c["forward_slowdown"], ".2f"),
            _number(c["decode_slowdown"], ".2f"),
            *([at_a_time(m)] if beside else []),
        )
    return table


def show_forecast(f: Forecast, console: Console | None = None) -> None:
    """Print what `--dry-run` found."""
    console = console or wide_console()
    console.print(f"\n{f.study.name}: {f.study.question}", style="bold")
    table = Table()
    for column in ("task", "method"):
        table.add_column(column)
    for column in ("rank", "trainable", "mismatch", "steps", "trials", "seeds", "time"):
        table.add_column(column, justify="right")
    for row in f.rows:
        table.add_row(
            task_name(row["model"], row["task"]) + f" · {row['metric']}",
            row["method"],
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['trainable_parameters']:,}",
            _number(row["mismatch"], "+.1%") or ", ".join(row["notes"]),
            str(row["steps"]),
            str(row["trials"]),
            str(row["seeds"]),
            in_words(row["seconds"]),
        )
    console.print(table)
    console.print(
        f"{f.runs} runs, {f.done} of them finished; about {in_words(f.seconds)} left with {f.workers} at a time "
        f"(by {f.basis}); about {f.adapter_bytes / 2**20:,.0f} MiB of adapters. Nothing was run."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
