"""What items add up to is the metric itself, for every metric that methods are compared by."""

from __future__ import annotations

import numpy as np
import pytest

from dual_lora.lab.comparison import metrics
from dual_lora.lab.errors import UserError
from dual_lora.lab.evaluation.scoring import summary


class Labelled:
    def __init__(self, label):
        self.label = label


def check(metric, task, rows, labels=(), classes=(), name=None):
    """The shares of the items against the evaluation's own figure; returns the item table."""
    shares = np.asarray(metrics.features(metric, rows, labels, classes), dtype=float)
    figure = summary(task, rows, [Labelled(label) for label in labels])[name or metric]
    assert metrics.value(metric, shares.mean(0)) == pytest.approx(figure, rel=1e-9)
    table = metrics.score_table(metric, [shares, shares])
    assert table.mean(1) == pytest.approx([metrics.sign(metric) * figure] * 2, rel=1e-6)
    return table


def test_classification():
    random = np.random.default_rng(0)
    classes = ["bad", "good", "odd"]
    labels = random.choice(classes, 60).tolist()
    rows = []
    for label in labels:
        guess = label if random.random() < 0.7 else random.choice(classes)
        rows.append({"correct": guess == label, "predicted": guess, "nats": float(random.random())})
    for metric in ("accuracy", "f1", "matthews", "loss"):
        assert check(metric, "classification", rows, labels, classes).shape == (2, 60)


def test_loss_is_per_token_and_answers_to_one_prompt_are_one_item():
    rows = [{"nats": 4.0, "tokens": 2}, {"nats": 9.0, "tokens": 6}, {"nats": 1.0, "tokens": 4}]
    table = check("loss", "loss", rows)
    assert table.shape == (2, 3)
    assert table.mean() == pytest.approx(-14 / 12)
    together = metrics.features("loss", rows, [], [], ["a", "b", "a"])
    assert together == [[5.0, 6.0], [9.0, 6.0]]


def test_choice_and_exact_match():
    rows = [{"correct": True}, {"correct": False}, {"correct": True}]
    assert check("choice", "choice", rows)[0] == pytest.approx([1, 0, 1], abs=1e-6)
    check("exact_match", "exact_match", rows)


def test_bleu():
    pytest.importorskip("sacrebleu")
    rows = [
        {
            "predicted": "the cat sat on the mat today",
            "references": ["the cat sat on the mat", "a cat sat there today"],
        },
        {"predicted": "there is a small house by the sea", "references": ["there is a small house near the sea"]},
        {"predicted": "aromi is a coffee shop", "references": ["aromi is a coffee shop in the city centre"]},
    ]
    check("bleu", "bleu", rows)


@pytest.mark.parametrize("said", [["the cat sat on", "no"], ["", ""], ["cat", "so"]])
def test_bleu_without_a_match_of_four_words_is_zero(said):
    pytest.importorskip("sacrebleu")
    rows = [{"predicted": text, "references": ["a cat sat up there so still"]} for text in said]
    shares = metrics.features("bleu", rows, [], [])
    assert metrics.score_table("bleu", [shares, shares]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_metrics_fit_their_models():
    assert metrics.evaluation("loss", "classification") == "classification"
    assert metrics.evaluation("loss", "causal") == "loss"
    assert metrics.default_metric([], "classification") == "accuracy"
    assert metrics.default_metric(["choice", "loss"], "causal") == "choice"
    with pytest.raises(UserError, match="classifier has no bleu"):
        metrics.evaluation("bleu", "classification")
    with pytest.raises(UserError, match="language model has no f1"):
        metrics.evaluation("f1", "causal")
    with pytest.raises(UserError, match="Did you mean 'matthews'"):
        metrics.evaluation("mathews", "classification")
