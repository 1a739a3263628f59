"""`dual-lora advise`: make the paired study as long as the minutes allow, run it, and say what follows.

What lies in the folder is an ordinary study: `compare` goes on with it, `report` and `rejudge` read it. Next to it
stands `recommended.yaml`, the recipe with the method and the learning rate that were found best.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dual_lora.lab.advise import pace
from dual_lora.lab.advise.advice import Advice, advice_of
from dual_lora.lab.advise.paired import length_of, paired_study, recipe_of, with_length
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import write_atomically
from dual_lora.lab.progress import Bar, console
from dual_lora.lab.read import read_json, unlinked
from dual_lora.lab.recipe.read import changed
from dual_lora.lab.study.cell import Cell, pace_job
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.execute import Options, run_jobs
from dual_lora.lab.study.folder import StudyFolder, study_folder
from dual_lora.lab.study.forecast import Forecast, Speed, forecast
from dual_lora.lab.study.job import Job, Outcome, read_outcome
from dual_lora.lab.study.plan import lay_out, settled_plan
from dual_lora.lab.study.read import build_study
from dual_lora.lab.study.study import Study

RECOMMENDED = "recommended.yaml"
HOPELESS = 4  # times the minutes, by arithmetic: not even a few steps are tried


def folder_of(source: str | Path, out: str | Path | None) -> Path:
    """Return the study's folder: one folder a recipe, in which more minutes add to what is there."""
    return study_folder(f"advise-{recipe_of(source)[1].name}", out)


def advise(
    source: str | Path,
    minutes: float,
    out: str | Path | None = None,
    *,
    metric: str | None = None,
    margin: float | None = None,
    progress: bool = True,
) -> Advice:
    """Run the paired study of a recipe in `out`, and say which method to use. Called again, it goes on; with more
    minutes it takes the next look, with more seeds.

    metric: that judges, the recipe's first evaluation unless told. margin: the difference that is too small to matter.
    Raises UserError for everything that a person can put right, too few minutes among it, and for runs that failed.
    """
    made = _AdviceStudy(source, minutes, out, metric, margin)
    study = made.next or made.begun or made.measured_study(progress)
    if progress and (outlook := made.outlook(study)):
        console.print(outlook, markup=False)
    results = compare(study, made.folder.path, longer=made.next is not None, progress=progress)
    if not results["complete"]:
        raise UserError(
            f"There is no advice yet, because {len(results['failed'])} runs failed: {results['failed'][0]} Remove the "
            "cause, and give the same command again."
        )
    advice = advice_of(results, made.whole, made.work, source, minutes, made.folder.path)
    return _with_recipe(source, made, advice)


def plan(
    source: str | Path,
    minutes: float,
    out: str | Path | None = None,
    *,
    metric: str | None = None,
    margin: float | None = None,
) -> Forecast:
    """`--dry-run`: what the study would be, fitted by its first steps if measured already; its time by arithmetic."""
    made = _AdviceStudy(source, minutes, out, metric, margin)
    study = made.next or made.begun or made.estimated_study()
    return replace(forecast(study, made.folder.path), said=made.outlook(study))


