"""A recipe's examples: its sources read, parted and limited."""

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from dual_lora.lab.data.formats import OPTIONAL, Example, example_of, format_of, turn
from dual_lora.lab.data.records import Record, joined, read_records, whole_text
from dual_lora.lab.data.values import as_whole, value_of, written
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection

WORDS = {"train": "training"}  # a split as people say it


def load_split(data: DataSection, split: str) -> list[Example]:
    """The examples of "train", "validation" or "test" as the recipe wants them, limits and holdout applied."""
    if split == "validation" and not data.validation and data.holdout:
        return _limited(_split_off(data)[1], data.test_limit, data.seed)
    if split == "train":
        examples = _split_off(data)[0] if data.holdout and not data.validation else _read(data, "train")
        return _limited(examples, data.train_limit, data.seed)
    if split == "test" and data.tests:
        if data.test:
            raise UserError("The recipe names both data.test and data.tests: keep one of them.")
        parts = ((name, _test_examples(read_examples(source, data), data)) for name, source in data.tests.items())
        return [replace(example, part=name) for name, examples in parts for example in examples]
    return _test_examples(_read(data, split), data)


def _test_examples(examples: list[Example], data: DataSection) -> list[Example]:
    """Return as many of a test set's examples as the recipe wants."""
    if data.test_prompts is not None:
        prompts = list(dict.fromkeys(repr(example.prompt) for example in examples))
        if data.test_prompts < len(prompts):
            kept = set(random.Random(data.seed).sample(prompts, data.test_prompts))
            examples = [example for example in examples if repr(example.prompt) in kept]
    return _limited(examples, data.test_limit, data.seed)


def read_examples(source: str, data: DataSection, records: list[Record] | None = None) -> list[Example]:
    """All examples of a source, or of several joined by " + ". records: those of the source, if they are read already.

    Raises UserError with file and line for the first record that lacks a field.
    """
    if records is None and " + " in source:
        return [example for one in joined(source) for example in read_examples(one, data)]
    records = records_of(source, data) if records is None else records
    if data.fields:
        free = {o for o, t in data.fields.items() if o in OPTIONAL and any(t in r.values for r in records)}
        renamed = [
            {o: r.values.get(t) if o in free else value_of(r, t) for o, t in data.fields.items()} for r in records
        ]
        records = [
            replace(r, values=r.values | values, theirs=data.fields, found=tuple(r.names))
            for r, values in zip(records, renamed, strict=True)
        ]
    form = data.format if data.format != "auto" else format_of(records, data)
    examples = _examples_of(records, form)
    if data.answers == "text":
        examples = [in_words(example) for example in examples]
    if data.choices:
        examples = [replace(e, choices=tuple(data.choices)) for e in examples]
    if data.group == "prompt":
        examples = [replace(e, group=item_of(e)) for e in examples]
    elif data.group is not None:
        groups = (as_whole(written(value_of(r, data.group), f"{r.where}: field {data.group!r}")) for r in records)
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    return examples


def _examples_of(records: list[Record], form: str) -> list[Example]:
    """Raises UserError for the first record that cannot be read, with the number of the others."""
    examples, failed = [], []
    for record in records:
        try:
            examples.append(example_of(record, form))
        except UserError as error:
            failed.append(error)
    if not failed:
        return examples
    first, others = failed[0], len(failed) - 1
    if not others:
        raise first
    more = f"{others:,} more records" if others > 1 else "One more record"
    raise UserError(f"{first} {more} cannot be read: `dual-lora check-data` lists all errors.") from first


def records_of(source: str, data: DataSection) -> list[Record]:
    """The records of one source; a text file that is no list of facts is one text."""
    records = read_records(source, data.columns)
    if not source.endswith(".txt"):
        return records
    form = format_of(records, data) if data.format == "auto" else data.format
    return whole_text(source) if form == "document" else records


