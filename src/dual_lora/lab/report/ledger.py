"""The benchmark ledger as blocks: gates met and missed, costs as they grow, and how a figure changed over time."""

from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Source, Table, Text, View
from dual_lora.lab.report.columns import Column, Row, columns
from dual_lora.lab.report.gather import short_path

GROWS_WITH = {"tokens": "tokens T", "size": "size O = I", "rank": "rank r1 + r2", "adapters": "active adapters"}
GATES = (
    "work subject against threads met ratio low high at_most median unit scatter rounds share_of_cores date commit "
    "device"
)
MET = {"✓": True, "✗": False}


def ledger_sections(file: Path, rows: list[Row], title: str) -> list[Section]:
    """One ledger. Rows of a kind that is not known here are shown as they are."""
    source = source_of_ledger(file, rows)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind") or row.get("suite") or "rows"), []).append(row)
    known = {"gate": _gates, "curve": _curves}
    blocks = [
        b for kind, members in kinds.items() for b in known.get(kind, _plain)(f"{title}: {kind}", members, source)
    ]
    return [Section(title, blocks, "Benchmarks")]


def source_of_ledger(file: Path, rows: list[Row]) -> Source:
    """Where a ledger's newest figures come from."""
    commit, device, date, versions = (_text(rows[-1].get(key)) for key in ("commit", "device", "date", "versions"))
    return Source(short_path(file), "python -m benchmarks", commit, device, date, versions or "")


def _identity(row: Row) -> tuple[Any, ...]:
    """What tells one measurement from another, on one device."""
    return tuple(_text(row.get(key)) for key in ("work", "shape", "subject", "against", "threads", "device", "at"))


def _newest(rows: list[Row]) -> list[Row]:
    return list({_identity(row): row for row in rows}.values())


def _gates(title: str, rows: list[Row], source: Source) -> list[Block]:
    newest = [_with_interval(row) | {"met": MET.get(row.get("mark", ""), row.get("mark"))} for row in _newest(rows)]
    met = sum(row["met"] is True for row in newest)
    points = [
        {k: row[of] / row["at_most"] for k, of in (("x", "ratio"), ("low", "low"), ("high", "high"))}
        | {"label": f"{row['work']} · {row['against']}" + f" · {row['threads']} threads" * (row["threads"] > 1)}
        | {"mood": {True: "good", False: "bad"}.get(row["met"], "open")}
        | {"note": f"ratio {row['ratio']:.3g}, at most {row['at_most']:.3g}"}
        for row in newest
        if row.get("at_most")
    ]
    view = View("", Axis("measured ratio over the gate's limit (1 or less is met)"), Axis(""), points)
    shown = [row | {"scatter": row.get("spread")} for row in newest]
    return [
        Text(f"{met} of {len(newest)} limits are kept in their newest rows.", "lead"),
        Text("A gate that is stated twice, against LoRA and the unavoidable products, is met when one is kept."),
        Chart(f"{title}s", "intervals", [view], source, "Shaded: met.", (0.0, 1.0)),
        Table(f"{title} table", columns(GATES, low="95% from"), shown, source),
        _history(title, rows, source),
    ]


def _history(title: str, rows: list[Row], source: Source) -> Chart:
    """Ratios of gates that were measured more than once, in the order of measuring."""
    by_gate: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_gate.setdefault(_identity(row), []).append(_with_interval(row))
    views = []
    for members in (members for members in by_gate.values() if len(members) > 1):
        points = [
            {"series": "measured", "x": n, "y": r["ratio"], "low": r["low"], "high": r["high"]}
            | {"note": f"{r.get('date')}, {r.get('commit')}"}
            for n, r in enumerate(members, 1)
        ]
        points += [{"series": "limit", "x": n, "y": r.get("at_most")} for n, r in enumerate(members, 1)]
        name = "{work} · {against} · {threads} thr.".format(**members[0])
        views.append(View(name, Axis("measurement"), Axis("ratio"), points))
    return Chart(f"{title} history", "lines", views, source, "In the order of measuring.")


def _curves(title: str, rows: list[Row], source: Source) -> list[Block]:
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in _newest(rows):
        curves.setdefault((str(row["work"]), _text(row.get("device")) or ""), []).append(_with_interval(row))
    several = len({device for _, device in curves}) > 1
    views = []
    for (work, device), members in curves.items():
        members.sort(key=lambda row: row["at"])
        points = [
            {"series": "measured", "x": r["at"], "y": r["ratio"], "low": r["low"], "high": r["high"]} for r in members
        ]
        points += [
            {"series": "limit by flops", "x": r["at"], "y": r["limit"]} for r in members if r.get("limit") is not None
        ]
        grows, cost = GROWS_WITH.get(work, work), Axis(f"cost against {members[0]['against']}")
        views.append(View(grows + f" · {device}" * several, Axis(grows, log=True), cost, points))
    note = "Forward and backward, newest rows; bands are 95 % intervals of the median ratio."
    return [Chart(f"{title}s", "lines", views, source, note)]


def _plain(title: str, rows: list[Row], source: Source) -> list[Block]:
    """All rows: which fields tell one measurement from another is not known, and a length would be one."""
    shown = [{k: _text(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
    keys = [k for k in dict.fromkeys(k for row in shown for k in row) if k not in ("kind", "versions", "python")]
    return [Table(title, [_column(key, shown) for key in keys], shown, source, folded=len(shown) > 12)]


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
    """A column for a key that is not known here, after what its values are."""
    kinds = {type(row[key]) for row in rows if row.get(key) is not None}
    form = "check" if kinds == {bool} else "g" if kinds and kinds <= {int, float} else ""
    return Column(key, key.replace("_", " "), form)
