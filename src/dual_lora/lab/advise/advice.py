"""An advice in plain English: the answer first, with how sure it is, then the figures and how it came about."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dual_lora.lab.advise.pace import LOOKS, TRIALS, Work, minutes_of, needed_records, needed_seeds
from dual_lora.lab.advise.paired import DUAL, LORA, Length, length_of
from dual_lora.lab.advise.rule import Recommendation, Rival, Why, recommend
from dual_lora.lab.errors import UserError
from dual_lora.lab.study import notes
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.read import build_study
from dual_lora.lab.study.rows import ComparisonRow, MethodRow, Results, UntrainedRow
from dual_lora.lab.study.search import RATE, Search
from dual_lora.lab.study.study import Study
from dual_lora.lab.study.verdicts import Verdict, percent

Values = dict[str, Any]
Pairs = dict[str, ComparisonRow]  # by candidate
Methods = dict[str, MethodRow]


@dataclass(frozen=True)
class Advice:
    """The result of `dual-lora advise`. use: the method, None if not known; rate: the learning rate that was best for
    it.

    sentences: the answer, then one for each other method. methods: rows of the table. how: how it was decided.
    needed: minutes that a clear answer would take, None where the answer is clear or more minutes would not give it.
    """

    use: str | None
    why: Why
    sentences: list[str]
    methods: list[Values]
    how: list[str]
    notes: list[str]
    next: str
    rate: float | None
    needed: int | None
    minutes: float
    seconds: float
    out: str

    def plain(self) -> Values:
        """Return plain values for `--json`."""
        return dataclasses.asdict(self) | {"why": str(self.why)}


def advice_of(results: Results, whole: Study, work: Work, source: object, minutes: float, out: Path) -> Advice:
    """Make the advice from a finished study's results. whole: the same study at the recipe's own length."""
    study = build_study(results["study"])
    methods = {m["method"]: m for m in results["methods"]}
    judged = {c["candidate"]: c for c in results["comparisons"]}
    untrained = results.get("untrained", [])
    failed = {name: why for name, m in methods.items() if (why := _failure(m, untrained))}
    rivals = [_rival(c, methods, name in failed) for name, c in judged.items()]
    if DUAL not in judged:
        raise UserError(
            "No method has a run that came to an end with a score: every loss became infinite or NaN. Give a lower "
            "train.learning_rate in the recipe, and another --out."
        )
    found = recommend(rivals, LORA, failed.get(LORA))
    (margin,) = study.margin.values()
    needed, records = _needed_minutes_and_records(found, rivals, judged, study, work)
    about = [_comparison_sentence(rival, judged[rival.name]) for rival in rivals]
    rival = next(r for name in (found.use, DUAL) for r in rivals if r.name == name)
    left_open = _open_reason([r for r in rivals if not r.ruled_out], judged, methods, minutes, needed, records)
    longer = f"dual-lora advise {quote(str(source))} --minutes {needed}"
    loser = methods[LORA if found.why is Why.BETTER else rival.name]
    doubt = _learning_rate_doubt(loser, untrained, study.search) if found.why in (Why.BETTER, Why.NO_GAIN) else ""
    return Advice(
        found.use,
        found.why,
        [_answer(found, rival, judged[rival.name], methods[LORA], left_open) + doubt, *about],
        [_row(m, judged.get(m["method"]), methods[LORA]) for m in results["methods"]],
        _conditions(study, whole, work, methods, next(iter(study.margin)), margin),
        results["notes"],
        f"dual-lora train {quote(str(out / 'recommended.yaml'))}" if found.use else longer if needed else "",
        (methods[found.use]["settings"] or {}).get(RATE) if found.use else None,
        needed,
        minutes,
        results["provenance"]["seconds_of_runs"],
        str(out),
    )


def _failure(method: MethodRow, untrained: list[UntrainedRow]) -> Why | None:
    """A run without a score counts with the worst one that was seen: it may be worse than that."""
    if method["diverged_in_search"] or method["diverged"]:
        return Why.DIVERGED
    return Why.NOTHING_LEARNED if notes.why_unlearned(method, untrained) else None


def _learning_rate_doubt(method: MethodRow, untrained: list[UntrainedRow], search: Search | None) -> str:
    """Say why the learning rate of the losing method looks wrong, so that rates were compared as well; "" if it does
    not."""
    ended = [seed for seed in method["seeds"] if seed["score"] is not None]
    idle = sum(bool(notes.why_unlearned_in(method, s["score"], [s["figures"]], untrained)) for s in ended)
    if method["diverged_in_search"] or method["diverged"]:
        why = f"{_diverged_runs(method)} of {method['method']} diverged"
    elif idle:
        why = f"{idle} of {len(ended)} runs of {method['method']} did not learn the task"
    elif end := notes.end_of_search(method, search):
        why = f"{method['method']} did best with {end}"
    else:
        return ""
    return f" But {why}: with another learning rate it may do better."


def _rival(c: ComparisonRow, methods: Methods, failed: bool) -> Rival:
    time = _time_ratio(methods[c["candidate"]], methods[LORA])
    assert c["margin"] is not None, "a study of advise has one"
    return Rival(c["candidate"], Verdict(c["verdict"]), c["difference"], upper(c), c["margin"], time, failed)


def upper(c: ComparisonRow) -> float | None:
    """Return how much better the candidate may be: the upper end of the interval that its verdict goes by.

    Where few right or wrong answers differ, that of the interval which they allow (`statistics.against_margin`).
    """
    alike = c["verdict"] == Verdict.EQUIVALENT
    if c["high"] is None or not _too_few_differ(c):
        return c["same_high"] if alike else c["high"]
    return stats.interval(_spread(c), c["confidence"])[1]


def _too_few_differ(c: ComparisonRow) -> bool:
    """Whether the items' error was seen to be smaller than a difference of the margin allows."""
    return c["difference"] is not None and _spread(c).error != c["spread"]["error"]


