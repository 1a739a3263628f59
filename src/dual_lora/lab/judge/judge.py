"""Judge scores that others made: the same tests, words, notes, files and page as a study has.

from dual_lora.lab.judge.judge import judge
results = judge("scores.csv", reference="lora", margin=0.01)
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import make_folder, text_of_json, write_output
from dual_lora.lab.judge import packed
from dual_lora.lab.judge.copies import copied, one_under_several_names, repeated, repeated_items
from dual_lora.lab.judge.lm_eval import read_lm_eval, sample_files
from dual_lora.lab.judge.peft import read_peft, result_files
from dual_lora.lab.judge.scores import WHOLE, Runs, Scenario, Scores, one_metric, read_table, reference_of, tables
from dual_lora.lab.read import read_json
from dual_lora.lab.study import metrics, verdicts
from dual_lora.lab.study import results as results_of_studies
from dual_lora.lab.study.conclude import conclude
from dual_lora.lab.study.job import task_name
from dual_lora.lab.study.notes import level_here
from dual_lora.lab.study.rows import MethodRow, Results
from dual_lora.lab.study.study import Study

TUNED = (
    "How the methods were tuned is not known here: the verdicts hold for the settings that these runs had, not for "
    "what another search would choose."
)
WHOLE_ONLY = (
    "There is one score a run, none for each test item: the verdicts hold for these test items and other seeds, not "
    "for other items."
)
MOST_COMPARISONS = 5000  # which are tested together; some seconds a thousand
FEW = 11  # values, from none to ten tenths; with fewer items than that no more than one less than there are
# Words in the name of a metric of which there should be less, and of which there should be more.
LESS = set("loss nll entropy perplexity ppl bits mse mae rmse error wer cer brier".split())  # noqa: SIM905
MORE = set("accuracy acc exact match f1 recall precision bleu rouge matthews mcc pearson auc".split())  # noqa: SIM905
# With one of these a name is that of a distance or a change, of which more may be either.
TURNED = set(
    "gap drop gain change difference diff delta rise fall decline decrease increase reduction inverse not".split()  # noqa: SIM905
)


def judge(
    source: str | Path,
    *,
    reference: str | None = None,
    metric: str | None = None,
    better: Literal["more", "less"] | None = None,
    margin: float | None = None,
    level: float = 0.05,
    out: str | Path | None = None,
) -> Results:
    """Read the scores, judge them, and return what a study's results.json holds; written into `out` if given.

    reference: the method that all others are compared with, the first one if left out. metric: needed where the source
    has several. better: of the metric; left out, what the source or the metric's name says, else more. margin: the
    difference that is too small to matter, in the metric's unit; without one, equivalence is not asked.
    Raises UserError, in a sentence, for everything that is wrong with the scores.
    """
    path = Path(source)
    if not 0 < level < 0.5:
        raise UserError(f"The level is {level}, expected a share above 0 and below 0.5, such as 0.05.")
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"The margin is {margin}, expected a positive number in the metric's unit, or none.")
    scores = read(path)
    chosen = one_metric(scores, metric)
    direction, guessed = _directions(chosen, scores, better)
    paired = tables(scores.rows)
    if (count := sum(len(own) - 1 for own in paired.values())) > MOST_COMPARISONS:
        raise UserError(f"{path} asks for {count:,} comparisons, at most {MOST_COMPARISONS:,} are made at once.")
    copies = list(copied(paired))
    methods = list(dict.fromkeys(row.method for row in scores.rows))
    against = reference_of(methods, reference)
    _check_scored(against, paired)
    study = _study(path, paired, methods, against, level)
    rows: list[MethodRow] = []
    pairs: list[verdicts.Comparison] = []
    for at, own in paired.items():
        by = chosen[at], direction[at]
        rows += [_method(at, method, runs, *by, scores.costs.get((at, method))) for method, runs in own.items()]
        pairs += _pairs(at, own, against, *by, margin, level)
    conclusion = conclude(study, pairs, rows, [])
    whole = any(runs.items == [WHOLE] for own in paired.values() for runs in own.values())
    results: Results = {
        "format": results_of_studies.RESULTS_FORMAT,
        "study": study.model_dump(mode="json"),
        "complete": True,
        "methods": rows,
        "comparisons": conclusion.comparisons,
        "false_alarm": conclusion.false_alarm,
        "pareto": results_of_studies.pareto(rows),
        "notes": [
            *(note for note in conclusion.notes if not note.startswith("Chance of any")),
            *level_here(conclusion.false_alarm, level),
            *([TUNED] + [WHOLE_ONLY] * whole) * any(c["p"] is not None for c in conclusion.comparisons),
            *_one_seed_note(paired),
            *guessed,
            *_other_units(paired),
            *repeated(paired, against),
            *copies,
            *one_under_several_names(paired),
            *repeated_items(paired),
            *_missing_methods_notes(paired, methods),
            *scores.notes,
        ],
        "untrained": [],
        "failed": [],
        "provenance": _provenance(path),
        "judged_from": path.name,
    }
    if out is not None:
        file = _free_output(Path(out) / "results.json")
        make_folder(file.parent)
        write_output(file, text_of_json(results))
    return results


def _check_scored(method: str, paired: Mapping[Scenario, Mapping[str, Runs]]) -> None:
    for scenario, own in paired.items():
        if method not in own:
            raise UserError(
                f"{method}, which the others are compared with, has no score on {task_name(*scenario)}: choose "
                "another with --reference, or leave that task out."
            )


def read(path: Path) -> Scores:
    """The scores in a table, or in a folder of lm-eval's samples or of PEFT's results."""
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        scores = read_table(path)
    elif path.is_file():
        raise UserError(f"{path} is no .csv or .tsv table: give one, or a folder of lm-eval's or PEFT's results.")
    elif not path.is_dir():
        raise UserError(f"There is no {path}: give a .csv or .tsv file, or a folder of lm-eval's or PEFT's results.")
    elif (path / packed.PACKED).is_file():
        scores = packed.read_packed(path)
    elif sample_files(path):
        scores = read_lm_eval(path)
    elif result_files(path):
        scores = read_peft(path)
    else:
        raise UserError(
            f"{path} holds no scores: expected samples_*.jsonl of lm-eval (`--log_samples`), METHOD/SEED/ below it, or "
            "the JSON results of PEFT's method comparison."
        )
    if not scores.rows:
        raise UserError(f"{path} holds no scores." + (f" {' '.join(scores.notes)}" if scores.notes else ""))
    return scores


def _directions(
    chosen: dict[Scenario, str], scores: Scores, asked: str | None
) -> tuple[dict[Scenario, str], list[str]]:
    """Return which way each scenario's metric is better, and a note on those for which no source says it."""
    found, guessed = {}, dict[str, str]()
    for scenario, metric in chosen.items():
        name = metric.partition(",")[0]
        direction = asked or scores.better.get((scenario[1], name)) or scores.better.get(("", name))
        if direction is None and metric in metrics.METRICS:
            direction = metrics.better(metric)
        if direction is None:
            words = set(re.findall("[a-z0-9]+", name.lower().replace("_", " ")))
            direction = "less" if LESS & words else "more"
            if direction == "less" or not MORE & words or TURNED & words or name.startswith("1-"):
                guessed[metric] = direction
        found[scenario] = direction
    return found, [
        f"Which way {metric} is better was not said: {way} of it is taken as better. If it is the other way, give "
        f"--better {'more' if way == 'less' else 'less'}."
        for metric, way in guessed.items()
    ]


