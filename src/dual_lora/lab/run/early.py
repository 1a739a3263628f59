"""Checks of a run that need no library: they come before torch and transformers are imported, which takes seconds.

Nothing here is the only check. What needs the model or PEFT's own classes is looked at again later, and what this file
cannot tell it leaves to them.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from dual_lora.lab.data.classes import classes_of
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.records import find, joined
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.location import check_here, locate
from dual_lora.lab.model.names import ALIASES, FUSED, OURS
from dual_lora.lab.model.quantize import check_quantize
from dual_lora.lab.recipe.schema import Recipe

SMALL = 20_000_000  # bytes of records that are read twice, which takes less than a second


def check(recipe: Recipe, folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Raise UserError for a run that cannot begin, as far as that needs no library.

    Of several processes the first one alone looks at the folder: it may have begun to fill it.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        RunFolder(folder).check(resume, overwrite)
    check_method(recipe)
    check_records(recipe)
    check_here(recipe.model.path, recipe.model.revision)
    check_quantize(recipe.model, locate(recipe.model.path, recipe.model.revision).gguf_file is not None)


def check_records(recipe: Recipe) -> None:
    """Raise UserError for training records that are missing and, where they are few, for what does not fit in them."""
    data = recipe.data
    named = {"train": data.train, "validation": data.validation if recipe.train.validate_every else None}
    sources = [one for source in named.values() for one in joined(source or "") if one]
    local = [one for one in sources if not one.startswith("hub:")]
    if sum(find(one).stat().st_size for one in local) > SMALL or len(local) < len(sources):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when the records are read for the run
        classes_of(recipe.model.head, load_split(data, "train"))


def check_method(recipe: Recipe) -> None:
    """Raise UserError for a field that the method's configuration does not have, by the source of PEFT and ours."""
    name = str(recipe.method["name"])
    alias = ALIASES.get(name, {})
    known = declared_fields(str(alias.get("name", name)))
    for key in [str(key) for key in recipe.method if key != "name"]:
        if known and key not in known:
            raise UserError(f"method {name} has no field {key!r}.{suggest(key, known)}")


def declared_fields(method: str) -> list[str]:
    """The fields of a method's configuration that a recipe may set, read from its source; [] where they are not found.

    A class that inherits from one outside its file, but for PEFT's own beginnings, tells nothing.
    """
    if method == "dual_lora":
        file = Path(__file__).parents[2] / "method" / "config.py"
    else:
        spec = PathFinder.find_spec("peft")  # is not imported for it
        if spec is None or not spec.submodule_search_locations:
            return []
        peft = Path(next(iter(spec.submodule_search_locations)))
        file = peft / "tuners" / method / "config.py"
    spec = PathFinder.find_spec("peft")
    start = Path(str(spec.origin)).parent / "config.py" if spec and spec.origin else None
    if start is None or not file.is_file() or not start.is_file() or not method.isidentifier():
        return []
    classes = _classes_in(start) | (own := _classes_in(file))
    wanted = [name for name in own if name.lower() == f"{method}config".replace("_", "")]
    found = _with_inherited(wanted[0], classes) if len(wanted) == 1 else None
    if not found:
        return []
    more = declared_fields("lora") if method == "dual_lora" else ["fused"] if method in FUSED else []  # taken as LoRA's
    return sorted({*found, *more} - OURS)


def _classes_in(file: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return the bases and the declared fields of each class in a file."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: ([ast.unparse(base) for base in node.bases], [*_fields_of(node)]) for node in classes}


def _fields_of(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            value = ast.unparse(line.value) if line.value is not None else ""
            if not ast.unparse(line.annotation).startswith(("ClassVar", "InitVar")) and "init=False" not in value:
                yield line.target.id


def _with_inherited(name: str, classes: dict[str, tuple[list[str], list[str]]]) -> list[str] | None:
    """All fields of a class; None where it inherits from one that is not among these."""
    if name == "PushToHubMixin":
        return []
    if name not in classes:
        return None
    bases, fields = classes[name]
    inherited = [_with_inherited(base, classes) for base in bases]
    if any(found is None for found in inherited):
        return None
    return [*fields, *(field for found in inherited for field in found or [])]
