"""The subject of an advice: a recipe, a run's folder, or a base and records, of which a recipe is written."""

import contextlib
import os
from pathlib import Path
from typing import Any

from dual_lora.lab.data.guess import guess
from dual_lora.lab.data.records import read_joined
from dual_lora.lab.data.starter import as_trained, read_starter, starter
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.read import regular
from dual_lora.lab.recipe.read import read_recipe, run_name


def source_of(recipe: str | None, base: str | None, data: str | None, test: str | None, out: Path | None) -> str:
    """The recipe's file or name. Of flags a recipe is written next to the study's folder, the same one each time.

    Raises UserError for flags that name too little, and where another recipe lies there already.
    """
    folder = out.parent if out is not None else Path("studies")
    if recipe is not None:
        changed: dict[str, Any] = {"data": {k: v for k, v in (("train", data), ("test", test)) if v is not None}}
        changed |= {"model": {"path": base}} if base else {}
        if not changed["data"] and not base:
            return recipe
        found = read_recipe(recipe, changed)
        return _write_once(folder / f"{found.name}-{_short_digest(base, data, test)}.yaml", found.to_yaml())
    missing = [flag for flag, value in (("--base", base), ("--data", data), ("--test", test)) if not value]
    if missing or not (base and data and test):
        raise UserError(
            "Say what the advice is about: a recipe, a run's folder, or --base, --data and --test, the records that "
            f"nothing is trained on. Missing here: {', '.join(missing)}."
        )
    records = read_joined(data)
    name = run_name(Path(data).stem)
    file = folder / f"{name}-{_short_digest(base, data, test)}.yaml"
    guessed = guess(records)
    text = starter(file, name, base, data, test, guessed, as_trained(records, data, guessed))
    read_starter(text, Path(name))
    return _write_once(file, text)


def _short_digest(*given: str | None) -> str:
    """Short letters that tell one base and records from others."""
    import hashlib

    return hashlib.sha256(repr(given).encode()).hexdigest()[:6]


def _write_once(path: Path, text: str) -> str:
    if os.path.lexists(path):
        with contextlib.suppress(OSError, ValueError):
            if regular(path).read_text(encoding="utf-8") == text:
                return str(path)
        raise UserError(f"{path} is there and differs from what these options make: give its name, or move it.")
    make_folder(path.parent)
    write_output(path, text)
    return str(path)
