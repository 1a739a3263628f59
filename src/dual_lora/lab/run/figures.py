"""The figures of a task: what the rows of all its examples add up to.

Of the task nlg they are those of the E2E challenge's script (e2e-metrics):

bleu     sacrebleu on 13a tokens in lower case, 0..100
nist     here: nltk's takes the one best reference, mteval-13a all of them
meteor   nltk with WordNet, 0..1: METEOR 1.5, which the script calls, is a Java program whose figures are far lower
rouge_l  rouge-score's common subsequences, 0..1: the script pairs the best precision with the best recall
cider    here, 0..10: pycocoevalcap has had no release since 2020 and brings 100 MB of Java; aac-metrics needs models

bleu and nist are counted on the tokens of mteval-13a, the others on words of the Penn Treebank without punctuation,
both in lower case (the script uses Stanford's tokenizer, this nltk's; they part at few words).
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.run.scoring import Rows

Words = list[str]

# Dropped by COCO's tokenizer; brackets are named -lrb- and so on there, nltk leaves them as they are.
_PUNCTUATION = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";", "(", ")", "{", "}"}
_NO_WORDNET = (
    "METEOR is left out: it needs WordNet, which nltk does not carry. `python -m nltk.downloader wordnet` brings it "
    "(without a network: put its folder at corpora/wordnet into a folder that NLTK_DATA names)."
)


def figures(task: str, rows: Rows, examples: list[Example]) -> dict[str, float]:
    """The figures of a task over its rows; of several test sets (`Example.part`) each, and their mean first."""
    parts = list(dict.fromkeys(example.part for example in examples))
    if len(parts) < 2:
        return summary(task, rows, examples)
    each = {}
    for part in parts:
        if task in ("bleu", "nlg"):  # a row is a prompt
            each[part] = summary(task, [row for row in rows if row["part"] == part], [])
            continue
        own = [i for i, example in enumerate(examples) if example.part == part]
        each[part] = summary(task, [rows[i] for i in own], [examples[i] for i in own])
    names = [name for name in each[parts[0]] if all(name in own for own in each.values())]  # a correlation may not be
    means = {name: sum(own[name] for own in each.values()) / len(parts) for name in names}
    return means | {f"{name}/{part}": value for part, own in each.items() for name, value in own.items()}


def summary(task: str, rows: Rows, examples: list[Example]) -> dict[str, float]:
    """The figures of a task over its rows, all taken together."""
    if task == "loss":
        nats, tokens = sum(r["nats"] for r in rows), sum(r["tokens"] for r in rows)
        loss = nats / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if task == "nlg":
        return nlg_figures([r["predicted"] for r in rows], [r["references"] for r in rows])
    if task == "bleu":
        return {"bleu": bleu([r["predicted"] for r in rows], [r["references"] for r in rows])}
    if task == "regression":
        from scipy.stats import pearsonr, spearmanr

        values, labels = [float(r["predicted"]) for r in rows], [float(e.label) for e in examples]
        error = {"mse": sum((v - label) ** 2 for v, label in zip(values, labels, strict=True)) / len(rows)}
        if len({*values}) < 2 or len({*labels}) < 2:  # a correlation is not defined
            return error
        own = {"pearson": pearsonr, "spearman": spearmanr}
        return {name: float(of(values, labels).statistic) for name, of in own.items()} | error
    accuracy = sum(r["correct"] for r in rows) / len(rows)
    if task != "classification":
        return {task: accuracy}
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, guess = [e.label for e in examples], [r["predicted"] for r in rows]
    return {
        "accuracy": accuracy,
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, guess)),
        "loss": sum(r["nats"] for r in rows) / len(rows),
    }


def nlg_figures(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The figures of ``texts`` against one or several references each; without "meteor" where WordNet is missing.

    Raises UserError when there are no texts.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    if not texts:
        raise UserError("There are no generated texts to measure.")
    marks = Tokenizer13a()
    found = [marks(text.lower()).split() for text in texts]
    wanted = [[marks(text.lower()).split() for text in own] for own in references]
    words, right = [treebank_words(text) for text in texts], [[treebank_words(t) for t in own] for own in references]
    figures = {
        "bleu": bleu(texts, references, lowercase=True, force=True),
        "nist": nist(found, wanted),
        "rouge_l": rouge_l(words, right),
        "cider": cider(words, right),
    }
    wordnet = _wordnet()
    if wordnet is None:
        warn(_NO_WORDNET, stacklevel=2)
        return figures
    return figures | {"meteor": meteor(words, right, wordnet)}


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], **options: Any) -> float:
    """Corpus BLEU, 0..100. options: those of sacrebleu's `BLEU`."""
    from sacrebleu.metrics import BLEU

    columns: Any = list(zip_longest(*references))  # the first reference of every text, the second, ...; None for none
    return float(BLEU(**options).corpus_score(list(texts), columns).score)


