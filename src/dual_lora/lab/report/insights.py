"""An analysis as blocks: signs and zeros, ranks, gradients, likeness to full fine-tuning, what a group contributes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dual_lora.lab.analysis.summary import last_state, mean_over_layers, spread_over_layers
from dual_lora.lab.report.blocks import Axis, Block, Chart, Column, Row, Section, Source, Table, Text, View, number
from dual_lora.lab.report.gather import source_of

# Key of a layer's row -> (its name for people, whether it is a share), in the order in which a reader chooses.
OVER_TRAINING: dict[str, tuple[str, bool]] = {
    "zero": ("entries that are zero", True),
    "positive": ("entries that are +", True),
    "negative": ("entries that are −", True),
    "direction_positive": ("Sign(DC) that is +1", True),
    "start_flipped": ("moved entries, sign flipped since the start", True),
    "start_direction_flipped": ("Sign(DC) flipped since the start", True),
    "start_switched_on": ("entries switched on since the start", True),
    "start_switched_off": ("entries switched off since the start", True),
    "flipped_a_step": ("moved entries, sign flipped a step (between states)", True),
    "direction_flipped_a_step": ("Sign(DC) flipped a step (between states)", True),
    "norm_ratio": ("‖ΔW‖ / ‖W₀‖", True),
    "largest_ratio": ("largest |ΔW| / rms of W₀", False),
    "learned_share": ("‖ΔW − ΔW at the start‖ / ‖ΔW‖", True),
    "strength": ("warm-up λ", False),
    "magnitude_change": ("DoRA's magnitude change", False),
    "direction_change": ("DoRA's direction change", False),
    "rank_effective": ("effective rank of ΔW", False),
    "rank_stable": ("stable rank of ΔW", False),
    "rank_numerical": ("numerical rank of ΔW", False),
}
GRADIENTS: dict[str, tuple[str, bool]] = {
    "share_direction": ("gradient share of the direction group", True),
    "share_magnitude": ("gradient share of the magnitude group", True),
    "rms_direction": ("rms gradient of the direction group", False),
    "rms_magnitude": ("rms gradient of the magnitude group", False),
    "cut": ("entries that the estimator cuts", True),
    "cut_moving": ("of entries with a gradient, those that the estimator cuts", True),
    "lost": ("of the gradient of Sign, lost to the estimator", True),
    "largest_H": ("largest |H|", False),
}
LIKENESS: dict[str, tuple[str, bool]] = {
    "cosine": ("cosine to full fine-tuning", False),
    "learned_cosine": ("cosine of what was learned since the start", False),
    "agreement_1": ("sign agreement on its largest 1 % (of those moved)", True),
    "agreement_10": ("sign agreement on its largest 10 % (of those moved)", True),
    "rest_1": ("of its largest 1 %, not moved", True),
    "overlap_left": ("overlap of left subspaces", True),
    "overlap_right": ("overlap of right subspaces", True),
    "learned_agreement_1": ("sign agreement of what was learned, on its largest 1 %", True),
    "norm_relative": ("norm relative to full fine-tuning", False),
}
LIVE: dict[str, tuple[str, bool]] = {
    "step_flipped": ("moved entries, sign flipped in this step", True),
    "step_direction_flipped": ("Sign(DC) flipped in this step", True),
    "step_switched_on": ("entries switched on in this step", True),
    "step_switched_off": ("entries switched off in this step", True),
    "zero": ("entries that are zero", True),
    "share_direction": ("gradient share of the direction group", True),
    "strength": ("warm-up λ", False),
    "norm_ratio": ("‖ΔW‖ / ‖W₀‖", True),
}
LOGARITHMIC = {"share_direction", "rms_direction", "rms_magnitude", "largest_H", "norm_relative"}
BY_LAYER = (
    "zero", "positive", "start_direction_flipped", "start_flipped", "start_switched_on", "norm_ratio", "rank_effective",
    "rank_stable",
)  # fmt: skip

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
    for run in runs:
        _per_step(run)
    blocks: list[Block] = [Text(sentence) for sentence in _in_words(runs)]
    blocks.append(_glance(title, runs, source))
    blocks += _lines(f"{title}: over training", runs, "layers", OVER_TRAINING, source)
    blocks += _heat(title, runs, source)
    blocks += _lines(f"{title}: step by step, live", runs, "live", LIVE, source)
    blocks += _ranks(title, runs, analysis.get("rank_examples", []), source)
    blocks += _lines(f"{title}: gradients", runs, "gradients", GRADIENTS, source)
    blocks += _likeness(title, runs, source)
    blocks += _dora(title, runs, source)
    blocks += _contribution(title, runs, source)
    blocks.append(_layers(title, runs, source))
    blocks.append(_runs(title, runs, source))
    for run in runs:
        blocks += [Text(f"{run['name']}: {note}", "note") for note in run.get("notes", [])]
    return [Section(title, blocks, "Analyses")]


def _per_step(run: Row) -> None:
    """Changes between two states, divided by the steps that lie between them."""
    for row in run["layers"]:
        if row.get("between_steps"):
            for key in ("flipped", "direction_flipped"):
                if row.get(f"between_{key}") is not None:
                    row[f"{key}_a_step"] = row[f"between_{key}"] / row["between_steps"]


def end(run: Row, table: str = "layers") -> list[Row]:
    """The rows of a run's last state."""
    return last_state(run[table])


