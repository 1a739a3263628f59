"""An analysis as blocks: signs and zeros, ranks, gradients, likeness to full fine-tuning, what a group contributes."""

import re
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Table, Text, View
from dual_lora.lab.report.columns import COLUMNS, Row, columns, grouped, number
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
SAMPLING = "layer tokens zero_rows added_50 added_25 added_10 uniform_25 auto_share auto_added"
MEANS = "Means over layers, weighted by their entries."
BOUND = (
    "What can be said about rank in advance: BA has rank r1 and DC has rank r2, but ReLU and Sign act on single "
    "entries and keep no rank. They may raise it, up to min(O, I) from rank 2 on, and they may lower it; the examples "
    "below were computed with the method's own functions. So the bound that holds for ΔW is min(O, I), and only "
    "measuring tells what is reached."
)


def analysis_name(file: Path, analysis: dict[str, Any]) -> str:
    """A heading: the runs that it is about."""
    names = [run["name"] for run in analysis["runs"]]
    return "Analysis: " + ", ".join(names[:4]) + ("…" if len(names) > 4 else "")


def analysis_sections(file: Path, analysis: dict[str, Any], title: str) -> list[Section]:
    """Return the sections of one analysis file."""
    runs = analysis["runs"]
    for row in (row for run in runs for row in run["layers"]):
        row["full"] = min(row["O"], row["I"])
        for key in ("flipped", "direction_flipped"):  # changes between two states, a step
            if row.get(f"between_{key}") is not None and row.get("between_steps"):
                row[f"{key}_a_step"] = row[f"between_{key}"] / row["between_steps"]
    every_layer = [{"run": run["name"], **row} for run in runs for row in last_state(run["layers"])]
    glance = at_a_glance(runs)
    blocks: list[Block] = [
        *(Text(_sentence(run, row)) for run, row in zip(runs, glance, strict=True) if run["layers"]),
        Table("At a glance", columns(GLANCE), glance, "At the last state. " + MEANS),
        _lines("Over training", runs, "layers", OVER_TRAINING),
        _heat(runs),
        _lines("Step by step, live", runs, "live", LIVE),
        *_ranks(runs, analysis.get("rank_examples", [])),
        _lines("Gradients", runs, "gradients", GRADIENTS),
        *_likeness([run for run in runs if run["likeness"]]),
        _dora(runs),
        *_sampling(runs),
        *_contribution(runs),
        Table("Every layer", columns(LAYERS), every_layer, "At the last state.", folded=True),
        _runs(runs),
        *(Text(f"{run['name']}: {note}", "note") for run in runs for note in run.get("notes", [])),
    ]
    return [Section(title, blocks, "Analyses", title, source_of(file, analysis.get("made", {})))]


def _sentence(run: Row, means: Row) -> str:
    """The main figures of a run's last state in a sentence, for those who read no charts. means: its `at_a_glance`."""

    def mean(key: str, form: str = ".1%") -> str:
        return number(means.get(key), form)

    parts = [f"{mean('zero')} of the entries of ΔW are zero, {mean('positive')} are + and {mean('negative')} are −"]
    if flipped := mean("start_direction_flipped"):
        parts.append(f"{flipped} of the signs of DC flipped since the start")
    if ratio := mean("norm_ratio", ".2%"):
        parts.append(f"‖ΔW‖ is {ratio} of ‖W₀‖")
    if effective := mean("rank_effective", ".0f"):
        parts.append(f"its effective rank is {effective} of {mean('full', '.0f')} on average")
    if cut := mean("cut", ".3%"):
        parts.append(f"the estimator cuts {cut} of the entries" if means["cut"] else "the estimator cuts no entry")
    if share := mean("share_direction", ".4%"):
        parts.append(f"the direction group has {share} of the squared gradient")
    if cosine := mean("cosine", ".3f"):
        learned = mean("learned_cosine", ".3f")
        since = f" ({learned} for what was learned since the start)" if learned else ""
        parts.append(f"its cosine to full fine-tuning is {cosine}{since}")
    return f"{run['name']} ({run['method']['name']}), step {means['step']}: {'; '.join(parts)}."


def at_a_glance(runs: list[Row]) -> list[Row]:
    """One row a run: means over layers, weighted by their entries, at its last state. A table that ends at an earlier
    one says nothing about it."""
    rows = []
    for run in runs:
        row = {"run": run["name"], "method": run["method"]["name"], "step": max(run["steps"], default=0)}
        row |= {"seed": run["seed"], "magdir": run["magnitude_direction"]}
        for table in ("layers", "gradients", "likeness"):
            row |= _means([found for found in run[table] if found["step"] == row["step"]])
        rows.append(row | _means(run["first_step"]))
    return rows


def _means(rows: list[Row]) -> Row:
    """The mean over layers of every figure in the rows."""
    return {key: mean_over_layers(rows, key) for key in {k for r in rows for k in r} - {"layer", "step", "O", "I"}}


def _axis(key: str) -> Axis:
    column = COLUMNS[key]
    return Axis((column.help or column.label).partition(":")[0], key in LOGARITHMIC, "%" if "%" in column.form else "g")


def _by_step(rows: list[Row], key: str) -> dict[int, list[Row]]:
    """The rows that have the figure, by their step."""
    return grouped((row for row in rows if row.get(key) is not None), itemgetter("step"))


def _lines(title: str, runs: list[Row], table: str, keys: str) -> Chart:
    views = []
    for key in keys.split():
        points = [
            {"series": run["name"], "x": step, "y": mean_over_layers(rows, key), "low": low, "high": high}
            for run in runs
            for step, rows in _by_step(run[table], key).items()
            for low, high in [spread_over_layers(rows, key)]
        ]
        if points:
            views.append(View(_axis(key).label, Axis("optimizer step"), _axis(key), points))
    note = "Lines are means over layers, weighted by entries; bands hold the middle 80 % of the layers."
    return Chart(title, "lines", views, note)


