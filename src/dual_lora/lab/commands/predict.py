"""dual-lora predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import create_model

from dual_lora.lab.commands.card import duration, facts_card, finish
from dual_lora.lab.commands.parameters import AutoDtype, Base, Device, Json, Source, flag_values, flags
from dual_lora.lab.data.questions import is_blank, read_questions
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import held
from dual_lora.lab.model.location import check_answers, check_source, classes_of
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection, Recipe
from dual_lora.lab.run.results_file import check_cells, check_columns, check_out
from dual_lora.lab.run.resume import recipe_of_run

_ASKED = ("format", "fields", "columns", "template", "choices", "max_length")
_HOW = ("batch_size", "max_new_tokens", "beams", "length_penalty", "no_repeat_ngram", "per_token")
_PARTS: dict[str, Any] = {
    "data": (flags(DataSection, _ASKED) | None, None),
    "evaluate": (flags(EvaluateSection, _HOW) | None, None),
}
PredictFlags: Any = create_model("PredictFlags", **_PARTS)


def predict(
    source: Source,
    file: Annotated[
        str,
        Parameter(help="Records: a .csv, .jsonl, .json, .tsv or .parquet file, or a .txt file with one record a line."),
    ],
    *,
    out: Annotated[
        Path | None, Parameter(help="File of the results, .jsonl or .csv. [default: FILE's name with .predicted in it]")
    ] = None,
    limit: Annotated[int | None, Parameter(help="Predict only the first N records.")] = None,
    without_adapter: Annotated[bool, Parameter(help="Predict with the untrained base.")] = False,
    base: Base = None,
    dtype: AutoDtype = None,
    device: Device = None,
    overwrite: Annotated[bool, Parameter(help="Start again and replace the results file.")] = False,
    json: Json = False,
    given: Annotated[
        PredictFlags | None,
        Parameter(name="*", negative_bool="no-", show_default=False, consume_multiple=True),
    ] = None,
) -> None:
    """Label or answer every record of a file: classes with probabilities, values, or texts.

    Example: `dual-lora predict runs/sst2-minilm reviews.csv --out labelled.csv`

    Given answers: `dual-lora predict runs/mine my.jsonl --data.choices yes no`

    After an interruption the same command goes on where it stopped.
    """
    overrides = flag_values(given)
    recipe, classes = _recipe_and_classes(source)
    plain = {"data": recipe.data.model_dump(), "evaluate": recipe.evaluate.model_dump()} if recipe else {}
    settings = build_recipe({"model": {"path": source}, **Recipe.merged(plain, overrides)}, "flags")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, expected at least 1 record.")
    head = recipe.model.head if recipe else "classification" if classes else "causal"
    records, examples = read_questions(file, settings.data, head)
    records, examples = records[:limit], examples[:limit]
    target = out or _default_output(file)
    check_out(target, overwrite)
    check_columns(records, ("predicted", "probability", "probabilities"))
    check_cells(target, records)
    with stage(f"{source}: {len(records):,} records of {file}, into {target}"):
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.model.opened import open_tuned
        from dual_lora.lab.run.predict import predict as run_prediction
    with stage(f"loading {source}"):
        use_device(device)
        tuned = open_tuned(source, base, dtype, unsaid="auto", classes=classes)
    with held(target):  # two would mix their results in the file of the unfinished ones
        result = run_prediction(
            tuned, file, records, examples, target, settings.data, settings.evaluate,
            variant="base" if without_adapter else None, overwrite=overwrite,
        )  # fmt: skip
    facts = {"records": f"{result.examples:,} in {duration(result.seconds)}"}
    if result.resumed_from:
        facts["records"] += f", {result.resumed_from:,} of them before the interruption"
    if result.cut:
        facts["cut"] = f"{result.cut:,} texts longer than {settings.data.max_length} tokens"
    if result.empty:
        first = next(example.where for example in examples if is_blank(example))
        facts["empty"] = f"{result.empty:,} without a text, whose results mean nothing; the first: {first}"
    if result.counts:
        facts["labels"] = " · ".join(f"{name}: {count:,}" for name, count in result.counts.items())
    if result.answered:
        share = result.agree / result.answered
        facts["agree"] = f"{result.agree:,} of {result.answered:,} with the record's own answer ({share:.1%})"
    facts["results"] = result.file
    finish(result.summary(), facts_card(f"predicted by {result.source}", facts), json)


def _recipe_and_classes(source: str) -> tuple[Recipe | None, list[str]]:
    """A run's or an adapter's own recipe, or the class names of a plain classifier, read before a library is imported.
    Raises UserError for an unfinished run, and for a name that nothing has."""
    check_source(source)
    if RunFolder(Path(source)).is_run:
        return recipe_of_run(source), []
    from dual_lora.lab.model.note import read_note

    classes = classes_of(source)
    if not classes:
        check_answers(source)
    recipe = read_note(Path(source))[0]
    return recipe, [] if recipe else classes


def _default_output(file: str) -> Path:
    path = Path(file)
    return Path(f"{path.stem}.predicted{'.csv' if path.suffix in ('.csv', '.tsv') else '.jsonl'}")
