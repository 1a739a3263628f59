"""dual-lora evaluate"""

import math
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import create_model
from rich.console import Group
from rich.text import Text

from dual_lora.lab.commands.card import duration, figures_table, finish
from dual_lora.lab.commands.parameters import AutoDtype, Base, Device, Json, Source, flag_values, flags
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.location import check_source
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection, Recipe

_PARTS: dict[str, Any] = {"data": (flags(DataSection) | None, None), "evaluate": (flags(EvaluateSection) | None, None)}
EvaluateFlags: Any = create_model("EvaluateFlags", **_PARTS)


def evaluate(
    source: Source,
    *,
    recipe: Annotated[str | None, Parameter(help="Recipe that names the data; left out: the run's own.")] = None,
    base: Base = None,
    dtype: AutoDtype = None,
    device: Device = None,
    out: Annotated[Path | None, Parameter(help="Folder for the results of every item. [default: in the run]")] = None,
    json: Json = False,
    given: Annotated[
        EvaluateFlags | None,
        Parameter(name="*", negative_bool="no-", show_default=False, consume_multiple=True),
    ] = None,
) -> None:
    """Evaluate a run, an adapter or a model, and compare an adapter with its base.

    Example: `dual-lora evaluate runs/boolq-smollm2`

    An adapter alone: `dual-lora evaluate my-adapter --recipe boolq-smollm2`
    """
    # A wrong value, recipe or source shows before a library is imported.
    overrides = flag_values(given)
    build_recipe({"model": {"path": source}, **overrides}, "flags")
    ground = read_recipe(recipe) if recipe else None
    check_source(source)
    with stage(f"loading {source}"):
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.model.opened import open_tuned
        from dual_lora.lab.run.evaluate import changed_settings, write_result
        from dual_lora.lab.run.evaluate import evaluate as run_evaluation

        use_device(device)
        tuned = open_tuned(source, base, dtype, unsaid="auto")
    ground = ground or tuned.recipe
    data, spec = (ground.data, ground.evaluate) if ground else (DataSection(), EvaluateSection())
    values = Recipe.merged({"data": data.model_dump(), "evaluate": spec.model_dump()}, overrides)
    data, spec = DataSection.model_validate(values["data"]), EvaluateSection.model_validate(values["evaluate"])
    _check_split(overrides.get("data", {}), spec.split)
    result = run_evaluation(tuned, data, spec)
    if recipe and ground and ground.origin and not changed_settings(ground, data, spec):
        result.reported = ground.origin.reported
    if out is not None:
        write_result(result, out)
    columns: dict[str, dict[str, Any]] = {**result.metrics, **result.reported}
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    rows = [[name, *(_figure_text(figures.get(name, "")) for figures in columns.values())] for name in names]
    rows.append(["time", *(duration(s) for s in result.seconds.values())])
    cut = f", {result.cut} longer than data.max_length" if result.cut else ""
    title = f"{result.source} · {result.split}, {result.examples:,} examples{cut}"
    table = figures_table("", ["", *columns], rows)
    finish(result.summary(), Group(Text(f" {title}", style="italic"), table), json)  # a title may be the wider one


def _check_split(given: dict[str, Any], split: str) -> None:
    """Raise UserError for records that are given and would not be measured."""
    named = {"test": given.get("test") or given.get("tests"), "validation": given.get("validation")}
    if other := [name for name, source in named.items() if source and not named.get(split)]:
        raise UserError(
            f"--data.{other[0]} names {other[0]} records, and evaluate.split is {split}: add --evaluate.split "
            f"{other[0]}, so that they are measured."
        )


def _figure_text(figure: float | str) -> str:
    """Figures that others report may be words ("+0.6 over DoRA")."""
    if isinstance(figure, str):
        return figure
    return f"{figure:.4f}" if math.isfinite(figure) else "–"  # the correlation of values that are all the same
