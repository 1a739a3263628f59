"""Judge a finished study again from its results.json alone, by today's rule and without training.

`python -m dual_lora.lab.study.rejudge results/studies/*/results.json` rewrites the files and prints what changed.

Items' scores are not in results.json, and needn't be: the seeds' part of a difference's error follows from the stored
scores of its seeds, and the whole error is stored. What changed is written into the file's list of amendments.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import write_json
from dual_lora.lab.module_command import run_module
from dual_lora.lab.read import read_json
from dual_lora.lab.study import metrics, notes, verdicts
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.conclude import Methods, about_pairs, conclude
from dual_lora.lab.study.job import task_name
from dual_lora.lab.study.read import build_study
from dual_lora.lab.study.results import RESULTS_FORMAT, wanted_pairs
from dual_lora.lab.study.rows import AmendmentRow, ComparisonRow, MethodRow, Results
from dual_lora.lab.study.study import Study

WHY = "Verdicts computed again from the stored scores, by the rule of this version (docs/explanation/calibration.md)."
GONE = ("overall", "ranking")  # of format 1
NEW_WORDS = {"better": "significantly better", "worse": "significantly worse", "not distinguishable": "inconclusive"}


def rejudge(results: Results) -> Results:
    """The results with today's verdicts. Raises UserError for a file that does not hold what they need."""
    foreign = "judged_from" in results
    try:
        study = build_study(results["study"])
        methods, before, untrained = results["methods"], results["comparisons"], results.get("untrained", [])
        at = {(m["model"], m["task"], m["method"]): m for m in methods}
        pairs = [_pair(study, c, at, foreign) for c in before]
    except (KeyError, TypeError) as error:
        raise UserError(f"These are no results of a study: {error!r} is missing or not what it should be.") from None
    missing = 0 if results.get("complete", True) else _missing(study, pairs)
    conclusion = conclude(study, pairs, methods, untrained, results.get("amendments", []), missing)
    changed = [
        {key: new[key] for key in ("candidate", "reference", "model", "task")}
        | {"before": old["verdict"], "after": str(new["verdict"])}
        for old, new in zip(before, conclusion.comparisons, strict=True)
        if NEW_WORDS.get(old["verdict"], old["verdict"]) != new["verdict"]
    ]
    amendment: AmendmentRow = {"date": time.strftime("%Y-%m-%d"), "what": WHY, "changed": changed}
    kept = [note for note in results["notes"] if note not in conclusion.notes and not note.startswith("Chance of any")]
    ours = conclusion.notes
    if foreign:
        ours = [note for note in ours if not note.startswith("Chance of any")]
        ours += notes.level_here(conclusion.false_alarm, study.level)
    rest: Any = {key: value for key, value in results.items() if key not in GONE}
    judged: Results = rest | {
        "format": RESULTS_FORMAT,
        "comparisons": conclusion.comparisons,
        "false_alarm": conclusion.false_alarm,
        "notes": ours + kept,
        "amendments": [*results.get("amendments", []), amendment],
    }
    return judged


def _missing(study: Study, pairs: list[verdicts.Comparison]) -> int:
    """Return how many pairs the whole study has beyond these; twice as many where forgetting is measured as well."""
    planned = len(wanted_pairs(study, list(study.variants()))) * len(study.tasks) * max(1, len(study.models))
    forgetting = sum(pair.metric == "forgetting" for pair in pairs)
    return max(0, planned - (len(pairs) - forgetting)) * (2 if forgetting else 1)


def _pair(study: Study, c: ComparisonRow, at: Methods, foreign: bool) -> verdicts.Comparison:
    """foreign: of scores made elsewhere, whose metric, direction and margin the comparison alone knows."""
    scenario = (c["model"], c["task"])
    two = [at[(*scenario, c[side])] for side in ("candidate", "reference")]
    spread, sign = c["spread"], metrics.direction(c["better"]) if foreign else metrics.sign(c["metric"])
    own = (c["candidate_score"], c["reference_score"])
    scores = tuple(sign * (math.nan if value is None else value) for value in own)
    difference, error, seed_error = spread["difference"], spread["error"], spread.get("seed_error")
    if difference is None or error is None:  # every run diverged
        difference = error = seed_error = 0.0
    elif seed_error is None:
        seed_error = _seed_error(_by_seed([m for key, m in at.items() if key[:2] == scenario], two), error)
    if error and c["metric"] == two[0]["metric"] and any(0 < m["diverged"] < spread["seeds"] for m in two):
        # By the rule until 2026-11-30 lost runs had the worst score of any method's. They add a constant to a row of
        # the table of differences, which leaves the items' part of the error as it was.
        pair = _by_seed(two, two)
        items = math.sqrt(max(error**2 - seed_error**2, 0.0))
        scores, difference = tuple(float(side.mean()) for side in pair), float(np.subtract(*pair).mean())
        seed_error = _seed_error(pair, math.inf)
        error = math.hypot(seed_error, items)
    reach = spread.get("reach", None if foreign else metrics.usual_reach(c["metric"]))
    if reach is not None and not 0 < reach < math.inf:
        raise UserError(
            f"The reach of {c['candidate']} against {c['reference']} is {reach}: expected a number above 0."
        )
    s = stats.Spread(difference, error, seed_error, spread["seeds"], spread["items"], reach)
    own_about = {"metric": c["metric"], "better": c["better"], "margin": c["margin"], "confidence": 1 - study.level}
    about = (
        {"task": task_name(*scenario), "scenario": scenario, **own_about}
        if foreign
        else about_pairs(study, scenario, c["metric"])
    )
    return verdicts.compare_spread(s, scores, (c["candidate"], c["reference"]), **about)  # type: ignore[arg-type]


def _by_seed(among: list[MethodRow], two: list[MethodRow]) -> list[stats.Table]:
    """The scores of two methods' runs, better is more; lost ones have the worst score of all runs `among` these."""
    sign = metrics.direction(two[0]["better"])
    tables = [np.array([[math.nan if s["score"] is None else sign * s["score"]] for s in m["seeds"]]) for m in among]
    return [table[:, 0] for table, m in zip(stats.with_lost_runs(*tables), among, strict=True) if m in two]


def _seed_error(pair: list[stats.Table], error: float) -> float:
    """The seeds' part of the error."""
    a, b = pair
    if len(a) < 2:
        return 0.0
    found = float(np.std(np.subtract(a, b), ddof=1)) / math.sqrt(len(a))
    return min(found, error) if found > 1e-12 else error  # seeds that agree to the last digit: all of it, to be safe


def main(files: list[str]) -> int:
    """Rewrite these files; print each verdict that changed."""
    for name in files:
        file = Path(name)
        results = rejudge(read_json(file))
        write_json(file, results)
        level = results["false_alarm"]
        print(f"{results['study']['name']}: chance of any false alarm {'unknown' if level is None else f'{level:.1%}'}")
        for c in results["amendments"][-1]["changed"]:
            print(f"  {c['candidate']} against {c['reference']}: {c['before']} -> {c['after']}")
    return 0


if __name__ == "__main__":
    run_module(main)
