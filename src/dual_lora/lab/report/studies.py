"""A study's results as blocks: verdicts first, then scores, tuning and cost; and one that is still running."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Cards, Chart, Section, Source, Table, Text, View, mood, place
from dual_lora.lab.report.columns import Row, columns, grouped
from dual_lora.lab.report.consistency import inconsistencies
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


def study_name(file: Path, results: Any) -> str:
    """Return the name of a study, finished or under way."""
    return str(results["study"].get("name") or file.parent.name)


def study_sections(file: Path, results: Results, name: str, folded: bool) -> list[Section]:
    """Verdicts and details of one study. folded: what has its figures, where several studies are on the page."""
    source = source_of(file, results.get("provenance", {}))
    return [
        Section(verdict_title(name), _verdict_blocks(results, folded), "Verdicts", name, source),
        Section(f"Figures: {name}", _details(results), "Figures", name, source, folded),
    ]


def verdict_title(name: str) -> str:
    """The heading of a study's verdicts."""
    return f"Verdicts: {name}"


def scenario(row: Mapping[str, Any]) -> str:
    """Return the task, with the model where the study has several."""
    return f"{row['task']} ({row['model']})" if row.get("model") else row["task"]


def _verdict_blocks(results: Results, folded: bool) -> list[Block]:
    """Return the verdicts of one study, with the figures behind them. folded: the table, which the chart shows too."""
    study, comparisons = results["study"], results["comparisons"]
    blocks: list[Block] = [Text(study.get("question") or study["name"], "lead")]
    if not results.get("complete", True):
        blocks.append(Text("This study is not complete; what follows holds for the runs that are there.", "warning"))
    blocks += [Text(each, "warning") for each in inconsistencies(results)]
    if comparisons:
        words = ", ".join(f"{n} × {verdict}" for verdict, n in Counter(c["verdict"] for c in comparisons).most_common())
        blocks.append(Text(f"{len(comparisons)} comparison{'s'[: len(comparisons) != 1]}, tested together: {words}."))
    else:
        blocks.append(Text("There is nothing to compare yet.", "note"))
    sure_first = sorted(comparisons, key=lambda c: place(c["verdict"]))
    blocks.append(Cards([_verdict(c) for c in sure_first], "verdicts"))
    blocks += [_differences(metric, some) for metric, some in grouped(comparisons, itemgetter("metric")).items()]
    if comparisons:
        blocks.append(verdict_table(results, f"{VERDICTS} seeds items", folded))
    blocks += [Text(note, "note") for note in [*amended(results), *results.get("notes", [])]]
    return blocks + [Text(f"Failed: {text}", "warning") for text in results.get("failed", [])]


def verdict_table(results: Results, keys: str, folded: bool = False) -> Table:
    """One row a comparison. keys: of the columns."""
    study, comparisons = results["study"], results["comparisons"]
    rows = [c | {"scenario": scenario(c)} | {key: c["spread"][key] for key in ("seeds", "items")} for c in comparisons]
    named = columns(keys, low=f"{percent(comparisons[0]['confidence'])} from")
    scores = [c[side] for c in comparisons for side in ("candidate_score", "reference_score")]
    if all(abs(score or 0.0) < SMALL for score in scores):
        named = [replace(column, form=column.form.replace(".4f", "g")) for column in named]
    note = f"Chance of any false alarm in the study: {study['level']:g} at most."
    return Table("Verdicts", named, rows, note, folded)


def _verdict(c: ComparisonRow) -> Row:
    subject = f"{c['candidate']} against {c['reference']} on {scenario(c)}"
    rest = c["sentence"].removeprefix(subject)
    whole = rest == c["sentence"]
    return {"verdict": c["verdict"], "mood": mood(c["verdict"]), "subject": "" if whole else subject, "rest": rest}


def _differences(metric: str, comparisons: list[ComparisonRow]) -> Chart:
    margin = comparisons[0].get("margin")
    points = [
        {"label": f"{c['candidate']} · {scenario(c)}", "x": c["difference"], "low": c["low"], "high": c["high"]}
        | {"note": c["verdict"] + f" than {c['reference']}" * (mood(c["verdict"]) in ("good", "bad"))}
        | {"mood": mood(c["verdict"])}
        for c in comparisons
    ]
    references = ", ".join(dict.fromkeys(c["reference"] for c in comparisons))
    view = View("", Axis(f"difference in {metric} to {references} (right is better)"), Axis(""), points)
    note = (
        f"Points are means over paired seeds and items, bars their {percent(comparisons[0]['confidence'])} intervals."
    )
    if any(c["spread"]["seeds"] == 1 for c in comparisons):
        note += " With one seed they are for other test items only."
    if margin:
        share = percent(2 * comparisons[0]["confidence"] - 1)
        note += f" Shaded: margin of equivalence, which goes by {share} intervals."
    band = (-margin, margin) if margin else None
    return Chart(f"Differences in {metric}", "intervals", [view], note, band, zero=True)


def _details(results: Results) -> list[Block]:
    """Scores, tuning, cost and runs of one study."""
    methods = results["methods"]
    blocks: list[Block] = [
        _scores_chart(methods, results.get("untrained", [])),
        score_table(results, f"{SCORES} share about"),
        _tuning(methods, (results["study"].get("search") or {}).get("metric")),
        cost_table(results),
        *_trade_offs(results.get("pareto", []), {m["metric"]: m["better"] for m in methods}, _incomparable(methods)),
        _runs(methods),
    ]
    return [b for b in blocks if not isinstance(b, Table) or b.rows]


