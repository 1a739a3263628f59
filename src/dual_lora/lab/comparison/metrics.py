"""The metrics that methods are compared by: which evaluation yields them, and what every item adds to them.

Every metric here is a function of item means: accuracy of the mean of right answers, loss of the means of nats and
tokens, Matthews' correlation and F1 of the mean confusion matrix, BLEU of the mean n-gram counts. So an item's share
in any of them is defined (`stats.pseudo_values`), and paired tests over items work for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dual_lora.lab.comparison import stats
from dual_lora.lab.errors import UserError, suggest

# Name -> (the evaluation that yields it, +1 if more is better and -1 if less is).
METRICS: dict[str, tuple[str, int]] = {
    "exact_match": ("exact_match", 1),
    "choice": ("choice", 1),
    "accuracy": ("classification", 1),
    "f1": ("classification", 1),
    "matthews": ("classification", 1),
    "loss": ("loss", -1),
    "bleu": ("bleu", 1),
}


def sign(metric: str) -> int:
    """+1 where more is better, -1 where less is."""
    return METRICS[metric][1]


def better(metric: str) -> str:
    """Of which there should be, "more" or "less"."""
    return "more" if sign(metric) > 0 else "less"


def counted(metric: str) -> bool:
    """Whether items are right or wrong, so that two methods may agree on all of a few by luck; else it is measured."""
    return metric not in ("loss", "bleu")


def evaluation(metric: str, head: str) -> str:
    """The evaluation that yields the metric on a causal or a classification model. Raises UserError if none does."""
    if metric not in METRICS:
        raise UserError(f"There is no metric {metric!r}.{suggest(metric, METRICS)}")
    if head == "regression":
        raise UserError("Studies compare classifiers and language models; a head for one number has no metric here.")
    if head == "classification":
        if metric not in ("accuracy", "f1", "matthews", "loss"):
            raise UserError(f"A classifier has no {metric}: choose accuracy, f1, matthews or loss.")
        return "classification"
    if METRICS[metric][0] == "classification":
        raise UserError(f"A language model has no {metric}: choose choice, exact_match, loss or bleu.")
    return METRICS[metric][0]


def default_metric(tasks: Sequence[str], head: str) -> str:
    """What a recipe is judged by if the study does not say."""
    first = tasks[0] if tasks else ("classification" if head == "classification" else "loss")
    return {"classification": "accuracy", "nlg": "bleu"}.get(first, first)


def features(
    metric: str,
    rows: Sequence[dict[str, Any]],
    labels: Sequence[str],
    classes: Sequence[str],
    prompts: Sequence[str] = (),
) -> list[Any]:
    """What each of the N items adds: [N, K]. rows: as the evaluation keeps them; labels and classes: classifiers.

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
    if metric in ("f1", "matthews"):
        number = {name: i for i, name in enumerate(classes)}
        truth = np.array([number[label] for label in labels])
        guess = np.array([number[row["predicted"]] for row in rows])
        return stats.confusion_cells(truth, guess[None], len(classes))[0].tolist()
    return [[float(row["correct"])] for row in rows]


def value(metric: str, means: NDArray[np.float64]) -> float:
    """The metric from the K item means."""
    if metric == "loss":
        return float(means[0] / means[1])
    if metric == "bleu":
        return _bleu(means)
    if metric == "matthews":
        return stats.matthews(means)
    if metric == "f1":
        return stats.f1(means)
    return float(means[0])


def score_table(metric: str, runs: Sequence[Any]) -> NDArray[np.float64]:
    """Item shares [S, N] of the runs' features [S, N, K], with the sign turned so that more is better."""
    return sign(metric) * stats.pseudo_values(np.asarray(runs, dtype=np.float64), lambda m: value(metric, m))


def _ngrams(text: str, references: Sequence[str]) -> list[float]:
    from sacrebleu.metrics import BLEU

    score = BLEU(effective_order=True).sentence_score(text, list(references))
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu(means: NDArray[np.float64]) -> float:
    from sacrebleu.metrics import BLEU

    # sacrebleu counts in whole numbers; BLEU does not depend on their unit.
    counts = [round(float(mean) * 10**12) for mean in means]
    if min(counts[:8]) <= 0:  # an order without a match; below 0 where the slope is taken there
        return 0.0
    return BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9]).score
