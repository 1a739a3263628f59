"""A study's results as blocks: verdicts first, then scores, tuning and cost; and one that is still running."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import MOODS, Axis, Block, Cards, Chart, Section, Source, Table, Text, Verdict, View
from dual_lora.lab.report.columns import Row, columns
from dual_lora.lab.report.gather import short_path, source_of
from dual_lora.lab.study import metrics
from dual_lora.lab.study.job import settings_in_words
from dual_lora.lab.study.notes import amended, at_a_time, numbers_at_a_time
from dual_lora.lab.study.rows import ComparisonRow, MethodRow, ParetoRow, Results, UntrainedRow
from dual_lora.lab.study.verdicts import percent

SMALL = 0.01  # scores below it need more than four decimals
VERDICTS = "candidate reference scenario metric verdict difference low high p_holm visible"
SCORES = (
    "scenario metric method score score_deviation seeds forgetting diverged rank trainable_parameters mismatch settings"
)
COST = (
    "scenario method train_seconds steps_per_second tokens_per_second peak_memory adapter_bytes merge_seconds "
    "forward_slowdown decode_slowdown"
)


def study_sections(file: Path, results: Results, name: str, alone: bool) -> list[Section]:
    """Verdicts and details of one study. alone: no other is on the page; else the details are folded."""
    source = source_of(file, results.get("provenance", {}))
    return [
        Section(verdict_title(name), _judged(results, source, not alone), "Verdicts"),
        Section(f"Figures: {name}", _details(results, source), "Figures", folded=not alone),
    ]


def verdict_title(name: str) -> str:
    """The heading of a study's verdicts."""
    return f"Verdicts: {name}"


def scenario(row: Mapping[str, Any]) -> str:
    """Task, and the model where the study has several."""
    return f"{row['task']} ({row['model']})" if row.get("model") else row["task"]


def _judged(results: Results, source: Source, folded: bool) -> list[Block]:
    """What may be said about one study, with the figures behind it. folded: the table, which the chart shows too."""
    study, comparisons = results["study"], results["comparisons"]
    blocks: list[Block] = [Text(study.get("question") or study["name"], "lead")]
    if not results.get("complete", True):
        blocks.append(Text("This study is not complete; what follows holds for the runs that are there.", "warning"))
    if comparisons:
        words = ", ".join(f"{n} × {verdict}" for verdict, n in Counter(c["verdict"] for c in comparisons).most_common())
        blocks.append(Text(f"{len(comparisons)} comparison{'s'[: len(comparisons) != 1]}, tested together: {words}."))
    else:
        blocks.append(Text("There is nothing to compare yet.", "note"))
    cards = [_verdict(c) for c in comparisons]
    blocks.append(Cards(sorted(cards, key=lambda v: ("good", "bad", "same", "open").index(v.mood)), "verdicts"))
    for metric in dict.fromkeys(c["metric"] for c in comparisons):
        blocks.append(_differences(study, metric, [c for c in comparisons if c["metric"] == metric], source))
    if comparisons:
        blocks.append(verdict_table(results, f"{VERDICTS} seeds items", source, folded))
    blocks += [Text(note, "note") for note in [*amended(results), *results.get("notes", [])]]
    return blocks + [Text(f"Failed: {text}", "warning") for text in results.get("failed", [])]


def verdict_table(results: Results, keys: str, source: Source | None = None, folded: bool = False) -> Table:
    """One row a comparison. keys: of the columns."""
    study, comparisons = results["study"], results["comparisons"]
    rows = [c | {"scenario": scenario(c)} | {key: c["spread"][key] for key in ("seeds", "items")} for c in comparisons]
    named = columns(keys, low=f"{percent(comparisons[0]['confidence'])} from")
    scores = [c[side] for c in comparisons for side in ("candidate_score", "reference_score")]
    if all(abs(score or 0.0) < SMALL for score in scores):
        named = [replace(column, form=column.form.replace(".4f", "g")) for column in named]
    note = f"Chance of any false alarm in the study: {study['level']:g} at most."
    return Table(f"{study['name']}: verdicts", named, rows, source, note, folded)


def _verdict(c: ComparisonRow) -> Verdict:
    subject = f"{c['candidate']} against {c['reference']} on {scenario(c)}"
    rest = c["sentence"].removeprefix(subject)
    return Verdict(c["verdict"], MOODS.get(c["verdict"], "open"), subject if rest != c["sentence"] else "", rest)


