"""A single run on the page: what it was, its loss, its scores, which classes it takes for which, where it is wrong, and
what it cost. Read from the run's folder alone: the records that it was trained on are not opened."""

from collections import Counter
from pathlib import Path
from typing import Any

from dual_lora.lab.report.blocks import Axis, Block, Chart, Section, Source, Table, Text, View
from dual_lora.lab.report.columns import Column, Row, grouped, number
from dual_lora.lab.report.gather import short_path, source_of
from dual_lora.lab.terminal import duration, size

MOST_WRONG = 100  # wrong answers of an evaluation that are shown
MOST_CLASSES = 30  # of a confusion matrix
CUT = 400  # characters of an answer
WRONG = [Column("where", "record"), Column("expected", "expected"), Column("predicted", "predicted")]
SURE = Column("nats", "loss", ".3f", "Of the right answer, in nats: the larger, the surer of a wrong one.")


def run_name(file: Path, content: dict[str, Any]) -> str:
    """The name of the folder."""
    return file.parent.resolve().name


def run_sections(file: Path, content: dict[str, Any], name: str) -> list[Section]:
    """A section of the run, and one of each evaluation: its figures come from a file of its own."""
    record = content["record"]
    blocks: list[Block] = [Text(_summary(record), "lead")]
    blocks += [Text(f"It found: {problem}", "warning") for problem in record.get("problems") or []]
    blocks += _losses(content["metrics"])
    blocks.append(_cost(record))
    source = source_of(file, record | {"versions": record["versions"]})
    sections = [Section(f"{name}: run", blocks, "Runs", name, source)]
    for scores, result, items in content["evaluations"]:
        blocks = [*_scores(result), *_confusion(result, items), *_wrong_answers(result, items)]
        sections.append(Section(f"{name}: {scores.parent.name}", blocks, "Runs", name, Source(short_path(scores))))
    return sections


def _summary(record: dict[str, Any]) -> str:
    method, result = record["method"], record.get("result") or {}
    kind = str(method.get("peft_type") or method.get("name")).lower()
    base = method.get("base_model_name_or_path")
    state = str(record["state"])
    parts = [f"{kind} on {base}" if base else kind, state]
    if result:
        parts.append(f"{number(result['steps'])} of {number(record.get('total_steps') or result['steps'])} steps")
        parts.append(f"{number(result['examples'])} examples")
    if step := result.get("best_step"):
        parts.append(f"lowest validation loss at step {number(step)}")
    if error := record.get("error"):
        parts.append(f"because: {error}")
    return ", ".join(parts) + "."


def _losses(metrics: list[Row]) -> list[Block]:
    """Training and validation loss over the steps; the learning rate in a view of its own."""
    named = {"training": "loss", "validation": "eval_loss"}
    lines = [
        {"series": series, "x": line["step"], "y": line[key]}
        for series, key in named.items()
        for line in metrics
        if isinstance(line.get(key), int | float)
    ]
    if not lines:
        return []
    rates = [
        {"series": "learning rate", "x": line["step"], "y": line["learning_rate"]}
        for line in metrics
        if isinstance(line.get("learning_rate"), int | float)
    ]
    views = [View("loss", Axis("step"), Axis("loss"), lines)]
    views += [View("learning rate", Axis("step"), Axis("learning rate"), rates)] if rates else []
    return [
        Chart(
            "Loss", "lines", views, "Each point of the training loss is the mean over the steps since the point before."
        )
    ]


def _records_text(result: Row) -> str:
    other = " with other settings than the run's" if result.get("other") else ""
    return f"{number(result['examples'])} {result['split']} records{other}"


def _scores(result: Row) -> list[Block]:
    variants = list(result["metrics"])
    names = list(dict.fromkeys(name for figures in result["metrics"].values() for name in figures))
    rows = [{"metric": name} | {v: result["metrics"][v].get(name) for v in variants} for name in names]
    columns = [Column("metric", "metric"), *(Column(variant, variant, ".4f") for variant in variants)]
    return [Table(f"Scores on {_records_text(result)}", columns, rows)]


