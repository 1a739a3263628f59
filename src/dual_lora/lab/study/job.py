"""One run of a study: what to do (Job), what came of it (Outcome), and the files that hold it.

runs/KEY/              the run's own folder: checkpoints while it goes on, then adapter and record
runs/KEY.json          its outcome, written last and whole: where it is, the run is finished
runs/KEY.scores.json   what every test item adds to the metric
runs/KEY.error.json    why it stopped; removed as soon as it is finished

The key is a hash of what the job says. Equal jobs have equal keys, so nothing that is finished is ever run again.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_json
from dual_lora.lab.model.weights import is_other_base, weights_digest
from dual_lora.lab.read import read_json, unlinked
from dual_lora.lab.recipe.read import identity
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study import metrics

_KEY = re.compile(r"[0-9A-Za-z]+")
JOB_FORMAT = 1  # part of every key: raised when the meaning of a job changes
Kind = Literal["trial", "final", "probe", "base"]
Split = Literal["validation", "test", "none"]
Settings = dict[str, Any]  # train.X or method.X: value


@dataclass(frozen=True)
class Job:
    """A run to do. kind: of a search, compared, measuring a budget, or the model as it is."""

    kind: Kind
    recipe: Recipe
    model: str
    task: str
    method: str
    seed: int
    metric: str
    split: Split  # by which records it is scored
    settings: Settings = field(default_factory=dict)  # what a search varied or chose
    data: dict[str, str] = field(default_factory=dict)  # split: what its files held
    freeze: dict[str, float] = field(default_factory=dict)
    round: Mapping[str, str] = field(default_factory=dict)
    cost: bool = False  # measure what the adapter costs in use
    report_to: tuple[str, ...] = ()  # no part of the key

    @cached_property
    def key(self) -> str:
        """The name that the run is known by: names of methods and tasks are no part of it."""
        same = {name: getattr(self, name) for name in ("kind", "data", "freeze", "round", "metric", "split", "cost")}
        same |= {"format": JOB_FORMAT, "recipe": identity(self.recipe)}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scenario(self) -> tuple[str, str]:
        """Model and task: runs of one scenario are compared with each other."""
        return self.model, self.task

    def __str__(self) -> str:
        where = cell_name(*self.scenario, self.method)
        more = {"trial": f", {settings_in_words(self.settings)}", "final": f", seed {self.seed}"}
        return where + more.get(self.kind, "")


class Training(BaseModel):
    """The cost of training; the file may say more. Seconds, bytes."""

    model_config = ConfigDict(frozen=True, extra="allow")

    seconds: float | None = None
    steps: int = 0
    tokens_per_second: float | None = None
    peak_memory: float | None = None
    adapter_bytes: float | None = None


class Outcome(BaseModel):
    """The outcome of a run. A run that diverged has an outcome, one that stopped with an error has none."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    status: Literal["done", "diverged"]
    seconds: FiniteFloat
    score: FiniteFloat | None = None
    metric: str | None = None
    figures: dict[str, float | None] | None = None  # everything that the evaluation gave
    items: int | None = None  # how many scores are in its other file
    constant: float | None = None  # how often one answer to everything would be right
    training: Training | None = None
    steps_per_second: float | None = None
    step_seconds: float | None = None  # of a probe, without the steps that also warm up
    evaluation_seconds: float | None = None
    use: dict[str, float | None] = {}
    use_problems: dict[str, str] = {}
    warnings: list[str] = []
    error: str | None = None
    runs_at_a_time: int | None = None
    device: str | None = Field(None, max_length=200)
    weights: dict[str, str] = {}  # what the base held, of a run that trains nothing: others have a record that says it
    code: str | None = Field(None, max_length=200, pattern=r"^[^/\\\x00-\x1f]*$")  # the version that did it: no path


def run_file(runs: Path, key: str, what: Literal["", "scores", "forgetting", "error"] = "") -> Path:
    """Return the path of a run's outcome, its items' scores, its losses on other text, or why it stopped."""
    return run_folder(runs, key).with_name(f"{key}.{what}.json" if what else f"{key}.json")


