"""A study's results as blocks: verdicts first, then scores, tuning and cost; and one that is still running."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dual_lora.lab.comparison import metrics
from dual_lora.lab.comparison.jobs import settings_in_words
from dual_lora.lab.comparison.load import company, loads
from dual_lora.lab.comparison.notes import amended
from dual_lora.lab.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Mood,
    Row,
    Section,
    Source,
    Table,
    Text,
    Verdict,
    View,
    slug,
)  # fmt: skip
from dual_lora.lab.report.gather import source_of

MOODS: dict[str, Mood] = {
    "significantly better": "good",
    "significantly worse": "bad",
    "equivalent within the margin": "same",
}


def verdict_blocks(file: Path, results: dict[str, Any], folded: bool) -> list[Block]:
    """What may be said about one study, with the figures behind it. folded: the table, which the chart shows too."""
    study, source = results["study"], source_of(file, results.get("provenance", {}))
    blocks: list[Block] = [Text(study.get("question") or study["name"], "lead")]
    if not results.get("complete", True):
        blocks.append(Text("This study is not complete; what follows holds for the runs that are there.", "warning"))
    comparisons = results["comparisons"]
    if not comparisons:
        blocks.append(Text("There is nothing to compare yet.", "note"))
    blocks += [_counted(comparisons)] if comparisons else []
    blocks.append([_verdict(c) for c in comparisons])
    for metric in dict.fromkeys(c["metric"] for c in comparisons):
        here = [c for c in comparisons if c["metric"] == metric]
        blocks.append(_forest(metric, here, source, study))
    if comparisons:
        blocks.append(_verdict_table(study, comparisons, source, folded))
    blocks += [Text(note, "note") for note in [*amended(results), *results.get("notes", [])]]
    blocks += [Text(f"Failed: {text}", "warning") for text in results.get("failed", [])]
    return blocks


def _verdict(c: Row) -> Verdict:
    subject = f"{c['candidate']} against {c['reference']} on {place(c)}"
    return Verdict(c["verdict"], subject, c["sentence"], MOODS.get(c["verdict"], "open"))


def _decided(c: Row) -> bool:
    return MOODS.get(c["verdict"]) in ("good", "bad")


def _counted(comparisons: list[Row]) -> Text:
    counts = Counter(c["verdict"] for c in comparisons)
    words = ", ".join(f"{n} × {verdict}" for verdict, n in counts.most_common())
    return Text(f"{len(comparisons)} comparison{'s' * (len(comparisons) != 1)}, judged together: {words}.")


def place(row: Row) -> str:
    """Task, and the model where the study has several."""
    return f"{row['task']} ({row['model']})" if row.get("model") else row["task"]


def _forest(metric: str, comparisons: list[Row], source: Source, study: Row) -> Chart:
    first = comparisons[0]
    margin = first.get("margin")
    points = [
        {
            "label": f"{c['candidate']} · {place(c)}",
            "x": c["difference"],
            "low": c["low"],
            "high": c["high"],
            "mood": MOODS.get(c["verdict"], "open"),
            "note": f"{c['verdict']} than {c['reference']}" if _decided(c) else c["verdict"],
        }
        for c in comparisons
        if c["difference"] is not None
    ]
    reference = ", ".join(dict.fromkeys(c["reference"] for c in comparisons))
    axis = Axis(f"difference in {metric} to {reference} (right is better)")
    return Chart(
        f"{study['name']}: differences in {metric}",
        "intervals",
        [View("", axis, Axis(""), [{"name": metric, "points": points}])],
        source,
        f"Points are means over paired seeds and items, bars their {first['confidence']:.0%} intervals.",
        band=(-margin, margin) if margin else None,
        band_label="margin of equivalence" if margin else "",
        zero=True,
    )


def _verdict_table(study: Row, comparisons: list[Row], source: Source, folded: bool) -> Table:
    first = comparisons[0]
    rows = [{**c, "place": place(c), "seeds": c["spread"]["seeds"], "items": c["spread"]["items"]} for c in comparisons]
    columns = [
        Column("candidate", "method"),
        Column("reference", "against"),
        Column("place", "task"),
        Column("metric", "metric"),
        Column("verdict", "verdict", "verdict"),
        Column("difference", "difference", "number", 4, signed=True, help="In the metric's unit; positive is better."),
        Column("low", f"{first['confidence']:.0%} from", "number", 4, signed=True),
        Column("high", "to", "number", 4, signed=True),
        Column(
            "p_holm", "p (Holm)", "number", help="Chance of such a difference by luck, corrected for all comparisons."
        ),
        Column(
            "visible",
            "visible from",
            "number",
            4,
            help=f"The smallest true difference that this study finds with {first['power']:.0%} chance.",
        ),
        Column("seeds", "seeds", "number"),
        Column("items", "items", "number"),
    ]
    note = f"Chance of any false alarm in the study: {study['level']:g} at most."
    return Table(f"{study['name']}: verdicts", columns, rows, source, note, folded)


def detail_blocks(file: Path, results: dict[str, Any]) -> list[Block]:
    """Scores, tuning and cost of one study."""
    source, name = source_of(file, results.get("provenance", {})), results["study"]["name"]
    methods = results["methods"]
    blocks: list[Block] = [_scores_chart(name, results, source)] if any(m["score"] is not None for m in methods) else []
    blocks.append(_scores(name, results, source))
    blocks += _tuning(name, methods, (results["study"].get("search") or {}).get("metric"), source)
    blocks.append(_cost(name, methods, source))
    better = {m["metric"]: m["better"] for m in methods}
    blocks += _pareto(name, results.get("pareto", []), better, source, _mixed_company(methods))
    blocks.append(_runs(name, methods, source))
    return [b for b in blocks if not isinstance(b, Table) or b.rows]


def _scores_chart(name: str, results: Row, source: Source) -> Chart:
    """One row a method: its mean and every seed, one picture a task."""
    views = []
    for where in dict.fromkeys(place(m) for m in results["methods"]):
        here = [m for m in results["methods"] if place(m) == where and m["score"] is not None]
        points = [{"label": "(untrained)", "x": u["score"]} for u in results.get("untrained", []) if place(u) == where]
        points += [
            {
                "label": m["method"],
                "x": m["score"],
                "dots": [s["score"] for s in m["seeds"] if s.get("score") is not None],
                "note": f"{len(m['seeds'])} seeds" + (f", {m['diverged']} diverged" if m["diverged"] else ""),
            }
            for m in here
        ]
        if here:
            axis = Axis(f"{here[0]['metric']} ({here[0]['better']} is better)")
            views.append(View(where, axis, Axis(""), [{"name": where, "points": points}]))
    return Chart(f"{name}: scores", "intervals", views, source, "Large marks are means, small ones single seeds.")


def _scores(name: str, results: Row, source: Source) -> Table:
    rows: list[Row] = [
        {"place": place(u), "metric": u["metric"], "method": "(untrained)", "score": u["score"]}
        for u in results.get("untrained", [])
    ]
    for m in results["methods"]:
        chosen = settings_in_words(m["settings"])
        share = m["trainable_parameters"] / m["base_parameters"] if m.get("base_parameters") else None
        done = sum(s["status"] != "missing" for s in m["seeds"])
        rows.append({**m, "place": place(m), "chosen": chosen, "share": share, "done": done})
    columns = [
        Column("place", "task"),
        Column("metric", "metric"),
        Column("method", "method"),
        Column("score", "score", "number", 4),
        Column("score_deviation", "± over seeds", "number", 4, help="Standard deviation over the seeds."),
        Column("done", "seeds", "number"),
        Column("diverged", "diverged", "number"),
        Column("rank", "rank", "number"),
        Column("trainable_parameters", "trainable", "number", 0),
        Column("share", "of the model", "percent", 2),
        Column("mismatch", "budget mismatch", "percent", 1, signed=True),
        Column("chosen", "chosen settings"),
        Column("about", "what it is"),
    ]
    return Table(f"{name}: scores table", columns, rows, source).without_empty_columns()


def _tuning(name: str, methods: list[Row], metric: str | None, source: Source) -> list[Block]:
    """The score of each trial over the first setting that was searched: how much a method depends on it.

    metric: what trials are judged by; None for the task's own.
    """
    views = []
    for where in dict.fromkeys(place(m) for m in methods):
        here = [m for m in methods if place(m) == where and m["trials"]]
        keys = [key for m in here for key, v in m["trials"][0]["settings"].items() if isinstance(v, int | float)]
        if not keys:
            continue
        key = Counter(keys).most_common(1)[0][0]
        series = []
        for m in here:
            points = [
                {"x": t["settings"][key], "y": t["score"], "note": "chosen" if t["settings"] == m["settings"] else ""}
                for t in m["trials"]
                if t.get("score") is not None and key in t["settings"]
            ]
            if points:
                series.append({"name": m["method"], "points": sorted(points, key=lambda p: p["x"])})
        x = Axis(key.rpartition(".")[2].replace("_", " "), log=True)
        judged = metric or here[0]["metric"]
        y = Axis(f"{judged} on validation records ({metrics.better(judged)} is better)")
        views.append(View(where, x, y, series))
    note = "Trials are judged on validation records, never on test. A gap is a run that diverged."
    return [Chart(f"{name}: tuning", "lines", views, source, note)] if views else []


def _cost(name: str, methods: list[Row], source: Source) -> Table:
    columns = [
        Column("place", "task"),
        Column("method", "method"),
        Column("train_seconds", "training [s]", "number", 1),
        Column("steps_per_second", "steps/s", "number", 2),
        Column("tokens_per_second", "tokens/s", "number", 0),
        Column("peak_memory", "peak memory", "bytes"),
        Column("adapter_bytes", "on disk", "bytes"),
        Column("merge_seconds", "merge [s]", "number", 3),
        Column(
            "forward_slowdown", "forward ×", "number", 2, help="Time of a forward pass, unmerged, against the base."
        ),
        Column(
            "decode_slowdown",
            "decoding ×",
            "number",
            2,
            help="Time to read a prompt and write eight tokens, unmerged, against the base.",
        ),
    ]
    rows = [
        {"place": place(m), "method": m["method"], "company": company(m), **m["cost"]} for m in methods if m.get("cost")
    ]
    note = "Medians over the seeds."
    if mixed := _mixed_company(methods):
        columns.append(Column("company", "runs at a time"))
        note += f" {mixed}"
    return Table(f"{name}: cost", columns, rows, source, note).without_empty_columns()


def _mixed_company(methods: list[Row]) -> str:
    """A warning where runs were measured beside different numbers of others; "" if they were not."""
    return (
        "" if len(loads(methods)) < 2 else "Times and speeds are not comparable: not all runs shared the machine alike."
    )


def _pareto(name: str, fronts: list[Row], better: dict[str, str], source: Source, warning: str) -> list[Block]:
    blocks: list[Block] = []
    for where in dict.fromkeys(place(f) for f in fronts):
        views = []
        for f in (f for f in fronts if place(f) == where):
            series = [
                {
                    "name": p["method"],
                    "points": [
                        {"x": p["cost"], "y": p["quality"], "label": p["method"], "front": p["front"],
                         "note": "no other is better in both" if p["front"] else ""}
                    ],
                }
                for p in f["points"]
            ]  # fmt: skip
            x = Axis(f["label"].replace(" [bytes]", ""), bytes="bytes" in f["label"])
            views.append(
                View(
                    f["label"].replace(" [bytes]", ""),
                    x,
                    Axis(f"{f['metric']} ({better.get(f['metric'], 'more')} is better)"),
                    series,
                )
            )
        note = f"Joined by a line: methods that no other beats in both quality and cost. {warning}".rstrip()
        blocks.append(Chart(f"{name}: quality against cost on {where}", "dots", views, source, note))
    return blocks


def _runs(name: str, methods: list[Row], source: Source) -> Table:
    """Every run that the figures come from, by the name of its folder."""
    rows = [
        {
            **run,
            "place": place(m),
            "method": m["method"],
            "kind": kind,
            "chosen": settings_in_words(m["settings"] if kind == "final" else run["settings"]),
        }
        for m in methods
        for kind, runs in (("search", m["trials"]), ("final", m["seeds"]))
        for run in runs
    ]
    columns = [
        Column("key", "run"),
        Column("place", "task"),
        Column("method", "method"),
        Column("kind", "kind", help="Search: judged on validation records. Final: judged on test records."),
        Column("seed", "seed", "number"),
        Column("chosen", "settings"),
        Column("status", "status"),
        Column("score", "score", "number", 4),
        Column("seconds", "seconds", "number", 1),
    ]
    note = "A run's recipe, record and scores lie in the study's folder of runs under this name."
    return Table(f"{name}: runs", columns, rows, source, note, folded=True).without_empty_columns()


def progress_sections(file: Path, state: dict[str, Any]) -> list[Section]:
    """A study that is under way: how far it is, what is going on, what came out so far."""
    study, runs = state["study"], state["runs"]
    name = study.get("name", file.parent.name)
    counts = Counter(run["status"] for run in runs)
    done = counts["done"] + counts["diverged"]
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    blocks: list[Block] = [
        Text(study.get("question") or name, "lead"),
        Text(f"{done} of {len(runs)} runs known so far have ended ({words})."),
    ]
    rows = []
    for run in reversed(runs):
        job, outcome = run["job"], run["outcome"] or {}
        if run["status"] == "planned":
            continue
        rows.append(
            {
                "status": run["status"],
                "kind": job.get("kind"),
                "method": job.get("method"),
                "place": place(job) if "task" in job else "",
                "seed": job.get("seed"),
                "settings": settings_in_words(job.get("settings")),
                "metric": outcome.get("metric"),
                "score": outcome.get("score"),
                "seconds": run["seconds"],
                "error": run["error"],
            }
        )
    columns = [
        Column("status", "status"),
        Column("kind", "kind"),
        Column("method", "method"),
        Column("place", "task"),
        Column("seed", "seed", "number"),
        Column("settings", "settings"),
        Column("metric", "metric"),
        Column("score", "score", "number", 4),
        Column("seconds", "seconds", "number", 1),
        Column("error", "error"),
    ]
    table = Table(f"{name}: runs so far", columns, rows, Source(str(file))).without_empty_columns()
    return [Section(f"Under way: {name}", [*blocks, *([table] if rows else [])], "Under way")]


def study_sections(file: Path, results: dict[str, Any], name: str, alone: bool) -> list[Section]:
    """Verdicts and details of one study. alone: no other is on the page; else the details are folded."""
    return [
        Section(verdict_title(name), verdict_blocks(file, results, not alone), "Verdicts"),
        Section(f"Figures: {name}", detail_blocks(file, results), "Figures", folded=not alone),
    ]


def verdict_title(name: str) -> str:
    """The heading of a study's verdicts."""
    return f"Verdicts: {name}"


def study_names(studies: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Each study's name, with a number where several have the same (as an anchor writes it)."""
    names: list[str] = []
    for file, results in studies:
        name = str(results["study"].get("name") or file.parent.name)
        again = sum(slug(name) == slug(known) for known in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names
