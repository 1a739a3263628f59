"""Conclusions from pairs and methods, as a results.json has them; no run is looked at."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from dual_lora.lab.study import metrics, notes, verdicts
from dual_lora.lab.study.job import cell_name, settings_in_words, task_name
from dual_lora.lab.study.rows import AmendmentRow, ComparisonRow, MethodRow, UntrainedRow
from dual_lora.lab.study.study import Study

Methods = dict[tuple[str, str, str], MethodRow]  # (model, task, method) -> as in results.json


class PairNotes(NamedTuple):
    """Notes and rows that follow from pairs and methods alone, so from a results.json as well as from runs."""

    comparisons: list[ComparisonRow]
    false_alarm: float | None  # chance of any, with the noise of these runs
    notes: list[str]


def conclude(
    study: Study,
    pairs: Sequence[verdicts.Comparison],
    methods: Sequence[MethodRow],
    untrained: Sequence[UntrainedRow],
    amendments: Sequence[AmendmentRow] = (),
    missing: int = 0,
) -> PairNotes:
    """Judge the pairs together, each as far as its methods' runs allow.

    missing: pairs that the study will have when it is complete; a look at the first ones is no smaller study.
    amendments: of the study; a change after final runs had ended is named in every verdict.
    """
    at = {(m["model"], m["task"], m["method"]): m for m in methods}
    ends = {key: end for key, m in at.items() if (end := notes.end_of_search(m, study.search))}
    unlearned = {key: why for key, m in at.items() if (why := notes.why_unlearned(m, untrained))}
    tuned = study.search.metric if study.search else None
    failing = {key: why for key, m in at.items() if (why := notes.failed_in_tuning(m, untrained, tuned))}
    judged = verdicts.judge([_without_unearned_p(pair, at) for pair in pairs], study.level, missing)
    late = "Amended after final runs had ended." if any(a.get("ended", 0) > 0 for a in amendments) else ""
    false_alarm = verdicts.false_alarm(judged, study.level, missing)

    def row_of(c: verdicts.Comparison) -> ComparisonRow:
        verdict, learned = _verdict_if_learned(c, unlearned)
        doubts = [_unfinished_search_note(c, ends), *_failed_tuning_notes(c, failing)]
        return _comparison_row(_with_note(c, _settings(c, at), learned, *doubts, late, verdict=verdict))

    return PairNotes(
        [row_of(c) for c in judged],
        false_alarm,
        [
            *notes.level(false_alarm, study.level),
            *notes.tuned_by(study.search, methods),
            *notes.near_choices(methods, study.search),
            *notes.extended_searches(study.search, methods),
            *(f"{cell_name(*at)} did best with {end}: it may do better beyond." for at, end in ends.items()),
            *notes.level_searches(methods),
            *(f"{key[2]} has not learned {task_name(*key[:2])}: {why}." for key, why in unlearned.items()),
            *notes.code_versions(methods),
        ],
    )


def about_pairs(study: Study, scenario: tuple[str, str], metric: str) -> dict[str, Any]:
    """The metric by which one scenario is compared."""
    return {
        "task": task_name(*scenario),
        "scenario": scenario,
        "metric": metric,
        "better": metrics.better(metric),
        "margin": study.margin.get(metric),
        "confidence": 1 - study.level,
        "power": study.power,
    }


def _with_note(c: verdicts.Comparison, *parts: str, **changes: Any) -> verdicts.Comparison:
    """The comparison with these sentences as its note."""
    return dataclasses.replace(c, note=" ".join(part for part in parts if part), **changes)


def _diverged_runs(method: MethodRow) -> int | None:
    """Return how many final runs diverged; None if all did."""
    everything = method["diverged_in_search"] or method["diverged"] == len(method["seeds"])
    return None if everything else method["diverged"]


def _without_unearned_p(c: verdicts.Comparison, at: Methods) -> verdicts.Comparison:
    """Drop p, and so the verdict, where all runs of a method diverged, or one item stands for all others.

    The score that a diverged run counts with says only that it is no better than that: no ground for equivalence.
    """
    lost = {name: _diverged_runs(at[(*c.scenario, name)]) for name in (c.candidate, c.reference)}
    silent: dict[str, Any] = {"p": None, "p_same": None, "visible": None}
    gone = [name for name, n in lost.items() if n is None]
    if gone:
        note = f"No run of {' or '.join(gone)} came to an end with a score."
        return _with_note(c, note, verdict=verdicts.Verdict.DIVERGED, **silent)
    whole = at[(*c.scenario, c.candidate)].get("whole")  # the score of a whole test set, made elsewhere
    if c.items == 1 and c.seeds > 1 and not whole:
        return dataclasses.replace(c, verdict=verdicts.Verdict.ONE_ITEM, **silent)
    some = [f"{n} of {name}" for name, n in lost.items() if n]
    if some and c.seeds > 1:
        claimed = "." if c.margin is None else ": equivalence is not claimed."
        return _with_note(c, f"Of {c.seeds} runs each, {' and '.join(some)} diverged{claimed}", p_same=None)
    return c


def _comparison_row(c: verdicts.Comparison) -> ComparisonRow:
    """Return a comparison as in results.json, without figures that do not exist."""
    sign = metrics.direction(c.better)
    model, task = c.scenario
    spread = dataclasses.asdict(c.spread)
    diverged = c.verdict is verdicts.Verdict.DIVERGED  # figures of a method that has none
    alone = diverged or c.seeds == c.items == 1  # one figure each: nothing says how far another one would lie
    if diverged:
        spread |= dict.fromkeys(("difference", "error", "seed_error"))
    return {
        "candidate": c.candidate,
        "reference": c.reference,
        "task": task,
        "metric": c.metric,
        "candidate_score": None if diverged else sign * c.candidate_score,
        "reference_score": None if diverged else sign * c.reference_score,
        "difference": None if diverged else c.difference,
        "low": None if alone else c.low,
        "high": None if alone else c.high,
        "confidence": c.confidence,
        "p": c.p,
        "p_holm": c.p_holm,
        "p_same": c.p_same,
        "p_same_holm": c.p_same_holm,
        "same_low": None if alone else c.same_low,
        "same_high": None if alone else c.same_high,
        "visible": c.visible,
        "power": c.power,
        "margin": c.margin,
        "spread": spread,
        "verdict": c.verdict,
        "note": c.note,
        "better": c.better,
        "sentence": c.sentence,
        "model": model,
    }


def _verdict_if_learned(
    c: verdicts.Comparison, unlearned: dict[tuple[str, str, str], str]
) -> tuple[verdicts.Verdict, str]:
    """The verdict, and its note. A method that did not learn the task is like another in nothing that anybody asked
    about."""
    why = {name: unlearned[key] for name in (c.candidate, c.reference) if (key := (*c.scenario, name)) in unlearned}
    if not why:
        return c.verdict, c.note
    alike = c.verdict is verdicts.Verdict.EQUIVALENT
    if len(why) == 1:
        ((name, reason),) = why.items()
        note = f"{name} has not learned the task: {reason}."
        if alike:
            return verdicts.Verdict.INCONCLUSIVE, f"{note} Equivalence is not claimed."
        return c.verdict, f"{c.note} {note}".lstrip()
    first, second = why.values()
    reason = f"Of both, {first}." if first == second else f"Of {c.candidate}, {first}; of {c.reference}, {second}."
    if alike:
        return verdicts.Verdict.UNLEARNED, reason
    return c.verdict, f"{c.note} Neither learned the task. {reason}".lstrip()


def _settings(c: verdicts.Comparison, at: Methods) -> str:
    """A verdict holds for the settings that one search chose, so it names them: another might choose others."""
    mine, other = (settings_in_words(at[(*c.scenario, name)]["settings"]) for name in (c.candidate, c.reference))
    if not (mine or other):
        return ""
    return f"Both at {mine}." if mine == other else f"At {mine or 'its settings'} against {other or 'its settings'}."


def _unfinished_search_note(c: verdicts.Comparison, ends: dict[tuple[str, str, str], str]) -> str:
    """A verdict on a method that was not searched to its best says so."""
    loser = {verdicts.Verdict.WORSE: c.candidate, verdicts.Verdict.BETTER: c.reference}.get(c.verdict)
    end = ends.get((*c.scenario, loser)) if loser else None
    return f"{loser} did best with {end}." if end else ""


def _failed_tuning_notes(c: verdicts.Comparison, failing: dict[tuple[str, str, str], str]) -> list[str]:
    """A verdict on a method of which tuning runs failed says so: the seeds of a study need not show its failures."""
    if c.verdict is verdicts.Verdict.DIVERGED:
        return []
    return [failing[key] for name in (c.candidate, c.reference) if (key := (*c.scenario, name)) in failing]
