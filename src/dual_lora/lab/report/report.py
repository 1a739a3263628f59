"""The report command's work: gather, build, write; and again when a source changes.

from dual_lora.lab.report.report import report
report(["results", "benchmarks/ledger.jsonl"], "report.html")
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, described
from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.report.blocks import Chart, Page, Section, Table, slug, unused
from dual_lora.lab.report.charts import drawings
from dual_lora.lab.report.columns import columns
from dual_lora.lab.report.exports import export
from dual_lora.lab.report.gather import Material, find, gather, short_path
from dual_lora.lab.report.insights import analysis_name, analysis_sections
from dual_lora.lab.report.ledger import ledger_sections
from dual_lora.lab.report.overall import overall_sections
from dual_lora.lab.report.overview import Studies, overview_sections
from dual_lora.lab.report.page import SIGN, render
from dual_lora.lab.report.read_run import METRICS, RECORD
from dual_lora.lab.report.runs import run_name, run_sections
from dual_lora.lab.report.studies import progress_sections, study_name, study_sections
from dual_lora.verify.time_limit import Late, ended_after

LIVE_SECONDS = 5
SECONDS = 60.0  # for one source, where it can be ended
MOST_BLOCKS = 2000  # tables and charts of one source
ORDER = ("Overview", "Verdicts", "Under way", "Runs", "Figures", "Analyses", "Benchmarks")
SOURCE = "file command commit device finished versions"


@dataclass(frozen=True)
class Report:
    """The files of a report: the page, its size in bytes, what it is made of, exported tables, what could not be
    read."""

    file: str
    bytes: int
    made_of: str
    studies: int
    analyses: int
    ledgers: int
    runs: int
    exported: list[str]
    problems: list[str]


def report(
    sources: list[str | Path],
    out: str | Path = "report.html",
    title: str = "Dual LoRA: report",
    tables: str | Path | None = None,
    live: int = 0,
) -> Report:
    """Write one self-contained HTML page from runs, studies, analyses and ledgers.

    sources: files, or folders that are searched for them. tables: folder for every table as CSV, Markdown and LaTeX.
    live: seconds after which the page loads itself anew. Raises UserError for paths that are not there, if nothing that
    can be shown lies under them, or if `out` is a file that is no report; a source that cannot be read is named on the
    page.
    """
    material = gather(sources)
    if not material and not live:
        expected = (
            "a run (`dual-lora train`), results.json of a study (`dual-lora compare`), analysis.json (`dual-lora "
            "analyze`) or ledger.jsonl"
        )
        raise UserError(
            f"Nothing to report lies under {', '.join(map(str, sources))}: expected {expected} (benchmarks). "
            f"{' '.join(material.problems)}".strip()
        )
    file = _free_output(Path(out))
    page = build_page(material, title)
    text = render(page, live).encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
    make_folder(file.parent)
    write_output(file, text)
    exported = [str(path) for path in export(page, Path(tables))] if tables is not None else []
    counts = len(material.studies), len(material.analyses), len(material.ledgers), len(material.runs)
    return Report(str(file), len(text.encode()), material.counted, *counts, exported, material.problems)


def _free_output(file: Path) -> Path:
    """The output, unless something lies there that no report of ours would replace."""
    if file.is_dir():
        raise UserError(f"The output {file} is a folder: give a file, such as {file / 'report.html'}.")
    if file.exists() and not (file.is_file() and (file.stat().st_size == 0 or SIGN.encode() in file.read_bytes())):
        raise UserError(f"The output {file} exists and is no report: give another --out, or remove that file first.")
    return file


def build_page(material: Material, title: str) -> Page:
    """The page's parts: questions and answers, then verdicts, then what is under way, figures, analyses, benchmarks;
    and where they come from. One file of another shape is named and must not cost the rest, whatever it raises."""
    sections: list[Section] = []
    whole: Studies = []
    alone = len(material.studies) == 1
    kinds: list[tuple[Any, Any, Any]] = [
        (material.studies, study_name, partial(study_sections, folded=not alone)),
        (material.running, study_name, progress_sections),
        (material.runs, run_name, run_sections),
        (material.analyses, analysis_name, analysis_sections),
        (material.ledgers, lambda *_: "Benchmarks", ledger_sections),
    ]
    for found, name_of, sections_of in kinds:
        names: set[str] = set()
        for file, content in found:
            try:
                with ended_after(SECONDS):
                    name = unused(name_of(file, content), names)
                    made = sections_of(file, content, name)
                    if found is material.studies:  # tried here; made below, of all of them
                        overview_sections([(name, content), (f"{name}_", content)])
                        overall_sections([(name, content)])
                    drawings([block for section in made for block in section.blocks if isinstance(block, Chart)])
                if (count := sum(len(section.blocks) for section in made)) > MOST_BLOCKS:
                    raise ValueError(f"it makes {count:,} tables and charts, at most {MOST_BLOCKS:,} are shown")
            except Late:
                material.problems.append(f"{short_path(file)} could not be shown within {SECONDS:g} seconds.")
            except Exception as error:
                material.problems.append(f"{short_path(file)} could not be shown: {described(error)[:200]}.")
            else:
                names.add(slug(name))
                sections += made
                whole += [(name, content)] if found is material.studies else []
    of_one = next((section.source for section in sections if section.group == "Verdicts"), None) if alone else None
    try:
        with ended_after(SECONDS):
            sections += [*(overview_sections(whole) if len(whole) > 1 else []), *overall_sections(whole, of_one)]
    except (Late, Exception) as error:
        why = f"within {SECONDS:g} seconds" if isinstance(error, Late) else f"({described(error)[:200]})"
        material.problems.append(f"What all studies say together could not be shown {why}.")
    sections.sort(key=lambda section: ORDER.index(section.group))
    made_at = time.strftime("Made on %Y-%m-%d at %H:%M:%S")
    sources = dict.fromkeys(section.source for section in sections if section.source)
    table = Table("Where the figures come from", columns(SOURCE), [vars(source) for source in sources])
    sections.append(Section("Provenance", [table], "Provenance"))
    return Page(title, sections, material.problems, f"{made_at}{' from ' * bool(material)}{material.counted}.")


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
            now = _file_stamps(sources)
            if now != seen:
                say(report(sources, out, title, tables, live=LIVE_SECONDS))
                seen = now
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    report(sources, out, title, tables)  # the last page does not reload


def _file_stamps(sources: list[str | Path]) -> list[tuple[Path, int, int]]:
    """Files with times and sizes; of a study under way also the folder of its runs, which begin and end there."""
    files = find(sources)
    files += [file.parent / "runs" for file in files if file.name == "study.json"]
    files += [file.parent / METRICS for file in files if file.name == RECORD]
    files += [each for file in files if file.name == RECORD for each in file.parent.glob("evaluation/*/result.json")]
    return [(each, (state := each.stat()).st_mtime_ns, state.st_size) for each in files if each.exists()]