def _scores_chart(methods: list[MethodRow], untrained: list[UntrainedRow]) -> Chart:
    """One row a method: its mean and every seed, one picture a task."""
    views = []
    for where, here in grouped((m for m in methods if m["score"] is not None), scenario).items():
        points: list[Row] = [{"label": "(untrained)", "x": u["score"]} for u in untrained if scenario(u) == where]
        points += [
            {"label": m["method"], "x": m["score"]}
            | {"dots": [s["score"] for s in m["seeds"] if s.get("score") is not None]}
            | {"note": f"{len(m['seeds'])} seeds" + (f", {m['diverged']} diverged" if m["diverged"] else "")}
            for m in here
        ]
        views.append(View(where, Axis(f"{here[0]['metric']} ({here[0]['better']} is better)"), Axis(""), points))
    return Chart("Scores", "intervals", views, "Large marks are means, small ones single seeds.")


def score_table(results: Results, keys: str) -> Table:
    """One row a method, the untrained model first. keys: of the columns."""
    rows = [{**u, "scenario": scenario(u), "method": "(untrained)"} for u in results.get("untrained", [])]
    for m in results["methods"]:
        trainable, base = m["trainable_parameters"], m.get("base_parameters")
        rows.append(
            m
            | {"scenario": scenario(m), "settings": settings_in_words(m["settings"])}
            | {"share": trainable / base if trainable is not None and base else None}
            | {"seeds": sum(s["status"] != "missing" for s in m["seeds"])}
            | {"diverged": "all trials" if m.get("diverged_in_search") else m.get("diverged") or None}
            | {"mismatch": ", ".join(m.get("notes", [])) if m.get("mismatch") is None else m["mismatch"]}
        )
    return Table("Scores table", columns(keys, settings="chosen settings"), rows)


def cost_table(results: Results) -> Table:
    """Return the cost of training and of use of every method."""
    methods, warning = results["methods"], _incomparable(results["methods"])
    rows = [
        {"scenario": scenario(m), "method": m["method"], "at_a_time": at_a_time(m), **m["cost"]}
        for m in methods
        if m.get("cost")
    ]
    note = f"Medians over the seeds. {warning}".rstrip()
    return Table("Cost", columns(COST + " at_a_time" * bool(warning)), rows, note)


def _incomparable(methods: list[MethodRow]) -> str:
    several = len(numbers_at_a_time(methods)) > 1
    return "Times and speeds are not comparable: not all runs shared the machine alike." if several else ""


def _tuning(methods: list[MethodRow], metric: str | None) -> Chart:
    """The score of each trial over the first setting that was searched: how much a method depends on it.

    metric: by what trials are compared; None for the task's own.
    """
    views = []
    for where, here in grouped((m for m in methods if m["trials"]), scenario).items():
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
    return Chart("Tuning", "lines", views, note)


def _trade_offs(fronts: list[ParetoRow], better: dict[str, str], warning: str) -> list[Block]:
    """Quality against each cost, a chart a task."""
    note = f"Joined by a line: methods that no other beats in both quality and cost. {warning}".rstrip()
    blocks: list[Block] = []
    for where, here in grouped(fronts, scenario).items():
        views = []
        for f in here:
            points = [
                {"series": p["method"], "x": p["cost"], "y": p["quality"], "label": p["method"], "front": p["front"]}
                | {"note": "no other is better in both" if p["front"] else ""}
                for p in f["points"]
            ]
            label, form = f["label"].replace(" [bytes]", ""), "B" if "bytes" in f["label"] else "g"
            y = Axis(f"{f['metric']} ({better.get(f['metric'], 'more')} is better)")
            views.append(View(label, Axis(label, form=form), y, points))
        blocks.append(Chart(f"Quality against cost on {where}", "dots", views, note))
    return blocks


def _runs(methods: list[MethodRow]) -> Table:
    """Every run that the figures come from, by the name of its folder."""
    rows = [
        {**run, "run": run["key"], "scenario": scenario(m), "method": m["method"], "kind": kind}
        | {"settings": settings_in_words(settings)}
        for m in methods
        for kind, run, settings in (
            *(("search", t, t["settings"]) for t in m["trials"]),
            *(("final", s, m["settings"]) for s in m["seeds"]),
        )
    ]
    note = "A run's recipe, record and scores lie in the study's folder of runs under this name."
    named = columns("run scenario method kind seed settings status score seconds")
    return Table("Runs", named, rows, note, folded=True)


def progress_sections(file: Path, state: dict[str, Any], name: str) -> list[Section]:
    """A study that is under way: how far it is, what is going on, what came out so far."""
    study, runs = state["study"], state["runs"]
    counts = Counter(run["status"] for run in runs)
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
    named = columns("status kind method scenario seed settings metric score seconds error")
    blocks: list[Block] = [Text(study.get("question") or name, "lead"), Text(ended)]
    blocks += [Table("Runs so far", named, rows)] if rows else []
    return [Section(f"Under way: {name}", blocks, "Under way", name, Source(short_path(file)))]
