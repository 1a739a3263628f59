"""One job of a study, from its recipe to its outcome. It runs in the leader, in a process of its own, or elsewhere.

runs/<key>/              the run's folder: checkpoints while it goes on, then adapter and record
runs/<key>.json          its outcome, written last and whole: if it is there, the run is finished
runs/<key>.scores.json   what every test item adds to the metric
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import OURS, UserError
from dual_lora.lab.interrupt import Stopped
from dual_lora.lab.run.write import write_json

WAIT_SECONDS = 120  # for a run's folder that an orphan of a killed leader may still hold
KEPT = ("adapters", "all", "nothing")


def outcome_file(runs: Path, key: str) -> Path:
    """Where the outcome of a run lies."""
    return runs / f"{key}.json"


def scores_file(runs: Path, key: str) -> Path:
    """Where what every item adds to the metric lies."""
    return runs / f"{key}.scores.json"


def read_outcome(runs: Path, key: str) -> dict[str, Any] | None:
    """The outcome of a finished run; None if it is not finished, or its files are not there or not whole."""
    try:
        outcome = json.loads(outcome_file(runs, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if outcome.get("key") != key:
        return None
    try:
        whole = outcome.get("items") is None or len(read_scores(runs, key)) == outcome["items"]
    except (OSError, ValueError):
        return None
    return outcome if whole else None


def read_scores(runs: Path, key: str) -> list[Any]:
    """What every item of a finished run adds to its metric. Raises OSError or ValueError for a broken file."""
    return json.loads(scores_file(runs, key).read_text(encoding="utf-8"))


def perform(job: dict[str, Any], runs: Path, keep: str = "adapters") -> dict[str, Any]:
    """Do the job, or return its outcome if it is done. A run that was killed goes on from its last checkpoint.

    A run that diverged is an outcome ("status": "diverged"). Raises what training or evaluation raises otherwise.
    """
    runs.mkdir(parents=True, exist_ok=True)
    if (done := read_outcome(runs, job["key"])) is not None:
        return done
    start = time.time()
    folder = runs / job["key"]
    with contextlib.ExitStack() as stack:
        held(folder, stack)
        if (done := read_outcome(runs, job["key"])) is not None:
            return done  # an orphan finished it while we waited
        outcome = {"key": job["key"], "status": "done", "runs_at_a_time": job.get("runs_at_a_time")}
        said: list[str] = []
        try:
            with _kept_warnings(said):
                outcome |= _base(job, runs) if job["kind"] == "base" else _trained(job, folder, runs)
        except Exception as error:
            if not _diverged(error):
                if said:
                    error.add_note(f"Warned before: {' '.join(said)}")
                raise
            outcome |= {"status": "diverged", "error": str(error)}
        if said:
            outcome["warnings"] = said
        outcome["seconds"] = round(time.time() - start, 3)
        write_json(outcome_file(runs, job["key"]), outcome)
        _tidy(job, folder, keep)
    return outcome


def held(folder: Path, stack: contextlib.ExitStack) -> None:
    """Hold a lock beside the run's folder, so that nobody else runs the same job."""
    from filelock import FileLock, Timeout

    try:
        stack.enter_context(FileLock(folder.with_suffix(".lock"), timeout=WAIT_SECONDS))
    except Timeout:
        raise UserError(
            f"The run {folder} is still held by another process; wait for it, then start the study again."
        ) from None


