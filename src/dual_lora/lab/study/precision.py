"""One precision for a whole study: what `auto` stands for is chosen when the study is made, and kept with it.

Times, scores and job keys depend on it, so a study never mixes runs of two choices, wherever it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.precision import AUTO, DTYPES, FIELDS, Fast, Short, fast_precision, leaves_open
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.plan import written_scenarios
from dual_lora.lab.study.study import Study


def settled_study(study: Study, folder: StudyFolder) -> tuple[Study, dict[str, Any]]:
    """The study with bf16 or fp32 in the place of every `auto`, and what the choice followed from.

    A study that was begun in `folder` keeps its choice, by `precision` in its study.yaml. Nothing is chosen where the
    study leaves nothing open.
    """
    for name, values in _varied(study):
        if name.removeprefix("train.") == "autocast" and AUTO in values:
            raise UserError(f"{name}: auto is one choice for the whole study; write bf16 and none to compare the two.")
    if study.precision != AUTO:
        return _filled_in(study, study.precision), {"asked": study.precision, "precision": study.precision}
    if not any(leaves_open(recipe) for _, _, recipe in written_scenarios(study)) and _filled_in(study, "bf16") == study:
        return study, {}
    before: Any = folder.known.study.get("precision") if folder.known.study else AUTO
    if before not in (AUTO, *DTYPES):
        raise UserError(
            f"The study in {folder.path} was begun with precision {before}: write `precision: bf16` or "
            "`precision: fp32` into the study, as its runs have it (runs/*/recipe.yaml)."
        )
    found = fast_precision() if before == AUTO else Fast(before, "as the study was begun")
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
    if any(leaves_open(recipe) for _, _, recipe in written_scenarios(study)):
        values["precision"] = precision
    return Study.model_validate(values)