def _other_units(paired: dict[Scenario, dict[str, Runs]]) -> Iterator[str]:
    """Tasks where some runs' scores look like shares and others' like percent, of one method or of several."""
    for scenario, own in paired.items():
        runs = [(m, seed, row) for m, r in own.items() for seed, row in zip(r.seeds, r.table, strict=True)]
        small = [run for run in runs if run[2].min() >= 0 and run[2].max() <= 1]
        large = [run for run in runs if run[2].min() >= 0 and 1 < run[2].max() <= 100]
        if not small or not large:
            continue
        share, percent = (np.median([row.mean() for *_, row in some]) for some in (small, large))
        if max(row.max() for *_, row in large) > 20 or 30 * share <= percent <= 300 * share:
            yield (
                f"On {task_name(*scenario)} the scores of {_named(small, own)} lie between 0 and 1, those of "
                f"{_named(large, own)} go up to 100: are some of them in percent?"
            )


def _named(runs: Sequence[tuple[str, int, Any]], of: Mapping[str, Runs]) -> str:
    """The methods of these runs; with their seeds, where not all are among them."""
    seeds = {method: [str(seed) for m, seed, _ in runs if m == method] for method, *_ in runs}
    return ", ".join(m if len(s) == len(of[m].seeds) else f"{m} (seed {', '.join(s)})" for m, s in seeds.items())


def _missing_methods_notes(paired: dict[Scenario, dict[str, Runs]], methods: list[str]) -> Iterator[str]:
    """A method that diverged on a task may have been left out of it, and looks better by that."""
    lacking = [
        f"{method} on {task_name(*scenario)}" for scenario, own in paired.items() for method in methods
        if method not in own
    ]  # fmt: skip
    if lacking:
        yield (
            f"Without any score, and so not compared: {', '.join(lacking)}. Give a diverged run the worst score of its "
            "task, do not leave it out."
        )


