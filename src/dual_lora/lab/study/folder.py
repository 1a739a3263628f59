"""A study's folder: what it was begun with, and what was changed since. Plain files, each written whole.

study.json    the plan (study, recipes, data), its hash, the amendments, and the runs known so far
study.yaml    the study for people, and for `dual-lora compare`
study.lock    held by the one process that works on the study
runs/         the runs (see `job`): what is done is known from there alone
results.json  what the study says so far

The plan is hashed and written before the first run. A changed one is refused: it is another study, with a name of its
own, and may share the runs. Only the next look of an advice makes a study longer. That is an amendment: results.json
keeps what changed, when, and how many of the final runs had ended by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from pydantic import BaseModel

from dual_lora.lab import yaml_text
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import OLD, hold, make_folder, remove_remains, write_atomically, write_json
from dual_lora.lab.model.weights import is_other_base, other_settings, short_digest, tensor_digests, warn_of_doubt
from dual_lora.lab.read import read_json, unlinked
from dual_lora.lab.study.job import Job, Kind, Settings, read_outcome, run_file
from dual_lora.lab.study.read import values_in

Plain = dict[str, Any]
WEIGHTS = " weights"  # ends the name of a base's print among the recipes
LONGER = {"seeds", "overrides", "methods"}  # what makes a study longer: seeds, steps, and ramps that follow from them


Changes = dict[str, tuple[Any, Any]]  # of a study after it was begun, field: (old, new)


class Amendment(BaseModel):
    """A change of the study after it was begun: what, when, and how many final runs had ended by then."""

    date: str
    what: str
    ended: int
    of: int
    fields: Changes = {}


def changes(before: dict[str, Any], now: dict[str, Any], inside: Iterable[str] = ("search",)) -> Changes:
    """Return the differing fields, for some (`inside`) field by field. Fields that were not known do not count."""
    pairs: Changes = {}
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if name.endswith(WEIGHTS):
            if is_other_base(old, new) or other_settings(old, new):  # one change, however many tensors tell of it
                pairs[name] = short_digest(old), short_digest(new)
            else:
                warn_of_doubt(old, new, "the study was begun with")
        elif name in inside and isinstance(old, dict) and isinstance(new, dict):
            pairs |= {f"{name}.{key}": pair for key, pair in changes(old, new).items()}
        elif old != new:
            pairs[name] = old, new
    return pairs


def _with_known_bases(before: Plain, now: Plain) -> Plain:
    """Keep digests of bases that are not here (the hub's, with an empty cache): the same ones' from before."""

    def base(recipes: Plain, name: str) -> list[Any]:
        model = recipes.get(f"{name.removesuffix(WEIGHTS)} model") or {}
        return [model.get("path"), model.get("revision")]

    lost = [n for n in now if n.endswith(WEIGHTS) and not tensor_digests(now[n]) and tensor_digests(before.get(n))]
    return {name: before[name] | now[name] for name in lost if base(before, name) == base(now, name)}


class PlanMark(BaseModel):
    """The study as it is to be run. before: final runs that had ended before this plan had any of them done."""

    hash: str = ""
    written: str = ""
    before: int | None = None


class Planned(BaseModel):
    """A run that belongs to the study."""

    kind: Kind
    model: str
    task: str
    method: str
    seed: int
    settings: Settings


class Known(BaseModel):
    """The content of study.json."""

    format: Literal["dual-lora study"] = "dual-lora study"
    study: Plain = {}
    recipes: dict[str, Plain] = {}
    precision: Plain = {}
    runs: str | None = None  # where they lie, if not in the folder
    plan: PlanMark = PlanMark()
    amendments: list[Amendment] = []
    jobs: dict[str, Planned] = {}


def study_folder(name: str, out: str | Path | None = None) -> Path:
    """Where a study lies: at `out`, else in `studies` under its name."""
    return Path(out) if out is not None else Path("studies") / name


class StudyFolder:
    """The folder of one study. As a context manager it is held: another process that wants it is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "study.json"
        self.known = Known()
        self.before: set[str] = set()  # keys of the runs that it knew

    def __enter__(self) -> StudyFolder:
        make_folder(self.path)
        busy = f"Another process is working on the study in {self.path}. Wait for it, or give another --out."
        self._lock = hold(self.path / "study.lock", busy)
        remove_remains(self.path)
        if not (self.path / "runs").is_symlink():
            remove_remains(self.path / "runs", after=OLD)  # which another study may share
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def read(self) -> StudyFolder:
        """Take up what the folder says. Raises UserError for a damaged study.json."""
        self.known = Known()
        if os.path.lexists(self.file):
            try:
                self.known = Known.model_validate_json(unlinked(self.file).read_bytes())
            except (OSError, ValueError):
                raise UserError(
                    f"{self.file} is damaged or another program's. Move it away: study.yaml and the runs are enough to "
                    "go on with. Or give another --out."
                ) from None
        elif (text := self.path / "study.yaml").is_file():
            if not any((self.path / name).exists() for name in ("state.sqlite", "runs", "results.json")):
                raise UserError(f"{text} is not a study of this command and would be replaced: give another --out.")
            self.known.study = values_in(text)  # of an earlier version, or study.json was lost
        return self

    def runs(self, asked: str | Path | None) -> Path:
        """Return the folder of the runs: inside this folder, or the user's. A file cannot name another folder."""
        if asked is not None:
            return Path(asked)
        inside, other = self.path / "runs", self.known.runs
        earlier = (self.path / "state.sqlite").is_file() and not inside.is_dir()
        if other or earlier or inside.is_symlink():
            where = repr(other) if other else "another folder"
            raise UserError(f"The runs of this study lie in {where}, outside of {self.path}: name it with --runs.")
        return inside

    def begin(self, study: Plain, recipes: Plain, precision: Plain, runs: Path, longer: bool = False) -> None:
        """Write the plan. Raises UserError for another one than the study was begun with. longer: the next look of an
        advice, which may have more seeds and steps."""
        known, self.before = self.known, set(self.known.jobs)
        if isinstance(before := known.study.get("search"), dict):
            before.setdefault("extend", 0)  # what an earlier version did
        changed = changes(known.study, study)
        subject = "study has" if changed else "study's recipes or data have"
        recipes = recipes | _with_known_bases(known.recipes, recipes)
        changed |= changes(known.recipes, recipes, recipes)
        if changed.keys() - (LONGER if longer else set()):
            raise UserError(
                f"The {subject} changed since it was started in {self.path}: {', '.join(changed)}. A study keeps the "
                "plan with which it was started. Restore the plan, or give the changed study another name (or another "
                f"--out); with --runs {quote(str(runs))} it takes over the finished runs that are part of both."
            )
        if changed:
            self.amend(f"Changed: {', '.join(changed)}.", runs, changed)
        if changed or not known.plan.hash:
            digest = hashlib.sha256(json.dumps([study, recipes], sort_keys=True).encode()).hexdigest()[:16]
            known.plan = PlanMark(hash=digest, written=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            known.jobs = {}  # of the plan before; those that belong to this one too come again
        if precision and not known.precision:
            known.precision = precision
        where = os.path.relpath(runs, self.path)  # relative: a folder of studies may be moved as a whole
        known.study, known.recipes, known.runs = study, recipes, None if where == "runs" else where
        text = yaml_text.dump(study, sort_keys=False, allow_unicode=True, width=110)
        self.write()  # first: without it a study.yaml is somebody's own
        write_atomically(self.path / "study.yaml", text)

    def amend(self, what: str, runs: Path, fields: Changes | None = None) -> None:
        """Note that the study is no longer as it was begun, and after how many final runs."""
        finals = [key for key, job in self.known.jobs.items() if job.kind == "final"]
        ended = [read_outcome(runs, key) is not None for key in finals]
        today = time.strftime("%Y-%m-%d")
        self.known.amendments.append(
            Amendment(date=today, what=what, ended=sum(ended), of=len(ended), fields=fields or {})
        )

    def plan(self, jobs: Iterable[Job]) -> None:
        """Make runs known, for whoever looks at the study while it goes on."""
        jobs = list(jobs)
        self.known.jobs |= {job.key: Planned.model_validate(job, from_attributes=True) for job in jobs}
        self.write()

    def begin_finals(self, ended: int) -> None:
        """Note how many final runs had ended before this plan had any of them done."""
        if self.known.plan.before is None:
            self.known.plan.before = ended
            self.write()

    def write(self) -> None:
        """Bring study.json up to date."""
        write_json(self.file, self.known.model_dump(mode="json"))


def progress(file: Path) -> Plain | None:
    """A study under way, by its study.json and its runs; None where every run has ended and the results are there."""
    known, runs, rows = Known.model_validate_json(unlinked(file).read_bytes()), file.parent / "runs", []
    inside = not known.runs and not runs.is_symlink()
    for key, job in known.jobs.items():
        row: Plain = {"status": "planned" if inside else "unknown", "job": job.model_dump()}
        row |= dict.fromkeys(("outcome", "error", "seconds"))
        if not inside or not key.isalnum():
            pass
        elif outcome := read_outcome(runs, key):
            kept = outcome.model_dump(exclude={"weights"})
            row |= {"status": outcome.status, "outcome": kept, "seconds": outcome.seconds}
        elif (error := run_file(runs, key, "error")).is_file():
            row |= {"status": "failed", "error": str(read_json(unlinked(error)))}
        elif (runs / key).is_dir():
            row["status"] = "running"
        rows.append(row)
    ended = all(row["status"] in ("done", "diverged") for row in rows)
    return None if ended and (file.parent / "results.json").exists() else {"study": known.study, "runs": rows}
