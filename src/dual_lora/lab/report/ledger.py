"""The benchmark ledger as blocks: gates met and missed, costs as they grow, and how a figure changed over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Column, Row, Section, Source, Table, Text, View
from dual_lora.lab.report.gather import short_path

GROWS_WITH = {"tokens": "tokens T", "size": "size O = I", "rank": "rank r1 + r2", "adapters": "active adapters"}
MET = {"✓": True, "✗": False}


def ledger_sections(file: Path, rows: list[Row], title: str) -> list[Section]:
    """One ledger. Rows of a kind that is not known here are shown as they are."""
    source = source_of_ledger(file, rows)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind") or row.get("suite") or "rows"), []).append(row)
    blocks: list[Block] = []
    for kind, members in kinds.items():
        make = {"gate": _gates, "curve": _curves}.get(kind, _plain)
        blocks += make(f"{title}: {kind}", members, source)
    return [Section(title, blocks, "Benchmarks")]


def source_of_ledger(file: Path, rows: list[Row]) -> Source:
    """Where a ledger's newest figures come from."""
    last = rows[-1] if rows else {}
    versions = last.get("versions") if isinstance(last.get("versions"), dict) else {}
    device, made = _text(last.get("device")), _text(last.get("date"))
    return Source(short_path(file), "python -m benchmarks", last.get("commit"), device, made, versions or {})


def _identity(row: Row) -> tuple[Any, ...]:
    """What tells one measurement from another, on one device."""
    return tuple(_text(row.get(key)) for key in ("work", "shape", "subject", "against", "threads", "device", "at"))


def _newest(rows: list[Row]) -> list[Row]:
    return list({_identity(row): row for row in rows}.values())


def _gates(title: str, rows: list[Row], source: Source) -> list[Block]:
    newest = [_with_interval(row) | {"met": MET.get(row.get("mark", ""), row.get("mark"))} for row in _newest(rows)]
    met = sum(row["met"] is True for row in newest)
    points = [
        {
            "label": f"{row['work']} · {row['against']}"
            + (f" · {row['threads']} threads" if row["threads"] > 1 else ""),
            "x": row["ratio"] / row["at_most"],
            "low": row["low"] / row["at_most"],
            "high": row["high"] / row["at_most"],
            "mood": {True: "good", False: "bad"}.get(row["met"], "open"),
            "note": f"ratio {row['ratio']:.3g}, at most {row['at_most']:.3g}",
        }
        for row in newest
        if row.get("at_most")
    ]
    axis = Axis("measured ratio over the gate's limit (1 or less is met)")
    columns = [
        Column("work", "work"),
        Column("subject", "of"),
        Column("against", "against"),
        Column("threads", "threads", "number"),
        Column("met", "gate", "check"),
        Column("ratio", "ratio", "number", 3),
        Column("low", "95% from", "number", 3),
        Column("high", "to", "number", 3),
        Column("at_most", "at most", "number", 3),
        Column("median", "median", "number"),
        Column("unit", "unit"),
        Column("spread", "spread", "percent", 1, help="Middle half of the measurements, relative to the median."),
        Column("rounds", "rounds", "number"),
        Column("share_of_cores", "share of cores", "percent", 0),
        Column("date", "date"),
        Column("commit", "commit"),
        Column("device", "device"),
    ]
    return [
        Text(f"{met} of {len(newest)} limits are kept in their newest rows.", "lead"),
        Text("A gate that is stated twice, against LoRA and the unavoidable products, is met when one is kept."),
        Chart(f"{title}s", "intervals", [View("", axis, Axis(""), [{"name": "gates", "points": points}])], source,
              band=(0.0, 1.0), band_label="met"),
        Table(f"{title} table", columns, newest, source).without_empty_columns(),
        *_history(title, rows, source),
    ]  # fmt: skip


def _history(title: str, rows: list[Row], source: Source) -> list[Block]:
    """Ratios of gates that were measured more than once, in the order of measuring."""
    by_gate: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_gate.setdefault(_identity(row), []).append(_with_interval(row))
    views = []
    for members in by_gate.values():
        if len(members) < 2:
            continue
        first = members[0]
        points = [
            {"x": n, "y": r["ratio"], "low": r["low"], "high": r["high"], "note": f"{r.get('date')}, {r.get('commit')}"}
            for n, r in enumerate(members, 1)
        ]
        limit = [{"x": n, "y": r.get("at_most")} for n, r in enumerate(members, 1)]
        name = f"{first['work']} · {first['against']} · {first['threads']} thr."
        series = [{"name": "measured", "points": points}, {"name": "limit", "points": limit}]
        views.append(View(name, Axis("measurement"), Axis("ratio"), series))
    return [Chart(f"{title} history", "lines", views, source, "In the order of measuring.")] if views else []


def _curves(title: str, rows: list[Row], source: Source) -> list[Block]:
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in _newest(rows):
        curves.setdefault((str(row["work"]), _text(row.get("device")) or ""), []).append(_with_interval(row))
    devices = {device for _, device in curves}
    views = []
    for (work, device), members in curves.items():
        members.sort(key=lambda row: row["at"])
        measured = [{"x": r["at"], "y": r["ratio"], "low": r["low"], "high": r["high"]} for r in members]
        limit = [{"x": r["at"], "y": r["limit"]} for r in members if r.get("limit") is not None]
        series = [{"name": "measured", "points": measured}, {"name": "limit by flops", "points": limit}]
        name = GROWS_WITH.get(work, work) + (f" · {device}" if len(devices) > 1 else "")
        views.append(
            View(
                name, Axis(GROWS_WITH.get(work, work), log=True), Axis(f"cost against {members[0]['against']}"), series
            )
        )
    note = "Forward and backward, newest rows; bands are 95 % intervals of the median ratio."
    return [Chart(f"{title}s", "lines", views, source, note)]


def _plain(title: str, rows: list[Row], source: Source) -> list[Block]:
    newest = [{k: _text(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in _newest(rows)]
    keys = [k for k in dict.fromkeys(k for row in newest for k in row) if k not in ("kind", "versions", "python")]
    columns = [_column(key, newest) for key in keys]
    return [Table(title, columns, newest, source, folded=len(newest) > 12).without_empty_columns()]


def _with_interval(row: Row) -> Row:
    low, high = row.get("interval") or (row["ratio"], row["ratio"])
    return {**row, "low": low, "high": high}


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return " – ".join(map(str, value))
    return None if value is None else str(value)


def _column(key: str, rows: list[Row]) -> Column:
    values = [row[key] for row in rows if row.get(key) is not None]
    if values and all(isinstance(v, bool) for v in values):
        return Column(key, key.replace("_", " "), "check")
    numbers = bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return Column(key, key.replace("_", " "), "number" if numbers else "text")
