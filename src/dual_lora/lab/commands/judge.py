"""dual-lora judge"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish
from dual_lora.lab.commands.parameters import Json


def judge(
    source: Annotated[
        Path | None,
        Parameter(
            help="A .csv or .tsv file with the columns method, seed, score and optionally item, task, "
            "model, metric; or a folder METHOD/SEED/ of lm-eval's samples_*.jsonl; or the results of PEFT's "
            "method_comparison; or a study's folder, to write it for PEFT."
        ),
    ] = None,
    /,
    *,
    reference: Annotated[
        str | None, Parameter(help="Method that the others are compared with. [default: the first]")
    ] = None,
    metric: Annotated[str | None, Parameter(help="Metric to compare, if there are several.")] = None,
    better: Annotated[
        Literal["more", "less"] | None,
        Parameter(
            help="Whether more or less of the metric is better. [default: by the source or the metric's name, else "
            "more]"
        ),
    ] = None,
    margin: Annotated[
        float | None, Parameter(help="Difference that is too small to matter, in the metric's unit.")
    ] = None,
    level: Annotated[float, Parameter(help="Probability of any false alarm.")] = 0.05,
    out: Annotated[Path | None, Parameter(help="Folder for results.json and report.html.")] = None,
    peft: Annotated[
        Path | None,
        Parameter(
            help="With SOURCE: folder for a study's runs in the format of PEFT's method_comparison. Alone: a clone of "
            "PEFT with its history, or a table of its results; writes a page on which differences that comparison can "
            "detect."
        ),
    ] = None,
    methods: Annotated[
        bool,
        Parameter(help="Print the experiments of PEFT's suite as the methods of a study, and judge nothing."),
    ] = False,
    json: Json = False,
) -> None:
    """Judge scores from elsewhere: the verdicts, intervals and notes of a study, without training anything.

    Example: `dual-lora judge scores.csv --reference lora --margin 0.01`

    The lm-evaluation-harness: `dual-lora judge evaluations --metric acc` (`lm_eval --log_samples` wrote into
    `evaluations/METHOD/seed-1`, `evaluations/METHOD/seed-2`, …)

    Results of PEFT's method comparison:

    `dual-lora judge method_comparison/MetaMathQA --metric "test accuracy"`

    A study, for it: `dual-lora judge studies/mine --peft method_comparison/mine`

    What its table can detect: `dual-lora judge --peft peft --out peft-verdicts` (by the reruns in the
    history of PEFT's repository)
    """
    from dual_lora.lab.errors import UserError
    from dual_lora.lab.report.tables import show_results

    if source is None and peft is not None:
        from dual_lora.lab.judge.history import write_page

        folder = out or Path("peft-verdicts")
        found = write_page(peft, folder)
        first = sum(place.first == 1 for place in found.places)
        text = (
            f"A rerun has a standard deviation of {100 * found.sd:.2f} points; two runs differ from "
            f"{100 * found.apart:.1f} on, any two of {len(found.places)} from {100 * found.apart_all:.1f}. {first} are "
            f"not told apart from the first. Page: {folder / 'index.html'}"
        )
        finish(dataclasses.asdict(found), text, json)
        return
    if source is None:
        raise UserError("Nothing to judge: give a table, a folder of results, or --peft with a history of PEFT's.")
    if methods:
        from dual_lora.lab import yaml_text
        from dual_lora.lab.judge.peft import study_methods

        print(yaml_text.dump({"methods": study_methods(source)}, sort_keys=False), end="")
        return
    if peft is not None:
        from dual_lora.lab.judge.peft import write_peft

        written = write_peft(source, peft)
        finish(written, f"{written['results']} results and {written['experiments']} experiments in {peft}.", json)
        return
    from dual_lora.lab.judge.judge import judge as run

    results = run(source, reference=reference, metric=metric, better=better, margin=margin, level=level, out=out)
    if out is not None:
        from dual_lora.lab.report.report import report

        report([out / "results.json"], out / "report.html", f"Verdicts: {source.name}")
    if json:
        finish(results, None, True)
    else:
        show_results(results, next_steps=f"As a page: {out / 'report.html'}" if out is not None else "")
