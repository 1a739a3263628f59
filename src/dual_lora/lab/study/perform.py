"""One job of a study, from its recipe to its outcome. It runs in the runner's process, in one of its own, or elsewhere.

The outcome file is the only channel that counts, and is written whole (see `job`): whoever does a run may be killed.
"""

import contextlib
import math
import secrets
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora._warning import DualLoraWarning
from dual_lora.lab.errors import NotFinite, UserError, described, is_disk_full
from dual_lora.lab.files.write import hold, write_json
from dual_lora.lab.interrupt import Stopped
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.weights import weights_digest
from dual_lora.lab.run.failures import Diverged
from dual_lora.lab.run.record import code_version, device_name
from dual_lora.lab.study import metrics
from dual_lora.lab.study.job import Job, Outcome, read_outcome, run_file, write_outcome

WAIT_SECONDS = 120  # for a run's folder that an orphan of a killed runner may still hold
KEPT = ("adapters", "all", "nothing")
Figures = dict[str, Any]  # fields of an outcome


class DiskFull(UserError):
    """There was no room for a run's files. What was finished before is whole."""


def perform(job: Job, runs: Path, keep: str = "adapters", at_a_time: int | None = None) -> Outcome:
    """Do the job, or return its outcome if it is done. A run that was killed goes on from its last checkpoint.

    A run that diverged is an outcome. Raises what training or evaluation raises otherwise, and writes it down;
    DiskFull if there is no room.
    """
    if (done := read_outcome(runs, job.key)) is not None:
        return done
    start, code, messages = time.monotonic(), code_version(), list[str]()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with _locked(runs / job.key), _kept_warnings(messages):
            if (done := read_outcome(runs, job.key)) is not None:
                return done  # an orphan finished it while we waited
            try:
                came = _base(job, runs) if job.kind == "base" else _trained(job, runs, keep)
                came["status"] = "done"
            except Exception as error:
                if not (isinstance(error, Diverged | NotFinite) or isinstance(error.__cause__, NotFinite)):
                    raise
                came = {"status": "diverged", "error": str(error)}
                if job.kind == "base":
                    came["weights"] = weights_digest(job.recipe.model)
            came |= {"warnings": messages}
            came |= {"runs_at_a_time": at_a_time, "device": device_name()[:200], "code": code}
            outcome = Outcome(key=job.key, seconds=round(time.monotonic() - start, 3), **came)
            write_outcome(runs, outcome)
            _tidy(job, runs / job.key, keep)
            return outcome
    except Exception as error:
        if messages:
            error.add_note(f"Warned before: {' '.join(messages)}")
        with contextlib.suppress(OSError):
            write_json(run_file(runs, job.key, "error"), described(error))
        if is_disk_full(error) or is_disk_full(error.__cause__):
            raise DiskFull(described(error)) from error
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock next to the run's folder, so that nobody else runs the same job. The folder may be no link."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.readlink()}, expected a run's own folder: remove the link.")
    busy = f"The run {folder} is still held by another process; wait for it, then start the study again."
    with hold(folder.with_suffix(".lock"), busy, WAIT_SECONDS):
        yield


def set_aside(runs: Path, key: str, code: str | None) -> None:
    """Put the files of a run aside under the name of the code that did it, so that it is done again."""
    aside = f"{key}.by-{(code or 'unknown').partition(',')[0][:20]}"
    with _locked(runs / key):
        # The scores first: without them the run is damaged, whatever is left by a kill, and done again.
        for name in (".scores.json", ".forgetting.json", "", ".json"):
            if (old := runs / f"{key}{name}").exists():
                old.replace(runs / f"{aside}-{secrets.token_hex(2)}{name}")


def _trained(job: Job, runs: Path, keep: str) -> Figures:
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.opened import open_tuned
    from dual_lora.lab.run.evaluate import evaluate
    from dual_lora.lab.run.train import run
    from dual_lora.lab.study.interventions import Freeze, Round, StepTimes

    recipe, folder = job.recipe, runs / job.key
    callbacks: list[Any] = [Freeze(job.freeze)] if job.freeze else []
    callbacks += [Round(job.round)] if job.round else []
    timed = StepTimes()
    callbacks += [timed] if job.split == "none" else []
    names = job.task, f"{job.method}/seed-{job.seed}"
    more: dict[str, Any] = {"report_to": job.report_to, "names": names} if job.report_to else {}
    more["passing"] = not _keeps_adapter(job, keep)
    result = run(recipe, folder, resume=True, progress=False, callbacks=callbacks, **more)
    if result.state != "finished":
        raise Stopped(result.stopped_by)
    came: Figures = {
        "training": {k: v for k, v in result.summary().items() if k != "folder"},
        "steps_per_second": round(result.steps / result.seconds, 4) if result.seconds else None,
    }
    if job.split == "none":
        return came | {"step_seconds": timed.warm}
    tuned = result.tuned or open_tuned(folder)
    examples = load_split(recipe.data, job.split)
    began = time.perf_counter()
    measured = evaluate(tuned, recipe.data, recipe.evaluate, examples=examples, variants=["tuned"], progress=False)
    came |= _scored(job, runs, measured, examples, tuned.classes)
    came["evaluation_seconds"] = round(time.perf_counter() - began, 3)
    if job.cost:
        from dual_lora.lab.study.use_cost import use_cost

        came["use"], came["use_problems"] = use_cost(tuned, examples, recipe)
    return came


