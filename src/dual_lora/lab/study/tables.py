"""A study's results on a terminal: verdicts first, then scores, then what they cost."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from dual_lora.lab.progress import in_words
from dual_lora.lab.study.forecast import Forecast
from dual_lora.lab.study.job import settings_in_words, task_name
from dual_lora.lab.study.notes import amended, at_a_time, numbers_at_a_time
from dual_lora.lab.terminal import Console, figures

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
    rows = [
        [
            c["candidate"],
            c["reference"],
            _scored(c),
            Text(c["verdict"], style=_COLOURS.get(c["verdict"], "yellow")),
            _number(c["difference"], "+.4f"),
            "" if c["low"] is None else f"{c['low']:+.4f} … {c['high']:+.4f}",
            _number(c["p_holm"], ".3g"),
            _number(c["visible"], ".4f"),
        ]
        for c in results["comparisons"]
    ]
    title = f"Verdicts (family-wise level {results['study']['level']:g}; a positive difference is better)"
    right = ("difference", f"{first['confidence']:.0%} interval", "p (Holm)", f"visible at {first['power']:.0%}")
    return figures(title, ("method", "against", "task", "verdict"), right, rows)


def score_table(results: dict[str, Any]) -> Table:
    """Mean and deviation over the seeds, size and chosen settings of every method."""
    forgets = any(m.get("forgetting") is not None for m in results["methods"])
    rows = [[_scored(row), "(untrained)", f"{row['score']:.4f}"] for row in results.get("untrained", [])]
    rows += [
        [
            _scored(m),
            m["method"],
            _number(m["score"], ".4f"),
            _number(m["score_deviation"], ".4f"),
            str(sum(s["status"] != "missing" for s in m["seeds"])),
            "all trials" if m["diverged_in_search"] else str(m["diverged"] or ""),
            "" if m["rank"] is None else str(m["rank"]),
            _number(m["trainable_parameters"], ",.0f"),
            _number(m["mismatch"], "+.1%") or ", ".join(m["notes"]),
            *([_number(m.get("forgetting"), "+.4f")] if forgets else []),
            settings_in_words(m["settings"]),
        ]
        for m in results["methods"]
    ]
    right = ("score", "± seeds", "seeds", "diverged", "rank", "trainable", "mismatch", *["forgetting"] * forgets)
    return figures("Scores", ("task", "method"), right, rows, ("chosen",))


def cost_table(results: dict[str, Any]) -> Table:
    """What training and use of every method cost."""
    beside = len(numbers_at_a_time(results["methods"])) > 1  # or times and speeds would be compared that can't be
    rows = [
        [
            task_name(m["model"], m["task"]),
            m["method"],
            in_words(c["train_seconds"]) if c["train_seconds"] is not None else "",
            _number(c["steps_per_second"], ".2f"),
            _number(c["tokens_per_second"], ".0f"),
            _number(c["peak_memory"] and c["peak_memory"] / 2**20, ",.0f"),
            _number(c["adapter_bytes"] and c["adapter_bytes"] / 2**20, ",.1f"),
            *(_number(c[name], ".2f") for name in ("merge_seconds", "forward_slowdown", "decode_slowdown")),
            *([at_a_time(m)] if beside else []),
        ]
        for m in results["methods"]
        for c in [m["cost"]]
    ]
    right = ("train", "steps/s", "tokens/s", "peak MiB", "adapter MiB", "merge s", "forward ×", "decode ×")
    end = ("runs at a time",) if beside else ()
    return figures("Cost (medians over seeds)", ("task", "method"), right, rows, end)


def show_forecast(f: Forecast, console: Console | None = None) -> None:
    """Print what `--dry-run` found."""
    console = console or wide_console()
    console.print(f"\n{f.study.name}: {f.study.question}", style="bold")
    rows = [
        [
            _scored(row),
            row["method"],
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['trainable_parameters']:,}",
            _number(row["mismatch"], "+.1%") or ", ".join(row["notes"]),
            *(str(row[name]) for name in ("steps", "trials", "seeds")),
            in_words(row["seconds"]),
            *([f"{row['peak_memory'] / 1e9:.1f}"] if f.memory else []),
        ]
        for row in f.rows
    ]
    card = (f"GB of {f.memory / 1e9:.0f}",) if f.memory else ()
    right = ("rank", "trainable", "mismatch", "steps", "trials", "seeds", "time", *card)
    console.print(figures("", ("task", "method"), right, rows))
    console.print(
        f"{f.runs} runs, {f.done} of them finished; about {in_words(f.seconds)} left with {f.workers} at a time "
        f"(by {f.basis}); about {f.adapter_bytes / 2**20:,.0f} MiB of adapters. Nothing was run."
    )


def _scored(row: dict[str, Any]) -> str:
    return f"{task_name(row['model'], row['task'])} · {row['metric']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