def _in_words(runs: list[Row]) -> list[str]:
    """The main figures in sentences, for those who read no charts."""
    return [_sentence(run) for run in runs if end(run)]


def _sentence(run: Row) -> str:
    def mean(key: str, kind: str = "percent", digits: int | None = None, table: str = "layers") -> str:
        return number(mean_over_layers(end(run, table), key), kind, digits)

    parts = [f"{mean('zero')} of the entries of ΔW are zero, {mean('positive')} are + and {mean('negative')} are −"]
    if flipped := mean("start_direction_flipped"):
        parts.append(f"{flipped} of the signs of DC flipped since the start")
    if ratio := mean("norm_ratio", digits=2):
        parts.append(f"‖ΔW‖ is {ratio} of ‖W₀‖")
    if effective := mean("rank_effective", "number", 0):
        full = mean_over_layers(_with_full_rank(end(run)), "full")
        parts.append(f"its effective rank is {effective} of {number(full, digits=0)} on average")
    if cut := mean("cut", digits=3, table="gradients"):
        nothing = not any(row["cut"] for row in end(run, "gradients"))
        parts.append("the estimator cuts no entry" if nothing else f"the estimator cuts {cut} of the entries")
    if share := mean("share_direction", digits=4, table="gradients"):
        parts.append(f"the direction group has {share} of the squared gradient")
    if cosine := mean("cosine", "number", 3, "likeness"):
        learned = mean("learned_cosine", "number", 3, "likeness")
        since = f" ({learned} for what was learned since the start)" if learned else ""
        parts.append(f"its cosine to full fine-tuning is {cosine}{since}")
    return f"{run['name']} ({run['method']['name']}), step {end(run)[0]['step']}: {'; '.join(parts)}."


def _with_full_rank(rows: list[Row]) -> list[Row]:
    return [{**row, "full": min(row["O"], row["I"])} for row in rows]


def _glance(title: str, runs: list[Row], source: Source) -> Table:
    rows = []
    for run in runs:
        row: Row = {
            "run": run["name"],
            "method": run["method"]["name"],
            "seed": run["seed"],
            "magdir": run["magnitude_direction"],
        }
        for table in ("layers", "gradients", "likeness"):
            last = end(run, table)
            for key in {k for r in last for k in r} - {"layer", "step", "O", "I"}:
                row[key] = mean_over_layers(last, key)
        if run["first_step"]:
            for key in ("gradient_cosine", "sign_cosine"):
                row[key] = mean_over_layers(run["first_step"], key)
        rows.append(row)
    columns = [
        Column("run", "run"),
        Column("method", "method"),
        Column("seed", "seed", "number"),
        Column("zero", "zero", "percent"),
        Column("positive", "+", "percent"),
        Column("negative", "−", "percent"),
        Column(
            "start_flipped",
            "moved, flipped",
            "percent",
            help="Moved at the start and at the end, in opposite directions.",
        ),
        Column(
            "start_direction_flipped",
            "Sign flipped",
            "percent",
            help="Sign(DC) at the end against the start, moved or not.",
        ),
        Column("start_switched_on", "switched on", "percent"),
        Column("start_switched_off", "switched off", "percent"),
        Column("norm_ratio", "‖ΔW‖/‖W₀‖", "percent", 2),
        Column("rank_effective", "effective rank", "number", 1),
        Column(
            "learned_share",
            "learned",
            "percent",
            help="‖ΔW − ΔW at the start‖ / ‖ΔW‖: how much of the update is not its start.",
        ),
        Column("share_direction", "gradient, direction", "percent", 4),
        Column("cut", "cut by estimator", "percent", 3),
        Column("cosine", "cosine to full", "number", 3),
        Column(
            "agreement_1",
            "signs as full",
            "percent",
            help="Of full fine-tuning's largest 1 % of entries that moved here, those that went the same way.",
        ),
        Column(
            "gradient_cosine",
            "first step, −G",
            "number",
            3,
            help="Cosine of the first step's ΔW with the negative full gradient.",
        ),
        Column(
            "sign_cosine",
            "first step, −sign G",
            "number",
            3,
            help="Cosine of the first step's ΔW with AdamW's first step on the weight itself.",
        ),
        Column(
            "magdir",
            "magnitude ~ direction",
            "number",
            2,
            signed=True,
            help="DoRA's correlation of magnitude change and direction change over layers and states.",
        ),
    ]
    note = "At the last state; means over layers, weighted by their entries."
    return Table(f"{title}: at a glance", columns, rows, source, note).without_empty_columns()


