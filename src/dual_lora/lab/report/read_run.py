"""A run's folder, read for a page. The records that it was trained on are not opened."""

from pathlib import Path
from typing import Any

from dual_lora.lab.files.folder import ENTRIES, check_plain
from dual_lora.lab.read import read_json_lines, read_object, unlinked
from dual_lora.lab.results import read_evaluation
from dual_lora.lab.run.record import read_metrics

RECORD, METRICS = "record.json", "metrics.jsonl"


def read_run(record: Path) -> dict[str, Any]:
    """Read a run's folder. Raises ValueError or OSError for what cannot be read, UserError for a link."""
    folder = record.parent
    check_plain(folder, ENTRIES)
    evaluations = []
    for file in sorted((folder / "evaluation").glob("*/result.json")):
        items = file.with_name("items.jsonl")
        rows = read_json_lines(unlinked(items)) if items.is_file() else []
        evaluations.append((file, read_evaluation(unlinked(file)), rows))
    metrics = folder / METRICS
    if metrics.is_file():
        unlinked(metrics)
    return {"record": read_object(record), "metrics": read_metrics(metrics), "evaluations": evaluations}