class _AdviceStudy:
    """The study of an advice: as it was begun in its folder, or to be fitted to the minutes."""

    def __init__(
        self, source: str | Path, minutes: float, out: str | Path | None, metric: str | None, margin: float | None
    ):
        if not 0 < minutes < 1e6:
            raise UserError(f"--minutes is {minutes:g}, expected a number above 0.")
        self.source, self.minutes = source, minutes
        whole = paired_study(source, metric, margin, pace.LOOK_LEVEL)
        self.folder = StudyFolder(folder_of(source, out)).read()
        _check_same_question(whole, self.folder)
        planned = settled_plan(whole, self.folder)
        self.whole = planned.study
        # What the recipe says today, as long as it was begun: `compare` sees what has changed since.
        known = self.folder.known.study
        self.begun = with_length(self.whole, length_of(build_study(known))) if known else None
        self.cells = lay_out(planned)
        self.runs = self.folder.runs(None)
        self.probes = [pace_job(self.whole, cell) for cell in self.cells]

    @property
    def next(self) -> Study | None:
        """The study of the next look: where the one that was begun has ended, and a longer one fits the minutes."""
        if self.begun is None or not self._all_measured() or not self._complete():
            return None
        before, found = length_of(self.begun), self.work.fitting(60 * self.minutes)
        longer = found is not None and found.steps >= before.steps and found > before
        return with_length(self.whole, found) if found is not None and longer else None

    def _complete(self) -> bool:
        try:
            return bool(read_json(self.folder.path / "results.json")["complete"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def outlook(self, study: Study) -> str:
        """Say what to expect if the methods do not differ, and how many minutes would usually settle it; "" if these
        minutes do."""
        work = self.work
        ((metric, margin),) = self.whole.margin.items()
        wanted = pace.settling_length(work, metric, margin)
        if wanted is None:
            return (
                f"If the methods do not differ, {work.test:,} test records will usually not rule out {margin:g} of "
                f"{metric}, however many minutes there are: give more records, or a larger --margin."
            )
        if wanted <= length_of(study):
            return ""
        needed = pace.minutes_of(work, wanted)
        return (
            f'If the methods do not differ, this will usually end in "not known". --minutes {needed} ({wanted.seeds} '
            f"seeds of {wanted.steps} steps) would usually settle it; it can be given later, and goes on from here."
        )

    @property
    def work(self) -> pace.Work:
        """Return the work that is to be done, at the measured pace; before measurements, at the estimated one."""
        paces = (
            pace.measured_paces(self._measured_runs(), self.runs)
            if self._all_measured()
            else pace.estimated_paces(self.cells, Speed())
        )
        return pace.work_of(self.cells, paces)

    def measured_study(self, progress: bool) -> Study:
        """The study that fits, by measured steps."""
        if not self._all_measured():
            guess = self.work
            bare = guess._replace(paces=tuple(p._replace(start=0.0) for p in guess.paces))  # the start is a wild guess
            if bare.seconds(guess.least) > HOPELESS * 60 * self.minutes:
                raise pace.too_few_minutes(self.source, self.minutes, guess, 0.0, Speed().basis)
            _measure(self.probes, self.runs, progress)
        spent = sum(outcome.seconds for _, outcome in self._measured_runs())
        return self._study_of_length(spent, f"a few measured steps of each in {self.folder.path}")

    def estimated_study(self) -> Study:
        """The study that fits, without running anything."""
        return self._study_of_length(0.0, "a few measured steps of each" if self._all_measured() else Speed().basis)

    def _study_of_length(self, spent: float, basis: str) -> Study:
        """The study as long as the minutes allow. Raises UserError where they are too few, saying how many it takes."""
        work = self.work
        if (length := work.fitting(60 * self.minutes - spent)) is None:
            raise pace.too_few_minutes(self.source, self.minutes, work, spent, basis)
        return with_length(self.whole, length)

    def _measured_runs(self) -> list[tuple[Job, Outcome]]:
        found = [(job, read_outcome(self.runs, job.key)) for job in self.probes]
        return [(job, outcome) for job, outcome in found if outcome is not None]

    def _all_measured(self) -> bool:
        return len(self._measured_runs()) == len(self.probes)


def _check_same_question(whole: Study, folder: StudyFolder) -> None:
    """Raise UserError where the folder holds another study than this one, however long."""
    if not folder.known.study:
        return
    known = build_study(folder.known.study, f"{folder.path}/study.json")
    if (known.name, known.question, known.margin) != (whole.name, whole.question, whole.margin):
        raise UserError(
            f"{folder.path} holds another study: {known.name}, {known.question!r}. Give the same recipe and --margin "
            "to go on with it, or another --out."
        )
    train, now = known.overrides.get("train"), length_of(whole).steps
    begun = train.get("steps") if isinstance(train, dict) else None
    if type(begun) is not int or begun < 1:
        raise UserError(
            f"{folder.path}/study.json says {begun!r:.100} of the steps of its runs, expected 1 or more: it was "
            "changed since it was begun. Give another --out."
        )
    if len(known.seeds) > pace.LOOKS[-1]:
        raise UserError(
            f"{folder.path}/study.json has {len(known.seeds):,} seeds, expected at most {pace.LOOKS[-1]}: it was "
            "changed since it was begun. Give another --out."
        )
    if begun > now:
        raise UserError(
            f"The runs in {folder.path} have {begun} steps, and the recipe has {now} now. Give --out for a new study, "
            f"or {begun} steps in the recipe to go on."
        )


def _measure(jobs: Sequence[Job], runs: Path, progress: bool) -> None:
    """A few steps of each method. Raises UserError where they fail."""
    with Bar("measuring", len(jobs), progress, timed=False) as bar:
        for done, (key, outcome, error) in enumerate(run_jobs(Options(progress=progress), jobs, runs), 1):
            job = next(job for job in jobs if job.key == key)
            if outcome is None:
                raise UserError(f"The first steps of {job.method} failed: {error}")
            bar.to(done, f"{job.method}: a few steps")


def _with_recipe(source: str | Path, made: _AdviceStudy, advice: Advice) -> Advice:
    """The advice with its recipe written: in place of an earlier answer's, but of nothing that the user has changed."""
    file = made.folder.path / RECOMMENDED
    if os.path.lexists(file) and not _is_unchanged(file):
        kept = f"{file} is not as advise has written it, and stays so: move it away and give the same command again"
        return replace(advice, notes=[*advice.notes, f"{kept} for a new one."])
    if advice.use is None:
        file.unlink(missing_ok=True)
    else:
        write_atomically(file, _with_checksum(_recommended_recipe(source, made, advice)))
    return advice


def _recommended_recipe(source: str | Path, made: _AdviceStudy, advice: Advice) -> str:
    """The recipe with the method that was found best, at its own number of steps."""
    cell: Cell = next(cell for cell in made.cells if cell.method == advice.use)
    recipe = recipe_of(source)[1].replaced(origin=None, method=cell.recipe.method)
    return changed(recipe, {"train": {"learning_rate": advice.rate}}).to_yaml()


def _with_checksum(text: str) -> str:
    """The text below a line that tells whether somebody has changed it since."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"# Written by dual-lora advise, which keeps it once it is changed ({digest}).\n{text}"


def _is_unchanged(file: Path) -> bool:
    try:
        text = unlinked(file).read_bytes().decode()
    except (OSError, ValueError):  # a link, a folder, no text
        return False
    return text == _with_checksum(text.partition("\n")[2])