def _base(job: Job, runs: Path) -> Figures:
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.opened import Tuned
    from dual_lora.lab.run.evaluate import evaluate

    recipe = job.recipe
    loaded = load_model(recipe.model)
    weights = weights_digest(recipe.model)  # only now a hub's are here
    examples = load_split(recipe.data, job.split)
    tuned = Tuned(loaded.model, loaded.tokenizer, recipe.model.path)
    measured = evaluate(tuned, recipe.data, recipe.evaluate, examples=examples, variants=["base"], progress=False)
    return (
        _scored(job, runs, measured, examples, [])
        | _constant_answer_scores(job.metric, examples)
        | {"weights": weights}
    )


def _constant_answer_scores(metric: str, examples: list[Any]) -> dict[str, float]:
    """Return the best accuracy of one constant answer, for metrics of right and wrong."""
    if metric not in ("choice", "exact_match"):
        return {}
    parts: dict[str, Counter[str]] = {}
    for example in examples:
        parts.setdefault(example.part, Counter())[example.target] += 1
    most = [targets.most_common(1)[0][1] / targets.total() for targets in parts.values()]
    return {"constant": sum(most) / len(most)}


def _scored(job: Job, runs: Path, measured: Any, examples: list[Any], classes: list[str]) -> Figures:
    labels = [example.label for example in examples]
    prompts = [repr(example.prompt) for example in examples] if examples[0].messages else []
    other = [item for item in measured.items if item.get("task") == "forgetting"]
    own = [item for item in measured.items if item.get("task") != "forgetting"]
    shares = metrics.features(job.metric, own, labels, classes, prompts)
    counts = _item_weights(examples, len(shares))
    shares = [[count * x for x in row] for count, row in zip(counts, shares, strict=True)]
    if metrics.is_share(job.metric) and len(set(counts)) > 1:
        shares = [[*row, count] for count, row in zip(counts, shares, strict=True)]  # for `metrics.reach`
    score = metrics.value(job.metric, np.asarray(shares, dtype=np.float64).mean(0), len(shares))
    (figures,) = measured.metrics.values()
    if not math.isfinite(score) or not _all_finite(figures, measured.items):
        raise NotFinite(f"The {job.metric} is {score:g}, or comes from figures that are not finite.")
    if other:
        texts = [[item["base_nats"], item["nats"], item["tokens"]] for item in other]
        write_json(run_file(runs, job.key, "forgetting"), texts)
    write_json(run_file(runs, job.key, "scores"), shares)
    return {"score": score, "metric": job.metric, "figures": figures, "items": len(shares)}


def _item_weights(examples: list[Any], items: int) -> list[float]:
    """Return the items' weights, with mean 1: each of several test sets has the same weight, whatever its size."""
    sizes = Counter(example.part for example in examples)
    if len(sizes) == 1:
        return [1.0] * items
    return [items / (len(sizes) * sizes[example.part]) for example in examples]


def _all_finite(figures: dict[str, float], items: list[dict[str, Any]]) -> bool:
    """A model of NaN gives every item its first class or choice, which may well be right: look at what it chose by."""
    chosen_by = [value for item in items for value in item.get("scores", ())]
    return all(map(math.isfinite, figures.values())) and not any(map(math.isnan, chosen_by))


@contextlib.contextmanager
def _kept_warnings(messages: list[str]) -> Iterator[None]:
    """This package's own warnings go into `messages`, for the person who leads the study, wherever the run is done;
    those of libraries go where they went before."""
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, DualLoraWarning):
                show_others(message, category, *rest, **more)
            elif str(message) not in messages:
                messages.append(str(message))

        warnings.filterwarnings("always", category=DualLoraWarning)
        warnings.showwarning = show
        yield


def _tidy(job: Job, folder: Path, keep: str) -> None:
    """Remove checkpoints (the outcome is written), and what the study was not told to keep."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if keep == "all":
        return
    shutil.rmtree(folder / "model", ignore_errors=True)
    if not _keeps_adapter(job, keep):
        shutil.rmtree(folder / "adapter", ignore_errors=True)


def _keeps_adapter(job: Job, keep: str) -> bool:
    """Whether the run's adapter is kept once it is scored."""
    return keep == "all" or (keep != "nothing" and job.kind == "final")
