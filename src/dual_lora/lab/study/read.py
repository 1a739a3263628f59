"""Studies out of YAML files, shipped ones and those that extend another; what is wrong with them, in sentences."""

from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import BaseModel, ValidationError

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import parse_yaml, read_yaml_text
from dual_lora.lab.recipe.read import shipped_recipes
from dual_lora.lab.study.search import Search
from dual_lora.lab.study.study import Budget, Study, TaskEntry

MOST_EXTENDED = 10
LISTING = "`dual-lora compare` lists the shipped studies; a study of yours is named by its file."


def shipped_studies() -> dict[str, Path]:
    """Name → file of the studies that the package carries."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.yaml"))}


def read_study(source: str | Path | Study) -> Study:
    """The study in a YAML file, or the shipped one of that name; a Study is itself.

    Raises UserError for a missing file, broken YAML, and every unknown or impossible field (nearest name suggested).
    """
    if isinstance(source, Study):
        return source
    path = _study_file(str(source), Path(source))
    values = values_in(path)
    if not {"tasks", "methods", "extends"} & set(values) and {"model", "method", "data"} & set(values):
        raise UserError(_recipe_hint(str(source)))
    values = _with_extended(values, path, [path.resolve()])
    study = build_study(values, str(path))
    for task in study.tasks.values():  # a recipe may lie in the study's folder
        if not Path(task.recipe).is_file() and (beside := path.parent / task.recipe).is_file():
            task.recipe = str(beside.resolve())
    return study


def _study_file(name: str, path: Path) -> Path:
    """The file itself, or the shipped study of that name."""
    shipped = shipped_studies()
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    if name in shipped_recipes():
        raise UserError(_recipe_hint(name))
    raise UserError(f"There is no study {name!r}.{suggest(name, shipped, LISTING)}")


def values_in(path: Path) -> dict[str, Any]:
    """Read a YAML file. Raises UserError if it is none, or no mapping."""
    values = parse_yaml(read_yaml_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, expected a mapping with name, tasks and methods.")
    return values


def _with_extended(values: dict[str, Any], path: Path, seen: list[Path]) -> dict[str, Any]:
    """The values over those of the study that `extends` names (a file in its folder, or a shipped study).

    A field replaces the other study's; only `methods` are merged, entry by entry and field by field.
    """
    if "extends" not in values:
        return values
    name = str(values["extends"])
    base = _study_file(name, path.parent / name)
    if base.resolve() in seen:
        raise UserError(f"{path} extends {name}, which extends {path.name} in turn: leave one of them out.")
    if len(seen) > MOST_EXTENDED:
        raise UserError(f"{path} is the end of a row of more than {MOST_EXTENDED} studies that extend each other.")
    below = _with_extended(values_in(base), base, [*seen, base.resolve()])
    over = {key: value for key, value in values.items() if key != "extends"}
    theirs, ours = below.get("methods"), over.get("methods")
    if isinstance(theirs, dict) and isinstance(ours, dict):
        both = {key: (theirs[key], ours[key]) for key in theirs.keys() & ours.keys()}
        pairs = {key: (a or {}) | (b or {}) for key, (a, b) in both.items() if isinstance(a or {}, dict)}
        over["methods"] = theirs | ours | pairs
    return below | over


def _recipe_hint(name: str) -> str:
    """Return a hint for a file that is a recipe and not a study, else ""."""
    using = [study for study in shipped_studies() if name in read_study(study).recipes]
    shipped = f" The shipped studies {', '.join(using)} use it." if using else ""
    return (
        f"{name} is a recipe, not a study.{shipped} To compare methods by it, write a study with `tasks: [{name}]` and "
        f"`methods: [lora, dual_lora]`; to run it alone, `dual-lora train {quote(name)}`."
    )


def build_study(values: dict[str, Any], where: str = "the study") -> Study:
    """A validated study from plain values, or a UserError that names every problem."""
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {' '.join(_problem(item) for item in error.errors())}") from None


def _problem(item: Any) -> str:
    *above, last = item["loc"] or ("",)
    field = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"budget": Budget, "search": Search, "tasks": TaskEntry}
        known = parts.get(str(above[0]), Study) if above else Study
        return f"unknown field {field!r}.{suggest(str(last), known.model_fields)}"
    if item["type"] == "missing":
        return f"field {field!r} is missing."
    message = str(item["msg"]).removeprefix("Value error, ")
    return (f"{field}: " if field else "") + message + ("" if message.endswith((".", "?")) else ".")