def _lines(
    title: str, runs: list[Row], table: str, measures: dict[str, tuple[str, bool]], source: Source
) -> list[Block]:
    views = []
    for key, (label, share) in measures.items():
        series = []
        for run in runs:
            points = []
            for step in dict.fromkeys(row["step"] for row in run[table]):
                rows = [r for r in run[table] if r["step"] == step and r.get(key) is not None]
                if rows:
                    low, high = spread_over_layers(rows, key)
                    points.append({"x": step, "y": mean_over_layers(rows, key), "low": low, "high": high})
            if points:
                series.append({"name": run["name"], "points": points})
        if series:
            views.append(
                View(label, Axis("optimizer step"), Axis(label, percent=share, log=key in LOGARITHMIC), series)
            )
    note = "Lines are means over layers, weighted by entries; bands hold the middle 80 % of the layers."
    return [Chart(title, "lines", views, source, note)] if views else []


def place_of(layer: str) -> tuple[int, str]:
    """(number of the block, name inside it): "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj")."""
    match = re.search(r"\.(\d+)\.", f".{layer}")
    return (int(match[1]), f".{layer}"[match.end() :]) if match else (0, layer)


def _heat(title: str, runs: list[Row], source: Source) -> list[Block]:
    views = []
    for run in runs:
        rows = end(run)
        places = {place_of(row["layer"]): row for row in rows}
        columns = sorted({number for number, _ in places})
        kinds = list(dict.fromkeys(kind for _, kind in places))
        for key in BY_LAYER:
            if not any(row.get(key) is not None for row in rows):
                continue
            label, share = OVER_TRAINING[key]
            cells = [[places.get((n, kind), {}).get(key) for n in columns] for kind in kinds]
            series = [{"rows": kinds, "columns": [str(n) for n in columns], "cells": cells}]
            views.append(View(f"{run['name']}: {label}", Axis("block"), Axis(label, percent=share), series))
    return [Chart(f"{title}: by layer", "heat", views, source, "At the last state.")] if views else []


