"""Recipes out of YAML files and plain values; what is wrong with them, in sentences; what makes two runs the same."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import parse_yaml, read_yaml_text
from dual_lora.lab.recipe.schema import Recipe, method_in

FAMILIES = "paper"  # the folder of recipes that are written as families


LISTING = "`dual-lora recipes` lists those that are shipped."


def read_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name, with ``overrides`` laid over it.

    Raises UserError for a missing file, broken YAML, and unknown or mistyped fields (nearest name suggested).
    """
    path, text = recipe_text(source)
    values = parse_yaml(text, path)
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}"
        raise UserError(f"{path} {found}, expected a mapping with model, method, data, train.")
    return build_recipe(_restamped(merged(values, overrides or {}), overrides or {}), str(path))


def recipe_text(source: str | Path) -> tuple[str, str]:
    """Where the recipe lies and its text: a file if there is one, else the shipped recipe of that name."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        shipped = shipped_recipes()
        if str(source) in shipped:
            path = shipped[str(source)]
            if path.parent.name == FAMILIES:
                from dual_lora.lab.recipe.families import family

                return f"{path} ({source})", family(path)[str(source)].text
        elif path.suffix in {".yaml", ".yml"} or "/" in str(source):
            raise UserError(f"There is no recipe file {source}. {LISTING}")
        else:
            raise UserError(f"There is no recipe {str(source)!r}.{suggest(str(source), shipped, LISTING)}")
    return str(path), read_yaml_text(path)


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that the package carries; those of a family share its file."""
    from dual_lora.lab.recipe.families import family

    folder = Path(__file__).parent / "shipped"
    alone = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return alone | {name: path for path in sorted((folder / FAMILIES).glob("*.yaml")) for name in family(path)}


def build_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Validated recipe from plain values; every problem is named, with the nearest known field or value."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """What is wrong in a recipe, field by field, in sentences."""
    return " ".join(_problem(item) for item in error.errors())


# What is dropped where something else is given in its place, and what goes with a value that is given anew.
_IN_PLACE = {"data": (("test", "tests"), ("tests", "test"), ("holdout", "validation")), "train": (("epochs", "steps"),)}
_BELONGS = {"model": (("path", "revision"),)}


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``overrides`` laid over ``values``, mapping by mapping.

    A new method name drops the old method's fields, another model.path the revision, data.test the recipe's data.tests
    (and the other way round), data.holdout its validation records. train.epochs drops its steps, train.lr_warmup the
    same among train.arguments. Patterns of train.rates that are given come before the recipe's, as the first that fits
    counts.
    """
    result = dict(values)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            renamed = key == "method" and method_in({**old, **value}) != method_in(old)
            result[key] = value if renamed else value | old | value if key == "rates" else merged(old, value)
            anew = [pair for pair in _BELONGS.get(key, ()) if value.get(pair[0]) != old.get(pair[0])]
            for given, other in (*_IN_PLACE.get(key, ()), *anew):
                if value.get(given) and other not in value:
                    result[key].pop(other, None)
            if key == "train" and "lr_warmup" in value and isinstance(result[key].get("arguments"), dict):
                kept = value.get("arguments") or {}
                result[key]["arguments"] = {
                    name: setting
                    for name, setting in result[key]["arguments"].items()
                    if name not in ("warmup_steps", "warmup_ratio") or name in kept
                }
        else:
            result[key] = value
    return result


def _restamped(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings that the user has changed are no longer those of their source."""
    settings = (values.get("origin") or {}).get("settings")
    if not settings or "origin" in overrides:
        return values
    changed = {f"{part}.{key}" for part, over in overrides.items() if isinstance(over, dict) for key in over}
    kept = {name: [s for s in given if s not in changed] for name, given in settings.items()}
    more = {"yours": sorted(changed)} if changed else {}
    sources = values["origin"].get("sources", {}) | ({"yours": "ours: set by you"} if changed else {})
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
    """What makes two runs the same run: the recipe's values, without where they come from and what is declared."""
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
    if item["type"] == "missing":
        return f"field {field!r} is missing."
    if item["type"] in ("dict_type", "model_type", "model_attributes_type"):
        key = {"model": "path", "method": "name", "data": "train"}.get(field)
        if key is None or not isinstance(item["input"], str):
            return f"{field} is {item['input']!r}, expected a mapping of fields to values."
        value = item["input"]
        return f"{field} is {value!r}, expected {field}: {{{key}: {value}}}, or as a flag --{field}.{key} {value}."
    if item["type"] == "literal_error":
        return f"{field} is {item['input']!r}, expected {item['ctx']['expected']}.{_near_literal(item)}"
    text = item["msg"].removeprefix("Value error, ")
    if not field:
        return f"{text}."
    return f"{field} is {item['input']!r}: {text[0].lower()}{text[1:]}."


def _near_literal(item: Any) -> str:
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
