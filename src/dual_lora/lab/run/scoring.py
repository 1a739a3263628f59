"""One function a task: model + examples → one row an example, in their order. Batched, longest rows first.

The answer in a generated text is what a regular expression takes, or the rule of the commonsense protocol: LLM-Adapters
and DoRA after it (commonsense_evaluate.py, extract_answer) take the first label of the task's kind that the text holds,
wherever it stands, and count a text without one as wrong.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from dual_lora._warning import warn
from dual_lora.lab.data.batches import Collator, aligned, collator, longest_first, to_device
from dual_lora.lab.data.encode import IGNORED, VALUE, Encoded, Prompter, encode_texts
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.generate import generate_all, search_of, specials_of
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.recipe.schema import EvaluateSection

COMMONSENSE = "commonsense"

# Every task has the labels of one kind: BoolQ; PIQA; SIQA, ARC and OpenBookQA; HellaSwag; WinoGrande. The first three
# have fewer answers than five in most questions, yet all five labels are looked for.
LABELS = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")

Rows = list[dict[str, Any]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """The inputs of a scoring function. prompter: for language models; classes, max_length: for encoders."""

    model: Any
    examples: list[Example]
    prompter: Prompter
    spec: EvaluateSection
    classes: Sequence[str] = ()
    max_length: int = 512
    advance: Advance = lambda _: None

    @property
    def tokenizer(self) -> Any:
        return self.prompter.tokenizer


def score_loss(asked: Asked) -> Rows:
    """Summed negative log-likelihood (nats) of each answer and its number of tokens."""
    parts = [asked.prompter.pieces(example, asked.max_length) for example in asked.examples]
    encoded = [row for rows in parts for row in rows]
    rows = iter(loss_rows(asked.model, asked.tokenizer, encoded, asked.spec.batch_size, asked.advance))
    together = ([next(rows) for _ in part] for part in parts)  # a text without a prompt has several
    return [part[0] if len(part) == 1 else {n: sum(row[n] for row in part) for n in part[0]} for part in together]


def loss_rows(
    model: Any, tokenizer: Any, encoded: list[Encoded], batch_size: int, advance: Advance = lambda _: None
) -> Rows:
    """Summed negative log-likelihood (nats) of each row's labels and their number."""
    collate = collator(tokenizer, False, model)
    rows: Rows = [{}] * len(encoded)
    for part, found, labels in _logits(model, encoded, collate, batch_size, advance):
        logits, targets = aligned(found, labels)
        nats = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        sums, counts = nats.view_as(targets).double().sum(1).tolist(), (targets != IGNORED).sum(1).tolist()
        for i, total, count in zip(part, sums, counts, strict=True):
            rows[i] = {"nats": total, "tokens": count}
    return rows