def _ranks(title: str, runs: list[Row], examples: list[Row], source: Source) -> list[Block]:
    rows, views = [], []
    parts = {"": "ΔW", "magnitude_": "ReLU(BA)", "direction_": "Sign(DC)"}
    for run in runs:
        for step in dict.fromkeys(r["step"] for r in run["layers"]):
            here = [r for r in run["layers"] if r["step"] == step and r.get("rank_effective") is not None]
            for prefix, what in parts.items():
                if here and here[0].get(f"{prefix}rank_effective") is not None:
                    row: Row = {"run": run["name"], "step": step, "what": what}
                    names = ("rank_effective", "rank_stable", "rank_numerical", "rank_90", "rank_99")
                    row |= {name: mean_over_layers(here, f"{prefix}{name}") for name in names}
                    row["bound"] = (
                        mean_over_layers(here, "rank_bound") if not prefix and here[0].get("rank_bound") else None
                    )
                    row["full"] = mean_over_layers(_with_full_rank(here), "full")
                    rows.append(row)
    for prefix, what in parts.items():
        for name in ("effective", "stable", "numerical"):
            series = []
            for run in runs:
                last = [r for r in end(run) if r.get(f"{prefix}rank_{name}") is not None]
                points = [{"x": i, "y": r[f"{prefix}rank_{name}"], "label": r["layer"]} for i, r in enumerate(last)]
                if points:
                    series.append({"name": run["name"], "points": points})
            if series:
                views.append(
                    View(
                        f"{name} rank of {what}",
                        Axis("layer, in the model's order"),
                        Axis(f"{name} rank", log=True),
                        series,
                    )
                )
    columns = [
        Column("run", "run"),
        Column("step", "step", "number"),
        Column("what", "of"),
        Column(
            "rank_effective", "effective", "number", 1, help="exp of the entropy of the normalised singular values."
        ),
        Column("rank_stable", "stable", "number", 2, help="‖·‖²_F / σ₁²"),
        Column("rank_numerical", "numerical", "number", 1, help="Singular values above max(O, I) · ε · σ₁, in fp32."),
        Column("rank_90", "90 % of energy", "number", 1, help="Directions that hold 90 % of the squared norm."),
        Column("rank_99", "99 %", "number", 1),
        Column(
            "bound", "bound", "number", 1, help="The largest rank that ΔW can have for any factors of these shapes."
        ),
        Column("full", "min(O, I)", "number", 1),
    ]
    blocks: list[Block] = []
    if rows:
        blocks.append(
            Table(
                f"{title}: ranks", columns, rows, source, "Means over layers, weighted by entries."
            ).without_empty_columns()
        )
        blocks.append(Chart(f"{title}: ranks by layer", "dots", views, source, "At the last state."))
    if examples:
        blocks.append(Text(BOUND))
        columns = [
            Column("what", "matrix"),
            Column("size", "size", "number"),
            Column("before", "its rank", "number"),
            Column("operation", "operation"),
            Column("after", "rank after", "number"),
        ]
        blocks.append(Table(f"{title}: what ReLU and Sign do to a rank", columns, examples, source))
    return blocks


def _likeness(title: str, runs: list[Row], source: Source) -> list[Block]:
    compared = [run for run in runs if run["likeness"]]
    if not compared:
        return []
    rows = []
    for run in compared:
        last = end(run, "likeness")
        row: Row = {"run": run["name"], "step": last[0]["step"]}
        for key in last[0].keys() - {"layer", "step"}:
            row[key] = mean_over_layers(last, key)
        rows.append(row)
    columns = [
        Column("run", "run"),
        Column("step", "step", "number"),
        Column("cosine", "cosine", "number", 4),
        Column("cosine_chance", "± by chance", "number", 4),
        Column("learned_cosine", "learned: cosine", "number", 4, help="Of the update without its Gaussian start."),
        Column("learned_agreement_1", "learned: agreement", "percent"),
        Column("norm_relative", "norm, relative", "number", 2),
        Column("agree_1", "largest 1 %: same way", "percent"),
        Column("disagree_1", "opposite", "percent"),
        Column("rest_1", "not moved", "percent"),
        Column("agreement_1", "agreement", "percent", help="Same way, of those moved. 50 % by chance."),
        Column("agreement_10", "of largest 10 %", "percent"),
        Column("overlap_left", "left overlap", "percent"),
        Column("overlap_left_chance", "by chance", "percent"),
        Column("overlap_right", "right overlap", "percent"),
        Column("overlap_right_chance", "by chance", "percent"),
        Column(
            "angle_left", "left angle [°]", "number", 1, help="Smallest principal angle of the leading left subspaces."
        ),
        Column("angle_right", "right angle [°]", "number", 1),
    ]
    reference = compared[0]["reference"]
    note = f"To full fine-tuning ({reference}) at the same step, from the same start and data; means over layers."
    return [
        Table(f"{title}: likeness to full fine-tuning", columns, rows, source, note).without_empty_columns(),
        *_lines(f"{title}: likeness over training", compared, "likeness", LIKENESS, source),
    ]


