"""Measures of generated text: by hand, and against the libraries where they agree on the definition."""

import math
import random

import pytest

pytest.importorskip("nltk")
pytest.importorskip("rouge_score")
sacrebleu = pytest.importorskip("sacrebleu")

from dual_lora.lab.errors import UserError  # noqa: E402
from dual_lora.lab.run import figures as nlg  # noqa: E402


def words(*texts):
    return [text.split() for text in texts]


def sentences(count, seed=0):
    chance = random.Random(seed)
    return [" ".join(chance.choices(["the", "a", "blue", "red", "cat", "dog", "sat"], k=8)) for _ in range(count)]


def test_nist_by_hand():
    # 4 reference words: a twice (1 bit), b and c once (2 bits); after a comes b or c (1 bit). (1 + 2) / 2 + 1 / 1
    assert nlg.nist(words("a b"), [words("a b", "a c")]) == pytest.approx(2.5)
    # two thirds of the reference's length halve the score: (log2 3 + log2 3) / 2 + 0 / 1
    assert nlg.nist(words("a b"), [words("a b c")]) == pytest.approx(0.5 * math.log2(3))
    assert nlg.nist(words("x y"), [words("a b")]) == 0


def test_nist_is_nltks_with_one_reference_each():
    from nltk.translate.nist_score import corpus_nist

    texts, references = words(*sentences(12)), [[r] for r in words(*sentences(12, seed=1))]
    assert nlg.nist(texts, references) == pytest.approx(corpus_nist(references, texts), rel=1e-9)


def test_rouge_l_by_hand():
    # precision 1, recall 1/2
    assert nlg.rouge_l(words("a b"), [words("a b c d")]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    # the best precision (second reference) and the best recall (first one) are both 1
    assert nlg.rouge_l(words("a b c d"), [words("a b", "a b c d e f g h")]) == pytest.approx(1)
    assert nlg.rouge_l(words("x"), [words("a b")]) == 0


def test_rouge_l_without_weight_on_recall_is_the_librarys():
    from rouge_score.rouge_scorer import RougeScorer

    texts, references = sentences(6), sentences(6, seed=1)
    scorer = RougeScorer(["rougeL"])
    mean = sum(scorer.score(r, t)["rougeL"].fmeasure for t, r in zip(texts, references, strict=True)) / 6
    ours = nlg.rouge_l(words(*texts), [words(r) for r in references], beta=1.0)
    assert ours == pytest.approx(mean)


def test_cider_by_hand():
    # All n-grams stand in one of two reference sets, so all weigh log 2. The first text is its reference: 10.
    # The second shares 2 of 4 words and 1 of 3 pairs with a reference two pairs longer.
    short = (2 / (math.sqrt(2) * 2) + 1 / math.sqrt(3)) / 4 * math.exp(-4 / 72)
    score = nlg.cider(words("a b c d", "x y"), [words("a b c d"), words("x y z w")])
    assert score == pytest.approx((10 + 10 * short) / 2)
    # A word said twice counts as often as the reference has it: 1 · 1 / (2 · √2), no pair in common.
    twice = nlg.cider(words("a b c d", "x x"), [words("a b c d"), words("x y")])
    assert twice == pytest.approx((10 + 10 / (2 * math.sqrt(2)) / 4) / 2)
    # Words that all references hold weigh nothing.
    assert nlg.cider(words("a", "a"), [words("a"), words("a")]) == 0


def test_cider_is_cocos():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="optional: no release since 2020")
    texts, references = sentences(8), [sentences(3, seed=k) for k in range(8)]
    judge = scorer.CiderScorer()
    for text, own in zip(texts, references, strict=True):
        judge += (text, own)
    assert nlg.cider(words(*texts), [words(*own) for own in references]) == pytest.approx(judge.compute_score()[0])


class Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


class Thesaurus:
    """Cheap and low mean the same (nltk looks up stems, so both are their own)."""

    def synsets(self, word):
        return [self] if word in ("cheap", "low") else []

    def lemmas(self):
        return [Lemma("cheap"), Lemma("low")]


def test_meteor_by_hand():
    # Three matches in one chunk: F = 1, penalty 0.5 · (1/3)³
    assert nlg.meteor(words("a b c"), [words("a b c")], Thesaurus()) == pytest.approx(1 - 0.5 / 27)
    # Synonyms count as matches; the better of two references counts.
    same = nlg.meteor(words("a cheap pub"), [words("x y z", "a low pub")], Thesaurus())
    assert same == pytest.approx(1 - 0.5 / 27)
    assert nlg.meteor(words("a dear pub"), [words("a low pub")], Thesaurus()) < 0.8


def test_all_figures_of_texts_as_they_are_written(monkeypatch):
    monkeypatch.setattr(nlg, "_wordnet", Thesaurus)
    texts = ["Aromi is a coffee shop in the city.", "It's a cheap family-friendly pub (riverside)."]
    references = [[texts[0], "Aromi sells coffee."], [texts[1].lower()]]
    figures = nlg.nlg_figures(texts, references)
    assert figures["bleu"] == pytest.approx(100)  # case does not count
    assert figures["rouge_l"] == pytest.approx(1)
    assert figures["cider"] > 7
    assert set(figures) == {"bleu", "nist", "meteor", "rouge_l", "cider"}
    assert nlg.treebank_words(texts[1]) == ["it", "'s", "a", "cheap", "family-friendly", "pub", "riverside"]


def test_bleu_is_sacrebleus():
    texts, references = sentences(10), [sentences(2, seed=k) for k in range(10)]
    with pytest.warns(UserWarning, match="METEOR is left out") if nlg._wordnet() is None else _quiet():
        figures = nlg.nlg_figures(texts, references)
    columns = [list(column) for column in zip(*references, strict=True)]
    assert figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, columns, lowercase=True).score)


def _quiet():
    import contextlib

    return contextlib.nullcontext()


def test_without_wordnet_the_rest_is_there(monkeypatch):
    monkeypatch.setattr(nlg, "_wordnet", lambda: None)
    with pytest.warns(UserWarning, match="nltk.downloader wordnet"):
        figures = nlg.nlg_figures(["a b c d"], [["a b c d"]])
    assert set(figures) == {"bleu", "nist", "rouge_l", "cider"}


def test_no_texts():
    with pytest.raises(UserError, match="no generated texts"):
        nlg.nlg_figures([], [])