def treebank_words(text: str) -> Words:
    """Words in lower case as the Penn Treebank splits them, without punctuation."""
    from nltk.tokenize import TreebankWordTokenizer

    return [word for word in TreebankWordTokenizer().tokenize(text.lower()) if word not in _PUNCTUATION]


def nist(texts: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = 5) -> float:
    """NIST (Doddington 2002) as mteval-13a counts it with several references.

    Every n-gram that a text shares with any of its references weighs log2(count of its first n-1 words / its own
    count), counts over all references; the mean per n, summed over n; times a penalty for texts shorter than the
    mean reference.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for own in references:
        for reference in own:
            seen[()] += len(reference)
            for n in range(1, longest + 1):
                seen.update(_ngrams(reference, n))
    total = 0.0
    for n in range(1, longest + 1):
        weight = possible = 0.0
        for text, own in zip(texts, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                most |= Counter(_ngrams(reference, n))
            shared = Counter(_ngrams(text, n)) & most
            weight += sum(math.log2(seen[gram[:-1]] / seen[gram]) * count for gram, count in shared.items())
            possible += max(len(text) - n + 1, 0)
        total += weight / possible if possible else 0.0
    length = sum(map(len, texts))
    expected = sum(sum(map(len, own)) / len(own) for own in references)
    ratio = min(length / expected, 1.0) if expected else 1.0
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if ratio else 0.0


def rouge_l(texts: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> float:
    """Mean F of the longest common subsequence, 0..1: best precision and best recall over a text's references."""
    from rouge_score.rouge_scorer import RougeScorer

    class Split:  # the words are split already
        def tokenize(self, text: str) -> Words:
            return text.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Split())
    scores = []
    for text, own in zip(texts, references, strict=True):
        each = [scorer.score(" ".join(reference), " ".join(text))["rougeL"] for reference in own]
        precision, recall = max(s.precision for s in each), max(s.recall for s in each)
        both = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / both if both else 0.0)
    return sum(scores) / len(scores)


def cider(texts: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = 4, sigma: float = 6.0) -> float:
    """CIDEr-D (Vedantam et al. 2015), 0..10: which COCO's and so the E2E challenge's "CIDEr" is.

    Cosine of the texts' n-gram counts, each n-gram weighted by how few texts' references hold it, counts clipped to
    the reference's, times a Gaussian of the difference in length; mean over references and over n = 1..4.
    """
    holders: Counter[tuple[str, ...]] = Counter()
    for own in references:
        holders.update({gram for reference in own for n in range(1, longest + 1) for gram in _ngrams(reference, n)})

    def weighted(words: Words, n: int) -> dict[tuple[str, ...], float]:
        return {
            gram: count * (math.log(len(references)) - math.log(max(1, holders[gram])))
            for gram, count in Counter(_ngrams(words, n)).items()
        }

    total = 0.0
    for text, own in zip(texts, references, strict=True):
        vectors = [weighted(text, n) for n in range(1, longest + 1)]
        for reference in own:
            # COCO measures length in bigrams; the difference is the same as in words unless there is no bigram.
            apart = max(len(text) - 1, 0) - max(len(reference) - 1, 0)
            near = math.exp(-(apart**2) / (2 * sigma**2))
            for n, mine in enumerate(vectors, 1):
                other = weighted(reference, n)
                norms = _norm(mine) * _norm(other)
                dot = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in mine.items())
                total += near * (dot / norms if norms else dot) / (longest * len(own))
    return 10 * total / len(texts)


def meteor(texts: Sequence[Words], references: Sequence[Sequence[Words]], wordnet: Any) -> float:
    """Mean METEOR (Banerjee and Lavie 2005, nltk's parameters), 0..1: words, stems and WordNet's synonyms."""
    from nltk.translate.meteor_score import meteor_score

    scores: list[float] = [
        meteor_score(own, text, wordnet=wordnet) for text, own in zip(texts, references, strict=True)
    ]
    return sum(scores) / len(scores)


def _ngrams(words: Words, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(value**2 for value in vector.values()))


def _wordnet() -> Any:
    """nltk's WordNet, or None where its files are not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):  # not there, or in parts only
        return None
    return wordnet