def _spread(c: ComparisonRow) -> stats.Spread:
    """The spread of a comparison, with the least error of its items."""
    return stats.against_margin(
        stats.Spread(**c["spread"] | {"difference": c["difference"] or 0.0}), c["margin"] or 0.0
    )


def _time_ratio(method: MethodRow, lora: MethodRow) -> float | None:
    """A step's time as a multiple of LoRA's."""
    own, theirs = (m["cost"]["steps_per_second"] for m in (method, lora))
    return theirs / own if own and theirs else None


def _needed_minutes_and_records(
    found: Recommendation, rivals: list[Rival], judged: Pairs, study: Study, work: Work
) -> tuple[int | None, int | None]:
    """Minutes that would show a difference of the margin, or, where no number of seeds would, test records as well."""
    if found.why is not Why.OPEN:
        return None, None
    level, now, wanted = study.level / len(rivals), len(study.seeds), 0
    short = length_of(study).steps < work.steps  # then noise too is a short run's: first the recipe's own length
    for rival in rivals:
        c = judged[rival.name]
        if rival.verdict is Verdict.BETTER:  # what is missing is not more of the same
            return None, None
        if rival.ruled_out or (c["visible"] is None and not _too_few_differ(c)):
            continue
        enough = needed_seeds(_spread(c), rival.margin, level, study.power)
        if enough is None and short:
            enough = LOOKS[0]
        if enough is None:
            return None, needed_records(_spread(c), rival.margin, level, study.power)
        wanted = max(wanted, enough)
    if not wanted or (now >= LOOKS[-1] and not short):
        return None, None
    seeds = next(look for look in LOOKS if look >= wanted and (short or look > now))
    return minutes_of(work, Length(seeds, work.steps)), None


def _difference_text(c: ComparisonRow, alike: bool = False) -> str:
    """The difference with an interval: that of the test of equivalence, or the plain one."""
    if c["difference"] is None:
        return ""
    what = f"{'' if c['better'] == 'more' else 'reduction of '}{c['metric']} {c['difference']:+.3g}"
    share = 2 * c["confidence"] - 1 if alike else c["confidence"]
    low, high = (c["same_low"], c["same_high"]) if alike else (c["low"], c["high"])
    return what if low is None else f"{what} [{percent(share)}: {low:+.3g} to {high:+.3g}]"


def _step_time_text(rival: Rival) -> str:
    return "" if rival.time is None else f"a step of {rival.name} takes {rival.time:.2f} times LoRA's time"


def _comparison_sentence(rival: Rival, c: ComparisonRow) -> str:
    """One method against LoRA: the verdict, the figure, the time."""
    figure = _difference_text(c, rival.verdict is Verdict.EQUIVALENT)
    more = "; ".join(part for part in (figure, _step_time_text(rival)) if part)
    return f"{rival.name} against LoRA: {rival.verdict}{f' ({more})' if more else ''}."


def _answer(found: Recommendation, rival: Rival, c: ComparisonRow, lora: MethodRow, open_: str) -> str:
    """The answer in a sentence. rival, c: the method that it is about; open_: what a study that left it open says."""
    margin = rival.margin
    step = f", and {_step_time_text(rival)}" if rival.time is not None else ""
    if found.why is Why.BETTER:
        return f"Use {found.use}: it is significantly better than LoRA ({_difference_text(c)}){step}."
    if found.why is Why.QUICKER:
        return f"Use {found.use}: it is as good as LoRA within ±{margin:g} ({_difference_text(c, alike=True)}){step}."
    if found.why is Why.NO_GAIN:
        return f"Use LoRA: {_no_gain_reason(rival, c, margin)}{step}.{_tie_reason(rival)}"
    if found.why is Why.NOTHING_LEARNED:
        return (
            "Not known: LoRA did not learn the task in these runs, and nothing else can be recommended. Give "
            "more --minutes, or another train.learning_rate in the recipe."
        )
    if found.why is Why.DIVERGED:
        return (
            f"Not known: {_diverged_runs(lora)} of LoRA diverged, and how bad they are no score says. Give a lower "
            "train.learning_rate in the recipe."
        )
    step = (
        f"costs less: {_step_time_text(rival)}"
        if rival.time is not None and rival.time > 1
        else "every library and server takes"
    )
    return f"Not known: {open_} Until then use LoRA, which {step}."