def _tuned(result: Row, items: list[Row], task: str | None = None) -> list[Row]:
    """The items of the trained model, or of the only one there is."""
    variant = "tuned" if "tuned" in result["metrics"] else next(iter(result["metrics"]), "")
    return [item for item in items if item.get("variant") == variant and task in (None, item.get("task"))]


def _confusion(result: Row, items: list[Row]) -> list[Block]:
    """Show which class is taken for which, of the evaluations that noted the right one."""
    labelled = [item for item in _tuned(result, items, "classification") if "expected" in item]
    pairs = Counter((str(item["expected"]), str(item["predicted"])) for item in labelled)
    names = sorted({name for pair in pairs for name in pair})
    if not 2 <= len(names) <= MOST_CLASSES:
        return []
    counts = {name: sum(pairs[name, other] for other in names) for name in names}
    rows = [
        {"class": right} | {f"n{k}": pairs[right, predicted] for k, predicted in enumerate(names)}
        | {"found": pairs[right, right] / counts[right] if counts[right] else None}
        for right in names
    ]  # fmt: skip
    columns = [Column("class", "right class")]
    columns += [Column(f"n{k}", f"predicted {predicted}", "g") for k, predicted in enumerate(names)]
    columns.append(Column("found", "found", ".1%", "Share of a class's records that are predicted as it (recall)."))
    points = [{"label": right, "x": predicted, "y": pairs[right, predicted]} for right in names for predicted in names]
    view = View("", Axis("predicted"), Axis("records"), points)
    title = f"Confusion matrix of {_records_text(result)}"
    return [Chart(title, "heat", [view]), Table(f"{title}, in numbers", columns, rows)]


def _wrong_answers(result: Row, items: list[Row]) -> list[Block]:
    """The answers that are not the expected ones, the surest first."""
    blocks: list[Block] = []
    by_task = grouped(_tuned(result, items), lambda item: str(item.get("task")))
    for task, of_task in by_task.items():
        own = [item for item in of_task if "correct" in item]
        wrong = sorted((item for item in own if not item["correct"]), key=lambda item: -float(item.get("nats") or 0))
        if not wrong:
            continue
        rows = [{k: _short(item.get(k)) for k in ("where", "expected", "predicted")} for item in wrong[:MOST_WRONG]]
        for row, item in zip(rows, wrong, strict=False):
            row["nats"] = item.get("nats")
        shown = f"The first {MOST_WRONG} of them." if len(wrong) > MOST_WRONG else ""
        unsaid = "" if "expected" in wrong[0] else "An older evaluation noted no expected answers: measure again."
        title = f"Wrong answers of {task}: {number(len(wrong))} of {number(len(own))}"
        blocks.append(Table(title, [*WRONG, SURE], rows, " ".join(filter(None, [shown, unsaid])), folded=True))
    return blocks


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= CUT else f"{text[:CUT]}…"


def _cost(record: dict[str, Any]) -> Table:
    result = record.get("result") or record
    facts: dict[str, str] = {}
    trained, every = result.get("trainable_parameters"), result.get("all_parameters")
    if trained and every:
        facts["trained"] = f"{number(trained)} parameters ({number(trained / every, '.2%')} of the model)"
    if seconds := result.get("seconds"):
        facts["time"] = f"{duration(seconds)}, {number(result['tokens_per_second'], '.0f')} tokens/s"
    if peak := result.get("peak_memory"):
        facts["memory"] = f"{size(peak)} at the peak"
    if held := result.get("adapter_bytes"):
        facts["weights"] = size(held)
    processes = record.get("processes", 1)
    facts["device"] = f"{record.get('device')}, {processes} process{'' if processes == 1 else 'es'}"
    rows = [{"what": what, "value": value} for what, value in facts.items()]
    return Table("Cost", [Column("what", "what"), Column("value", "value")], rows)
