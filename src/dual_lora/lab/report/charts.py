"""A chart's views as Vega-Lite specifications, which the page draws, and as rows of text, which it says.

Colours are names of the style sheet's variables, so that a chart follows the page from light to dark.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dual_lora.lab.report.blocks import Axis, Chart, View
from dual_lora.lab.report.columns import Row

Spec = dict[str, Any]
COLOURS = 8
SHAPES = (("circle", "●"), ("square", "■"), ("triangle-up", "▲"), ("diamond", "◆"), ("triangle-down", "▼"))
UNSEEN = str.maketrans("01", "\u200b\u200c")
MARKS = {"good": "triangle-up", "bad": "triangle-down"}
SPOT = {"type": "point", "filled": True, "opacity": 1, "stroke": "var(--card)", "strokeWidth": 1}
NAMES = {"title": None, "domain": False, "ticks": False, "labelColor": "var(--ink)", "labelLimit": 330}


def drawings(charts: Sequence[Chart]) -> dict[str, list[Row]]:
    """What the page's script needs, by the chart's id: each view's name, specification, legend, and rows of text."""
    names = Counter(_same(name) for chart in charts for name in _series(chart))
    usual = {name: i % COLOURS for i, (name, _) in enumerate(names.most_common())}
    return {chart.id: _drawn(chart, _styles(chart, names, usual)) for chart in charts}


def _drawn(chart: Chart, styles: dict[str, Row]) -> list[Row]:
    views = []
    for view in chart.views:
        points = [p for p in view.points if _finite(p["x"]) and (chart.form == "intervals" or _finite(p.get("y")))]
        drawn: Row = {"name": view.name, **_said(chart, view, points)}
        if chart.form == "intervals":
            drawn |= {"spec": _intervals(chart, view, points), "narrow": _intervals(chart, view, points, stacked=True)}
        elif chart.form == "heat":
            drawn["spec"] = _heat(view, points)
        else:
            shown = [style for name, style in styles.items() if any(p["series"] == name for p in points)]
            drawn |= {"spec": _lines(chart, view, points, shown), "legend": shown}
        views.append(drawn)
    return views


def _series(chart: Chart) -> list[str]:
    return list(dict.fromkeys(p["series"] for view in chart.views for p in view.points if "series" in p))


def _same(name: str) -> str:
    return name.lower().replace("_", "-")


def _styles(chart: Chart, names: Counter[str], usual: dict[str, int]) -> dict[str, Row]:
    """The same name has the same colour in all charts where that is free; no two names of one chart look alike."""
    styles: dict[str, Row] = {}
    taken: set[int] = set()
    for name in sorted(_series(chart), key=lambda name: -names[_same(name)]):
        number = usual[_same(name)]
        while number in taken:
            number = (number + 1) % COLOURS if number < COLOURS and len(taken) < COLOURS else number + COLOURS
        taken.add(number)
        shape, sign = SHAPES[len(styles) % len(SHAPES)]
        styles[name] = {"name": name, "colour": f"var(--s{number % COLOURS})", "shape": shape, "sign": sign}
    return styles


def _finite(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))


def _said(chart: Chart, view: View, points: list[Row]) -> Row:
    """Headings and rows of text, one a point: the tooltip, what a screen reader says, the values as a table."""
    x, y = view.x, view.y
    if chart.form == "heat":
        cells = [[p["label"], str(p["x"]), y.text(p["y"])] for p in points]
        return {"head": ["layer", x.label, y.label], "rows": cells}
    around = x if chart.form == "intervals" else y
    head, rows = ["series", x.label, y.label, "from", "to", "note"], []
    for p in points:
        seeds = "seeds: " + ", ".join(map(x.text, p["dots"])) if p.get("dots") else ""
        label = p.get("label", "") if p.get("label") != p.get("series") else ""
        interval = [around.text(p[k]) if _finite(p.get(k)) else "–" for k in ("low", "high")]
        if chart.form == "intervals":
            rows.append([p["label"], x.text(p["x"]), *interval, "; ".join(filter(None, [seeds, p.get("note")]))])
        else:
            note = ", ".join(filter(None, [label, p.get("note")]))
            rows.append([p["series"], x.text(p["x"]), y.text(p["y"]), *interval, note])
    return {"head": ["name", head[1], *head[3:]] if chart.form == "intervals" else head, "rows": rows}


def _values(points: list[Row]) -> Spec:
    keys = ("series", "x", "y", "label", "front", "low", "high")
    return {"values": [{"i": i} | {k: p[k] for k in keys if _finite(p.get(k))} for i, p in enumerate(points)]}


def _axis(axis: Axis, field: str, values: list[Any], zero: bool = False) -> Spec:
    finite = [v for v in values if _finite(v)]
    log = axis.log and min(finite) > 0 and max(finite) / min(finite) >= 1.5 if finite else False
    shown: Spec = {"title": axis.label, "grid": True}
    if axis.form == "%":
        shown["format"] = ".3~p"
    if axis.form == "B":
        shown["labelExpr"] = "format(datum.value, '.3~s') + 'B'"
    scale = {"type": "log" if log else "linear", "nice": False, "padding": 10} | ({} if log else {"zero": zero})
    return {"field": field, "type": "quantitative", "scale": scale, "axis": shown}


