"""The notes on verdicts: of searches, of methods that learned nothing, of what is missing."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.study import metrics
from dual_lora.lab.study.cell import Ended, Finished
from dual_lora.lab.study.job import Settings, cell_name, task_name
from dual_lora.lab.study.rank_rule import rank_rule
from dual_lora.lab.study.rows import AmendmentRow, MethodRow, Results, UntrainedRow
from dual_lora.lab.study.search import RATE, Search, mean_scores
from dual_lora.lab.study.study import Study
from dual_lora.lab.study.verdicts import percent


def _cell(method: MethodRow) -> str:
    return cell_name(method["model"], method["task"], method["method"])


def end_of_search(method: MethodRow, search: Search | None) -> str:
    """Say which value chosen for a method lies at an end of what was tried: it might do better outside. "" if none
    does."""
    tried_with = _tried(method, search)
    best = [score for settings, score in tried_with if settings == method["settings"]]
    for name, chosen in (method["settings"] or {}).items():

        def number(value: Any, name: str = name) -> Any:
            return rank_rule(value, method["rank"] or 1, name)  # 2r is a number too

        value = number(chosen)
        tried = [v for t in method["trials"] if isinstance(v := number(t["settings"].get(name)), int | float)]
        if len(set(tried)) <= 2 or value not in (ends := (min(tried), max(tried))):
            continue
        inside = [v for v in tried if v not in ends]
        if not any(score in best for settings, score in tried_with if number(settings.get(name)) in inside):
            written = chosen if isinstance(chosen, str) else f"{value:g}"
            return f"the {'smallest' if value == ends[0] else 'largest'} {name} tried ({written})"
    return ""


def _judged_by(method: MethodRow, search: Search | None) -> str:
    return (search.metric if search else None) or method["metric"]


def _tried(method: MethodRow, search: Search | None) -> list[tuple[Settings, float]]:
    """Return the settings that a method's search tried, with the score that decided, higher is better."""
    if not method["trials"]:
        return []
    better = metrics.sign(_judged_by(method, search))
    scores = ((t["settings"], None if t["score"] is None else better * t["score"]) for t in method["trials"])
    return mean_scores(scores, search.decide if search else "mean")


def level(false_alarm: float | None, allowed: float) -> Iterator[str]:
    """The level that the study really has."""
    if false_alarm is not None:
        yield (
            f"Chance of any false alarm in this study: {false_alarm:.1%} with the noise of these runs, "
            f"{percent(allowed)} at most. It holds for the methods with the settings named here, not for what another "
            "search would choose."
        )


def level_here(false_alarm: float | None, allowed: float) -> Iterator[str]:
    """Say the level of a comparison of scores from elsewhere."""
    if false_alarm is not None:
        most = percent(allowed)
        yield f"Chance of any false alarm here: {false_alarm:.1%} with the noise of these runs, {most} at most."


def near_choices(methods: Sequence[MethodRow], search: Search | None) -> Iterator[str]:
    """Note methods whose search was decided by less than its noise."""
    near = []
    for m in methods:
        judged = _judged_by(m, search)
        figures = [s["score"] if judged == m["metric"] else (s["figures"] or {}).get(judged) for s in m["seeds"]]
        noise = np.array([v for v in figures if v is not None])
        scores = np.array([score for _, score in _tried(m, search)])
        if len(scores) < 2 or len(noise) < 2:
            continue
        repeats = sum(t["settings"] == m["settings"] for t in m["trials"]) or 1
        worst = search is not None and search.decide == "worst"
        chance = other_choice(scores, float(noise.std(ddof=1)), repeats, worst)
        if chance > 0.05:
            near.append(f"{_cell(m)} ({chance:.0%})")
    if near:
        yield (
            "With another seed the search might choose other settings (in brackets the chance, if every trial varied "
            f"between seeds as much as the final runs do): {', '.join(near)}."
        )


def other_choice(scores: NDArray[np.float64], deviation: float, repeats: int, worst: bool) -> float:
    """Chance that a search with other seeds has another best trial. Both searches have the noise of a run, of which
    each trial has `repeats`; their mean decides, or the worst."""
    random = np.random.default_rng(0)
    if worst:
        ours, other = random.standard_normal((2, 4000, len(scores), repeats)).min(-1)
        repeated = scores + deviation * (other - ours)
    else:
        repeated = scores + math.sqrt(2 / repeats) * deviation * random.standard_normal((4000, len(scores)))
    return float((repeated.argmax(1) != scores.argmax()).mean())


def level_searches(methods: Sequence[MethodRow]) -> Iterator[str]:
    """Note searches whose trials all scored alike."""
    for m in methods:
        scores = {t["score"] for t in m["trials"] if t["status"] == "done"}
        if len(m["trials"]) > 1 and len(scores) == 1 and all(t["status"] != "missing" for t in m["trials"]):
            yield (
                f"Every trial of {_cell(m)} that did not diverge scored "
                f"{scores.pop():.4g}: the search could not choose, and the first of them was taken."
            )


