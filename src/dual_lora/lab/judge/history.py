"""The differences that a public table of single runs can show: PEFT's method comparison, read from its git history.

PEFT reruns its experiments at one seed, now and then, all of them together (a campaign). So its history has what its
table has not: how far a rerun of the same experiment lies from the first.

    accuracy = experiment + campaign + noise        least squares; sd of the noise from the residuals

What all runs of a campaign have in common (another PyTorch, another machine) is no noise of a comparison within it. Of
each experiment the last run is ranked, among those of the last campaign. Two of them differ where their distance is
above that of all pairs, so that in about 95 % of such tables no pair is told apart wrongly.

This distance is Tukey's (the studentised range) where the noise is normal. PEFT's is not: some reruns lie farther off.
By Tukey's alone a pair would be told apart wrongly in a third of tables with noise like these residuals. So it is the
range of Student's t, whose degrees of freedom give the residuals' kurtosis, with one standard error more. On the design
of PEFT's history that is wrong in 1 % of tables with normal noise, in 4 % with noise like the residuals, and in 9 %
where the noise has t with 4 degrees of freedom.

Sources: https://github.com/huggingface/peft/tree/main/method_comparison, Tukey 1949, Hsu 1996 (intervals of ranks).
"""

import csv
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import integrate, optimize, special, stats

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import make_folder, write_output
from dual_lora.lab.judge.objects import objects_of
from dual_lora.lab.read import opened, parse_json
from dual_lora.lab.report.blocks import Axis, Block, Chart, Page, Section, Table, Text, View
from dual_lora.lab.report.columns import Column
from dual_lora.lab.report.page import render

RESULTS = "method_comparison/MetaMathQA/results"
COLUMNS = ("experiment", "date", "accuracy", "settings")
PAUSE = 30  # days without a run, between two campaigns
LEAST = 0.1  # of accuracy: a model that hardly answers has no noise to show
MOST = 2000  # results: the fit of their noise has so many equations, and PEFT's history had 184
LONGEST = 10_000_000  # bytes of a result
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}(/[\w.+-]{1,100}){0,3}", re.ASCII)
_SETTINGS = re.compile(r"[0-9a-f]{8}")
LATER = {"init_kv_cache_prefix", "attn_implementation", "use_gc"}  # fields that came in between, no change of settings


class Run(NamedTuple):
    """One public result. settings: a hash of what it was trained with, so that a changed experiment is another one."""

    experiment: str
    date: str
    accuracy: float
    settings: str


@dataclass(frozen=True)
class Place:
    """An experiment's place in the last campaign. first, last: its rank may be anything from one to the other.

    groups: letters of the groups it belongs to; two experiments with a letter in common are not told apart.
    """

    experiment: str
    accuracy: float
    runs: int
    first: int
    last: int
    groups: str


@dataclass(frozen=True)
class Standing:
    """The state of the history. sd: of a rerun within a campaign, on df degrees of freedom; raw: with what campaigns
    add.

    kurtosis: of the noise, with one standard error more; that of a normal one is 0.
    shifts: what each campaign adds to all, against the last. apart: two runs that were chosen beforehand differ from
    here on; apart_all: any two of the table.
    """

    runs: int
    experiments: int
    repeated: int
    sd: float
    df: int
    raw: float
    kurtosis: float
    shifts: dict[str, float]
    apart: float
    apart_all: float
    places: list[Place]


def read_history(source: Path) -> list[Run]:
    """All results in a git history (a clone of PEFT, or its bare git directory), or in a table that `extract` wrote.

    Raises UserError for a folder without such a history, and for a table with other columns or other rows.
    """
    found = _in_table(source) if source.is_file() else _in_history(source)
    if not found:
        raise UserError(f"{source} has no {RESULTS} in its history: give a clone of huggingface/peft with its history.")
    if len(found) > MOST:
        raise UserError(f"{source} holds {len(found):,} results, and at most {MOST:,} are compared.")
    return sorted(found)