def _differences(study: dict[str, Any], metric: str, comparisons: list[ComparisonRow], source: Source) -> Chart:
    margin = comparisons[0].get("margin")
    points = [
        {"label": f"{c['candidate']} · {scenario(c)}", "x": c["difference"], "low": c["low"], "high": c["high"]}
        | {"note": c["verdict"] + f" than {c['reference']}" * (MOODS.get(c["verdict"]) in ("good", "bad"))}
        | {"mood": MOODS.get(c["verdict"], "open")}
        for c in comparisons
    ]
    references = ", ".join(dict.fromkeys(c["reference"] for c in comparisons))
    view = View("", Axis(f"difference in {metric} to {references} (right is better)"), Axis(""), points)
    note = (
        f"Points are means over paired seeds and items, bars their {percent(comparisons[0]['confidence'])} intervals."
    )
    note += " Shaded: margin of equivalence." if margin else ""
    band = (-margin, margin) if margin else None
    return Chart(f"{study['name']}: differences in {metric}", "intervals", [view], source, note, band, zero=True)


def _details(results: Results, source: Source) -> list[Block]:
    """Scores, tuning, cost and runs of one study."""
    name, methods = results["study"]["name"], results["methods"]
    search = (results["study"].get("search") or {}).get("metric")
    better = {m["metric"]: m["better"] for m in methods}
    blocks: list[Block] = [
        _scores_chart(name, methods, results.get("untrained", []), source),
        score_table(results, f"{SCORES} share about", source),
        _tuning(name, methods, search, source),
        cost_table(results, source),
        *_trade_offs(name, results.get("pareto", []), better, source, _incomparable(methods)),
        _runs(name, methods, source),
    ]
    return [b for b in blocks if not isinstance(b, Table) or b.rows]


def _scores_chart(name: str, methods: list[MethodRow], untrained: list[UntrainedRow], source: Source) -> Chart:
    """One row a method: its mean and every seed, one picture a task."""
    views = []
    for where in dict.fromkeys(scenario(m) for m in methods if m["score"] is not None):
        here = [m for m in methods if scenario(m) == where and m["score"] is not None]
        points: list[Row] = [{"label": "(untrained)", "x": u["score"]} for u in untrained if scenario(u) == where]
        points += [
            {
                "label": m["method"],
                "x": m["score"],
                "dots": [s["score"] for s in m["seeds"] if s.get("score") is not None],
            }
            | {"note": f"{len(m['seeds'])} seeds" + (f", {m['diverged']} diverged" if m["diverged"] else "")}
            for m in here
        ]
        views.append(View(where, Axis(f"{here[0]['metric']} ({here[0]['better']} is better)"), Axis(""), points))
    return Chart(f"{name}: scores", "intervals", views, source, "Large marks are means, small ones single seeds.")


def score_table(results: Results, keys: str, source: Source | None = None) -> Table:
    """One row a method, the untrained model first. keys: of the columns."""
    rows = [{**u, "scenario": scenario(u), "method": "(untrained)"} for u in results.get("untrained", [])]
    for m in results["methods"]:
        rows.append(
            m
            | {"scenario": scenario(m), "settings": settings_in_words(m["settings"])}
            | {"share": _share(m["trainable_parameters"], m.get("base_parameters"))}
            | {"seeds": sum(s["status"] != "missing" for s in m["seeds"])}
            | {"diverged": "all trials" if m.get("diverged_in_search") else m.get("diverged") or None}
            | {"mismatch": ", ".join(m.get("notes", [])) if m.get("mismatch") is None else m["mismatch"]}
        )
    named = columns(keys, settings="chosen settings")
    return Table(f"{results['study']['name']}: scores table", named, rows, source)


def _share(trainable: int | None, base: int | None) -> float | None:
    return trainable / base if trainable is not None and base else None


def cost_table(results: Results, source: Source | None = None) -> Table:
    """What training and use of every method cost."""
    methods, warning = results["methods"], _incomparable(results["methods"])
    rows = [
        {"scenario": scenario(m), "method": m["method"], "at_a_time": at_a_time(m), **m["cost"]}
        for m in methods
        if m.get("cost")
    ]
    note = f"Medians over the seeds. {warning}".rstrip()
    return Table(f"{results['study']['name']}: cost", columns(COST + " at_a_time" * bool(warning)), rows, source, note)