def _logits(
    model: Any, encoded: list[Encoded], collate: Collator, size: int, advance: Advance
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Yield each batch's row indices, logits and labels."""
    for part in longest_first([len(e.input_ids) for e in encoded], size):
        batch = to_device(model, collate([encoded[i] for i in part]))
        labels = batch.pop("labels")
        with torch.inference_mode():
            logits = model(**batch).logits
        yield part, logits, labels
        advance(len(part))


def score_exact_match(asked: Asked) -> Rows:
    """Greedy answers, and whether each one is the expected one."""
    spec, special, rows = asked.spec, specials_of(asked.tokenizer), []
    if spec.extract:
        _warn_of_parts(asked.examples, spec.extract)
    for example, text in zip(asked.examples, _generate_answers(asked, asked.examples), strict=True):
        found = answer_in(text, spec.extract, example.target) if spec.extract else text.strip()
        expected = special.sub("", _expected(example, spec.extract) if spec.extract else example.answer)
        row = {
            "correct": same_answer(found, expected.strip(), spec.compare),
            "predicted": found,
            "expected": expected.strip(),
        }
        rows.append(row | ({"text": text.strip()} if spec.extract else {}))  # what the answer was taken from
    return rows


def answer_in(text: str, extract: str, target: str) -> str:
    """Return the answer in ``text``, "" if there is none. extract: a regular expression (its last group, or all of it),
    or "commonsense": the first label of the kind that ``target``, the right answer, is of.

    Raises UserError for a target that is no label of the commonsense tasks.
    """
    pattern = _labels_like(target) if extract == COMMONSENSE else extract
    match = _pattern(pattern).search(text)
    return (match[match.lastindex or 0] if match else "").strip()


def part_in(text: str, extract: str) -> str:
    """Return the pattern's match in ``text`` if it is only a part of a word or number, as "4" of "3/4"; else ""."""
    match = _pattern(extract).search(text)
    if match is None:
        return ""
    first, last = match.span(match.lastindex or 0)
    found = text[first:last].strip()
    first = text.index(found, first)
    words = re.split(r"\s", text[:first])[-1] + found + re.split(r"\s", text[first + len(found) :])[0]
    alone = [signs.lstrip("([{<\"'“‘«*$").rstrip(")]}>\"'”’».,;:?!*$") for signs in (words, found)]
    return found if alone[0] != alone[1] else ""


@lru_cache
def _pattern(text: str) -> Pattern:
    return Pattern(text, "evaluate.extract")


def _labels_like(target: str) -> str:
    for labels in LABELS:
        if target in labels:
            return "|".join(labels)
    known = ", ".join(f"{labels[0]}…{labels[-1]}" for labels in LABELS)
    raise UserError(
        f"evaluate.extract is {COMMONSENSE}, but the right answer {target!r} is no label of these tasks ({known}): "
        "give a regular expression."
    )


def _expected(example: Example, extract: str) -> str:
    """The right answer: of records that have no field of their own for it, what the pattern takes of the answer."""
    if not _is_taken(example, extract):
        return example.target
    return answer_in(example.answer, extract, example.target) or example.target


def _is_taken(example: Example, extract: str) -> bool:
    return example.target == example.answer and extract != COMMONSENSE


def _warn_of_parts(examples: list[Example], extract: str) -> None:
    """Say where less than a word or a number is compared: a pattern may take "4" out of "3/4"."""
    whole = [example.answer for example in examples if _is_taken(example, extract)]
    if parts := [(part, text) for text in whole if (part := part_in(text, extract))]:
        warn(
            f"In {len(parts)} of {len(examples)} expected answers evaluate.extract takes a part of a word or a number, "
            f"such as {parts[0][0]!r} of {parts[0][1][-60:]!r}, and only that is compared. If it should be "
            "more, write a wider pattern, or give the records a field with the answer alone.",
            stacklevel=2,
        )


def score_texts(asked: Asked) -> Rows:
    """Generate one greedy text for each different prompt, with all its answers as references."""
    references: dict[tuple[str, str], list[Example]] = {}  # of several test sets each has its own
    for example in asked.examples:
        key = example.part, asked.prompter.prompt_text(example.prompt, example.tools)
        references.setdefault(key, []).append(example)
    texts, special = _generate_answers(asked, [group[0] for group in references.values()]), specials_of(asked.tokenizer)
    return [
        {"predicted": text.strip(), "references": [special.sub("", e.answer) for e in group]}
        | ({"part": group[0].part} if group[0].part else {})
        for text, group in zip(texts, references.values(), strict=True)
    ]


def _generate_answers(asked: Asked, examples: list[Example]) -> list[str]:
    """Generate the text after each example's prompt, with the recipe's search."""
    prompts, spec = [asked.prompter.prompt_ids(e.prompt, e.tools) for e in examples], asked.spec
    if longer := sum(len(asked.prompter.answer_ids(e.answer)) > spec.max_new_tokens + 1 for e in examples):
        warn(
            f"{longer} of {len(examples)} expected answers are longer than evaluate.max_new_tokens = "
            f"{spec.max_new_tokens}, so that none of the model's can be as long.",
            stacklevel=2,
        )
    how = spec.batch_size, spec.max_new_tokens, asked.advance, search_of(spec)
    return generate_all(asked.model, asked.tokenizer, prompts, *how)


def class_rows(asked: Asked) -> Rows:
    """Return each text's class probabilities, in the classes' order; for a regression, its value."""
    rows: Rows = [{}] * len(asked.examples)
    label = "0" if list(asked.classes) == [VALUE] else asked.classes[0]  # any: it is not looked at
    unlabelled = replace(asked, examples=[replace(example, label=label) for example in asked.examples])
    for part, found, _ in _encoder_logits(unlabelled):
        outputs = found if list(asked.classes) == [VALUE] else found.double().softmax(1)
        for i, values in zip(part, outputs.tolist(), strict=True):
            rows[i] = {"values": values}
    return rows


def score_classification(asked: Asked) -> Rows:
    """The most probable class of each text and its cross-entropy (nats)."""
    rows: Rows = [{}] * len(asked.examples)
    for part, found, labels in _encoder_logits(asked):
        nats, best = cross_entropy(found, labels, reduction="none").tolist(), found.argmax(1).tolist()
        for i, loss, number in zip(part, nats, best, strict=True):
            name = asked.classes[number]
            right = asked.examples[i].label
            rows[i] = {"correct": name == right, "predicted": name, "expected": right, "nats": loss}
    return rows


def score_regression(asked: Asked) -> Rows:
    """The value of each text."""
    rows: Rows = [{}] * len(asked.examples)
    for part, found, _ in _encoder_logits(asked):
        for i, value in zip(part, found.flatten().tolist(), strict=True):
            rows[i] = {"predicted": value}
    return rows


def _encoder_logits(asked: Asked) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    encoded, _ = encode_texts(asked.examples, asked.tokenizer, asked.max_length, list(asked.classes))
    collate = collator(asked.tokenizer, True, asked.model)
    for part, found, labels in _logits(asked.model, encoded, collate, asked.spec.batch_size, asked.advance):
        yield part, found.float(), labels


def same_answer(found: str, expected: str, compare: str) -> bool:
    """Whether two answers are the same text, or the same JSON value."""
    # é in one sign or in two is the same text, and many tokenizers write one of them only.
    if compare == "text":
        return unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", expected)
    try:
        normal = (unicodedata.normalize("NFC", text) for text in (found, expected))
        return _equal_json(*(json.loads(_without_commas(text), object_pairs_hook=_unique_object) for text in normal))
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, thousands of brackets
        return False


def _without_commas(text: str) -> str:
    """A number without the commas between its thousands; any other text as it is."""
    return text.replace(",", "") if _THOUSANDS.fullmatch(text.strip()) else text


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("The same name twice.")
    return dict(pairs)


def _equal_json(a: Any, b: Any) -> bool:
    """Equality of JSON's values: true is not 1, as it is in Python; 1 and 1.0 are one number."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
