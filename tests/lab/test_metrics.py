"""What items add up to is the metric itself, for every metric that methods are compared by."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.run.figures import summary
from dual_lora.lab.study import metrics


class Labelled:
    def __init__(self, label):
        self.label = label


def check(metric, task, rows, labels=(), classes=(), name=None):
    """The shares of the items against the evaluation's own figure; returns the item table."""
    shares = np.asarray(metrics.features(metric, rows, labels, classes), dtype=float)
    figure = summary(task, rows, [Labelled(label) for label in labels])[name or metric]
    assert metrics.value(metric, shares.mean(0), len(shares)) == pytest.approx(figure, rel=1e-9)
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


@pytest.mark.parametrize("said", [["the cat sat on", "no"], ["", ""], ["cat", "so"], ["a cat sat", "a cat so still"]])
def test_bleu_without_a_match_of_four_words(said):
    """Smoothed as the evaluation's is: two systems of which neither has one need not be equal."""
    pytest.importorskip("sacrebleu")
    rows = [{"predicted": text, "references": ["a cat sat up there so still"]} for text in said]
    table = check("bleu", "bleu", rows)
    assert (table > 0).any() == (max(len(text.split()) for text in said) >= 4)


def test_the_only_match_of_four_words_may_be_left_out():
    pytest.importorskip("sacrebleu")
    rows = [
        {"predicted": text, "references": ["a cat sat up there"]} for text in ["a cat sat up", *["a cat so up"] * 9]
    ]
    check("bleu", "bleu", rows)


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
    assert metrics.evaluation("mse", "regression") == "regression"
    assert metrics.default_metric([], "regression") == "pearson"
    with pytest.raises(UserError, match="model of one number has no accuracy: choose pearson or mse"):
        metrics.evaluation("accuracy", "regression")


@pytest.mark.parametrize("unit", [1.0, 1e6])
def test_pearson_and_squares_of_one_number(unit):
    random = np.random.default_rng(3)
    labels = unit * (3 + random.random(200))
    rows = [{"predicted": float(v)} for v in labels + 0.3 * unit * random.standard_normal(200)]
    table = check("pearson", "regression", rows, [str(v) for v in labels])
    values = np.array([row["predicted"] for row in rows])
    picks = random.integers(0, 200, (250, 200))
    resampled = np.std([np.corrcoef(labels[p], values[p])[0, 1] for p in picks])
    assert table[0].std() / np.sqrt(200) == pytest.approx(resampled, rel=0.2)  # the delta method's standard error
    squares = np.asarray(metrics.features("mse", rows, [str(v) for v in labels], []))
    assert metrics.value("mse", squares.mean(0), 200) == pytest.approx(((values - labels) ** 2).mean())
    assert metrics.sign("mse") == -1
    level = metrics.features("pearson", [{"predicted": 1.0}] * 3, ["1", "2", "3"], [])
    assert metrics.value("pearson", np.mean(level, 0), 3) == 0.0


def test_shares_of_bleu_are_what_it_loses_without_each_text():
    """By sacrebleu's own score of the others, where one order has no match and is smoothed by their number."""
    corpus_bleu = pytest.importorskip("sacrebleu").corpus_bleu
    random = np.random.default_rng(4)
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "slept", "well", "today"])
    said = [" ".join(random.choice(words, 6)) for _ in range(8)]
    wanted = [" ".join(random.choice(words, 6)) for _ in range(8)]
    rows = [{"predicted": text, "references": [right]} for text, right in zip(said, wanted, strict=True)]

    def score(kept):
        kept = list(kept)
        return corpus_bleu([said[i] for i in kept], [[wanted[i] for i in kept]], force=True).score

    assert not sum(np.array(metrics.features("bleu", rows, [], []))[:, 3]), "no four words match"
    (shares,) = metrics.score_table("bleu", [metrics.features("bleu", rows, [], [])])
    without = np.array([score(set(range(8)) - {i}) for i in range(8)])
    assert shares == pytest.approx(score(range(8)) + 7 * (without.mean() - without))


