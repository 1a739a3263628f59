"""The benchmark ledger as blocks: gates met and missed, costs as they grow, and how a figure changed over time."""

from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Source, Table, Text, View, check_cells
from dual_lora.lab.report.columns import Column, Row, columns, grouped
from dual_lora.lab.report.gather import short_path

GROWS_WITH = {"tokens": "tokens T", "size": "size O = I", "rank": "rank r1 + r2", "adapters": "active adapters"}
GATES = (
    "work subject against threads met ratio low high at_most median unit scatter rounds share_of_cores date commit "
    "device"
)


def ledger_sections(file: Path, rows: list[Row], title: str) -> list[Section]:
    """One ledger. Rows of a kind that is not known here are shown as they are."""
    known = {"gate": _gates, "curve": _curves}
    kinds = grouped(rows, lambda row: str(row.get("kind") or row.get("suite") or "rows"))
    blocks = [
        b for kind, members in kinds.items() for b in known.get(kind, _plain)(kind[:1].upper() + kind[1:], members)
    ]
    commit, device, date, versions = (_text(rows[-1].get(key)) for key in ("commit", "device", "date", "versions"))
    source = Source(short_path(file), "python -m benchmarks", commit, device, date, versions or "")
    return [Section(title, blocks, "Benchmarks", title, source)]


def _measurement_key(row: Row) -> tuple[Any, ...]:
    """Return the fields that identify a measurement on one device."""
    return tuple(_text(row.get(key)) for key in ("work", "shape", "subject", "against", "threads", "device", "at"))


def _newest(rows: list[Row]) -> list[Row]:
    return [*{_measurement_key(row): row for row in rows}.values()]


def _gates(title: str, rows: list[Row]) -> list[Block]:
    marks = {"✓": True, "✗": False}
    newest = [
        row | _interval(row) | {"met": marks.get(mark, mark), "scatter": row.get("spread")}
        for row in _newest(rows)
        for mark in [row.get("mark", "")]
    ]
    met = sum(row["met"] is True for row in newest)
    points = [
        {k: row[of] / row["at_most"] for k, of in (("x", "ratio"), ("low", "low"), ("high", "high"))}
        | {"label": _name(row, rows)}
        | {"mood": {True: "good", False: "bad"}.get(row["met"], "open")}
        | {"note": f"ratio {row['ratio']:.3g}, at most {row['at_most']:.3g}"}
        for row in newest
        if row.get("at_most")
    ]
    view = View("", Axis("measured ratio over the gate's limit (1 or less is met)"), Axis(""), points)
    return [
        Text(f"{met} of {len(newest)} limits are kept in their newest rows.", "lead"),
        Text("A gate that is stated twice, against LoRA and the unavoidable products, is met when one is kept."),
        Chart(f"{title}s", "intervals", [view], "Shaded: met.", (0.0, 1.0)),
        Table(f"{title} table", columns(GATES, low="95% from"), newest),
        _history(title, rows),
    ]


def _name(row: Row, rows: list[Row]) -> str:
    """Return the name of a measurement, with the device where the rows are of several."""
    several = len({_text(each.get("device")) for each in rows}) > 1
    threads = f" · {row['threads']} threads" * (row["threads"] > 1)
    return f"{row['work']} · {row['against']}{threads}" + f" · {row.get('device')}" * several


def _history(title: str, rows: list[Row]) -> Chart:
    """Ratios of gates that were measured more than once, in the order of measuring."""
    views = []
    for members in (members for members in grouped(rows, _measurement_key).values() if len(members) > 1):
        numbered = [*enumerate(members, 1)]
        points = [_measurement_row(n, row) | {"note": f"{row.get('date')}, {row.get('commit')}"} for n, row in numbered]
        points += [{"series": "limit", "x": n, "y": row.get("at_most")} for n, row in numbered]
        views.append(View(_name(members[0], rows), Axis("measurement"), Axis("ratio"), points))
    return Chart(f"{title} history", "lines", views, "In the order of measuring.")


def _curves(title: str, rows: list[Row]) -> list[Block]:
    curves = grouped(_newest(rows), lambda row: (str(row["work"]), _text(row.get("device")) or ""))
    several = len({device for _, device in curves}) > 1
    views = []
    for (work, device), members in curves.items():
        members.sort(key=lambda row: row["at"])
        points = [_measurement_row(row["at"], row) for row in members]
        points += [{"series": "limit by flops", "x": row["at"], "y": row.get("limit")} for row in members]
        grows, cost = GROWS_WITH.get(work, work), Axis(f"cost against {members[0]['against']}")
        views.append(View(grows + f" · {device}" * several, Axis(grows, log=True), cost, points))
    note = "Forward and backward, newest rows; bands are 95 % intervals of the median ratio."
    return [Chart(f"{title}s", "lines", views, note)]


def _plain(title: str, rows: list[Row]) -> list[Block]:
    """Return all rows: which fields tell one measurement from another is not known, and a length would be one."""
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in ("kind", "versions", "python")]
    check_cells(len(rows), len(keys))
    shown = [{k: _text(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
    return [Table(title, [_column(key, shown) for key in keys], shown, folded=len(shown) > 12)]


def _measurement_row(x: float, row: Row) -> Row:
    return {"series": "measured", "x": x, "y": row["ratio"], **_interval(row)}


def _interval(row: Row) -> Row:
    low, high = row.get("interval") or (row["ratio"], row["ratio"])
    return {"low": low, "high": high}


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return " – ".join(map(str, value))
    return None if value is None else str(value)


def _column(key: str, rows: list[Row]) -> Column:
    """A column for a key that is not known here, after what its values are."""
    kinds = {type(row[key]) for row in rows if row.get(key) is not None}
    form = "check" if kinds == {bool} else "g" if kinds and kinds <= {int, float} else ""
    return Column(key, key.replace("_", " "), form)
