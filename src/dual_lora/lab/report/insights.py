"""An analysis as blocks: signs and zeros, ranks, gradients, likeness to full fine-tuning, what a group contributes."""

import re
from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Source, Table, Text, View
from dual_lora.lab.report.columns import COLUMNS, Row, columns, number
from dual_lora.lab.report.gather import source_of
from dual_lora.lab.results import last_state, mean_over_layers, spread_over_layers

# What a reader chooses from, by the rows' keys; the columns say what they mean.
OVER_TRAINING = (
    "zero positive negative direction_positive start_flipped start_direction_flipped start_switched_on "
    "start_switched_off flipped_a_step direction_flipped_a_step norm_ratio largest_ratio learned_share strength "
    "magnitude_change direction_change rank_effective rank_stable rank_numerical"
)
GRADIENTS = "share_direction share_magnitude rms_direction rms_magnitude cut cut_moving lost largest_H"
LIKENESS = (
    "cosine learned_cosine agreement_1 agreement_10 rest_1 overlap_left overlap_right learned_agreement_1 norm_relative"
)
LIVE = "step_flipped step_direction_flipped step_switched_on step_switched_off zero share_direction strength norm_ratio"
BY_LAYER = "zero positive start_direction_flipped start_flipped start_switched_on norm_ratio rank_effective rank_stable"
LOGARITHMIC = {"share_direction", "rms_direction", "rms_magnitude", "largest_H", "norm_relative"}
RANKS = ("rank_effective", "rank_stable", "rank_numerical", "rank_90", "rank_99")
PARTS = {"": "ΔW", "magnitude_": "ReLU(BA)", "direction_": "Sign(DC)"}
GLANCE = (
    "run method seed zero positive negative start_flipped start_direction_flipped start_switched_on start_switched_off "
    "norm_ratio rank_effective learned_share share_direction cut cosine agreement_1 gradient_cosine sign_cosine magdir"
)
LAYERS = (
    "run layer O I zero positive negative start_direction_flipped start_flipped start_switched_on "
    "start_switched_off norm norm_ratio rank_effective rank_stable rank_numerical rank_bound"
)
LIKE_FULL = (
    "run step cosine cosine_chance learned_cosine learned_agreement_1 norm_relative agree_1 disagree_1 "
    "rest_1 agreement_1 agreement_10 overlap_left overlap_left_chance overlap_right overlap_right_chance "
    "angle_left angle_right"
)
MEANS = "Means over layers, weighted by their entries."
BOUND = (
    "What can be said about rank in advance: BA has rank r1 and DC has rank r2, but ReLU and Sign act on single "
    "entries and keep no rank. They may raise it, up to min(O, I) from rank 2 on, and they may lower it; the examples "
    "below were computed with the method's own functions. So the bound that holds for ΔW is min(O, I), and only "
    "measuring tells what is reached."
)


def analysis_sections(file: Path, analysis: dict[str, Any], title: str) -> list[Section]:
    """One analysis file."""
    source = source_of(file, analysis.get("made", {}))
    runs = analysis["runs"]
    for row in (row for run in runs for row in run["layers"] if row.get("between_steps")):
        for key in ("flipped", "direction_flipped"):  # changes between two states, a step
            if row.get(f"between_{key}") is not None:
                row[f"{key}_a_step"] = row[f"between_{key}"] / row["between_steps"]
    every_layer = [{"run": run["name"], **row} for run in runs for row in last_state(run["layers"])]
    blocks: list[Block] = [
        *(Text(_sentence(run)) for run in runs if run["layers"]),
        Table(f"{title}: at a glance", columns(GLANCE), at_a_glance(runs), source, "At the last state. " + MEANS),
        _lines(f"{title}: over training", runs, "layers", OVER_TRAINING, source),
        _heat(title, runs, source),
        _lines(f"{title}: step by step, live", runs, "live", LIVE, source),
        *_ranks(title, runs, analysis.get("rank_examples", []), source),
        _lines(f"{title}: gradients", runs, "gradients", GRADIENTS, source),
        *_likeness(title, [run for run in runs if run["likeness"]], source),
        _dora(title, runs, source),
        *_contribution(title, runs, source),
        Table(f"{title}: every layer", columns(LAYERS), every_layer, source, "At the last state.", folded=True),
        _runs(title, runs, source),
        *(Text(f"{run['name']}: {note}", "note") for run in runs for note in run.get("notes", [])),
    ]
    return [Section(title, blocks, "Analyses")]


def analysis_title(analysis: dict[str, Any], used: list[str]) -> str:
    """A heading: the runs that it is about."""
    names = [run["name"] for run in analysis["runs"]]
    title = "Analysis: " + ", ".join(names[:4]) + ("…" if len(names) > 4 else "")
    return title if title not in used else f"{title} ({len(used) + 1})"