def _lines(chart: Chart, view: View, points: list[Row], styles: list[Row]) -> Spec:
    def by(key: str) -> Spec:
        scale = {"domain": [s["name"] for s in styles], "range": [s[key] for s in styles]}
        return {"field": "series", "type": "nominal", "scale": scale, "legend": None}

    joined, small = chart.form == "lines", len(points) > 40 * len(styles)
    y = _axis(view.y, "y", [p.get(k) for p in points for k in ("y", "low", "high")], chart.zero)
    x = _axis(view.x, "x", [p["x"] for p in points])
    y["axis"] |= {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "start", "titleY": -10, "titleX": 0}
    size = (10 if small else 40) if joined else 30 if small else 110
    spot = {"name": "spot", "mark": SPOT | {"size": size}, "encoding": {"y": y, "shape": by("shape")}}
    band = {
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
        "mark": {"type": "area", "opacity": 0.13},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    line = {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"y": y}}
    front = {
        "transform": [{"filter": "datum.front"}],
        "mark": {"type": "line", "color": "var(--soft)", "strokeDash": [5, 4]},
        "encoding": {"y": y, "color": {"value": "var(--soft)"}},
    }
    named = {
        "transform": [{"filter": "datum.front && isValid(datum.label)"}],
        "mark": {"type": "text", "align": "left", "dx": 9, "dy": -9, "fontSize": 12},
        "encoding": {"y": y, "text": {"field": "label"}, "color": {"value": "var(--ink)"}},
    }
    layers = [band, line, spot] if joined else [front, spot, named]
    return {"data": _values(points), "encoding": {"x": x, "color": by("colour")}, "layer": layers}


def _intervals(chart: Chart, view: View, points: list[Row], stacked: bool = False) -> Spec:
    """One row a point. stacked: its name stands above it, for narrow screens."""
    seen: Counter[str] = Counter()
    for p in points:  # rows of one name stay rows of their own, by a number in characters that are not seen
        p["row"] = p["label"] + f"{seen[p['label']]:b}".translate(UNSEEN) * (p["label"] in seen)
        seen[p["label"]] += 1
    values = [
        {"i": i, "row": p["row"], "x": p["x"], "label": p["label"], "shape": _shape(p), "colour": _colour(p)}
        | ({"low": p["low"], "high": p["high"]} if _finite(p.get("low")) and _finite(p.get("high")) else {})
        for i, p in enumerate(points)
    ]
    dots = [{"x": d, "row": p["row"], "colour": _colour(p)} for p in points for d in p.get("dots", []) if _finite(d)]
    ends = [p.get(k) for p in points for k in ("x", "low", "high")] + [d["x"] for d in dots] + list(chart.band or ())
    x = _axis(view.x, "x", ends, chart.zero)
    y = {"field": "row", "type": "nominal", "sort": [p["row"] for p in points], "axis": None if stacked else NAMES}
    own = {"y": y, "color": {"field": "colour", "type": "nominal", "scale": None}}
    layers: list[Spec] = []
    if chart.band:
        low, high = ({"datum": end} for end in chart.band)
        marked = {"type": "rect", "color": "var(--same-soft)"}
        layers.append({"data": {"values": [{}]}, "mark": marked, "encoding": {"x": low, "x2": high}})
    if chart.zero:
        line = {"type": "rule", "color": "var(--ink)", "strokeDash": [4, 3], "opacity": 0.75}
        layers.append({"data": {"values": [{}]}, "mark": line, "encoding": {"x": {"datum": 0}}})
    bar = {"type": "rule", "strokeWidth": 2.5, "strokeCap": "round"}
    layers.append({"transform": [{"filter": "isValid(datum.low)"}], "mark": bar,
                   "encoding": own | {"x": {**x, "field": "low"}, "x2": {"field": "high"}}})  # fmt: skip
    ring = {"type": "point", "filled": False, "size": 28, "strokeWidth": 1.3}
    layers.append({"data": {"values": dots}, "mark": ring, "encoding": own | {"x": x}})
    shape = {"field": "shape", "type": "nominal", "scale": None}
    layers.append({"name": "spot", "mark": SPOT | {"size": 110}, "encoding": own | {"x": x, "shape": shape}})
    if stacked:
        above = {"type": "text", "align": "left", "dy": -15, "limit": 330, "color": "var(--ink)", "fontSize": 12}
        layers.append({"mark": above, "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "label"}}})
    return {"data": {"values": values}, "height": (42 if stacked else 27) * max(len(points), 1), "layer": layers}


def _shape(point: Row) -> str:
    return MARKS.get(point.get("mood", ""), "diamond" if point.get("dots") else "circle")


def _colour(point: Row) -> str:
    return f"var(--{point['mood']})" if point.get("mood") else "var(--accent)"


def _heat(view: View, points: list[Row]) -> Spec:
    """Cells that are stronger the larger their value is."""
    values = [p["y"] for p in points]
    ends = f"pale: {view.y.text(min(values))}, strong: {view.y.text(max(values))}" if values else ""
    x = {"field": "x", "type": "ordinal", "sort": None, "axis": {"title": [view.x.label, ends], "labelAngle": 0}}
    strength = {"field": "y", "type": "quantitative", "scale": {"zero": False, "range": [0, 1]}, "legend": None}
    y = {"field": "label", "type": "nominal", "sort": None, "axis": NAMES | {"labelLimit": 160}}
    under = {"mark": {"type": "rect", "color": "var(--low)"}}
    over = {"name": "spot", "mark": {"type": "rect", "color": "var(--high)"}, "encoding": {"fillOpacity": strength}}
    height = 24 * len({p["label"] for p in points})
    return {"data": _values(points), "height": height, "encoding": {"x": x, "y": y}, "layer": [under, over]}
