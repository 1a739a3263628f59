"""Recipes out of YAML files and plain values; what is wrong with them, in sentences; what makes two runs the same."""

import copy
import re
from pathlib import Path
from shlex import quote
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dual_lora.lab.errors import UserError, suggest, suggest_file
from dual_lora.lab.read import parse_yaml, read_yaml_text
from dual_lora.lab.recipe.families import family, member_text
from dual_lora.lab.recipe.schema import IN_WORDS, Recipe
from dual_lora.lab.recipe.section import Origin

FAMILIES = "paper"  # the folder of recipes that are written as families


RECORDS = (".csv", ".tsv", ".jsonl", ".parquet")  # names of such files end so; a recipe may be JSON
WORDS: dict[type, str] = {str: "a text", list: "a list"}
LISTING = "`dual-lora recipes` lists those that are shipped."


def read_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name, with ``overrides`` laid over it.

    A file that gives no name has that of the file: two of them would share a folder.

    Raises UserError for a missing file, broken YAML, and unknown or mistyped fields (nearest name suggested).
    """
    values, where = recipe_values(source)
    return recipe_with({"name": run_name(Path(source).stem), **values}, overrides or {}, where)


def run_name(text: str) -> str:
    """A name for a run, and so for its folder, out of a file's."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "mine"


def recipe_with(values: dict[str, Any], overrides: dict[str, Any], where: str) -> Recipe:
    """The recipe of these values with overrides laid over them, which are marked as the user's."""
    return build_recipe(_with_updated_origin(Recipe.merged(values, overrides), overrides), where)


def recipe_values(source: str | Path) -> tuple[dict[str, Any], str]:
    """Return the values in a recipe's file, and where it lies. Raises UserError as `read_recipe` does."""
    path = _recipe_file(source)
    if path.parent.name == FAMILIES and not Path(source).is_file():
        return copy.deepcopy(family(path)[str(source)]), f"{path} ({source})"
    if path.suffix in RECORDS:
        raise UserError(
            f"{path} is a file of records, expected a recipe. `dual-lora recipes init mine.yaml --data "
            f"{quote(str(path))} --base MODEL` writes one for it."
        )
    values = parse_yaml(read_yaml_text(path), str(path))
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {WORDS.get(type(values), type(values).__name__)}"
        raise UserError(f"{path} {found}, expected a mapping with model, method, data, train.")
    return values, str(path)


def recipe_text(source: str | Path) -> str:
    """The recipe as a file: its own text, or of a family's member its settings with their sources."""
    path = _recipe_file(source)
    if path.parent.name == FAMILIES and not Path(source).is_file():
        return member_text(family(path)[str(source)])
    return read_yaml_text(path)


def _recipe_file(source: str | Path) -> Path:
    """A file if there is one, else that of the shipped recipe of this name."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{source} is a folder without a recipe.yaml: name a recipe's file, or a run's folder.")
    shipped = shipped_recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    if path.suffix in {".yaml", ".yml"} or "/" in str(source):
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"There is no recipe file {source}.{suggest_file(path.name, beside) or f' {LISTING}'}")
    raise UserError(f"There is no recipe {str(source)!r}.{suggest(str(source), shipped, LISTING)}")


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that the package carries; those of a family share its file."""
    folder = Path(__file__).parent / "shipped"
    alone = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return alone | {name: path for path in sorted((folder / FAMILIES).glob("*.yaml")) for name in family(path)}


def build_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Validated recipe from plain values; every problem is named, with the nearest known field or value."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {problems(error)}") from None