def _sentence(run: Row) -> str:
    """The main figures of a run's last state in a sentence, for those who read no charts."""

    last = last_state(run["layers"])

    def mean(key: str, form: str = ".1%", table: str = "layers") -> str:
        return number(mean_over_layers(_of_step(run[table], last[0]["step"]), key), form)

    parts = [f"{mean('zero')} of the entries of ΔW are zero, {mean('positive')} are + and {mean('negative')} are −"]
    if flipped := mean("start_direction_flipped"):
        parts.append(f"{flipped} of the signs of DC flipped since the start")
    if ratio := mean("norm_ratio", ".2%"):
        parts.append(f"‖ΔW‖ is {ratio} of ‖W₀‖")
    if effective := mean("rank_effective", ".0f"):
        full = number(mean_over_layers(_with_full_rank(last), "full"), ".0f")
        parts.append(f"its effective rank is {effective} of {full} on average")
    if cut := mean("cut", ".3%", "gradients"):
        nothing = not any(row.get("cut") for row in _of_step(run["gradients"], last[0]["step"]))
        parts.append("the estimator cuts no entry" if nothing else f"the estimator cuts {cut} of the entries")
    if share := mean("share_direction", ".4%", "gradients"):
        parts.append(f"the direction group has {share} of the squared gradient")
    if cosine := mean("cosine", ".3f", "likeness"):
        learned = mean("learned_cosine", ".3f", "likeness")
        since = f" ({learned} for what was learned since the start)" if learned else ""
        parts.append(f"its cosine to full fine-tuning is {cosine}{since}")
    return f"{run['name']} ({run['method']['name']}), step {last[0]['step']}: {'; '.join(parts)}."


def _of_step(rows: list[Row], step: int) -> list[Row]:
    """The rows of that state: another table may end at an earlier one, which is not to be taken for it."""
    return [row for row in rows if row["step"] == step]


def _with_full_rank(rows: list[Row]) -> list[Row]:
    return [{**row, "full": min(row["O"], row["I"])} for row in rows]


def _means(rows: list[Row]) -> Row:
    """The mean over layers of every figure in the rows."""
    return {key: mean_over_layers(rows, key) for key in {k for r in rows for k in r} - {"layer", "step", "O", "I"}}


def at_a_glance(runs: list[Row]) -> list[Row]:
    """One row a run: means over layers, weighted by their entries, at its last state."""
    rows = []
    for run in runs:
        row = {"run": run["name"], "method": run["method"]["name"], "step": max(run["steps"], default=0)}
        row |= {"seed": run["seed"], "magdir": run["magnitude_direction"]}
        for table in ("layers", "gradients", "likeness"):
            row |= _means(_of_step(run[table], row["step"]))
        rows.append(row | _means(run["first_step"]))
    return rows


def _axis(key: str) -> Axis:
    column = COLUMNS[key]
    return Axis((column.help or column.label).partition(":")[0], key in LOGARITHMIC, "%" if "%" in column.form else "g")


def _lines(title: str, runs: list[Row], table: str, keys: str, source: Source) -> Chart:
    views = []
    for key in keys.split():
        points = []
        for run in runs:
            for step in dict.fromkeys(row["step"] for row in run[table]):
                if rows := [r for r in run[table] if r["step"] == step and r.get(key) is not None]:
                    low, high = spread_over_layers(rows, key)
                    points.append(
                        {"series": run["name"], "x": step, "y": mean_over_layers(rows, key), "low": low, "high": high}
                    )
        if points:
            views.append(View(_axis(key).label, Axis("optimizer step"), _axis(key), points))
    note = "Lines are means over layers, weighted by entries; bands hold the middle 80 % of the layers."
    return Chart(title, "lines", views, source, note)


def _in_block(layer: str) -> tuple[int, str]:
    """(number of the block, name inside it): "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj")."""
    match = re.search(r"\.(\d+)\.", f".{layer}")
    return (int(match[1]), f".{layer}"[match.end() :]) if match else (0, layer)


def _heat(title: str, runs: list[Row], source: Source) -> Chart:
    views = []
    for run in runs:
        cells = sorted(((*_in_block(row["layer"]), row) for row in last_state(run["layers"])), key=lambda cell: cell[0])
        for key in BY_LAYER.split():
            points = [{"label": kind, "x": str(n), "y": row[key]} for n, kind, row in cells if row.get(key) is not None]
            if points:
                views.append(View(f"{run['name']}: {_axis(key).label}", Axis("block"), _axis(key), points))
    return Chart(f"{title}: by layer", "heat", views, source, "At the last state.")


