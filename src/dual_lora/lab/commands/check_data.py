"""dual-lora check-data"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import create_model

from dual_lora.lab.commands.card import facts_card, finish
from dual_lora.lab.commands.parameters import Json, flag_values, flags
from dual_lora.lab.data.guess import HEADS, RECIPE_OPTIONS, field_options, guess
from dual_lora.lab.data.records import column_name, joined, read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.read import build_recipe, read_recipe, shipped_recipes
from dual_lora.lab.recipe.schema import FIELDS, DataSection, Recipe

if TYPE_CHECKING:
    from dual_lora.lab.data.check import Checked

_PARTS: dict[str, Any] = {"data": (flags(DataSection) | None, None)}
CheckFlags: Any = create_model("CheckFlags", **_PARTS)
LISTED = 12  # classes that are shown


def check_data(
    file: Annotated[str, Parameter(help="Records (.csv, .jsonl, …), or a recipe, by file or shipped name.")],
    *,
    test: Annotated[str | None, Parameter(help="Test records, to find records that both sets contain.")] = None,
    base: Annotated[
        str | None, Parameter(help="Model whose tokenizer counts the tokens. [default: the recipe's]")
    ] = None,
    head: Annotated[
        Literal["causal", "classification", "regression"] | None,
        Parameter(help="Kind of model to train. [default: the recipe's, else by the columns]"),
    ] = None,
    json: Json = False,
    given: Annotated[
        CheckFlags | None, Parameter(name="*", negative_bool="no-", show_default=False, consume_multiple=True)
    ] = None,
) -> None:
    """Check records: rows, columns, labels, lengths, duplicates, empty cells, overlap with the test set.

    Exit status 1 if a record cannot be trained on.

    Example: `dual-lora check-data my.csv --test my-test.csv --base ./my-model`

    A recipe's data: `dual-lora check-data sst2-minilm`
    """
    overrides = flag_values(given)
    if test is not None:
        overrides = Recipe.merged({"data": {"test": test}}, overrides)
    data, task, model, guessed = _data_to_check(file, overrides, head)
    tokenizer = None
    if model := base or model:
        with stage(f"loading the tokenizer of {model}"):
            from dual_lora.lab.model.load import load_tokenizer, quiet

            with quiet():
                tokenizer = load_tokenizer(model)
    from dual_lora.lab.data.check import check

    with stage(f"reading {file}"):
        sets = check(data, task, tokenizer)
    good = not any(each.errors for each in sets)
    result = {"good": good, "head": task, "fields": data.fields, "sets": [each.plain() for each in sets]}
    finish(result, _cards(sets, data, task, tokenizer is not None, guessed), json)
    if not good:
        raise SystemExit(1)


def _data_to_check(file: str, overrides: dict[str, Any], head: Any) -> tuple[DataSection, str, str | None, bool]:
    """The data, the head and the model of a recipe, or of a file of records by its columns; whether it is guessed."""
    is_recipe = file.endswith((".yaml", ".yml")) or (Path(file) / "recipe.yaml").is_file()
    if is_recipe or (file in shipped_recipes() and not Path(file).is_file()):
        recipe = read_recipe(file, overrides | ({"model": {"head": head}} if head else {}))
        if recipe.data.train is None:
            raise UserError(f"{file} names no training records (data.train): give --data.train FILE.")
        return recipe.data, recipe.model.head, recipe.model.path, False
    plain = {"model": {"path": "-"}, "data": {"train": file}}
    data = build_recipe(Recipe.merged(plain, overrides), "flags").data
    records = read_records(joined(file)[0], data.columns)
    if data.format == "auto" and not data.fields:
        found = guess(records, options=RECIPE_OPTIONS)
        data = data.model_copy(update={"format": found.format, "fields": found.fields})
        return data, head or found.head, None, bool(found.fields)
    form = data.format if data.format != "auto" else "text" if "label" in {*data.fields, *records[0].values} else ""
    return data, head or ("classification" if form == "text" else "causal"), None, False


def _cards(sets: list[Checked], data: DataSection, head: str, in_tokens: bool, guessed: bool) -> Any:
    from rich.console import Group

    cards = []
    for each in sets:
        unit = "tokens" if in_tokens else "characters (--base MODEL counts tokens)"
        facts = {
            "records": f"{each.records:,} of {each.source}, {len(each.examples):,} of them can be used",
        }
        if each.columns:
            facts["columns"] = ", ".join(meanings(each.columns, data))
        if each.format:
            facts["format"] = f"{each.format}, to train a {HEADS[head]}"
        if guessed:
            facts["options"] = f"{field_options(data.fields)}, for train and predict"
        if each.labels:
            shown = [f"{label}: {count:,}" for label, count in [*each.labels.items()][:LISTED]]
            facts["labels"] = " · ".join(shown) + (f" · {len(each.labels) - LISTED} more" * (len(each.labels) > LISTED))
        if each.lengths:
            facts["lengths"] = " · ".join(f"{name} {n:,}" for name, n in each.lengths.items()) + f" {unit}"
        if each.rows is not None:
            facts["rows"] = f"{each.rows:,} of at most {data.max_length:,} tokens, into which the text is cut"
        if each.empty:
            facts["empty cells"] = " · ".join(f"{column_name(name)}: {count:,}" for name, count in each.empty.items())
        if each.warnings:
            facts["warnings"] = "\n".join(each.warnings)
        facts["errors"] = "\n".join(each.errors) or "none"
        card = facts_card(each.name, facts)
        card.border_style = "red" if each.errors else "yellow" if each.warnings else "green"
        cards.append(card)
    return Group(*cards)


def meanings(columns: list[str], data: DataSection) -> Iterator[str]:
    """Each column with what it is taken for."""
    ours = {theirs: ours for ours, theirs in data.fields.items()}
    for name in columns:
        if name in ours:
            yield f"{name} is the {ours[name]}"
        else:
            yield name if name in (*FIELDS, data.group) else f"{column_name(name)} is not used"
