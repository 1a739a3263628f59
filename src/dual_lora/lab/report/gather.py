"""Find and read what a report is made of. A file is known by what it holds, not by its name.

Files come from other people: one that cannot be read, is no regular file, is too large or too deep is named, not shown.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import described
from dual_lora.lab.files.write import finite
from dual_lora.lab.read import read_json, read_json_lines, unlinked
from dual_lora.lab.report.blocks import Source
from dual_lora.lab.report.read_run import RECORD, read_run
from dual_lora.lab.report.sources import check_sources
from dual_lora.lab.results import ANALYSIS, with_sizes
from dual_lora.lab.study.folder import progress

NAMES = ("results.json", "analysis.json", "ledger.jsonl", "study.json")
DEEPEST = 100  # folders in folders; Python 3.11 goes down some 900
SKIPPED, IN_A_RUN = {"node_modules", ".git", ".venv"}, {"checkpoints", "adapter", "model"}


@dataclass
class Material:
    """The material of a report, each with its file. problems: files that could not be read, in words."""

    studies: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    running: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    analyses: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    ledgers: list[tuple[Path, list[dict[str, Any]]]] = field(default_factory=list)
    runs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def counted(self) -> str:
        """Say how much there is of each; "" if nothing."""
        kinds = (
            (self.studies, "study", "studies"),
            (self.running, "study under way", "studies under way"),
            (self.runs, "run", "runs"),
            (self.analyses, "analysis", "analyses"),
            (self.ledgers, "ledger", "ledgers"),
        )
        return ", ".join(f"{len(found)} {one if len(found) == 1 else many}" for found, one, many in kinds if found)

    def __bool__(self) -> bool:
        return bool(self.studies or self.analyses or self.ledgers or self.running or self.runs)


def find(paths: list[str | Path], problems: list[str] | None = None) -> list[Path]:
    """The files that a report may be made of: those named, and those inside the folders named, each once.

    problems: takes the folders that cannot be read. Raises UserError for a path that is not there.
    """
    files: dict[str, Path] = {}  # by where they really lie: one that is named twice is no second study
    check_sources(paths)
    for given in paths:
        inside = _inside(Path(given), [] if problems is None else problems) if Path(given).is_dir() else [Path(given)]
        runs = _runs_in(Path(given), [] if problems is None else problems)
        for file in sorted([*runs, *inside], key=lambda file: (file.is_symlink(), file)):
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _runs_in(folder: Path, problems: list[str]) -> Iterator[Path]:
    """The record of a run that is named, and of each that lies in a named folder itself; a study's are not shown one by
    one, and what a link leads to is shown if it is named."""
    if not folder.is_dir() or (folder / "study.json").exists() or (folder.parent / "study.json").exists():
        return
    there: list[Path] = []
    with suppress(OSError):  # which `_inside` says, here as below
        there = [folder, *folder.iterdir()]
    for each in there:
        with suppress(OSError):
            if not ((each / "recipe.yaml").is_file() and (each / RECORD).is_file()):
                continue
            if each.is_symlink() and each != folder:
                problems.append(f"{short_path(each)} is a link, which is not followed out of a folder: name it itself.")
            else:
                yield each / RECORD


def _inside(folder: Path, problems: list[str]) -> Iterator[Path]:
    def closed(error: OSError) -> None:
        problems.append(f"The folder {short_path(Path(error.filename))} could not be read: {error.strerror}.")

    for place, folders, names in os.walk(folder, onerror=closed):
        skipped = SKIPPED | IN_A_RUN if "recipe.yaml" in names else SKIPPED
        folders[:] = [name for name in folders if name not in skipped]
        if folders and len(Path(place).parts) - len(folder.parts) >= DEEPEST:
            folders.clear()
            problems.append(f"A folder in {short_path(folder)} is nested more than {DEEPEST} deep, and was not read.")
        of_results = Path(place).name in ("results", "analysis")
        yield from (Path(place, n) for n in names if n in NAMES or (of_results and n.endswith(".json")))


def gather(paths: list[str | Path]) -> Material:
    """Read everything under the paths; what cannot be read is said in `problems`, and the rest is shown."""
    material, named = Material(), {*map(Path, paths)}
    for file in find(paths, material.problems):
        try:
            if file not in named:  # what a folder brought
                unlinked(file)
            if file.name == "study.json":
                if under_way := finite(progress(file)):
                    material.running.append((file, under_way))
            elif file.name == RECORD:
                material.runs.append((file, read_run(file)))
            elif file.suffix == ".jsonl":
                _add_ledger(material, file)
            else:
                _add_json(material, file, file in named)
        except Exception as error:  # whatever a stranger's file makes its readers raise
            reason = described(error, Exception)[:200].rstrip(".")
            material.problems.append(f"{short_path(file)} could not be read: {reason}.")
    return material


def _add_ledger(material: Material, file: Path) -> None:
    if rows := finite(read_json_lines(file)):
        material.ledgers.append((file, rows))
    else:
        material.problems.append(f"The ledger {short_path(file)} holds no rows yet.")


def _add_json(material: Material, file: Path, named: bool) -> None:
    value = finite(read_json(file))
    if isinstance(value, dict) and value.get("format") == ANALYSIS:
        if value["version"] > 1:
            raise ValueError(f"it is of version {value['version']}, made by a newer program; this one reads version 1")
        material.analyses.append((file, with_sizes(value)))
    elif isinstance(value, dict) and "study" in value and "comparisons" in value:
        material.studies.append((file, value))
    elif named:
        material.problems.append(f"{short_path(file)} is neither a study's results nor an analysis.")


def source_of(file: Path, made: dict[str, Any]) -> Source:
    """Return the source of figures: `made` is a study's "provenance" or an analysis's "made"."""
    known = {key: str(made[key]) for key in ("command", "commit", "device", "finished") if made.get(key) is not None}
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    return Source(short_path(file), **known, versions=versions)


def short_path(file: Path) -> str:
    """The path from the working folder, or as it was given; bytes that are no text are replaced."""
    whole = file.parent.resolve() / file.name
    shown = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else file
    return os.fsencode(shown).decode("utf-8", "replace")
