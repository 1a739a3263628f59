"""A study's results on a terminal: verdicts first, then scores, then what they cost."""

from dual_lora.lab.progress import in_words
from dual_lora.lab.report.studies import SCORES, VERDICTS, cost_table, score_table, verdict_table
from dual_lora.lab.study.forecast import Forecast
from dual_lora.lab.study.job import task_name
from dual_lora.lab.study.notes import amended
from dual_lora.lab.study.rows import Results
from dual_lora.lab.terminal import Console, figures, printed


def wide_console() -> Console:
    """Return a console on standard output; wide enough for whole words in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show_results(results: Results, console: Console | None = None, next_steps: str = "") -> None:
    """Print everything that a person wants to see of results.json. next_steps: the last line."""
    console = console or wide_console()
    study = results["study"]
    console.print(f"\n{study['name']}: {study['question']}", style="bold")
    if results["comparisons"]:
        console.print(printed(verdict_table(results, VERDICTS)))
    console.print(printed(score_table(results, SCORES)))
    if any(value is not None for m in results["methods"] for value in m["cost"].values()):
        console.print(printed(cost_table(results)))
    for note in [*amended(results), *results["notes"], *(f"failed: {text}" for text in results["failed"])]:
        console.print(f"• {note}")
    if not results["complete"]:
        console.print("Not complete: start the same command again to do what is missing.", style="yellow")
    if next_steps:
        console.print(next_steps, markup=False)


def show_forecast(f: Forecast, console: Console | None = None) -> None:
    """Print what `--dry-run` found."""
    console = console or wide_console()
    console.print(f"\n{f.study.name}: {f.study.question}", style="bold")
    rows = [
        [
            f"{task_name(row['model'], row['task'])} · {row['metric']}",
            row["method"],
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['trainable_parameters']:,}",
            ", ".join(row["notes"]) if row["mismatch"] is None else f"{row['mismatch']:+.1%}",
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
    if f.said:
        console.print(f.said, markup=False)
