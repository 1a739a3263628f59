"""From measurements to ✓ and ✗, and the table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from .gates import FLOOR, Gate, Limit
from .measure import Measured, Ratio


class Mark(Enum):
    """What a limit comes to."""

    HELD = "✓"
    MISSED = "✗"
    NOISY = "?"  # neither held nor missed: neighbours had the cores, or the interval reaches the limit
    ABSENT = "–"  # not run, with the reason


class Verdict(NamedTuple):
    """One gate's outcome in one run. emulated: it computes in bf16, and this processor has no units for that."""

    gate: Gate
    threads: int
    mark: Mark
    lines: Sequence[tuple[Limit, Ratio | None, Mark]]
    measured: Measured | None
    reason: str = ""
    emulated: bool = False


def judge(gate: Gate, threads: int, measured: Measured | str, bf16_units: bool = True) -> Verdict:
    """`measured`, or the reason why there is none.

    Without units for bf16 a product takes many times as long, and ratios to another method say how many products it
    has: then the floor counts alone, where the gate has one.
    """
    emulated = "bf16" in gate.work and not bf16_units
    if isinstance(measured, str):
        absent = [(limit, None, Mark.ABSENT) for limit in gate.any_of]
        return Verdict(gate, threads, Mark.ABSENT, absent, None, measured, emulated)
    lines = []
    by_floor = emulated and any(limit.against == FLOOR for limit in gate.any_of)
    for limit in gate.any_of:
        ratio = measured.ratio(gate.subject, limit.against)
        counts = not by_floor or limit.against == FLOOR
        lines.append((limit, ratio, _mark(ratio, limit, measured) if counts else Mark.ABSENT))
    marks = [mark for _, _, mark in lines]
    mark = next((m for m in (Mark.HELD, Mark.NOISY) if m in marks), Mark.MISSED)
    return Verdict(gate, threads, mark, lines, measured, emulated=emulated)


def _mark(ratio: Ratio, limit: Limit, measured: Measured) -> Mark:
    """Noisy is what could be on either side: an interval that spans the limit, with a median above it or with cores
    that were shared with others. A miss is one that was shown.

    A ratio counts as it is stated, to two decimals: 1.004 is not above 1.00.
    """
    above = round(ratio.median, 2) > limit.at_most
    if (above or not measured.quiet) and ratio.low <= limit.at_most < ratio.high:
        return Mark.NOISY
    return Mark.MISSED if above else Mark.HELD


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0: all held (what cannot run here aside); 1: one missed; 2: none missed, but one too noisy to tell."""
    marks = {v.mark for v in verdicts}
    return 1 if Mark.MISSED in marks else 2 if Mark.NOISY in marks else 0


def show(verdicts: Sequence[Verdict], noise: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    colours = {Mark.HELD: "green", Mark.MISSED: "bold red", Mark.NOISY: "yellow", Mark.ABSENT: "dim"}
    table = Table("", "work", "threads", "against", "ratio", "interval", "at most", "aim", "limit of the arithmetic",
                  title="Dual LoRA, r1 = r2 = 16 (the others r = 32): ratios of cost")  # fmt: skip
    for verdict in verdicts:
        for k, (limit, ratio, mark) in enumerate(verdict.lines):
            symbol = f"[{colours[verdict.mark]}]{verdict.mark.value}[/]" if k == 0 else "or"
            subject = "" if verdict.gate.subject == "dual" else f" ({verdict.gate.subject})"
            table.add_row(
                symbol,
                verdict.gate.work + subject + " *" * verdict.emulated if k == 0 else "",
                str(verdict.threads),
                limit.against,
                verdict.reason if ratio is None else f"[{colours[mark]}]{ratio.median:.3f}[/]",
                "" if ratio is None else f"{ratio.low:.3f}…{ratio.high:.3f} ({ratio.rounds})",
                f"{limit.at_most:.2f}",
                "" if limit.aim is None else f"{limit.aim:.2f}",
                limit.bound,
            )
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    if any(verdict.emulated for verdict in verdicts):
        console.print("* This processor has no units for bf16: where there is a floor, it alone decides.")
    console.print(noise)
