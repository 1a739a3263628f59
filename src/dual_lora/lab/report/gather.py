"""Find and read what a report is made of. A file is known by what it holds, not by its name."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.blocks import Source

ANALYSIS = "dual-lora analysis"
NAMES = ("results.json", "analysis.json", "ledger.jsonl", "state.sqlite")
SKIPPED = {"checkpoints", "adapter", "model", "node_modules", ".git", ".venv"}


@dataclass
class Material:
    """What was found, each with its file. problems: files that could not be read, in words."""

    studies: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    analyses: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    ledgers: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)
    running: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def counted(self) -> str:
        """How much there is of each, in words; "" if nothing."""
        kinds = (
            (self.studies, "study", "studies"),
            (self.running, "study under way", "studies under way"),
            (self.analyses, "analysis", "analyses"),
            (self.ledgers, "ledger", "ledgers"),
        )
        return ", ".join(f"{len(found)} {one if len(found) == 1 else many}" for found, one, many in kinds if found)

    def __bool__(self) -> bool:
        return bool(self.studies or self.analyses or self.ledgers or self.running)


def find(paths: list[str | Path]) -> list[Path]:
    """The files that a report may be made of: those named, and those inside the folders named.

    Raises UserError for a path that is not there.
    """
    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            for file in sorted(_walk(path)):
                files[file] = None
        elif path.exists():
            files[path] = None
        else:
            raise UserError(f"There is no {given}: give study folders, analysis files, a ledger, or a folder of them.")
    return list(files)


def _walk(folder: Path) -> list[Path]:
    found = []
    for item in folder.iterdir():
        if item.is_dir() and item.name not in SKIPPED and not item.is_symlink():
            found += _walk(item)
        elif item.name in NAMES or (item.suffix == ".json" and item.parent.name in ("results", "analysis")):
            found.append(item)
    return found


def gather(paths: list[str | Path]) -> Material:
    """Read everything under the paths; what cannot be read is said in `problems`, and the rest is shown."""
    material = Material()
    for file in find(paths):
        try:
            if file.suffix == ".sqlite":
                _add_state(material, file)
            elif file.suffix == ".jsonl":
                _add_ledger(material, file)
            else:
                _add_json(material, file, file in map(Path, paths))
        except (OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
            material.problems.append(f"{file} could not be read: {' '.join(str(error).split())[:200]}.")
    return material


def _add_ledger(material: Material, file: Path) -> None:
    if rows := read_lines(file):
        material.ledgers.append((file, rows))
    else:
        material.problems.append(f"The ledger {file} holds no rows yet.")


def _add_json(material: Material, file: Path, named: bool) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(value, dict) and value.get("format") == ANALYSIS:
        if value["version"] > 1:
            raise ValueError(f"it is of version {value['version']}, made by a newer program; this one reads version 1")
        material.analyses.append((file, value))
    elif isinstance(value, dict) and "study" in value and "comparisons" in value:
        material.studies.append((file, value))
    elif named:
        material.problems.append(f"{file} is neither a study's results nor an analysis.")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that is still being written is left out."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} is no JSON ({error.msg})") from None
    return [row for row in rows if isinstance(row, dict)]


def _add_state(material: Material, file: Path) -> None:
    """A study that is not finished: what its state file says, read without disturbing its writer."""
    db = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=2)
    try:
        study = db.execute("SELECT value FROM meta WHERE name = 'study'").fetchone()
        rows = db.execute("SELECT status, job, started, finished, outcome, error FROM runs ORDER BY rowid").fetchall()
    finally:
        db.close()
    runs = [
        {
            "status": status,
            "job": json.loads(job),
            "seconds": finished - started if finished and started else None,
            "outcome": json.loads(outcome) if outcome else None,
            "error": error,
        }
        for status, job, started, finished, outcome, error in rows
    ]
    if (
        any(run["status"] in ("planned", "running", "failed") for run in runs)
        or not (file.parent / "results.json").exists()
    ):
        material.running.append((file, {"study": json.loads(study[0]) if study else {}, "runs": runs}))


def source_of(file: Path, made: dict[str, Any]) -> Source:
    """Where figures come from: `made` is a study's "provenance" or an analysis's "made"."""
    return Source(
        short_path(file),
        made.get("command"),
        made.get("commit"),
        made.get("device"),
        made.get("finished"),
        made.get("versions", {}),
    )


def short_path(file: Path) -> str:
    """The path from the working folder, or as it was given."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
