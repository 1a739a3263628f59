"""The benchmark ledger as blocks: the newest figure of every measurement against its gate, and how it grew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Block, Column, Row, Section, Source, Table, Text


def ledger_sections(file: Path, rows: list[Row], title: str) -> list[Section]:
    """One ledger: rows are read by the names that the benchmarks write, and unknown ones are shown as they are."""
    last = rows[-1] if rows else {}
    source = Source(str(file), last.get("command"), last.get("commit"), last.get("device"), last.get("time"))
    plain = [{k: _plain(v) for k, v in row.items()} for row in rows]
    newest = list({tuple(row.get(k) for k in _identity(row)): row for row in plain}.values())
    gated = [row for row in newest if row.get("gate") is not None]
    blocks: list[Block] = []
    if gated:
        met = sum(bool(row.get("met")) for row in gated)
        blocks.append(Text(f"{met} of {len(gated)} gates are met in the newest rows.", "lead"))
    columns = [_column(key, newest) for key in dict.fromkeys(k for row in newest for k in row)]
    blocks.append(Table(f"{title}: newest figures", columns, newest, source).without_empty_columns())
    return [Section(title, blocks, group="Benchmarks")]


_MEASURED = {
    "median",
    "low",
    "high",
    "spread",
    "ratio",
    "time",
    "commit",
    "met",
    "rounds",
    "share",
    "command",
    "versions",
    "quiet",
}


def _identity(row: Row) -> list[str]:
    """What tells one measurement from another: all that is not measured."""
    return sorted(k for k, v in row.items() if k not in _MEASURED and not isinstance(v, float))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return value


def _column(key: str, rows: list[Row]) -> Column:
    values = [row[key] for row in rows if row.get(key) is not None]
    label = key.replace("_", " ")
    if values and all(isinstance(v, bool) for v in values):
        return Column(key, label, "check")
    if values and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return Column(key, label, "number")
    return Column(key, label)