def _incomparable(methods: list[MethodRow]) -> str:
    several = len(numbers_at_a_time(methods)) > 1
    return "Times and speeds are not comparable: not all runs shared the machine alike." if several else ""


def _tuning(name: str, methods: list[MethodRow], metric: str | None, source: Source) -> Chart:
    """The score of each trial over the first setting that was searched: how much a method depends on it.

    metric: by what trials are compared; None for the task's own.
    """
    views = []
    for where in dict.fromkeys(scenario(m) for m in methods):
        here = [m for m in methods if scenario(m) == where and m["trials"]]
        keys = [key for m in here for key, v in m["trials"][0]["settings"].items() if isinstance(v, int | float)]
        if not keys:
            continue
        key, judged = Counter(keys).most_common(1)[0][0], metric or here[0]["metric"]
        points = [
            {"series": m["method"], "x": t["settings"][key], "y": t["score"]}
            | {"note": "chosen" if t["settings"] == m["settings"] else ""}
            for m in here
            for t in m["trials"]
            if t.get("score") is not None and key in t["settings"]
        ]
        y = Axis(f"{judged} on validation records ({metrics.better(judged)} is better)")
        views.append(View(where, Axis(key.rpartition(".")[2].replace("_", " "), log=True), y, points))
    note = "Trials are compared on validation records, never on test. A gap is a run that diverged."
    return Chart(f"{name}: tuning", "lines", views, source, note)


def _trade_offs(
    name: str, fronts: list[ParetoRow], better: dict[str, str], source: Source, warning: str
) -> list[Block]:
    """Quality against each cost, a chart a task."""
    note = f"Joined by a line: methods that no other beats in both quality and cost. {warning}".rstrip()
    blocks: list[Block] = []
    for where in dict.fromkeys(scenario(f) for f in fronts):
        views = []
        for f in (f for f in fronts if scenario(f) == where):
            points = [
                {"series": p["method"], "x": p["cost"], "y": p["quality"], "label": p["method"], "front": p["front"]}
                | {"note": "no other is better in both" if p["front"] else ""}
                for p in f["points"]
            ]
            label, form = f["label"].replace(" [bytes]", ""), "B" if "bytes" in f["label"] else "g"
            y = Axis(f"{f['metric']} ({better.get(f['metric'], 'more')} is better)")
            views.append(View(label, Axis(label, form=form), y, points))
        blocks.append(Chart(f"{name}: quality against cost on {where}", "dots", views, source, note))
    return blocks


def _runs(name: str, methods: list[MethodRow], source: Source) -> Table:
    """Every run that the figures come from, by the name of its folder."""
    rows: list[Row] = []
    for m in methods:
        runs = [("search", dict(t), t["settings"]) for t in m["trials"]]
        runs += [("final", dict(s), m["settings"] or {}) for s in m["seeds"]]
        rows += [
            {**run, "run": run["key"], "scenario": scenario(m), "method": m["method"], "kind": kind}
            | {"settings": settings_in_words(settings)}
            for kind, run, settings in runs
        ]
    note = "A run's recipe, record and scores lie in the study's folder of runs under this name."
    named = columns("run scenario method kind seed settings status score seconds")
    return Table(f"{name}: runs", named, rows, source, note, folded=True)


def progress_sections(file: Path, state: dict[str, Any]) -> list[Section]:
    """A study that is under way: how far it is, what is going on, what came out so far."""
    study, runs = state["study"], state["runs"]
    name, counts = study.get("name", file.parent.name), Counter(run["status"] for run in runs)
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    rows = [
        job
        | {k: (run["outcome"] or {}).get(k) for k in ("metric", "score")}
        | {k: run[k] for k in ("status", "seconds", "error")}
        | {"scenario": scenario(job) if "task" in job else "", "settings": settings_in_words(job.get("settings"))}
        for run in reversed(runs)
        if run["status"] != "planned"
        for job in [run["job"]]
    ]
    ended = f"{counts['done'] + counts['diverged']} of {len(runs)} runs known so far have ended ({words})."
    blocks: list[Block] = [Text(study.get("question") or name, "lead"), Text(ended)]
    named = columns("status kind method scenario seed settings metric score seconds error")
    table = Table(f"{name}: runs so far", named, rows, Source(short_path(file)))
    return [Section(f"Under way: {name}", [*blocks, *([table] if rows else [])], "Under way")]