def why_unlearned(method: MethodRow, untrained: Sequence[UntrainedRow]) -> str:
    """Say why a method has not learned its task; "" if it has, or if there is nothing to measure it by."""
    done = [seed["figures"] for seed in method["seeds"] if seed["status"] == "done"]
    return why_unlearned_in(method, method["score"], done, untrained)


def why_unlearned_in(
    method: MethodRow,
    score: float | None,
    runs: Sequence[Mapping[str, float | None] | None],
    untrained: Sequence[UntrainedRow],
) -> str:
    """Say why some runs of a method have not learned the task, by their score and figures; "" if they have."""
    figures = [run or {} for run in runs]
    if figures and all(f.get("matthews") == 0 for f in figures):
        return "every run is right as often as one that gives every item the same answer (Matthews 0)"
    for correlation in ("matthews", "pearson"):
        if figures and all((value := f.get(correlation)) is not None and value <= 0 for f in figures):
            return f"what it predicts does not rise with what is right in any run ({correlation.title()} 0 or less)"
    if score is None:
        return ""
    sign = metrics.direction(method["better"])
    for base in untrained:
        if (base["model"], base["task"]) != (method["model"], method["task"]):
            continue
        if sign * (score - base["score"]) <= 1e-12:  # a mean over seeds may be an ulp above each of them
            return f"its mean score is not better than the untrained model's ({base['score']:.4g})"
        if score <= base.get("constant", -1.0) + 1e-12:
            return f"it is right no more often than one answer to everything ({base['constant']:.4g})"
    return ""


def failed_in_tuning(method: MethodRow, untrained: Sequence[UntrainedRow], metric: str | None) -> str:
    """Say which tuning runs failed at the learning rate that was chosen or a lower one; "" if none did.

    A run fails that diverged or did not learn the task. metric: of the search; None for the task's.
    """
    if not method["trials"]:
        return ""
    rate = (method["settings"] or {}).get(RATE)
    here = [t for t in method["trials"] if rate is None or t["settings"].get(RATE, rate) <= rate]
    failed = 0
    for t in here:
        score = t["score"] if metric in (None, method["metric"]) else None
        unlearned = why_unlearned_in(method, score, [t.get("figures")], untrained)
        failed += t["status"] == "diverged" or bool(unlearned)
    if not failed:
        return ""
    where = "" if rate is None else " at this learning rate or a lower one"
    return (
        f"{failed} of {len(here)} tuning runs of {method['method']}{where} failed: {len(method['seeds'])} final runs "
        "may not show how often it fails."
    )


def amended(results: Results) -> Iterator[str]:
    """Say what was changed in a study after its beginning, when, and which verdicts changed by it."""
    for a in results.get("amendments", []):
        seen = f" {a['ended']} of {a['of']} final runs known by then had ended." if "of" in a else ""
        changed = ", ".join(f"{c['candidate']} from {c['before']} to {c['after']}" for c in a.get("changed", []))
        end = f" Verdicts changed: {changed or 'none'}." if "changed" in a else ""
        yield f"Amended {a['date']}. {a['what']}{seen}{end}"


def seen_before(plan: dict[str, Any] | None, amendments: Sequence[AmendmentRow]) -> list[str]:
    """Note final runs that were there before the plan was written, and that no amendment speaks of."""
    before = (plan or {}).get("before") or 0
    if before <= max((a.get("ended", 0) for a in amendments), default=0):
        return []
    return [f"{before} of the final runs had ended before this study's plan was written, and were taken over."]


def tuned_by(search: Search | None, methods: Sequence[MethodRow]) -> list[str]:
    """Note searches that go by another metric than the one of the verdicts."""
    judges = dict.fromkeys(m["metric"] for m in methods)
    if search is None or search.metric is None:
        return []
    why = f": {search.why.rstrip('.')}." if search.why else ". What is best by one may be worst by the other."
    return [f"Tuned by {search.metric}, compared by {judge}{why}" for judge in judges if judge != search.metric]


def extended_searches(search: Search | None, methods: Sequence[MethodRow]) -> Iterator[str]:
    """Note searches that went on beyond their grid."""
    found = []
    for m in methods:
        points = [t["settings"] for t in m["trials"] if t.get("beyond")]
        if rates := dict.fromkeys(f"{point[RATE]:g}" for point in points if RATE in point):
            found.append(f"{_cell(m)} ({', '.join(rates)})")
    if found and search is not None:
        yield (
            "The best learning rate lay at an end of its grid, so the search went on beyond it, before any final run "
            f"and by the same rule for every method ({search.extend} more at most): {', '.join(found)}."
        )


