"""The metrics that methods are compared by: which evaluation yields them, and what every item adds to them.

Every metric here is a function of item means: accuracy of the mean of right answers, loss of the means of nats and
tokens, Matthews' correlation and F1 of the mean confusion matrix, BLEU of the mean n-gram counts, Pearson's correlation
of the mean products. So an item's share in any of them is defined (`pseudo_values`), and paired tests over items work
for all of them. Spearman's correlation is none: an item's rank depends on all others.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dual_lora.lab.errors import UserError, suggest

Table = NDArray[np.float64]
MOST_CELLS = 20_000_000  # of all items' confusion matrices, which are written as numbers


class Metric(NamedTuple):
    """evaluation: which yields it. sign: +1 if more is better and -1 if less is. of: [K] means over items, and how many
    items there are -> the metric.

    items: right or wrong, and the metric their share (then several test sets have a mean, in which each counts alike);
    right or wrong, so that two methods may agree on all of a few by luck; or measured.
    """

    evaluation: str
    sign: int
    items: Literal["share", "right or wrong", "measured"]
    of: Callable[[Table, int], float]


def _mean(means: Table, items: int) -> float:
    return float(means[0])


METRICS: dict[str, Metric] = {
    "exact_match": Metric("exact_match", 1, "share", _mean),
    "choice": Metric("choice", 1, "share", _mean),
    "accuracy": Metric("classification", 1, "share", _mean),
    "f1": Metric("classification", 1, "right or wrong", lambda means, items: f1(means)),
    "matthews": Metric("classification", 1, "right or wrong", lambda means, items: matthews(means)),
    "loss": Metric("loss", -1, "measured", lambda means, items: float(means[0] / means[1])),
    "bleu": Metric("bleu", 1, "measured", lambda means, items: _bleu(means * items)),
    "pearson": Metric("regression", 1, "measured", lambda means, items: pearson(means)),
    "mse": Metric("regression", -1, "measured", _mean),
    # With a task, never a task's own: nats of the base and with the adapter, tokens.
    "forgetting": Metric("forgetting", -1, "measured", lambda means, items: float((means[1] - means[0]) / means[2])),
}
# Head of a model -> (what such a model is called, the metrics that it has).
HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "causal": ("language model", ("choice", "exact_match", "loss", "bleu")),
    "classification": ("classifier", ("accuracy", "f1", "matthews", "loss")),
    "regression": ("model of one number", ("pearson", "mse")),
}


def sign(metric: str) -> int:
    """+1 where more is better, -1 where less is."""
    return METRICS[metric].sign


def direction(better: str) -> int:
    """The sign of a metric of which there should be "more" or "less"."""
    return 1 if better == "more" else -1


def better(metric: str) -> str:
    """Return "more" if a higher value of the metric is better, else "less"."""
    return "more" if sign(metric) > 0 else "less"


def is_right_or_wrong(metric: str) -> bool:
    """Whether items are right or wrong."""
    return METRICS[metric].items != "measured"


def is_share(metric: str) -> bool:
    """Whether it is the share of right answers."""
    return METRICS[metric].items == "share"


def evaluation(metric: str, head: str) -> str:
    """The evaluation that yields the metric on a model with this head. Raises UserError if none does."""
    if metric not in METRICS:
        raise UserError(f"There is no metric {metric!r}.{suggest(metric, METRICS)}")
    kind, offered = HEADS[head]
    if metric not in offered:
        raise UserError(f"A {kind} has no {metric}: choose {', '.join(offered[:-1])} or {offered[-1]}.")
    return METRICS[metric].evaluation if head == "causal" else head


def default_metric(tasks: Sequence[str], head: str) -> str:
    """Return the metric by which a recipe is compared by default."""
    first = tasks[0] if tasks else ("loss" if head == "causal" else head)
    return {"classification": "accuracy", "nlg": "bleu", "regression": "pearson"}.get(first, first)


def features(
    metric: str,
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    classes: Sequence[str],
    prompts: Sequence[str] = (),
) -> list[Any]:
    """Return what each of the N items adds: [N, K]. rows: as the evaluation keeps them; labels and classes:
    classifiers.

    prompts: several answers to one prompt (E2E's references) are no independent items; for the loss they become one.
    """
    if metric == "loss":
        items: dict[Any, list[float]] = {}
        for i, row in enumerate(rows):
            sums = items.setdefault(prompts[i] if prompts else i, [0.0, 0.0])
            sums[0] += row["nats"]
            sums[1] += row.get("tokens", 1)
        return list(items.values())
    if metric == "bleu":
        return [_ngrams(row["predicted"], row["references"]) for row in rows]
    if METRICS[metric].evaluation == "regression":
        truth = np.array([float(label) for label in labels])
        guess = np.array([row["predicted"] for row in rows])
        if metric == "mse":
            return list(((guess - truth) ** 2)[:, None].tolist())
        x, y = ((values - truth.mean()) / (truth.std() or 1.0) for values in (guess, truth))  # of order 1 in any unit
        return list(np.stack([x, y, x * x, y * y, x * y], 1).tolist())
    if metric in ("f1", "matthews"):
        if (cells := len(rows) * len(classes) ** 2) > MOST_CELLS:
            raise UserError(
                f"The {metric} of {len(rows):,} items in {len(classes):,} classes needs a table of {cells:,} cells, "
                f"expected at most {MOST_CELLS:,}: compare by accuracy, or take fewer test records."
            )
        number = {name: i for i, name in enumerate(classes)}
        truth = np.array([number[label] for label in labels])
        guess = np.array([number[row["predicted"]] for row in rows])
        return list(confusion_cells(truth, guess[None], len(classes))[0].tolist())
    return [[float(row["correct"])] for row in rows]


def value(metric: str, means: Table, items: int) -> float:
    """The metric from the K means over so many items."""
    return METRICS[metric].of(means, items)


def score_table(metric: str, runs: Sequence[Any]) -> Table:
    """Item shares [S, N] of the runs' features [S, N, K], with the sign turned so that more is better."""
    if is_share(metric):
        runs = [np.asarray(run)[:, :1] for run in runs]  # without the weights, which older runs do not have
    features = np.asarray(runs, dtype=np.float64)
    return sign(metric) * pseudo_values(metric, features)


def reach(metric: str, runs: Sequence[Any]) -> float | None:
    """Return how far one answer can move the metric, times N (`statistics.Spread`); None where items are measured.

    runs: features [S, N, K] of all that is compared. Of a share it is the largest weight of an item, right or not: of
    several test sets the features have it in a second column. Matthews' correlation and F1 move most where a class is
    rare: the largest step from the mean confusion matrix.
    """
    if not is_right_or_wrong(metric):
        return None
    if is_share(metric):
        return float(max(np.max(run) for run in runs)) or 1.0
    mean, items = np.mean([np.mean(run, axis=0) for run in runs], axis=0), len(runs[0])
    k = math.isqrt(mean.size)
    now, steps = value(metric, mean, items), [0.0]
    for cell in np.flatnonzero(mean):
        row = cell - cell % k  # of one label, for every prediction
        for other in {*range(row, row + k)} - {cell}:
            moved = mean.copy()
            moved[[cell, other]] += (-1 / items, 1 / items)
            steps.append(items * abs(value(metric, moved, items) - now))
    return max(steps) or 1.0


def usual_reach(metric: str) -> float | None:
    """The same for one test set and classes of like size, where the runs are not at hand."""
    return (2.0 if metric == "matthews" else 1.0) if is_right_or_wrong(metric) else None


def _ngrams(text: str, references: Sequence[str]) -> list[float]:
    from sacrebleu.metrics import BLEU

    score = BLEU(effective_order=True).sentence_score(text, list(references))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu(sums: Table) -> float:
    from sacrebleu.metrics import BLEU

    # Smoothed as sacrebleu's corpus_bleu is, which counts matches: what rounding leaves of none is none. Of the lengths
    # the ratio counts, and it takes whole numbers.
    counts: Any = [float(x) if x > 1e-6 else 0.0 for x in sums[:8]]
    written, wanted = (round(float(x) * 10**9) for x in sums[8:10])
    return BLEU.compute_bleu(counts[:4], counts[4:], written, wanted, smooth_method="exp").score


def pseudo_values(metric: str, features: ArrayLike) -> Table:
    """Items' shares [S, N] of a metric that is a function of item means, such as Matthews' correlation or F1.

    features: [S, N, K] what each item adds (for Matthews: the one-hot cell of the confusion matrix). The result's mean
    over items is that seed's metric exactly. An item's share is what the metric loses without it, times N - 1 (the
    jackknife), so all else here treats it like an accuracy. The slope at the mean (the infinitesimal jackknife) is too
    short for few items: 6 % false alarms for 5 % with 20.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 3:
        raise ValueError(f"Features of shape {x.shape}: expected [seeds, items, K].")
    N = x.shape[1]
    out = np.empty(x.shape[:2])
    for s, rows in enumerate(x):
        mean = rows.mean(0)
        out[s] = value(metric, mean, N)
        if N > 1:
            kinds, which = np.unique(rows, axis=0, return_inverse=True)
            without = np.array([value(metric, (N * mean - kind) / (N - 1), N - 1) for kind in kinds])[which.ravel()]
            out[s] += (N - 1) * (without.mean() - without)
    return out


def matthews(confusion: Table) -> float:
    """Matthews' correlation from a confusion matrix (label, prediction) [K*K], any unit; 0 if undefined."""
    k = math.isqrt(confusion.size)
    c = np.asarray(confusion, dtype=np.float64).reshape(k, k)
    total, right = c.sum(), np.trace(c)
    labels, guesses = c.sum(1), c.sum(0)
    under = (total**2 - guesses @ guesses) * (total**2 - labels @ labels)
    return float((right * total - labels @ guesses) / math.sqrt(under)) if under > 1e-18 else 0.0


def f1(confusion: Table) -> float:
    """Mean of F1 over the classes that occur, as label or prediction (scikit-learn's macro average), from a confusion
    matrix (label, prediction) [K*K] of shares or counts."""
    k = math.isqrt(confusion.size)
    c = np.asarray(confusion, dtype=np.float64).reshape(k, k)
    both = c.sum(0) + c.sum(1)
    occurs = both > 1e-12
    return float((2 * np.diag(c)[occurs] / both[occurs]).mean())


def confusion_cells(labels: ArrayLike, predictions: ArrayLike, classes: int) -> Table:
    """One-hot confusion cells [S, N, classes²] from labels [N] and predictions [S, N] (integers)."""
    cells = np.asarray(labels)[None] * classes + np.asarray(predictions)
    found = np.zeros((*cells.shape, classes * classes))
    np.put_along_axis(found, cells[..., None], 1.0, -1)
    return found


def pearson(means: Table) -> float:
    """Pearson's correlation from the means of x, y, x², y² and xy; 0 where one of them does not vary."""
    x, y, xx, yy, xy = means
    spread = (xx - x * x) * (yy - y * y)
    return float((xy - x * y) / math.sqrt(spread)) if spread > 1e-18 else 0.0
