"""dual-lora compare"""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Group

from dual_lora.lab.commands.card import finish, finish_forecast
from dual_lora.lab.commands.parameters import Device, DryRun, Json, ReportTo
from dual_lora.lab.errors import UserError
from dual_lora.lab.interrupt import resumable
from dual_lora.lab.progress import stage
from dual_lora.lab.terminal import figures

OWN = (
    "Your own study is a YAML file with tasks (recipes), methods and seeds: dual-lora compare mine.yaml. An example is "
    "in docs/how-to/studies.md, every field in docs/reference/study.md. Without such a file, for LoRA and Dual LoRA: "
    "dual-lora advise."
)


def compare(
    study: Annotated[str | None, Parameter(help="Study file, or the name of a shipped study.")] = None,
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the study. [default: studies/NAME]")] = None,
    runs: Annotated[
        Path | None,
        Parameter(help="Folder of the runs; studies that share it run identical runs only once. [default: OUT/runs]"),
    ] = None,
    executor: Annotated[
        Literal["serial", "process", "ray"],
        Parameter(help="serial: one run after another; process: parallel processes; ray: on a Ray cluster."),
    ] = "serial",
    workers: Annotated[
        int | None, Parameter(help="Parallel runs (process, ray). [default: one for each GPU, else for each core]")
    ] = None,
    keep: Annotated[
        Literal["adapters", "all", "nothing"], Parameter(help="What to keep of the final runs, besides their scores.")
    ] = "adapters",
    report_to: ReportTo = (),
    device: Device = None,
    dry_run: DryRun = False,
    on: Annotated[
        str | None,
        Parameter(
            help="With --dry-run: estimate time and memory on this GPU from its published figures, e.g. h100-80gb."
        ),
    ] = None,
    list: Annotated[bool, Parameter(help="Show the shipped studies.")] = False,
    json: Json = False,
) -> None:
    """Compare fine-tuning methods by a study: equal budgets, equal search, fresh seeds, and a verdict.

    Example: `dual-lora compare quick --dry-run`

    Then: `dual-lora compare quick --executor process`

    Your own: `dual-lora compare mine.yaml` (a file of tasks, methods and seeds: docs/how-to/studies.md)

    For another GPU: `dual-lora compare gpu-commonsense --dry-run --on h100-80gb`

    After a stop, the same command continues where it was. Finished runs are not repeated.
    """
    from dual_lora.lab.model.device import use_device
    from dual_lora.lab.study.read import read_study, shipped_studies

    use_device(device)
    if list or study is None:
        questions = {name: read_study(name).question for name in shipped_studies()}
        table = figures(
            "Shipped studies: dual-lora compare NAME", ("name", "question"), (), questions.items(), box=None
        )
        table.columns[0].style = "bold"
        finish(questions, Group(table, "\n" + OWN), json)
        return
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}, expected at least 1.")
    if on is not None and not dry_run:
        raise UserError("--on names a card for --dry-run; the study itself runs on what is here.")
    if dry_run:
        from dual_lora.lab.study.forecast import forecast

        with stage(f"planning {study}"):
            expected = forecast(study, out, runs=runs, executor=executor, workers=workers, on=on)
        finish_forecast(expected, json)
        return
    from dual_lora.lab.report.tables import show_results
    from dual_lora.lab.study.compare import compare as run
    from dual_lora.lab.study.folder import study_folder

    with resumable():
        options: dict[str, Any] = {"executor": executor, "workers": workers, "keep": keep}
        results = run(study, out, runs=runs, report_to=report_to, **options)
    if json:
        finish(results, None, True)
    else:
        folder = study_folder(results["study"]["name"], out)
        show_results(results, next_steps=f"The study is in {folder}. As a page: dual-lora report {quote(str(folder))}")
    if not results["complete"]:
        raise UserError(f"{len(results['failed'])} runs failed, so the study is not complete: {results['failed'][0]}")