def _study(
    path: Path, paired: dict[Scenario, dict[str, Runs]], methods: list[str], against: str, level: float
) -> Study:
    """The study that these runs would be one of. Its margin stands in the comparisons: the metric may be any."""
    name = re.sub(r"[^\w.\-]+", "-", path.resolve().stem).strip("-") or "scores"
    seeds = sorted({seed for own in paired.values() for runs in own.values() for seed in runs.seeds})
    return Study(
        name=name,
        question=f"What may be said of the scores in {path.name}?",
        tasks={task: {"recipe": path.name} for _, task in paired},  # type: ignore[misc]
        methods={method: {} for method in methods},  # type: ignore[misc]
        models={model: {} for model, _ in paired if model},
        reference=against,
        seeds=seeds,
        level=level,
        cost=False,
    )


def _pairs(
    scenario: Scenario, own: dict[str, Runs], against: str, metric: str, better: str, margin: float | None, level: float
) -> list[verdicts.Comparison]:
    sign = metrics.direction(better)
    reference = sign * own[against].table
    values = np.concatenate([runs.table.ravel() for runs in own.values()])
    whole = own[against].items == [WHOLE]
    if margin is not None and margin >= 1 and values.min() >= 0 and values.max() <= 1:
        raise UserError(
            f"The margin is {margin:g}, and all scores of {task_name(*scenario)} lie between 0 and 1: every method "
            "would be equivalent. Give it in the metric's unit, such as 0.01."
        )
    about: dict[str, Any] = {"task": task_name(*scenario), "scenario": scenario, "metric": metric, "better": better}
    about |= {"margin": margin, "confidence": 1 - level, "scale": float(np.abs(values).max())}
    about["reach"] = None if whole else _reach(values, len(own[against].items))
    return [
        verdicts.compare_pair(sign * runs.table, reference, names=(method, against), **about)
        for method, runs in own.items()
        if method != against
    ]


def _reach(scores: NDArray[np.float64], items: int) -> float | None:
    """Return how far one item can move, where scores are answers: all the same or nothing (right or wrong), or of few
    values (marks, quarters), from 0 on, and of values up to 1 up to there. None where they are measured.
    """
    found = np.unique(scores)
    low, high = min(found[0], 0.0), max(found[-1], 0.0)
    if set(found) <= {0.0, low + high}:
        return float(high - low) or 1.0
    if len(found) > min(FEW, items - 1):
        return None
    return float(high - low) if low < 0 or high > 1 else 1.0


def _method(
    scenario: Scenario, method: str, runs: Runs, metric: str, better: str, cost: dict[str, Any] | None
) -> MethodRow:
    """Return a method's row as `results` has it, with None for what is not known."""
    model, task = scenario
    means = runs.table.mean(1)
    known = cost or {}
    trained, everything = known.get("trainable_parameters"), known.get("all_parameters")
    return {
        "model": model,
        "task": task,
        "method": method,
        "about": "",
        "peft_method": {"name": method},
        "metric": metric,
        "better": better,
        "rank": None,
        "trainable_parameters": trained,
        "base_parameters": everything - trained if trained and everything and everything > trained else everything,
        "mismatch": None,
        "notes": [],
        "settings": None,
        "trials": [],
        "seeds": [
            {
                "seed": seed,
                "key": f"{method} {seed}",
                "status": "done",
                "score": float(mean),
                "seconds": None,
                "figures": None,
            }
            for seed, mean in zip(runs.seeds, means, strict=True)
        ],
        "score": float(means.mean()),
        "score_deviation": float(means.std(ddof=1)) if len(means) > 1 else None,
        "items": None if runs.items == [WHOLE] else len(runs.items),
        "whole": runs.items == [WHOLE],
        "diverged": 0,
        "diverged_in_search": False,
        "cost": {name: known.get(name) for name in results_of_studies.COSTS},
    }


def _one_seed_note(paired: dict[Scenario, dict[str, Runs]]) -> Iterator[str]:
    single = [task_name(*scenario) for scenario, own in paired.items() if len(next(iter(own.values())).seeds) == 1]
    if single:
        yield f"With one seed no winner can be called: there is only one of {', '.join(single)}. Give two, better five."


def _free_output(file: Path) -> Path:
    """The output, unless the results of a study lie there."""
    try:
        judged = "judged_from" in read_json(file)
    except FileNotFoundError:
        return file
    except (OSError, ValueError, TypeError):
        judged = False
    if not judged:
        raise UserError(f"{file} exists and was not written by `dual-lora judge`: give another --out.")
    return file


def _provenance(path: Path) -> dict[str, Any]:
    from dual_lora.lab.run.record import surroundings

    made = surroundings()
    kept = {key: made[key] for key in ("versions", "commit", "command") if key in made}
    return kept | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
