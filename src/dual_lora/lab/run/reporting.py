"""Reports of a run to W&B, MLflow, TensorBoard or trackio, for whoever asks on the command line.

No recipe can ask for it: a recipe may come from somebody else, and most of these send what a run logs over the network.
"""

import configparser
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import regular

PROJECT = "dual-lora"
PACKAGES = {
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
}
# What `wandb init` and `wandb offline` leave in a working folder, but for the entity: anything, or this alone.
OF_WANDB = {"mode": None, "disabled": None, "project": None, "base_url": "https://api.wandb.ai"}
LARGEST_SETTINGS = 100_000  # bytes


def check_reports(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises UserError for one that is not known, and for one whose package is missing."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"--report-to {name!r} is not known.{suggest(name, PACKAGES)}")
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise UserError(
                f"--report-to {name} needs the package {PACKAGES[name][0]}: `pip install {PACKAGES[name][0]}`."
            )
    if "wandb" in names:
        _check_wandb(Path(os.environ.get("WANDB_DIR") or ".").expanduser())
    return tuple(dict.fromkeys(names))


def _check_wandb(root: Path) -> None:
    """Raise UserError where the working folder has settings of W&B that say where it sends, or what: the folder may be
    a stranger's, and W&B reads them by itself."""
    for file in (root / "wandb" / "settings", root / ".wandb" / "settings"):
        if not os.path.lexists(file):
            continue
        held = configparser.ConfigParser(interpolation=None)
        try:
            held.read_string(regular(file, LARGEST_SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError, configparser.Error) as error:
            raise UserError(f"{file}, which W&B would read, cannot be read: {error}.") from None
        given = {**held.defaults(), **{name: value for part in held.sections() for name, value in held[part].items()}}
        if others := [name for name, value in given.items() if OF_WANDB.get(name, "") not in (None, value)]:
            raise UserError(
                f"{file} sets {others[0]}. Nothing was sent, because the file may be a stranger's and could redirect "
                "what W&B sends. If the setting is yours, move it from that file to the environment (such as "
                "WANDB_BASE_URL or WANDB_ENTITY)."
            )


@contextlib.contextmanager
def reported(to: Sequence[str], task: str, run: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Fields of TrainingArguments for a report, with its names in the environment while the run goes on.

    to: see `check_reports`. task, run: its names, the same for the same task and run, whenever it is started.
    What the user has set in the environment stays. A resumed run goes on under its own identifier.
    """
    if not to:
        yield {"report_to": []}
        return
    known = hashlib.sha256(f"{task}\n{run}\n{folder.resolve()}".encode()).hexdigest()[:12]
    names = {
        "WANDB_PROJECT": PROJECT,
        "WANDB_RUN_GROUP": task,
        "WANDB_RUN_ID": known,
        "WANDB_RESUME": "allow",
        "MLFLOW_EXPERIMENT_NAME": f"{PROJECT}/{task}",
        "MLFLOW_TAGS": json.dumps({"task": task, "run": known}),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
    }
    if "mlflow" in to:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", names["MLFLOW_EXPERIMENT_NAME"])
        if earlier := _in_mlflow(experiment, known):
            names["MLFLOW_RUN_ID"] = earlier
    added = {name: value for name, value in names.items() if name not in os.environ}
    os.environ |= added
    try:
        yield {
            "report_to": list(to),
            # trackio takes two runs of one name for one
            "run_name": f"{task}/{run}" + (f"-{known}" if "trackio" in to else ""),
            "project": PROJECT,
            "trackio_static_space_id": False,  # its dashboard stays on this machine
        }
    finally:
        for name in added:
            os.environ.pop(name, None)
        for name in to:  # a second run in this process is one of its own
            module = sys.modules.get(name)
            if name == "wandb" and getattr(module, "run", None) is not None:
                module.finish()  # type: ignore[union-attr]


def _in_mlflow(experiment: str, tag: str) -> str | None:
    """Return the identifier that MLflow gave to the run with our tag; None if there is no such run."""
    mlflow = importlib.import_module("mlflow")  # the user's choice, as the others are: no extra of ours
    found = mlflow.search_runs(
        experiment_names=[experiment], filter_string=f"tags.run = '{tag}'", max_results=1, output_format="list"
    )
    return found[0].info.run_id if found else None