def _in_block(layer: str) -> tuple[str, int, str]:
    """("model.layers", 3, "mlp.up_proj") for "model.layers.3.mlp.up_proj"; ("", 0, its name) for one in no block."""
    found = re.match(r"(?:(.*?)\.)??(\d+)\.(.*)", layer)
    return (found[1] or "", int(found[2]), found[3]) if found else ("", 0, layer)


def _heat(runs: list[Row]) -> Chart:
    views = []
    for run in runs:
        cells = sorted(((*_in_block(row["layer"]), row) for row in last_state(run["layers"])), key=itemgetter(1))
        several = len({stack for stack, *_ in cells if stack}) > 1  # of blocks: an encoder and a decoder
        for key in BY_LAYER.split():
            points = [
                {"label": kind + f" ({stack})" * (several and stack != ""), "x": str(n), "y": row[key]}
                for stack, n, kind, row in cells
                if row.get(key) is not None
            ]
            if points:
                views.append(View(f"{run['name']}: {_axis(key).label}", Axis("block"), _axis(key), points))
    return Chart("By layer", "heat", views, "At the last state.")


def _ranks(runs: list[Row], examples: list[Row]) -> list[Block]:
    rows = [
        {"run": run["name"], "step": step, "what": what, "full": mean_over_layers(here, "full")}
        | {name: mean_over_layers(here, f"{prefix}{name}") for name in RANKS}
        | ({} if prefix else {"rank_bound": mean_over_layers(here, "rank_bound")})
        for run in runs
        for step in dict.fromkeys(row["step"] for row in run["layers"])
        for prefix, what in PARTS.items()
        if (here := _by_step(run["layers"], f"{prefix}rank_effective").get(step))
    ]
    views = []
    for key, prefix, what in ((key, *part) for part in PARTS.items() for key in RANKS[:3]):
        points = [
            {"series": run["name"], "x": i, "y": row[prefix + key], "label": row["layer"]}
            for run in runs
            for i, row in enumerate(r for r in last_state(run["layers"]) if r.get(prefix + key) is not None)
        ]
        if points:
            axis = Axis(COLUMNS[key].label, log=True)
            views.append(View(f"{axis.label} of {what}", Axis("layer, in the model's order"), axis, points))
    table = Table("Ranks", columns(f"run step what {' '.join(RANKS)} rank_bound full"), rows, MEANS)
    named = columns("what size before operation after", what="matrix")
    bound: list[Block] = [Text(BOUND), Table("What ReLU and Sign do to a rank", named, examples)]
    shown: list[Block] = [table, Chart("Ranks by layer", "dots", views, "At the last state.")]
    return [*(shown if rows else []), *(bound if examples else [])]


def _likeness(runs: list[Row]) -> list[Block]:
    if not runs:
        return []
    ends = [(run["name"], last_state(run["likeness"])) for run in runs]
    rows = [{"run": name, "step": last[0]["step"], **_means(last)} for name, last in ends]
    note = f"To full fine-tuning ({runs[0]['reference']}) at the same step, from the same start and data."
    table = Table("Likeness to full fine-tuning", columns(LIKE_FULL), rows, note)
    return [table, _lines("Likeness over training", runs, "likeness", LIKENESS)]


def _dora(runs: list[Row]) -> Chart:
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
    return Chart("Magnitude against direction", "dots", [view] if points else [], note)


def median_sampling(rows: list[Row]) -> Row:
    """The median over layers of every figure of sampled tokens."""
    keys = SAMPLING.split()[1:]
    return {key: median(row[key] for row in rows) for key in keys} if rows else {}


def _sampling(runs: list[Row]) -> list[Block]:
    rows = [{"run": run["name"], **row} for run in runs for row in run.get("sampling", [])]
    note = "At the last state. Variance that a sample of the tokens adds to G, over the batch's own between sequences."
    return [Table("Sampled tokens", columns(f"run {SAMPLING}"), rows, note, folded=True)] if rows else []


def _contribution(runs: list[Row]) -> list[Block]:
    rows = [{"run": run["name"], **row} for run in runs for row in run["contribution"]]
    axis = Axis("held-out loss (less is better)")
    views = [
        View(name, axis, Axis(""), [_contribution_point(row) for row in here])
        for name, here in grouped(rows, itemgetter("run")).items()
    ]
    named = columns("run group what loss spread draws", what="what was done to it")
    note = "The finished adapter with one group set back to its start, or drawn anew with the same mean and spread."
    chart = Chart("What each group contributes", "intervals", views, note)
    return [chart, Table("Contribution of the groups", named, rows, folded=True)] if rows else []


def _contribution_point(r: Row) -> Row:
    label = f"{r['group']}: {r['what']}" if r["group"] not in ("", "all") else r["what"]
    around = {"low": r["loss"] - r["spread"], "high": r["loss"] + r["spread"]} if r.get("spread") else {}
    return {"label": label, "x": r["loss"], **around}


def _runs(runs: list[Row]) -> Table:
    """List each run's folder, and what made it."""
    rows = [
        {**run, "run": run["name"], "trained": ", ".join(f"{key} {value}" for key, value in run["method"].items())}
        | {"states": ", ".join(map(str, run["steps"]))}
        for run in runs
    ]
    named = columns("run folder command trained model data seed states reference", reference="compared with")
    return Table("Runs", named, rows, folded=True)