def changed(recipe: Recipe, changes: dict[str, Any], where: str = "the recipe") -> Recipe:
    """The recipe with changes laid over it; what is wrong in them is a UserError."""
    try:
        return recipe.over(changes)
    except ValidationError as error:
        raise UserError(f"{where}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """Say what is wrong in a recipe, field by field, in sentences."""
    return " ".join(_problem(item) for item in error.errors())


def _with_updated_origin(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Move settings that the user has changed, in the recipe's origin, from their source to the user."""
    try:
        origin = Origin.model_validate(values.get("origin") or {})
    except ValidationError:  # the recipe's own check says what is wrong
        return values
    if not origin.settings or "origin" in overrides:
        return values
    changed = {f"{part}.{key}" for part, over in overrides.items() if isinstance(over, dict) for key in over}
    kept = {name: [s for s in given if s not in changed] for name, given in origin.settings.items()}
    more = {"yours": sorted(changed)} if changed else {}
    sources = origin.sources | ({"yours": "ours: set by you"} if changed else {})
    return {**values, "origin": {**values["origin"], "sources": sources, "settings": kept | more}}


# Fields that came after the first studies: left out of a job's identity while they have their default, so that runs
# finished before stay finished.
_LATER = {
    "model": ("revision", "quantize"),
    "data": ("tests", "learn_prompt", "test_prompts", "group"),
    "train": ("label_smoothing", "rates", "patience", "keep_best"),
    "evaluate": ("beams", "length_penalty", "no_repeat_ngram", "forgetting"),
}


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the values that make two runs the same run: the recipe's, without where they come from and what is
    declared."""
    values = recipe.model_dump(mode="json", exclude={"origin": True, "data": {"overlap"}})  # neither changes the run
    for part, names in _LATER.items():
        for name in names:
            field = type(getattr(recipe, part)).model_fields[name]
            if values[part][name] == field.get_default(call_default_factory=True):
                del values[part][name]
    if recipe.objective.name == "sft":
        del values["objective"]
    return values


def _problem(item: Any) -> str:
    field = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        parent, wrong = _part_at(item["loc"][:-1]), str(item["loc"][-1])
        everywhere = [f"{part}.{f}" for part in Recipe.model_fields for f in _names(_part_at((part,)))]
        if wrong in everywhere:
            part, _, name = wrong.partition(".")
            return f"unknown field {field!r}: it is written {part}: {{{name}: …}} here."
        known = _names(parent)
        hint = suggest(wrong, known)
        if not hint.startswith(" Did"):
            hint = suggest(wrong, everywhere) if suggest(wrong, everywhere).startswith(" Did") else hint
        return f"unknown field {field!r}.{hint}"
    key = {"model": "path", "method": "name", "data": "train"}.get(field)
    if item["type"] == "missing":
        written = f"{field}: {{{key}: …}}" if key else f"{field.rpartition('.')[2]}: …"
        return f"field {field!r} is missing: write {written}, or give --{field}{f'.{key}' if key else ''}."
    if item["type"] in ("dict_type", "model_type", "model_attributes_type"):
        if key is None or not isinstance(item["input"], str):
            return f"{field} is {item['input']!r}, expected a mapping of fields to values."
        value = item["input"]
        return f"{field} is {value!r}, expected {field}: {{{key}: {value}}}, or as a flag --{field}.{key} {value}."
    if item["type"] == "literal_error":
        return f"{field} is {item['input']!r}, expected {item['ctx']['expected']}.{_literal_hint(item)}"
    if item["type"] == "string_pattern_mismatch" and item["ctx"]["pattern"] in IN_WORDS:
        return f"{field} is {item['input']!r}, expected {IN_WORDS[item['ctx']['pattern']]}."
    text = item["msg"].removeprefix("Value error, ")
    if not field:
        return f"{text}."
    return f"{field} is {item['input']!r}: {text[0].lower()}{text[1:]}."


def _literal_hint(item: Any) -> str:
    options = item["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    hint = suggest(str(item["input"]), options)
    return hint if hint.startswith(" Did") else ""


def _part_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    part: Any = Recipe
    for name in loc:
        part = part.model_fields[name].annotation
        part = next((a for a in get_args(part) if isinstance(a, type) and issubclass(a, BaseModel)), part)
    return part if isinstance(part, type) and issubclass(part, BaseModel) else None


def _names(part: type[BaseModel] | None) -> list[str]:
    return list(part.model_fields) if part else []