def item_of(example: Example) -> str:
    """Return the question without the answer; all of the example where nothing is asked."""
    return repr(example.prompt or example.messages) if example.messages else repr(example.text)


def _read(data: DataSection, split: str) -> list[Example]:
    source = getattr(data, split)
    if not source:
        way_out = " (or data.holdout, to take them out of the training records)" if split == "validation" else ""
        raise UserError(
            f"The recipe names no {WORDS.get(split, split)} records: set data.{split}, or give --data.{split} "
            f"FILE{way_out}."
        )
    return read_examples(source, data)


def _split_off(data: DataSection) -> tuple[list[Example], list[Example]]:
    examples = _read(data, "train")
    if data.holdout >= len(examples):
        raise UserError(f"data.holdout is {data.holdout}, but {data.train} holds only {len(examples)} records.")
    if data.group is not None:
        return _split_off_groups(examples, data)
    held = set(random.Random(data.seed).sample(range(len(examples)), data.holdout))
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def _split_off_groups(examples: list[Example], data: DataSection) -> tuple[list[Example], list[Example]]:
    """Whole groups are held out, until they hold `holdout` records or a few more. One without a group is its own."""
    found = prompts_together(examples) if data.group == "prompt" else [example.group for example in examples]
    group_of = [group or example.where for example, group in zip(examples, found, strict=True)]
    sizes = Counter(group_of)
    groups = random.Random(data.seed).sample(sorted(sizes), len(sizes))
    before = itertools.accumulate((sizes[group] for group in groups), initial=0)
    held = {group for group, taken in zip(groups, before, strict=False) if taken < data.holdout}
    if len(held) == len(groups):
        raise UserError(
            f"data.holdout is {data.holdout}, which takes every group of {data.train} (data.group: {data.group}, "
            f"{len(groups)} in all): give fewer."
        )
    parts: tuple[list[Example], list[Example]] = [], []
    for example, group in zip(examples, group_of, strict=True):
        parts[group in held].append(example)
    return parts


def prompts_together(examples: list[Example]) -> list[str]:
    """The group of each example by what it asks. A conversation that goes on where another one has ended is in its
    group, because it holds the other's question and answer."""
    asked = {last_digest(example.prompt): item_of(example) for example in reversed(examples) if example.prompt}
    prefixes = ((digest for _, digest in digests(example.prompt) if digest in asked) for example in examples)
    return [asked.get(next(found, ""), item_of(e)) for e, found in zip(examples, prefixes, strict=True)]


def digests(messages: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each message with a print of the conversation up to it: in one pass, however long the conversation is."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(repr(message).encode("utf-8", "surrogatepass") + b"\n")
        yield message, digest.hexdigest()


def last_digest(messages: Iterable[dict[str, Any]]) -> str:
    """The print of a whole conversation."""
    *_, (_, digest) = digests(messages)
    return digest


def _limited(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


_LISTED = re.compile(r"(?<!\S)(?:Answer|Solution|Option|Ending)(\d+): ?")


def in_words(example: Example) -> Example:
    """The question without its list of answers; choices and answer are what their labels stand for.

    Raises UserError for a prompt that lists no answers, or whose right answer is not in its list.
    """
    prompt = str(example.messages[-2]["content"]) if len(example.messages) > 1 else ""
    body = prompt.partition("Answer format:")[0].rstrip()
    question, *listed = _LISTED.split(body)
    texts = dict(zip(listed[::2], (text.strip() for text in listed[1::2]), strict=True))
    number = re.sub(r"\D", "", example.target)
    if number not in texts:
        raise UserError(
            f"{example.where}: data.answers is text, but {example.target!r} is none of the answers that the prompt "
            f"lists ({', '.join(texts) or 'none: expected Answer1: ... Answer2: ...'})."
        )
    right = texts[number]
    messages = (*example.messages[:-2], *turn(question.strip(), right))
    return replace(example, messages=messages, answer=right, target=right, choices=tuple(texts.values()))