def _no_gain_reason(rival: Rival, c: ComparisonRow, margin: float) -> str:
    if rival.verdict is Verdict.DIVERGED:
        return f"no run of {rival.name} came to an end with a score"
    if rival.verdict is Verdict.EQUIVALENT:
        return f"no difference that matters was seen ({_difference_text(c, alike=True)}, within ±{margin:g})"
    if rival.verdict is Verdict.WORSE:
        return f"{rival.name} is significantly worse ({_difference_text(c)})"
    return f"a gain of {margin:g} or more by {rival.name} is ruled out ({_difference_text(c)})"


def _tie_reason(rival: Rival) -> str:
    """Why a tie goes to LoRA; its cost is named only where these runs show it."""
    below = rival.verdict is Verdict.UNCLEAR and (rival.difference or 0.0) < 0
    if below or rival.verdict in (Verdict.WORSE, Verdict.DIVERGED):
        return ""
    if rival.time is not None and rival.time > 1:
        return " A tie goes to LoRA, because it costs less."
    return " A tie goes to LoRA, which every library and server takes."


def _diverged_runs(method: MethodRow) -> str:
    runs = len(method["seeds"])
    return "all runs" if method["diverged_in_search"] else f"{method['diverged']} of {runs} runs"


def _open_reason(
    rivals: list[Rival], judged: Pairs, methods: Methods, minutes: float, needed: int | None, records: int | None
) -> str:
    """Why the answer is open, and what would settle it. rivals: those that may gain what matters."""
    for rival in rivals:
        if rival.verdict is Verdict.BETTER:  # and not recommended
            lost = methods[rival.name]["diverged"]
            why = f"{_diverged_runs(methods[rival.name])} of it diverged" if lost else "it did not learn the task"
            return f"{rival.name} is significantly better, but {why}. Give another train.learning_rate in the recipe."
    seen = [c["visible"] for r in rivals if (c := judged[r.name])["visible"] is not None]
    margin = rivals[0].margin if rivals else 0.0
    if seen and max(seen) > margin:
        could = f"a difference of {max(seen):.2g} could have been seen, and what matters begins at {margin:g}"
    elif any(r.verdict is Verdict.UNCLEAR for r in rivals):
        could = f"there is a difference, and it may be smaller or larger than the {margin:g} from which it matters"
    elif any(_too_few_differ(judged[r.name]) for r in rivals):
        could = f"the methods differ on too few test records to rule out a gain of {margin:g}"
    else:
        could = f"a gain of {margin:g} was not ruled out"
    if needed:
        out = f"Give --minutes {needed}."
    elif records:
        out = f"More minutes alone will not settle it: that takes {LOOKS[-1]} seeds and about {records:,} test records."
    else:
        out = "Give more test records, or a larger --margin."
    return f"with {minutes:g} minutes {could}. {out}"


def _row(m: MethodRow, c: ComparisonRow | None, lora: MethodRow) -> Values:
    pace = m["cost"]["steps_per_second"]
    own = ("method", "score", "score_deviation", "rank", "trainable_parameters", "settings")
    from_pair = ("difference", "low", "high", "confidence", "verdict", "visible")
    mine, pair = dict(m), dict(c) if c else {}
    return (
        {name: mine[name] for name in own}
        | {name: pair.get(name) for name in from_pair}
        | {"metric": m["metric"], "step_seconds": 1 / pace if pace else None, "times_lora": _time_ratio(m, lora)}
        | {"peak_memory": m["cost"]["peak_memory"]}
    )


def _conditions(study: Study, whole: Study, work: Work, methods: Methods, metric: str, margin: float) -> list[str]:
    length, full = length_of(study), length_of(whole).steps
    sizes = sorted({m["trainable_parameters"] or 0 for m in methods.values()})
    short = (
        f"Runs have {length.steps} of the recipe's {full} steps: of a longer training this says less."
        if length.steps < full
        else f"Runs have the recipe's own {full} steps."
    )
    rates = ", ".join(f"{rate:g}" for rate in study.search.space["learning_rate"]) if study.search else ""
    return [
        f"Each method was tuned alike (learning rates {rates}; at most {TRIALS} runs, the worse of two seeds a rate) "
        f"by its loss on {work.validation} validation records, then trained with {length.seeds} new seeds and compared "
        f"by {metric} on {work.test} test records. They train {' to '.join(f'{size:,}' for size in sizes)} parameters "
        "each.",
        f"{short} Differences below {margin:g} count as none (--margin).",
        "A method is recommended for its score only if it is significantly better, and LoRA only if a gain of "
        f"{margin:g} is ruled out: either is wrong in at most 5% of such studies, for the settings named here. All "
        f"looks at it together, with {', '.join(map(str, LOOKS))} seeds, have that level, so each has "
        f"{percent(study.level)}.",
    ]
