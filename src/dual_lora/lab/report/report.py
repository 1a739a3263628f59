"""Gather, build, write; and again when a source changes.

from dual_lora.lab.report.report import report
report(["results", "benchmarks/ledger.jsonl"], "report.html")
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.folder import write_atomically
from dual_lora.lab.report.blocks import Page, Section, Source
from dual_lora.lab.report.exports import export
from dual_lora.lab.report.gather import Material, find, gather, source_of
from dual_lora.lab.report.insights import analysis_sections, titles
from dual_lora.lab.report.ledger import ledger_sections, source_of_ledger
from dual_lora.lab.report.overview import Studies, overview_sections
from dual_lora.lab.report.page import render
from dual_lora.lab.report.studies import progress_sections, study_names, study_sections

LIVE_SECONDS = 5


@dataclass(frozen=True)
class Report:
    """What was written: the page, its size in bytes, what it is made of, exported tables, what could not be read."""

    file: str
    bytes: int
    made_of: str
    studies: int
    analyses: int
    ledgers: int
    exported: list[str]
    problems: list[str]


def report(
    sources: list[str | Path],
    out: str | Path = "report.html",
    title: str = "Dual LoRA: report",
    tables: str | Path | None = None,
    live: int = 0,
) -> Report:
    """Write one self-contained HTML page from studies, analyses and ledgers.

    sources: files, or folders that are searched for them. tables: folder for every table as CSV, Markdown and LaTeX.
    live: seconds after which the page loads itself anew. Raises UserError for paths that are not there, or if nothing
    that can be shown lies under them; a file that cannot be read is named on the page.
    """
    material = gather(sources)
    if not material and not live:
        expected = "results.json of a study (`dual-lora compare`), analysis.json (`dual-lora analyze`) or ledger.jsonl"
        raise UserError(
            f"Nothing to report lies under {', '.join(map(str, sources))}: expected {expected} (benchmarks). "
            f"{' '.join(material.problems)}".strip()
        )
    page = build_page(material, title)
    file = Path(out)
    if file.is_dir():
        raise UserError(f"The output {file} is a folder: give a file, such as {file / 'report.html'}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    text = render(page, live)
    write_atomically(file, text)
    exported = export(page, Path(tables)) if tables is not None else []
    return Report(
        str(file),
        len(text.encode()),
        material.counted,
        len(material.studies),
        len(material.analyses),
        len(material.ledgers),
        [str(path) for path in exported],
        material.problems,
    )


def build_page(material: Material, title: str) -> Page:
    """The page's parts: questions and answers, then verdicts, then what is under way, figures, analyses, benchmarks."""
    sections: list[Section] = []
    sources: list[Source] = []
    whole: Studies = []
    for (file, results), name in zip(material.studies, study_names(material.studies), strict=True):
        made_of = _shown(material, file, study_sections, results, name, len(material.studies) == 1)
        sections += made_of
        whole += [(name, results)] if made_of else []
        sources.append(source_of(file, results.get("provenance", {})))
    if len(whole) > 1:
        sections += overview_sections(whole)
    for file, state in material.running:
        sections += _shown(material, file, progress_sections, state)
        sources.append(Source(str(file)))
    for (file, analysis), name in zip(material.analyses, titles(material.analyses), strict=True):
        sections += _shown(material, file, analysis_sections, analysis, name)
        sources.append(source_of(file, analysis.get("made", {})))
    for number, (file, rows) in enumerate(material.ledgers, 1):
        name = "Benchmarks" if len(material.ledgers) == 1 else f"Benchmarks {number}"
        sections += _shown(material, file, ledger_sections, rows, name)
        sources.append(source_of_ledger(file, rows))
    order = ("Overview", "Verdicts", "Under way", "Figures", "Analyses", "Benchmarks")
    sections.sort(key=lambda section: order.index(section.group))
    made = time.strftime("Made on %Y-%m-%d at %H:%M:%S")
    return Page(title, sections, sources, material.problems, f"{made}{' from ' * bool(material)}{material.counted}.")


def _shown(material: Material, file: Path, make: Callable[..., list[Section]], *args: Any) -> list[Section]:
    """The sections, or a named problem: one file of another shape must not cost the rest of the page."""
    try:
        return make(file, *args)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        material.problems.append(f"{file} could not be shown: {type(error).__name__} {error}.")
        return []


def watch(
    sources: list[str | Path],
    out: str | Path = "report.html",
    title: str = "Dual LoRA: report",
    tables: str | Path | None = None,
    say: Callable[[Report], Any] = lambda _: None,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Write the page, and again whenever a source changes or a new one appears, until Ctrl-C.

    An open page loads itself anew every few seconds and stays where it was scrolled to. say: called after each writing.
    """
    seen: list[tuple[Path, int, int]] | None = None
    try:
        while not until():
            now = _marks(sources)
            if now != seen:
                say(report(sources, out, title, tables, live=LIVE_SECONDS))
                seen = now
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    report(sources, out, title, tables)  # the last page does not reload


def _marks(sources: list[str | Path]) -> list[tuple[Path, int, int]]:
    """Files with times and sizes. SQLite writes beside its file first."""
    marks = []
    for file in find(sources):
        for each in (file, file.with_name(file.name + "-wal")):
            if each.exists():
                state = each.stat()
                marks.append((each, state.st_mtime_ns, state.st_size))
    return marks
