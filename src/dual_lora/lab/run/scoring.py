"""One function a task: model + examples → one row an example, in their order. Batched, longest rows first."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

from dual_lora._warning import warn
from dual_lora.lab.data.batches import Collator, check_padding, collator, kind_of_unmasked, left_padded
from dual_lora.lab.data.encode import IGNORED, Encoded, Prompter, encode_texts
from dual_lora.lab.data.examples import Example
from dual_lora.lab.model.generate import check_writes, ends_of, plain_search, specials_of, texts_of
from dual_lora.lab.recipe.schema import EvaluateSection
from dual_lora.lab.run.extraction import COMMONSENSE, answer_in, part_in

_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?")

Rows = list[dict[str, Any]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """What a task asks of a model. prompter: for language models; classes, max_length: for encoders."""

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
    encoded = [asked.prompter.encode(example) for example in asked.examples]
    return loss_rows(asked.model, asked.tokenizer, encoded, asked.spec.batch_size, asked.advance)


def loss_rows(
    model: Any, tokenizer: Any, encoded: list[Encoded], batch_size: int, advance: Advance = lambda _: None
) -> Rows:
    """Summed negative log-likelihood (nats) of each row's labels and their number."""
    collate = collator(tokenizer, False, model)
    rows: Rows = [{}] * len(encoded)
    for part, found, labels in _logits(model, encoded, collate, batch_size, advance):
        logits = found[:, :-1].float()
        targets = labels[:, labels.shape[1] - logits.shape[1] :]
        nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        sums, counts = nats.view_as(targets).double().sum(1).tolist(), (targets != IGNORED).sum(1).tolist()
        for i, total, count in zip(part, sums, counts, strict=True):
            rows[i] = {"nats": total, "tokens": count}
    return rows


def _logits(
    model: Any, encoded: list[Encoded], collate: Collator, size: int, advance: Advance
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Of each batch the rows' indices, their logits and their labels."""
    for part in batches([len(e.input_ids) for e in encoded], size):
        batch = to_device(model, collate([encoded[i] for i in part]))
        labels = batch.pop("labels")
        with torch.inference_mode():
            logits = model(**batch).logits
        yield part, logits[:, -labels.shape[1] :] if labels.dim() == 2 else logits, labels  # none of virtual tokens
        advance(len(part))


def score_exact_match(asked: Asked) -> Rows:
    """Greedy answers, and whether each one is the expected one."""
    spec, special, rows = asked.spec, specials_of(asked.tokenizer), []
    if spec.extract:
        _warn_of_parts(asked.examples, spec.extract)
    for example, text in zip(asked.examples, _generated(asked, asked.examples), strict=True):
        found = answer_in(text, spec.extract, example.target) if spec.extract else text.strip()
        expected = special.sub("", _expected(example, spec.extract) if spec.extract else example.answer)
        row = {"correct": _same(found, expected.strip(), spec.compare), "predicted": found}
        rows.append(row | ({"text": text.strip()} if spec.extract else {}))  # what the answer was taken from
    return rows


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
    """One greedy text for each different prompt, with all answers to this prompt as references."""
    references: dict[tuple[str, str], list[Example]] = {}  # of several test sets each has its own
    for example in asked.examples:
        key = example.part, asked.prompter.prompt_text(example.prompt, example.tools)
        references.setdefault(key, []).append(example)
    texts, special = _generated(asked, [group[0] for group in references.values()]), specials_of(asked.tokenizer)
    return [
        {"predicted": text.strip(), "references": [special.sub("", e.answer) for e in group]}
        | ({"part": group[0].part} if group[0].part else {})
        for text, group in zip(texts, references.values(), strict=True)
    ]


def _generated(asked: Asked, examples: list[Example]) -> list[str]:
    """What the model writes after each example's prompt, by the search that the recipe wants."""
    prompts, spec = [asked.prompter.prompt_ids(e.prompt, e.tools) for e in examples], asked.spec
    if longer := sum(len(asked.prompter.answer_ids(e.answer)) > spec.max_new_tokens + 1 for e in examples):
        warn(
            f"{longer} of {len(examples)} expected answers are longer than evaluate.max_new_tokens = "
            f"{spec.max_new_tokens}, so that none of the model's can be as long.",
            stacklevel=2,
        )
    how = spec.batch_size, spec.max_new_tokens, asked.advance, search_of(spec)
    return generate_all(asked.model, asked.tokenizer, prompts, *how)


def score_classification(asked: Asked) -> Rows:
    """The most probable class of each text and its cross-entropy (nats)."""
    rows: Rows = [{}] * len(asked.examples)
    for part, found, labels in _encoder_logits(asked):
        nats, best = cross_entropy(found, labels, reduction="none").tolist(), found.argmax(1).tolist()
        for i, loss, number in zip(part, nats, best, strict=True):
            name = asked.classes[number]
            rows[i] = {"correct": name == asked.examples[i].label, "predicted": name, "nats": loss}
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


def generate_all(
    model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, max_new_tokens: int,
    advance: Advance = lambda _: None, search: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Continuations of token-id prompts as text, without special tokens; greedy, unless ``search`` says otherwise."""
    check_writes(model)
    texts, ends, search = [""] * len(prompts), ends_of(model, tokenizer), {**(search or {})}
    once = search.pop(NO_REPEAT, 0)
    for part in batches([len(p) for p in prompts], batch_size):
        check_padding(kind_of_unmasked(model), [len(prompts[i]) for i in part])
        batch = left_padded([prompts[i] for i in part], tokenizer.pad_token_id)
        batch.pop("position_ids")  # generate counts positions itself
        width = batch["input_ids"].shape[1]
        if once:
            search["logits_processor"] = [_NoRepeat(once, width)]
        with torch.inference_mode(), plain_search(model):
            out = model.generate(
                **to_device(model, batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
                **search,
            )
        for i, text in zip(part, texts_of(out[:, width:].tolist(), tokenizer, ends), strict=True):
            texts[i] = text
        advance(len(part))
    return texts


NO_REPEAT = "no_repeat_ngram"


class _NoRepeat(LogitsProcessor):
    """No n-gram twice in an answer, as LoRA's own code has it; transformers' setting forbids the prompt's as well."""

    def __init__(self, size: int, width: int):
        self.rule, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.rule(input_ids[:, self.width :], scores)


def search_of(spec: EvaluateSection) -> dict[str, Any]:
    """The search for an answer in the terms of ``generate_all``; empty for a greedy one."""
    given: dict[str, Any] = {"num_beams": spec.beams, "length_penalty": spec.length_penalty} if spec.beams > 1 else {}
    return given | ({NO_REPEAT: spec.no_repeat_ngram} if spec.no_repeat_ngram else {})


def _same(found: str, expected: str, compare: str) -> bool:
    # é in one sign or in two is the same text, and many tokenizers write one of them only.
    if compare == "text":
        return unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", expected)
    try:
        normal = (unicodedata.normalize("NFC", text) for text in (found, expected))
        return _alike(*(json.loads(_uncut(text), object_pairs_hook=_object) for text in normal))
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, thousands of brackets
        return False


def _uncut(text: str) -> str:
    """A number without the commas between its thousands; any other text as it is."""
    return text.replace(",", "") if _THOUSANDS.fullmatch(text.strip()) else text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("The same name twice.")
    return dict(pairs)


def _alike(a: Any, b: Any) -> bool:
    """Equality of JSON's values: true is not 1, as it is in Python; 1 and 1.0 are one number."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, the longest first: too little memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def to_device(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
