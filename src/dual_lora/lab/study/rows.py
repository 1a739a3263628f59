"""The content of a results.json, as types: everything that reads results goes by them. Plain values, as JSON has
them."""

from typing import Any, NotRequired, TypedDict


class RunRow(TypedDict):
    """A run of a method: its seed, its key in the folder of runs, and what came out."""

    seed: int
    key: str
    status: str  # done, diverged, failed or missing
    score: float | None
    seconds: float | None


class TrialRow(RunRow):
    """A run of the search. beyond: outside the grid that was given, as the best lay at its end."""

    settings: dict[str, Any]
    beyond: NotRequired[bool]
    figures: NotRequired[dict[str, float | None] | None]


class SeedRow(RunRow):
    """A final run, with all figures of its evaluation and the version of the code."""

    figures: dict[str, float | None] | None
    code: NotRequired[str | None]


class MethodRow(TypedDict):
    """One method on one task of one model. cost: medians over the seeds, by the names in `results.COSTS`."""

    model: str
    task: str
    method: str
    about: str
    peft_method: dict[str, Any]
    metric: str
    better: str
    rank: int | None
    trainable_parameters: int | None  # None: of scores made elsewhere, not told
    base_parameters: int | None
    mismatch: float | None
    notes: list[str]
    settings: dict[str, Any] | None  # that the search chose
    trials: list[TrialRow]
    seeds: list[SeedRow]
    score: float | None
    score_deviation: float | None
    items: int | None
    forgetting: NotRequired[float | None]
    diverged: int
    diverged_in_search: bool
    cost: dict[str, float | None]
    # How many runs at a time there were when these were measured; None where a run does not say.
    measured_beside: NotRequired[list[int | None]]
    whole: NotRequired[bool]  # a score of a whole test set, made elsewhere


class UntrainedRow(TypedDict):
    """The score of the model without an adapter. constant: of one answer to everything."""

    model: str
    task: str
    metric: NotRequired[str]
    score: float
    constant: NotRequired[float]


class ComparisonRow(TypedDict):
    """`verdicts.Comparison`, with the scores in the metric's own direction."""

    model: str
    task: str
    candidate: str
    reference: str
    metric: str
    better: str
    candidate_score: float | None
    reference_score: float | None
    difference: float | None
    low: float | None
    high: float | None
    confidence: float
    p: float | None
    p_holm: float | None
    p_same: float | None
    p_same_holm: float | None
    same_low: float | None
    same_high: float | None
    visible: float | None
    power: float
    margin: float | None
    spread: dict[str, Any]
    verdict: str
    note: str
    sentence: str


class AmendmentRow(TypedDict):
    """A change of a study after its beginning.

    ended, of: how many of the final runs had ended by then. changed: the verdicts that another rule changed.
    """

    date: str
    what: str
    ended: NotRequired[int]
    of: NotRequired[int]
    fields: NotRequired[dict[str, Any]]
    changed: NotRequired[list[dict[str, str]]]


class PointRow(TypedDict):
    """A method's quality and cost. front: no other is better in both."""

    method: str
    quality: float
    cost: float
    front: bool


class ParetoRow(TypedDict):
    """All methods of a task by one cost."""

    model: str
    task: str
    metric: str
    cost: str
    label: str
    points: list[PointRow]


class Results(TypedDict):
    """The whole file."""

    format: int
    study: dict[str, Any]
    complete: bool
    methods: list[MethodRow]
    comparisons: list[ComparisonRow]
    false_alarm: float | None  # chance of any, with the noise of these runs
    pareto: list[ParetoRow]
    plan: NotRequired[dict[str, Any] | None]
    amendments: NotRequired[list[AmendmentRow]]
    notes: list[str]
    untrained: NotRequired[list[UntrainedRow]]
    precision: NotRequired[dict[str, Any] | None]
    failed: NotRequired[list[str]]
    provenance: NotRequired[dict[str, Any]]
    judged_from: NotRequired[str]