def test_pseudo_values_give_matthews_and_its_spread():
    from sklearn.metrics import f1_score, matthews_corrcoef

    random = np.random.default_rng(9)
    labels = random.integers(0, 2, 400)
    guesses = np.where(random.random((3, 400)) < 0.8, labels, 1 - labels)
    cells = metrics.confusion_cells(labels, guesses, 2)
    macro = partial(f1_score, average="macro")
    for ours, theirs in (("matthews", matthews_corrcoef), ("f1", macro)):
        values = metrics.pseudo_values(ours, cells)
        expected = [theirs(labels, g) for g in guesses]
        assert values.mean(1) == pytest.approx(expected, abs=1e-9)
        # the delta method's standard error against an ordinary bootstrap of the metric
        picks = random.integers(0, 400, (250, 400))
        resampled = np.std([theirs(labels[p], guesses[0][p]) for p in picks])
        assert values[0].std() / np.sqrt(400) == pytest.approx(resampled, rel=0.2)


def test_three_class_f1_is_the_macro_mean():
    from sklearn.metrics import f1_score, matthews_corrcoef

    random = np.random.default_rng(10)
    labels, guesses = random.integers(0, 3, (2, 100))
    table = metrics.confusion_cells(labels, guesses[None], 3)[0].sum(0)
    assert metrics.f1(table) == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert metrics.matthews(table) == pytest.approx(matthews_corrcoef(labels, guesses))


def test_many_classes_take_no_more_than_their_cells():
    """A whole matrix for each cell would be 65 GB of 300 classes."""
    classes = [f"c{i:03}" for i in range(300)]
    rows = [{"predicted": name} for name in classes[:20]]
    found = metrics.features("f1", rows, classes[:20], classes)
    assert np.shape(found) == (20, 300**2)
    assert [sum(row) for row in found] == [1] * 20
    assert [row.index(1.0) for row in found] == [301 * i for i in range(20)]
    with pytest.raises(UserError, match="f1 of 4,000 items in 300 classes needs a table of 360,000,000 cells"):
        metrics.features("f1", rows * 200, classes[:20] * 200, classes)


def test_f1_leaves_out_a_class_that_nobody_names():
    rows = [{"correct": True, "predicted": "a", "nats": 0.0}, {"correct": False, "predicted": "b", "nats": 1.0}] * 2
    check("f1", "classification", rows, list("aabb"), list("abc"))


def test_how_far_one_answer_moves_a_share():
    """Of two test sets, of 2 and 8 items, each counts half: an answer of the small one counts 2.5 times the mean."""
    weights = np.array([2.5] * 2 + [0.625] * 8)
    runs = weights[None, :, None] * np.ones((3, 1, 1))
    assert metrics.reach("accuracy", runs) == 2.5
    assert metrics.reach("accuracy", runs[:, 2:] / 0.625) == 1.0
    assert metrics.reach("accuracy", 0 * runs) == 1.0, "nobody is right"
    right = np.array([0.0] * 2 + [1.0] * 8)  # nobody in the small set
    weighed = [np.stack([weights * right, weights], 1)] * 2
    assert metrics.reach("accuracy", weighed) == 2.5
    assert metrics.score_table("accuracy", weighed) == pytest.approx(np.stack([weights * right] * 2))
    assert metrics.score_table("accuracy", [weighed[0], weighed[0][:, :1]]).shape == (2, 10), "a run of before"
    assert metrics.reach("loss", runs) is None


@pytest.mark.parametrize("metric", ["f1", "matthews"])
@pytest.mark.parametrize("rare", [0.5, 0.1])
def test_how_far_one_answer_moves_a_metric_of_classes(metric, rare):
    """By flipping every answer in turn. A rare class counts more."""
    random, N = np.random.default_rng(0), 200
    labels = (random.random(N) < rare).astype(int)
    guesses = np.where(random.random(N) < 0.1, 1 - labels, labels)

    def score(guess):
        return metrics.value(metric, metrics.confusion_cells(labels, guess[None], 2)[0].mean(0), N)

    moved = [abs(score(np.where(np.arange(N) == i, 1 - guesses, guesses)) - score(guesses)) for i in range(N)]
    found = metrics.reach(metric, metrics.confusion_cells(labels, np.stack([guesses] * 3), 2))
    assert found == pytest.approx(N * max(moved))
    assert (found > 1.5 * metrics.usual_reach(metric)) == (rare == 0.1)
