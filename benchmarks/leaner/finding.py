"""One idea's outcome, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..measure import Ratio, interleave

PAYS = 0.97  # of the present cost, and not more: less than that is not worth its code


class Finding(NamedTuple):
    """An idea beside what the package does at present (or beside what it would replace)."""

    idea: str
    present: str
    ratio: Ratio | None  # of processor time; None where time is not the point
    beside: str = ""  # flips, memory, errors
    exact: bool = True
    taken: bool = False  # the idea is what the package does, and `present` what it did before

    @property
    def verdict(self) -> str:
        """What follows from the figures."""
        if self.ratio is None:
            return "exact" if self.exact else "changes the method"
        if not self.exact:
            return "changes the method" if self.saves else "neither exact nor faster"
        return f"{'pays' if self.saves else 'does not pay'}{', taken' if self.taken else ''}"

    @property
    def saves(self) -> bool:
        """Whether the whole interval lies below what counts as a gain."""
        return self.ratio is not None and self.ratio.high < PAYS


def compared(
    variants: Mapping[str, Callable[[], object]],
    present: str,
    seconds: float,
    beside: Mapping[str, str] | None = None,
    inexact: Sequence[str] = (),
    taken: Sequence[str] = (),
) -> Iterator[Finding]:
    """Time all variants together; one finding for each but `present`."""
    ideas = [name for name in variants if name != present]
    measured = interleave(variants, [(name, present) for name in ideas], 1, seconds, rounds=(5, 30))
    for name in ideas:
        ratio = measured.ratio(name, present)
        yield Finding(name, present, ratio, (beside or {}).get(name, ""), name not in inexact, name in taken)


def show(findings: Sequence[Finding]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("idea", "against", "ratio", "interval", "beside", "verdict", title="Leaner still: ratios of cost")
    for f in findings:
        ratio = ("–", "") if f.ratio is None else (f"{f.ratio.median:.3f}", f"{f.ratio.low:.3f}…{f.ratio.high:.3f}")
        table.add_row(f.idea, f.present, *ratio, f.beside, f.verdict)
    Console(width=None if Console().is_terminal else 170).print(table)