def _in_table(file: Path) -> set[Run]:
    with opened(file) as lines:
        rows = csv.DictReader(lines)
        try:
            if set(rows.fieldnames or ()) != set(COLUMNS):
                raise UserError(f"{file} has the columns {rows.fieldnames!s:.200}: expected {COLUMNS}.")
            return {_checked_run(*(row[name] for name in COLUMNS)) for row in rows}
        except (csv.Error, ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}, line {rows.line_num}: {error}.") from None


def _in_history(folder: Path) -> set[Run]:
    blobs: dict[str, None] = {}
    with objects_of(folder) as (git, tip):
        for commit in git("log", "--format=%H", tip, "--", RESULTS).decode().split():
            for line in git("ls-tree", "-lz", commit, f"{RESULTS}/").decode(errors="replace").split("\0")[:-1]:
                about, _, name = line.partition("\t")
                _, kind, blob, size = about.split()
                if (
                    kind == "blob" and name.endswith(".json") and (size == "BAD" or int(size) <= LONGEST)
                ):  # BAD: missing
                    blobs[blob] = None
        texts = (git("cat-file", "blob", blob).decode(errors="replace") for blob in blobs)
        return {run for text in texts if (run := _run(text)) is not None}


def _run(text: str) -> Run | None:
    """A result that ended well; None for any other file."""
    try:
        result = parse_json(text)
        run, train = result["run_info"], result["train_info"]
        if train["status"] != "success":
            return None
        used = {name: value for name, value in run["train_config"].items() if name not in LATER}
        main = {name: used.get(name) for name in ("model_id", "optimizer_type", "optimizer_kwargs", "lr_scheduler")}
        main |= {name: used.get(name) for name in ("max_steps", "batch_size", "seed", "dtype", "max_seq_length")}
        settings = hashlib.sha256(json.dumps(main, sort_keys=True).encode()).hexdigest()[:8]
        accuracy = train["metrics"][-1]["test accuracy"]
        return _checked_run(str(run["experiment_name"]), str(run["created_at"])[:10], accuracy, settings)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _checked_run(experiment: str, day: str, accuracy: Any, settings: str) -> Run:
    """Raises ValueError for what cannot be one of PEFT's results. A name has no character that means something to a
    spreadsheet or a terminal."""
    if not (_NAME.fullmatch(experiment) and _SETTINGS.fullmatch(settings)):
        raise ValueError(f"{experiment!r:.100} {settings!r:.20} is no name of an experiment with its settings' hash")
    date.fromisoformat(day)
    try:
        share = float(accuracy)
    except OverflowError:
        share = math.inf
    if not 0 <= share <= 1:
        raise ValueError(f"the accuracy {accuracy!r:.40} is no share")
    return Run(experiment, day, round(share, 6), settings)


def extract(runs: Iterable[Run], file: Path) -> None:
    """Write the results as a small table."""
    lines = [",".join(COLUMNS), *(f"{r.experiment},{r.date},{r.accuracy:.6g},{r.settings}" for r in runs)]
    write_output(file, "\n".join(lines) + "\n")


