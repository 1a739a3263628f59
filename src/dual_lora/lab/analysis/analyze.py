"""`dual-lora analyze RUN…`: everything that this package measures, for run folders, as one JSON file.

from dual_lora.lab.analysis.analyze import analyze, save
analysis = analyze(["runs/dual", "runs/lora"], reference="runs/full")
save(analysis, "analysis.json")
"""

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dual_lora.lab.analysis.likeness import correlation
from dual_lora.lab.analysis.opened_run import open_run
from dual_lora.lab.analysis.ranks import rank_examples
from dual_lora.lab.analysis.trajectory import chosen_layers, states_of
from dual_lora.lab.analysis.walk import Options, Row, RunAnalysis, Walk
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.model.device import check_device
from dual_lora.lab.progress import Bar
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.results import ANALYSIS
from dual_lora.lab.run.record import read_metrics, surroundings
from dual_lora.lab.run.resume import recipe_of_run

VERSION = 1


@dataclass
class Analysis:
    """The analyses of some runs, with what is needed to repeat them."""

    runs: list[RunAnalysis]
    options: dict[str, Any]
    made: dict[str, Any]
    rank_examples: list[Row]


def analyze(
    runs: list[str | Path],
    reference: str | Path | None = None,
    options: Options | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Analysis:
    """Analyse run folders one after the other; only one base model is in memory at a time.

    reference: a run of full fine-tuning from the same model and data, whose update the others are compared with.
    Raises UserError for what is no run, has no states, or does not belong together.
    """
    options = options or Options()
    if not runs:
        raise UserError("No run was given: dual-lora analyze RUN [RUN …].")
    if options.held_out < 0:
        raise UserError(f"held_out is {options.held_out}, expected a number of records, or 0 to leave it out.")
    if device is not None:
        check_device(device)
    target = None if reference is None else _reference(Path(reference))
    names = _names([Path(run) for run in runs])
    found = [_recorded_run(Path(run), name, target, options) for run, name in zip(runs, names, strict=True)]
    for run in found:
        _analyze_run(run, options, device, progress)
        if run.model != found[0].model:
            run.notes.append(
                f"Of another model ({run.model}) than {found[0].name} ({found[0].model}): the figures of the two say "
                "nothing about each other."
            )
    examples = [example._asdict() for example in rank_examples()]
    made = surroundings() | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return Analysis(found, asdict(options), made, examples)


def check_free(file: Path) -> None:
    """Raise UserError if something lies there that no analysis would replace."""
    if file.exists() and not (file.is_file() and ANALYSIS.encode() in file.open("rb").read(100)):
        raise UserError(f"The output {file} exists and is no analysis: give another --out, or remove it first.")


def save(analysis: Analysis, file: str | Path) -> Path:
    """Write the analysis as JSON (numbers that are not finite become null)."""
    path = Path(file)
    make_folder(path.parent)
    values = {"format": ANALYSIS, "version": VERSION, **asdict(analysis)}
    write_output(path, json.dumps(_finite(values), indent=None, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _names(paths: list[Path]) -> list[str]:
    """The folders' own names; method and seed for a study's runs (named by a hash).

    Where two are the same, with as many folders above as tell them apart. Raises UserError for a run given twice.
    """
    full = [path.resolve() for path in paths]
    if twice := [path for i, path in enumerate(full) if path in full[:i]]:
        raise UserError(f"The run {twice[0]} is given twice.")
    names, deep = [_name(path) for path in full], 1
    while len({*names}) < len(names):
        deep += 1
        names = [
            name if names.count(name) == 1 else "/".join(path.parts[-deep:])
            for name, path in zip(names, full, strict=True)
        ]
    return names


def _name(path: Path) -> str:
    if re.fullmatch(r"[0-9a-f]{16}", path.name) and RunFolder(path).is_run:
        recipe = recipe_of_run(path)
        return f"{recipe.method['name']}, seed {recipe.train.seed}"
    return path.name


def _reference(path: Path) -> Path:
    if not RunFolder(path).is_run:
        raise UserError(f"The reference {path} is not a run: it holds no recipe.yaml.")
    method = recipe_of_run(path).method["name"]
    if method != "full":
        raise UserError(
            f"The reference {path} trained {method}, expected full fine-tuning: run the recipe with --method.name full."
        )
    return path


def _recorded_run(path: Path, name: str, reference: Path | None, options: Options) -> RunAnalysis:
    """Read what a run's folder records. Raises UserError for a folder without a run, or with one that does not fit the
    reference, before hours go into the others."""
    steps = [state.step for state in states_of(path, options.states)]
    recipe = recipe_of_run(path)
    known = dict(recipe.method), recipe.train.seed, recipe.model.path, recipe.data.train
    result = RunAnalysis(name, str(path), *known, steps=steps, live=read_metrics(path / "analysis" / "live.jsonl"))
    if reference is not None and reference.resolve() != path.resolve():
        result.reference = str(reference)
        result.notes += _check_comparable(recipe, recipe_of_run(reference), reference)
    return result


def _analyze_run(result: RunAnalysis, options: Options, device: str | None, progress: bool) -> None:
    """Open the run and look into it."""
    path = Path(result.folder)
    opened, stops = open_run(path, device), states_of(path, options.states)
    stops = stops[-1:] if options.what == "sampling" else stops
    result.command = opened.record.get("command")
    layers = chosen_layers(opened, options.layers)
    others = states_of(Path(result.reference)) if result.reference else []
    targets = {state.step: state for state in others if state.folder is not None}
    without = [state.step for state in stops if state.step and state.step not in targets]
    if result.reference and without:
        steps = ", ".join(map(str, without))
        result.notes.append(
            f"The reference {result.reference} kept no state of step {steps}: no likeness is given there."
        )
    if opened.origin:
        result.notes.append(
            f"The method changed {len(opened.origin)} base weights at its start; updates count from before."
        )
    with Bar(f"analysing {result.name}", len(stops) * len(layers), progress) as bar:
        Walk(opened, result, options, stops, layers, targets, bar).go()
    moved = [r for r in result.layers if r.get("norm") and "direction_change" in r]
    result.magnitude_direction = correlation(*([r[f"{k}_change"] for r in moved] for k in ("direction", "magnitude")))


def _check_comparable(recipe: Recipe, other: Recipe, where: Path) -> list[str]:
    """Return notes on settings in which the two runs differ. Raises UserError for another model or other data."""
    for part, a, b in (("model", recipe.model.path, other.model.path), ("data", recipe.data.train, other.data.train)):
        if a != b:
            raise UserError(
                f"The reference {where} has another {part} ({b}) than the run ({a}): likeness has no meaning."
            )
    fields = ("seed", "steps", "epochs", "batch_size", "accumulate", "schedule")
    different = [f"train.{f}" for f in fields if getattr(recipe.train, f) != getattr(other.train, f)]
    different += ["data"] if recipe.data != other.data else []
    return [f"The reference was trained with another {', '.join(different)}."] if different else []
