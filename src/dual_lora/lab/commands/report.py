"""dual-lora report"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.errors import UserError

USUAL = ("studies", "results", "benchmarks", "runs")


def report(
    sources: Annotated[
        list[Path] | None,
        Parameter(help=f"Files, or folders to search. [default: those of {', '.join(USUAL)}]"),
    ] = None,
    /,
    *,
    out: Annotated[
        Path, Parameter(help="HTML file to write; it may replace an earlier report, but no other file.")
    ] = Path("report.html"),
    title: Annotated[str, Parameter(help="Heading of the page.")] = "Dual LoRA: report",
    tables: Annotated[Path | None, Parameter(help="Folder for every table as CSV, Markdown and LaTeX.")] = None,
    watch: Annotated[bool, Parameter(help="Write the page again whenever a source changes, until Ctrl-C.")] = False,
    json: Json = False,
) -> None:
    """Write one self-contained HTML page from runs, studies, analyses and the benchmark ledger.

    Runs: `dual-lora report runs/mine runs/other` (loss, scores, confusion matrix and wrong answers)

    Example: `dual-lora report results benchmarks/ledger.jsonl --out report.html`

    While a study runs: `dual-lora report studies/quick --watch` (open the page; it reloads by itself)
    """
    from dual_lora.lab.report.sources import check_sources

    given: list[str | Path] = [*sources] if sources else [Path(name) for name in USUAL if Path(name).is_dir()]
    if not given:
        raise UserError(f"Here is none of the folders {', '.join(USUAL)}: name what the report is to be made of.")
    check_sources(given)

    from dataclasses import asdict

    from dual_lora.lab.commands.card import facts_card, finish, size
    from dual_lora.lab.report.report import Report
    from dual_lora.lab.report.report import report as write_report
    from dual_lora.lab.report.report import watch as keep_writing
    from dual_lora.lab.terminal import Console

    def say(written: Report) -> None:
        Console(stderr=True).print(f"{written.file}: {size(written.bytes)}")

    if watch:
        keep_writing(given, out, title, tables, say)
        return
    result = write_report(given, out, title, tables)
    facts = {
        "page": f"{result.file} ({size(result.bytes)})",
        "made of": result.made_of,
    }
    if result.exported:
        facts["tables"] = f"{len(result.exported)} files in {tables}"
    if result.problems:
        facts["problems"] = "\n".join(result.problems)
    finish(asdict(result), facts_card(title, facts), json)