def standing(runs: Sequence[Run], level: float = 0.05) -> Standing:
    """The noise of a rerun, and what it leaves of the last table. Raises UserError where nothing was run twice."""
    campaigns = _campaigns(runs)
    kept = [r for r in runs if r.accuracy >= LEAST]
    names = sorted({(r.experiment, r.settings) for r in kept})
    times = sorted(set(campaigns.values()))
    design = np.zeros((len(kept), len(names) + len(times)))
    for i, r in enumerate(kept):
        design[i, names.index((r.experiment, r.settings))] = 1
        design[i, len(names) + times.index(campaigns[r.date])] = 1
    design = np.delete(design, len(names) + len(times) - 1, 1)  # the last campaign is what all are measured against
    y = np.array([r.accuracy for r in kept])
    fit, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df, many = len(kept) - int(rank), len(kept) - len(names)
    if df < 2:
        raise UserError(f"{len(kept)} results of {len(names)} experiments: too few of them were run again.")
    residuals = y - design @ fit
    sd = float(np.sqrt((residuals**2).sum() / df))
    tails = _kurtosis(design, residuals)
    by_name: dict[tuple[str, str], list[float]] = {}
    for r in kept:
        by_name.setdefault((r.experiment, r.settings), []).append(r.accuracy)
    raw = float(np.sqrt(sum(((np.array(v) - np.mean(v)) ** 2).sum() for v in by_name.values()) / many))
    shifts = dict(zip(times, [*fit[len(names) :].tolist(), 0.0], strict=True))
    last = {r.experiment: r for r in runs if campaigns[r.date] == times[-1]}  # sorted by date: the last run of each
    table = sorted(last.values(), key=lambda r: -r.accuracy)
    apart_all = _range_quantile(len(table), df, level, tails) * sd
    scores = np.array([r.accuracy for r in table])
    letters = _groups(scores, apart_all)
    places = [
        Place(
            r.experiment,
            r.accuracy,
            len(by_name.get((r.experiment, r.settings), [r])),
            1 + int((scores - r.accuracy > apart_all).sum()),
            len(table) - int((r.accuracy - scores > apart_all).sum()),
            letters[i],
        )
        for i, r in enumerate(table)
    ]
    repeated = sum(len(v) > 1 for v in by_name.values())
    apart = float(stats.t.isf(level / 2, df)) * np.sqrt(2) * sd
    return Standing(len(kept), len(names), repeated, sd, df, raw, tails, shifts, float(apart), apart_all, places)


def _kurtosis(design: np.ndarray, residuals: np.ndarray) -> float:
    """Excess kurtosis of the noise behind these residuals of a fit, 0 at least, and one standard error more.

    A residual is a sum of many runs' noise, which has less of it. So the residuals' is divided by what such sums keep.
    """
    left = np.eye(len(residuals)) - design @ np.linalg.pinv(design)
    share = np.diag(left)
    known = share > 1e-9  # a run that was never repeated has no residual
    if not residuals.any():
        return 0.0
    z = residuals[known] / np.sqrt(share[known])
    kept = float(((left[known] ** 4).sum(1) / share[known] ** 2).mean())
    seen = float((z**4).mean() / (z**2).mean() ** 2) - 3
    return max(seen + math.sqrt(24 / len(z)), 0.0) / kept


@functools.cache
def _tukey_quantile(many: int, df: int, level: float) -> float:
    return float(stats.studentized_range.ppf(1 - level, many, df))


def _range_quantile(many: int, df: int, level: float, tails: float) -> float:
    """The quantile of the range of so many runs, in estimated deviations on df degrees of freedom: Tukey's, times what
    noise of this kurtosis adds to a range (that of Student's t, against normal noise)."""
    tukey = _tukey_quantile(many, df, level)
    if tails <= 0:
        return tukey
    nu = 4 + 6 / tails
    heavy = _quantile_of_range(many, nu, level) * math.sqrt((nu - 2) / nu)
    return tukey * max(heavy / _quantile_of_range(many, math.inf, level), 1.0)


@functools.cache
def _quantile_of_range(many: int, nu: float, level: float) -> float:
    """The distance that the range of so many draws of Student's t exceeds with this probability."""
    at = np.sinh(np.linspace(-6, 6, 1001))  # fine in the middle, and far out
    below, density = special.stdtr(nu, at), stats.t.pdf(at, nu)

    def above(width: float) -> float:
        inside = np.clip(special.stdtr(nu, at + width) - below, 0.0, 1.0)
        return 1 - level - many * float(integrate.trapezoid(density * inside ** (many - 1), at))

    return float(optimize.brentq(above, 0.0, 400.0, rtol=1e-6))


