"""A chart's views as Vega-Lite specifications, which the page draws, and as rows of text, which it says.

Colours are names of the style sheet's variables, so that a chart follows the page from light to dark. What all charts
share (axes without ticks, fonts) is Vega-Lite's configuration in page.js.
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
BOUNDED = [{"filter": "isValid(datum.low) && isValid(datum.high)"}]
SAID = {"heat": "label x y", "intervals": "label x low high note"}  # of a point, by the chart's form


def drawings(charts: Sequence[Chart]) -> dict[str, list[Row]]:
    """Return the data of the page's script, by the chart's id: each view's specification, legend, headings and rows of
    text."""
    names = Counter(_normalised(name) for chart in charts for name in _series(chart))
    usual = {name: i % COLOURS for i, (name, _) in enumerate(names.most_common())}
    return {chart.id: [_drawing(chart, view, _styles(chart, names, usual)) for view in chart.views] for chart in charts}


def _drawing(chart: Chart, view: View, styles: dict[str, Row]) -> Row:
    points = [p for p in view.points if _finite(p["x"]) and (chart.form == "intervals" or _finite(p.get("y")))]
    drawn: Row = {"form": chart.form, **_tooltip_rows(chart, view, points)}
    if chart.form == "intervals":
        return drawn | {"spec": _intervals(chart, view, points)}
    if chart.form == "heat":
        return drawn | {"spec": _heat(view, points)}
    shown = [style for name, style in styles.items() if any(p["series"] == name for p in points)]
    return drawn | {"spec": _lines(chart, view, points, shown), "legend": shown}


def _series(chart: Chart) -> list[str]:
    return list(dict.fromkeys(p["series"] for view in chart.views for p in view.points if "series" in p))


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-")


def _styles(chart: Chart, names: Counter[str], usual: dict[str, int]) -> dict[str, Row]:
    """The same name has the same colour in all charts where that is free; no two names of one chart look alike."""
    styles: dict[str, Row] = {}
    taken: set[int] = set()
    for name in sorted(_series(chart), key=lambda name: -names[_normalised(name)]):
        number = usual[_normalised(name)]
        while number in taken:
            number = (number + 1) % COLOURS if number < COLOURS and len(taken) < COLOURS else number + COLOURS
        taken.add(number)
        shape, sign = SHAPES[len(styles) % len(SHAPES)]
        styles[name] = {"name": name, "colour": f"var(--s{number % COLOURS})", "shape": shape, "sign": sign}
    return styles


def _finite(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))


def _tooltip_rows(chart: Chart, view: View, points: list[Row]) -> Row:
    """Headings and rows of text, one a point: the tooltip, what a screen reader says, the values as a table."""
    keys = SAID.get(chart.form, "series x y low high note").split()
    around = view.x if chart.form == "intervals" else view.y
    axes = {"x": view.x, "y": view.y, "low": around, "high": around}
    heads = {"label": "layer" if chart.form == "heat" else "name", "low": "from", "high": "to"}
    heads |= {"x": view.x.label, "y": view.y.label}

    def text(p: Row, key: str) -> str:
        if key in axes and not isinstance(p.get(key), str):
            return axes[key].text(p.get(key)) if _finite(p.get(key)) else "–"
        if key != "note":
            return str(p[key])
        label = p.get("label") if "series" in p and p.get("label") != p["series"] else None
        seeds = "seeds: " + ", ".join(map(view.x.text, p["dots"])) if p.get("dots") else None
        return "; ".join(filter(None, [label, seeds, p.get("note")]))

    return {"head": [heads.get(key, key) for key in keys], "rows": [[text(p, key) for key in keys] for p in points]}


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
    spot = {"name": "spot", "mark": SPOT | {"size": size}, "encoding": {"shape": by("shape")}}
    band = {
        "transform": BOUNDED,
        "mark": {"type": "area", "opacity": 0.13},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    front = {
        "transform": [{"filter": "datum.front"}],
        "mark": {"type": "line", "strokeDash": [5, 4]},
        "encoding": {"color": {"value": "var(--soft)"}},
    }
    named = {
        "transform": [{"filter": "datum.front && isValid(datum.label)"}],
        "mark": {"type": "text", "align": "left", "dx": 9, "dy": -9, "fontSize": 12},
        "encoding": {"text": {"field": "label"}, "color": {"value": "var(--ink)"}},
    }
    layers = [band, {"mark": {"type": "line", "strokeWidth": 2}}, spot] if joined else [front, spot, named]
    return {"data": _values(points), "encoding": {"x": x, "y": y, "color": by("colour")}, "layer": layers}


def _intervals(chart: Chart, view: View, points: list[Row]) -> Spec:
    """One row a point."""
    values, seen = _values(points)["values"], Counter[str]()
    for p, value in zip(points, values, strict=True):
        mood, label = p.get("mood", ""), p["label"]
        # Rows of one name stay rows of their own, by a number that is not seen.
        value["row"] = label + f"{seen[label]:b}".translate(UNSEEN) * (label in seen)
        value["dots"] = [dot for dot in p.get("dots", []) if _finite(dot)]
        value["shape"] = MARKS.get(mood, "diamond" if p.get("dots") else "circle")
        value["colour"] = f"var(--{mood or 'accent'})"
        seen[label] += 1
    ends = [each for v in values for each in (v["x"], v.get("low"), v.get("high"), *v["dots"])] + [*(chart.band or ())]
    x = _axis(view.x, "x", ends, chart.zero)
    names = {"labelLimit": 330, "zindex": 1}  # over the band: on a narrow page they stand in the chart
    y = {"field": "row", "type": "nominal", "sort": [v["row"] for v in values], "axis": names}
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
    between = {"x": {**x, "field": "low"}, "x2": {"field": "high"}}
    ring = {"type": "point", "filled": False, "size": 28, "strokeWidth": 1.3}
    dots = [{"flatten": ["dots"]}, {"filter": "isValid(datum.dots)"}]
    shape = {"field": "shape", "type": "nominal", "scale": None}
    layers += [
        {"transform": BOUNDED, "mark": bar, "encoding": own | between},
        {"transform": dots, "mark": ring, "encoding": own | {"x": {**x, "field": "dots"}}},
        {"name": "spot", "mark": SPOT | {"size": 110}, "encoding": own | {"x": x, "shape": shape}},
    ]
    return {"data": {"values": values}, "height": 27 * max(len(points), 1), "layer": layers}


def _heat(view: View, points: list[Row]) -> Spec:
    """Cells that are stronger the larger their value is."""
    values = [p["y"] for p in points]
    ends = f"pale: {view.y.text(min(values))}, strong: {view.y.text(max(values))}" if values else ""
    x = {"field": "x", "type": "ordinal", "sort": None, "axis": {"title": [view.x.label, ends], "labelAngle": 0}}
    strength = {"field": "y", "type": "quantitative", "scale": {"zero": False, "range": [0, 1]}, "legend": None}
    y = {"field": "label", "type": "nominal", "sort": None, "axis": {"labelLimit": 160}}
    under = {"mark": {"type": "rect", "color": "var(--low)"}}
    over = {"name": "spot", "mark": {"type": "rect", "color": "var(--high)"}, "encoding": {"fillOpacity": strength}}
    height = 24 * len({p["label"] for p in points})
    return {"data": _values(points), "height": height, "encoding": {"x": x, "y": y}, "layer": [under, over]}
