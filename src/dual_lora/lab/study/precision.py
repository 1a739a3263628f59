"""One precision for a whole study: what `auto` stands for is chosen when the study is made, and kept with it.

Times, scores and job keys depend on it, so a study never mixes runs of two choices, wherever it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.precision import AUTO, FIELDS, Fast, Short, fast_precision, leaves_open
from dual_lora.lab.study.cell import place_name
from dual_lora.lab.study.plan import written_places
from dual_lora.lab.study.state import remembered
from dual_lora.lab.study.study import Study


def settled_study(study: Study, folder: Path) -> tuple[Study, dict[str, Any]]:
    """The study with bf16 or fp32 in the place of every `auto`, and what the choice followed from.

    A study that was begun in `folder` keeps its choice. Nothing is chosen where the study leaves nothing open.
    """
    for name, values in _varied(study):
        if name.removeprefix("train.") == "autocast" and AUTO in values:
            raise UserError(f"{name}: auto is one choice for the whole study; write bf16 and none to compare the two.")
    if study.precision != AUTO:
        return _filled_in(study, study.precision), {"asked": study.precision, "precision": study.precision}
    if not any(leaves_open(recipe) for _, _, recipe in written_places(study)) and _filled_in(study, "bf16") == study:
        return study, {}
    before = _begun_with(folder, study)
    found = Fast(before, "as the study was begun") if before else fast_precision()
    return _filled_in(study, found.precision), {"asked": AUTO, **asdict(found)}


def _varied(study: Study) -> Iterator[tuple[str, list[Any]]]:
    """Every setting that the study varies, with its values."""
    yield from study.sweep.items()
    spaces = [study.search.space] if study.search else []
    for space in [*spaces, *(entry.search for entry in study.methods.values())]:
        yield from ((name, values) for name, values in space.items() if isinstance(values, list))


def _filled_in(study: Study, precision: Short) -> Study:
    """The study with `precision` in the place of every `auto` that it lays over its recipes."""
    values = study.model_dump(mode="json")
    over = [values["overrides"], *values["models"].values(), *values["tasks"].values(), *values["methods"].values()]
    for laid in over:
        for (part, name), words in FIELDS.items():
            if (laid.get(part) or {}).get(name) == AUTO:
                laid[part][name] = words[precision]
                values["precision"] = precision
    if any(leaves_open(recipe) for _, _, recipe in written_places(study)):
        values["precision"] = precision
    return Study.model_validate(values)


def _begun_with(folder: Path, study: Study) -> Short | None:
    """The precision of the study that was begun in `folder`; None for a new one."""
    text = remembered(folder, "study")
    if text is None and (folder / "study.yaml").is_file():  # the state was lost
        text = json.dumps(yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8")))
    if text is None:
        return None
    if (kept := json.loads(text).get("precision", AUTO)) != AUTO:
        return kept
    # Begun before studies named their precision: what its recipes had written where ours say `auto`.
    known = json.loads(remembered(folder, "recipes") or "{}")
    for model, task, recipe in written_places(study):
        for (part, name), words in FIELDS.items():
            old = known.get(f"{place_name(model, task)} {part}", {}).get(name)
            if getattr(getattr(recipe, part), name) == AUTO:
                for short, word in words.items():
                    if word == old:
                        return short
    return None