def _dora(title: str, runs: list[Row], source: Source) -> list[Block]:
    series, words = [], []
    for run in runs:
        points = [
            {"x": r["direction_change"], "y": r["magnitude_change"], "label": r["layer"], "note": f"step {r['step']}"}
            for r in run["layers"]
            if r.get("direction_change") and r.get("magnitude_change")
        ]
        if points:
            series.append({"name": run["name"], "points": points})
        if run["magnitude_direction"] is not None:
            words.append(f"{run['name']} {number(run['magnitude_direction'], digits=2, signed=True)}")
    if not series:
        return []
    view = View("", Axis("direction change, mean of 1 − cos", log=True), Axis("magnitude change", log=True), series)
    note = "One mark a layer and state, as in the DoRA paper (figure 2). Correlation: " + "; ".join(words) + "."
    return [Chart(f"{title}: magnitude against direction", "dots", [view], source, note)]


def _contribution(title: str, runs: list[Row], source: Source) -> list[Block]:
    rows = [
        {"run": run["name"], **row, "name": f"{row['group']} {row['what']}".strip()}
        for run in runs
        for row in run["contribution"]
    ]
    if not rows:
        return []
    views = []
    for run in runs:
        points = [
            {
                "label": f"{r['group']}: {r['what']}" if r["group"] not in ("", "all") else r["what"],
                "x": r["loss"],
                **({"low": r["loss"] - r["spread"], "high": r["loss"] + r["spread"]} if r.get("spread") else {}),
            }
            for r in run["contribution"]
        ]
        if points:
            views.append(
                View(
                    run["name"],
                    Axis("held-out loss (less is better)"),
                    Axis(""),
                    [{"name": run["name"], "points": points}],
                )
            )
    columns = [
        Column("run", "run"),
        Column("group", "group"),
        Column("what", "what was done to it"),
        Column("loss", "held-out loss", "number", 4),
        Column("spread", "± over draws", "number", 4),
        Column("draws", "draws", "number"),
    ]
    note = "The finished adapter with one group set back to its start, or drawn anew with the same mean and spread."
    return [
        Chart(f"{title}: what each group contributes", "intervals", views, source, note),
        Table(f"{title}: contribution of the groups", columns, rows, source, folded=True),
    ]


def _layers(title: str, runs: list[Row], source: Source) -> Table:
    rows = [{"run": run["name"], **row} for run in runs for row in end(run)]
    columns = [
        Column("run", "run"),
        Column("layer", "layer"),
        Column("O", "O", "number", 0),
        Column("I", "I", "number", 0),
        Column("zero", "zero", "percent"),
        Column("positive", "+", "percent"),
        Column("negative", "−", "percent"),
        Column("start_direction_flipped", "Sign flipped", "percent"),
        Column("start_flipped", "moved, flipped", "percent"),
        Column("start_switched_on", "on", "percent"),
        Column("start_switched_off", "off", "percent"),
        Column("norm", "‖ΔW‖", "number"),
        Column("norm_ratio", "‖ΔW‖/‖W₀‖", "percent", 2),
        Column("rank_effective", "effective rank", "number", 1),
        Column("rank_stable", "stable rank", "number", 1),
        Column("rank_numerical", "numerical rank", "number", 0),
        Column("rank_bound", "bound", "number", 0),
    ]
    return Table(
        f"{title}: every layer", columns, rows, source, "At the last state.", folded=True
    ).without_empty_columns()


def _runs(title: str, runs: list[Row], source: Source) -> Table:
    """Where each run lies, and what made it."""
    rows = [
        {
            **run,
            "trained": ", ".join(f"{key} {value}" for key, value in run["method"].items()),
            "states": ", ".join(map(str, run["steps"])),
        }
        for run in runs
    ]
    columns = [
        Column("name", "run"),
        Column("folder", "folder"),
        Column("command", "made by"),
        Column("trained", "method"),
        Column("model", "model"),
        Column("data", "data"),
        Column("seed", "seed", "number"),
        Column("states", "states looked at"),
        Column("reference", "compared with"),
    ]
    return Table(f"{title}: runs", columns, rows, source, folded=True).without_empty_columns()


def titles(analyses: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """A heading for each analysis: the runs that it is about."""
    found: list[str] = []
    for _, analysis in analyses:
        names = [run["name"] for run in analysis["runs"]]
        title = "Analysis: " + ", ".join(names[:4]) + ("…" if len(names) > 4 else "")
        found.append(title if title not in found else f"{title} ({len(found) + 1})")
    return found