def run_folder(runs: Path, key: Any) -> Path:
    """Return the folder of a run's own files. Raises ValueError for a key, as a stranger's results may have it, that
    leads elsewhere."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{key!r:.100} is no key of a run")
    return runs / key


def write_outcome(runs: Path, outcome: Outcome) -> None:
    """Declare the run finished: everything else that belongs to it has to be on the disk."""
    write_json(run_file(runs, outcome.key), outcome.model_dump(mode="json", exclude_defaults=True))
    run_file(runs, outcome.key, "error").unlink(missing_ok=True)


def read_outcome(runs: Path, key: str) -> Outcome | None:
    """The outcome of a finished run; None if it is not finished, or its files are damaged (see `damage`)."""
    outcome = _read_outcome(runs, key)
    return outcome if isinstance(outcome, Outcome) else None


def on_other_weights(runs: Path) -> Callable[[Job], bool | None]:
    """Function: job → whether its run was made, or begun, on other weights than its base has now; None where nothing
    tells.

    A job's key does not know of them. Each base is looked at once.
    """
    now: dict[tuple[str, str], dict[str, str]] = {}

    def made_on(key: str) -> Any:
        made_of = RunFolder(runs / key).recorded().get("made_of")
        if isinstance(made_of, dict):
            return made_of.get("weights")
        outcome = read_outcome(runs, key)
        return outcome.weights if outcome else None

    def other(job: Job) -> bool | None:
        if job.scenario not in now:
            now[job.scenario] = weights_digest(job.recipe.model)
        return is_other_base(made_on(job.key), now[job.scenario])

    return other


def outcomes_here(runs: Path) -> Callable[[Job], Outcome | None]:
    """Function: job → its outcome; None also for one that was made on other weights than its base has now."""
    other = on_other_weights(runs)
    return lambda job: None if other(job) else read_outcome(runs, job.key)


def damage(runs: Path, key: str) -> str:
    """Say what is wrong with the files of a finished run; "" if nothing is."""
    found = _read_outcome(runs, key)
    return found if isinstance(found, str) else ""


def _read_outcome(runs: Path, key: str) -> Outcome | str | None:
    file = run_file(runs, key)
    if not file.is_file():
        return None
    try:
        outcome = Outcome.model_validate_json(unlinked(file).read_bytes())
    except (OSError, ValueError):
        return f"{file} is damaged."
    if outcome.key != key:
        return f"{file} is the outcome of another run, {outcome.key}."
    own = run_file(runs, key, "scores")
    try:
        scores = None if outcome.items is None else read_scores(runs, key)
    except (OSError, ValueError):
        return f"{own} is damaged or missing."
    if scores is not None and len(scores) != outcome.items:
        return f"{own} is damaged or missing."
    if scores is not None and not _scores_give_value(scores, outcome.metric, outcome.score):
        return f"{own} does not give the {outcome.metric} that {file.name} says."
    forgotten = (outcome.figures or {}).get("forgetting")
    with contextlib.suppress(OSError, ValueError):  # without it, forgetting is not compared
        if not _scores_give_value(read_scores(runs, key, "forgetting"), "forgetting", forgotten):
            return f"{run_file(runs, key, 'forgetting')} does not give the forgetting that {file.name} says."
    return outcome


def _scores_give_value(scores: NDArray[np.float64], metric: str | None, score: float | None) -> bool:
    """Whether the items' scores give the run's score; files of another run would not."""
    if metric is None or score is None:
        return True  # of an earlier version
    try:
        return math.isclose(metrics.value(metric, scores.mean(0), len(scores)), score, rel_tol=1e-6, abs_tol=1e-9)
    except ImportError:  # of what counts n-grams
        return True
    except (ValueError, LookupError, ArithmeticError):
        return False


def read_scores(runs: Path, key: str, what: Literal["scores", "forgetting"] = "scores") -> NDArray[np.float64]:
    """Read what every item of a finished run adds to its metric [N, K]. Raises OSError or ValueError for a broken
    file."""
    try:
        scores = np.asarray(read_json(unlinked(run_file(runs, key, what))), dtype=np.float64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"Not a table of numbers: {error}.") from None
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"Scores of shape {scores.shape}: expected finite ones, [items, what each adds].")
    return scores


def data_digest(recipe: Recipe) -> dict[str, str]:
    """Return digests of the recipe's records and of its text for `forgetting`: a changed file makes another run."""
    from dual_lora.lab.data.records import find, joined

    data = recipe.data
    sources = {split: getattr(data, split) for split in ("train", "validation", "test")}
    sources |= {f"test {name}": source for name, source in data.tests.items()}
    prints = {}
    for split, source in (sources | {"forgetting": recipe.evaluate.forgetting}).items():
        files = [name for name in joined(source or "") if name and not name.startswith("hub:")]
        if found := [_file_digest(find(name)) for name in files]:
            prints[split] = "+".join(found)
    return prints


def check_data(job: Job) -> None:
    """Raise UserError where the job's files are not what they were when it was planned: its key would lie."""
    now = data_digest(job.recipe)
    if changed := [split for split in sorted(now.keys() | job.data.keys()) if now.get(split) != job.data.get(split)]:
        raise UserError(
            f"The data have changed while the study went on ({', '.join(changed)}): its runs would not be of the same "
            "records. Put the files back, or start the study again."
        )


_prints: dict[tuple[Path, int, int], str] = {}


def _file_digest(path: Path) -> str:
    from dual_lora.lab.data.records import stamp

    at = stamp(path)
    if at not in _prints:
        _prints[at] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _prints[at]


def task_name(model: str, task: str) -> str:
    """Return the name of a task with a model in sentences."""
    return f"{task} ({model})" if model else task


def cell_name(model: str, task: str, method: str) -> str:
    """Return the name of a method on a task in sentences."""
    return f"{method} on {task_name(model, task)}"


def settings_in_words(settings: Settings | None) -> str:
    """Say which settings a search tries or chose; "" for None."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in (settings or {}).items()
    )