def _campaigns(runs: Sequence[Run]) -> dict[str, str]:
    """Date -> the first date of its campaign."""
    found: dict[str, str] = {}
    before = start = ""
    for day in sorted({r.date for r in runs}):
        if not before or (date.fromisoformat(day) - date.fromisoformat(before)).days > PAUSE:
            start = day
        found[day], before = start, day
    return found


def _groups(scores: np.ndarray, apart: float) -> list[str]:
    """Letters of the groups of falling scores: each group is as long as its ends are not told apart."""
    ends = [int((scores[i] - scores <= apart).sum()) for i in range(len(scores))]
    starts = [i for i in range(len(scores)) if i == 0 or ends[i] > ends[i - 1]]
    letters = [chr(ord("a") + n) if n < 26 else f"({n})" for n in range(len(starts))]
    return ["".join(x for x, s in zip(letters, starts, strict=True) if s <= i < ends[s]) for i in range(len(scores))]


def page_of(s: Standing, source: str) -> str:
    """One static page: the noise, the places with their intervals, the groups."""
    tied = sum(p.first == 1 for p in s.places)
    lead = (
        f"One rerun of the same experiment has a standard deviation of {100 * s.sd:.2f} points within a campaign. Two "
        f"runs that were chosen beforehand differ from {100 * s.apart:.1f} points on, any two of the table from "
        f"{100 * s.apart_all:.1f}. {tied} of {len(s.places)} experiments are not told apart from the first."
    )
    about = (
        f"{s.runs} results of {s.experiments} experiments, {s.repeated} of them run more than once, all at one seed; "
        f"{s.df} degrees of freedom. Campaigns differ as a whole: without that the deviation would be "
        f"{100 * s.raw:.2f} points. The distance of any two allows for reruns farther off than normal noise lies "
        f"(excess kurtosis {s.kurtosis:.1f}, with one standard error more). Against the last campaign: "
        + ", ".join(f"{day} {100 * shift:+.1f}" for day, shift in list(s.shifts.items())[:-1])
        + f". Results below {LEAST:.0%} are not counted for the noise: a model that hardly answers has none."
    )
    half = s.apart_all / 2
    points = [
        {"label": p.experiment, "x": p.accuracy, "low": p.accuracy - half, "high": p.accuracy + half}
        | {"note": f"place {p.first} to {p.last}"}
        for p in s.places
    ]
    rows = [
        {"experiment": p.experiment, "accuracy": p.accuracy, "places": f"{p.first} to {p.last}", "groups": p.groups}
        | {"runs": p.runs}
        for p in s.places
    ]
    named = [
        Column("experiment", "experiment"),
        Column("accuracy", "test accuracy", ".2%"),
        Column("places", "place", help="from and to: simultaneous 95 % intervals"),
        Column("groups", "groups", help="experiments with a letter in common are not told apart"),
        Column("runs", "runs", "g", "results of the same experiment in the history"),
    ]
    view = View("", Axis("test accuracy", form="%"), Axis(""), points)
    note = "Bars are half of the distance from which any two are told apart: two that overlap are not."
    blocks: list[Block] = [
        Text(lead, "lead"),
        Text(about),
        Table("Places", named, rows),
        Chart("Accuracies of the last campaign", "intervals", [view], note),
        Text(f"Source: {source}. One seed, so this is the noise of a rerun, not of a seed: that is larger.", "note"),
    ]
    return render(Page("PEFT's method comparison: what it can tell apart", [Section("MetaMathQA", blocks, "PEFT")]))


def write_page(source: Path, out: Path) -> Standing:
    """Read the history, and write its page and its table (results.csv) into `out`."""
    runs = read_history(source)
    found = standing(runs)
    make_folder(out)
    extract(runs, out / "results.csv")
    origin = f"https://github.com/huggingface/peft, {RESULTS}, {len(runs)} results until {max(r.date for r in runs)}"
    write_output(out / "index.html", page_of(found, origin))
    return found