def _trained(job: dict[str, Any], folder: Path, runs: Path) -> dict[str, Any]:
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.opened import open_tuned
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.run.evaluate import evaluate
    from dual_lora.lab.run.train import run
    from dual_lora.lab.study.metrics import features, value

    recipe = build_recipe(job["recipe"])
    if folder.exists() and not (folder / "recipe.yaml").exists():
        shutil.rmtree(folder)  # killed before training began: there is nothing to go on from
    result = run(recipe, folder, resume=True, progress=False, callbacks=_callbacks(job))
    if result.state != "finished":
        raise Stopped(result.stopped_by)
    outcome: dict[str, Any] = {
        "training": {k: v for k, v in result.summary().items() if k != "folder"},
        "steps_per_second": round(result.steps / result.seconds, 4) if result.seconds else None,
    }
    if job["split"] == "none":
        return outcome
    tuned = result.tuned or open_tuned(folder)
    examples = load_split(recipe.data, job["split"])
    began = time.perf_counter()
    measured = evaluate(tuned, recipe.data, recipe.evaluate, examples=examples, variants=["tuned"], progress=False)
    outcome |= _scored(job, runs, measured, examples, tuned.classes, features, value)
    outcome["evaluation_seconds"] = round(time.perf_counter() - began, 3)
    if job["cost"]:
        from dual_lora.lab.study.use_cost import use_cost

        outcome["use"], problems = use_cost(tuned, examples, recipe)
        if problems:
            outcome["use_problems"] = problems
    return outcome


def _base(job: dict[str, Any], runs: Path) -> dict[str, Any]:
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.model.opened import Tuned
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.run.evaluate import evaluate
    from dual_lora.lab.study.metrics import features, value

    recipe = build_recipe(job["recipe"])
    loaded = load_model(recipe.model)
    examples = load_split(recipe.data, job["split"])
    tuned = Tuned(loaded.model, loaded.tokenizer, recipe.model.path)
    measured = evaluate(tuned, recipe.data, recipe.evaluate, examples=examples, variants=["base"], progress=False)
    return _scored(job, runs, measured, examples, [], features, value) | _constant(job["metric"], examples)


def _constant(metric: str, examples: list[Any]) -> dict[str, float]:
    """How often one answer to everything is right, the best of them, where being right is what counts."""
    if metric not in ("choice", "exact_match"):
        return {}
    (_, most), *_ = Counter(example.target for example in examples).most_common(1)
    return {"constant": most / len(examples)}


def _scored(
    job: dict[str, Any], runs: Path, measured: Any, examples: list[Any], classes: list[str], features: Any, value: Any
) -> dict[str, Any]:
    import numpy as np

    from dual_lora.lab.run.failures import NotFinite

    labels = [example.label for example in examples]
    prompts = [repr(example.prompt) for example in examples] if examples[0].messages else []
    shares = features(job["metric"], measured.items, labels, classes, prompts)
    score = value(job["metric"], np.asarray(shares, dtype=np.float64).mean(0))
    if not math.isfinite(score):
        raise UserError(f"The {job['metric']} is not finite.") from NotFinite()
    (figures,) = measured.metrics.values()
    if not all(map(math.isfinite, figures.values())):
        raise UserError(f"The {job['metric']} comes from figures that are not finite.") from NotFinite()
    write_json(scores_file(runs, job["key"]), shares)
    return {"score": score, "metric": job["metric"], "figures": figures, "items": len(shares)}


@contextlib.contextmanager
def _kept_warnings(said: list[str]) -> Iterator[None]:
    """This package's own warnings go into `said`, for the person who leads the study, wherever the run is done; those
    of libraries go where they went before."""
    with warnings.catch_warnings():
        elsewhere = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            if not re.match(OURS, str(message), re.IGNORECASE):
                elsewhere(message, *rest, **more)
            elif str(message) not in said:
                said.append(str(message))

        warnings.filterwarnings("always", message=OURS)
        warnings.showwarning = show
        yield


def _diverged(error: Exception) -> bool:
    from dual_lora.lab.run.failures import Diverged, NotFinite

    return isinstance(error, Diverged) or isinstance(error.__cause__, NotFinite)


def _callbacks(job: dict[str, Any]) -> list[Any]:
    from dual_lora.lab.study.interventions import Freeze, Round

    given: list[Any] = []
    if job["freeze"]:
        given.append(Freeze(job["freeze"]))
    if job["round"]:
        given.append(Round(job["round"]))
    return given


def _tidy(job: dict[str, Any], folder: Path, keep: str) -> None:
    """Checkpoints go (the outcome is written), and what the study was not told to keep."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if keep == "all":
        return
    shutil.rmtree(folder / "model", ignore_errors=True)
    if job["kind"] != "final" or keep == "nothing":
        shutil.rmtree(folder / "adapter", ignore_errors=True)