def _ranks(title: str, runs: list[Row], examples: list[Row], source: Source) -> list[Block]:
    rows, views = [], []
    for run in runs:
        for step in dict.fromkeys(r["step"] for r in run["layers"]):
            here = [r for r in run["layers"] if r["step"] == step and r.get("rank_effective") is not None]
            for prefix, what in PARTS.items():
                if here and here[0].get(f"{prefix}rank_effective") is not None:
                    row = {"run": run["name"], "step": step, "what": what}
                    row |= {name: mean_over_layers(here, f"{prefix}{name}") for name in RANKS}
                    row["full"] = mean_over_layers(_with_full_rank(here), "full")
                    rows.append(row | ({} if prefix else {"rank_bound": mean_over_layers(here, "rank_bound")}))
    for prefix, what in PARTS.items():
        for name in RANKS[:3]:
            points = [
                {"series": run["name"], "x": i, "y": r[f"{prefix}{name}"], "label": r["layer"]}
                for run in runs
                for i, r in enumerate(r for r in last_state(run["layers"]) if r.get(f"{prefix}{name}") is not None)
            ]
            if points:
                axis = Axis(COLUMNS[name].label, log=True)
                views.append(View(f"{axis.label} of {what}", Axis("layer, in the model's order"), axis, points))
    keys = f"run step what {' '.join(RANKS)} rank_bound full"
    table = Table(f"{title}: ranks", columns(keys), rows, source, MEANS)
    chart = Chart(f"{title}: ranks by layer", "dots", views, source, "At the last state.")
    named = columns("what size before operation after", what="matrix")
    bound: list[Block] = [Text(BOUND), Table(f"{title}: what ReLU and Sign do to a rank", named, examples, source)]
    shown: list[Block] = [table, chart] if rows else []
    return shown + (bound if examples else [])


def _likeness(title: str, runs: list[Row], source: Source) -> list[Block]:
    if not runs:
        return []
    ends = [(run["name"], last_state(run["likeness"])) for run in runs]
    rows = [{"run": name, "step": last[0]["step"], **_means(last)} for name, last in ends]
    note = f"To full fine-tuning ({runs[0]['reference']}) at the same step, from the same start and data."
    return [
        Table(f"{title}: likeness to full fine-tuning", columns(LIKE_FULL), rows, source, note),
        _lines(f"{title}: likeness over training", runs, "likeness", LIKENESS, source),
    ]


def _dora(title: str, runs: list[Row], source: Source) -> Chart:
    points = [
        {"series": run["name"], "x": r["direction_change"], "y": r["magnitude_change"], "label": r["layer"]}
        | {"note": f"step {r['step']}"}
        for run in runs
        for r in run["layers"]
        if r.get("direction_change") and r.get("magnitude_change")
    ]
    words = [
        f"{r['name']} {number(r['magnitude_direction'], '+.2f')}" for r in runs if r["magnitude_direction"] is not None
    ]
    view = View("", Axis("direction change, mean of 1 − cos", log=True), Axis("magnitude change", log=True), points)
    note = "One mark a layer and state, as in the DoRA paper (figure 2). Correlation: " + "; ".join(words) + "."
    return Chart(f"{title}: magnitude against direction", "dots", [view] if points else [], source, note)


def _contribution(title: str, runs: list[Row], source: Source) -> list[Block]:
    views = [
        View(
            run["name"],
            Axis("held-out loss (less is better)"),
            Axis(""),
            [_contributed(r) for r in run["contribution"]],
        )
        for run in runs
        if run["contribution"]
    ]
    rows = [{"run": run["name"], **row} for run in runs for row in run["contribution"]]
    named = columns("run group what loss spread draws", what="what was done to it")
    note = "The finished adapter with one group set back to its start, or drawn anew with the same mean and spread."
    chart = Chart(f"{title}: what each group contributes", "intervals", views, source, note)
    return [chart, Table(f"{title}: contribution of the groups", named, rows, source, folded=True)] if rows else []


def _contributed(r: Row) -> Row:
    label = f"{r['group']}: {r['what']}" if r["group"] not in ("", "all") else r["what"]
    around = {"low": r["loss"] - r["spread"], "high": r["loss"] + r["spread"]} if r.get("spread") else {}
    return {"label": label, "x": r["loss"], **around}


def _runs(title: str, runs: list[Row], source: Source) -> Table:
    """Where each run lies, and what made it."""
    rows = [
        {**run, "run": run["name"], "trained": ", ".join(f"{key} {value}" for key, value in run["method"].items())}
        | {"states": ", ".join(map(str, run["steps"]))}
        for run in runs
    ]
    named = columns("run folder command trained model data seed states reference", reference="compared with")
    return Table(f"{title}: runs", named, rows, source, folded=True)