def code_versions(methods: Sequence[MethodRow]) -> Iterator[str]:
    """Note scenarios whose final runs were done by different versions of the code, or do not all say by which."""
    for scenario in dict.fromkeys((m["model"], m["task"]) for m in methods):
        seeds = [seed for m in methods if (m["model"], m["task"]) == scenario for seed in m["seeds"]]
        codes = {seed.get("code") for seed in seeds if seed["status"] != "missing"}
        if len(codes) > 1:
            names = "; ".join(sorted(str(code or "not recorded") for code in codes))
            yield (
                f"The runs on {task_name(*scenario)} were done by several versions of the code ({names}): a difference "
                "may be the code's."
            )


def unfinished(study: Study, finished: Sequence[Finished]) -> Iterator[str]:
    """Say which methods have no verdict yet: half of the seeds are no verdict, and would tempt to stop when it
    pleases."""
    for f in finished:
        if f.complete:
            continue
        done = sum(outcome is not None for _, outcome in f.finals)
        state = f"{done} of {len(study.seeds)} runs have ended" if f.finals else "its search has not ended"
        alone = ", and nothing with it" if f.cell.method == study.baseline and study.pairs != "all" else ""
        yield f"{f.cell} is not compared with anything{alone}: {state}."


def numbers_at_a_time(methods: Iterable[Mapping[str, Any]]) -> set[int | None]:
    """Return all numbers of runs at a time in these methods of a results.json; None where a run does not say."""
    return {n for m in methods for n in m.get("measured_beside", [])}


def at_a_time(method: Mapping[str, Any]) -> str:
    """Return how many runs there were at a time when this method's were measured, "?" where it was not recorded."""
    return ", ".join("?" if n is None else str(n) for n in method.get("measured_beside", []))


def shared_machine(methods: Sequence[MethodRow]) -> Iterator[str]:
    """Note that times of runs that shared the machine differ from times of runs that had it for themselves."""
    found = numbers_at_a_time(methods)
    if len(found) > 1:
        _, listed = _group_by_words(
            (" and ".join("unknown" if n is None else str(n) for n in numbers), _cell(m))
            for m in methods
            if (numbers := m["measured_beside"])
        )
        yield (
            "Times and speeds are not comparable: different numbers of runs went side by side, some of them for "
            f"another study or another call. Runs at a time: {listed}."
        )
    elif found == {None}:
        yield "How many runs went side by side was not recorded: times and speeds may not be comparable."
    elif found - {1}:
        yield f"{found.pop()} runs went side by side: times and speeds are comparable with each other only."


def devices(finished: Sequence[Finished]) -> Iterator[str]:
    """Note runs of a study that went on elsewhere: times of two machines do not compare."""
    found, listed = _group_by_words((o.device, str(f.cell)) for f in finished for _, o in f.finals if o and o.device)
    if len(found) > 1:
        yield f"Times and speeds are not comparable: the runs were done on different devices. {listed}."


def precisions(finished: Sequence[Finished]) -> list[str]:
    """Say in which precision the runs were done: figures of two do not compare."""
    recipes = [(f.cell.recipe, str(f.cell)) for f in finished]
    found, listed = _group_by_words(
        (f"{r.model.dtype} weights{'' if r.train.autocast == 'none' else f' with {r.train.autocast} autocast'}", cell)
        for r, cell in recipes
    )
    return [f"Runs differ in precision. {listed}."] if len(found) > 1 else [f"All runs: {words}." for words in found]


def _group_by_words(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], str]:
    """Group pairs (text, cell) by the text. Returns the texts, and a sentence with the cells of each."""
    groups: dict[str, dict[str, None]] = {}
    for words, cell in pairs:
        groups.setdefault(words, {})[cell] = None
    return list(groups), "; ".join(f"{words}: {', '.join(cells)}" for words, cells in groups.items())


def unmeasured(finished: Sequence[Finished]) -> list[str]:
    """Note costs of use that a method would not be measured by, and why."""
    return [
        f"{name.replace('_', ' ')} of {f.cell} could not be measured: {why}"
        for f in finished
        for _, outcome in f.finals
        if outcome
        for name, why in outcome.use_problems.items()
    ]


_NUMBER = re.compile(r"(?<![\w./-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w/-])|\b[0-9a-f]{16}\b")  # or the key of a run


def warned(ended: Iterable[Ended]) -> list[str]:
    """List the warnings of runs, by task. Where numbers alone differ, the first, and the count of the others."""
    texts: dict[tuple[str, str], dict[str, list[str]]] = {}
    for job, outcome in ended:
        for text in outcome.warnings if outcome else ():
            alike = texts.setdefault(job.scenario, {}).setdefault(without_numbers(text), [])
            if text not in alike:
                alike.append(text)
    return [
        f"warning{f' ({task_name(*where)})' if len(texts) > 1 else ''}: {first}"
        + (f" (And {len(others)} more, with other numbers.)" if others else "")
        for where, forms in texts.items()
        for first, *others in forms.values()
    ]


def without_numbers(warning: str) -> str:
    """Remove the numbers of a warning, which differ from run to run. Digits in names stay."""
    return _NUMBER.sub("#", warning)
