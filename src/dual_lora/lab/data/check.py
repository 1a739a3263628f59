"""A check of training data: records that cannot be read, labels, lengths, duplicates, and what two sets share."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dual_lora.lab.data.classes import fit_head
from dual_lora.lab.data.encode import Prompter, class_names, rejected_length
from dual_lora.lab.data.examples import item_of, read_examples, records_of
from dual_lora.lab.data.formats import Example, format_of
from dual_lora.lab.data.overlap import Shared, shared_by, undeclared
from dual_lora.lab.data.records import joined
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection

SHOWN = 5  # records that are named for one kind of problem
RARE = 5  # records of a class: fewer teach it nothing


@dataclass
class Checked:
    """One set. empty: column: number of empty cells. lengths: in tokens, or in characters without a tokenizer.

    rows: into which texts are cut that are learned as a whole; None for other records, and without a tokenizer.
    """

    name: str
    source: str
    records: int = 0
    format: str = ""
    columns: list[str] = field(default_factory=list)
    empty: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    too_long: int | None = None
    rows: int | None = None
    duplicates: int = 0
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list, repr=False)

    def plain(self) -> dict[str, Any]:
        """Return plain values for --json."""
        return {name: value for name, value in vars(self).items() if name != "examples"}


def check(data: DataSection, head: str, tokenizer: Any = None) -> list[Checked]:
    """Every set that the recipe's data name, each with what is wrong in it. Nothing is left out silently.

    tokenizer: of the model, to count tokens.
    """
    sources = {"train": data.train, "validation": data.validation, "test": data.test, **data.tests}
    sets = [_checked(name, source, data, head, tokenizer) for name, source in sources.items() if source]
    train = next((each for each in sets if each.name == "train"), None)
    if train is None:
        return sets
    if head == "classification":
        known = set(train.labels)
        if len(known) == 1:
            train.errors.append(f"All records have the label {next(iter(known))!r}; a classifier needs two.")
        for each in sets:
            if unknown := sorted(set(each.labels) - known) if each is not train and known else []:
                each.errors.append(f"Labels that the training records do not have: {', '.join(unknown[:SHOWN])}.")
    if data.holdout and not data.validation and train.examples and data.holdout >= len(train.examples):
        train.errors.append(f"data.holdout is {data.holdout}, and there are {len(train.examples)} records.")
    if why := undeclared(data, _shared_of_readable(sets) if any(each.errors for each in sets) else None):
        train.warnings.append(f"The sets overlap: {why}")
    return sets


def _shared_of_readable(sets: list[Checked]) -> list[Shared]:
    """Return what the files share, by the records that can be read: a holdout cannot be taken before all can."""
    read: dict[str, list[Example]] = {}
    for each in sets:
        read.setdefault(each.name if each.name in ("train", "validation") else "test", []).extend(each.examples)
    return shared_by({name: examples for name, examples in read.items() if examples})


def _checked(name: str, source: str, data: DataSection, head: str, tokenizer: Any) -> Checked:
    result = Checked(name, source)
    try:
        for one in joined(source):
            _read(result, one, data, head)
    except UserError as error:
        result.errors.append(str(error))
    if not result.examples:
        return result
    with _collecting_warnings(result):
        if head == "classification":
            result.labels = dict(Counter(example.label for example in result.examples).most_common())
            try:
                class_names(result.examples)
            except UserError as error:
                result.errors.append(str(error))
    _lengths(result, data, head, tokenizer)
    _repeated(result, head)
    rare = [label for label, count in result.labels.items() if count < RARE]
    if name == "train" and rare:
        few = ", ".join(f"{label} ({result.labels[label]})" for label in rare[:SHOWN])
        result.warnings.append(f"Classes with fewer than {RARE} records: {few}{', …' if len(rare) > SHOWN else ''}.")
    return result


def _read(result: Checked, source: str, data: DataSection, head: str) -> None:
    records = records_of(source, data)
    result.records += len(records)
    names = dict.fromkeys(str(name) for record in records for name in record.values)
    result.columns = list(dict.fromkeys([*result.columns, *names]))
    filled = Counter(str(name) for record in records for name, value in record.values.items() if not _is_empty(value))
    for column in names:
        if count := len(records) - filled[column]:
            result.empty[column] = result.empty.get(column, 0) + count
    plain = data if data.format != "auto" else data.model_copy(update={"format": format_of(records, data)})
    result.format = plain.format
    failed: list[tuple[str, UserError]] = []
    with _collecting_warnings(result):
        for record in records:
            try:
                examples = read_examples(source, plain, [record])
                fit_head(examples, head)
                result.examples += examples
            except UserError as error:
                failed.append((record.where, error))
    result.errors += _by_reason(failed)


def _by_reason(failed: list[tuple[str, UserError]]) -> list[str]:
    """List each reason once, at the first record that has it. failed: where a record stands, and its error."""
    reasons: dict[str, list[str]] = {}
    for where, error in failed:
        reasons.setdefault(str(error).removeprefix(where), []).append(where)
    problems = [
        f"{where[0]}{reason}" + (f" The same in {len(where) - 1:,} more records." if len(where) > 1 else "")
        for reason, where in reasons.items()
    ]
    left = sum(map(len, list(reasons.values())[SHOWN:]))
    return problems[:SHOWN] + ([f"… and {left:,} more records that cannot be read."] if left else [])


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


@contextmanager
def _collecting_warnings(result: Checked) -> Iterator[None]:
    """Warnings inside become those of the set, each once."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            result.warnings += dict.fromkeys(str(warning.message) for warning in seen)


def _lengths(result: Checked, data: DataSection, head: str, tokenizer: Any) -> None:
    """The median length, the 95th percentile and the longest."""
    try:
        with _collecting_warnings(result):
            lengths = sorted(_row_lengths(result.examples, data, head, tokenizer))
    except UserError as error:
        result.errors.append(str(error))
        return
    shares = {"median": 0.5, "95 %": 0.95}
    result.lengths = {name: lengths[round(share * (len(lengths) - 1))] for name, share in shares.items()}
    result.lengths["longest"] = lengths[-1]
    if tokenizer is None:
        return
    if head == "causal" and any(example.whole for example in result.examples):
        result.rows = len(lengths)
    result.too_long = sum(length > data.max_length for length in lengths)
    if result.too_long == len(lengths) and head == "causal":
        result.errors.append(
            f"All {len(lengths)} examples are longer than data.max_length = {data.max_length} tokens; the shortest has "
            f"{lengths[0]}."
        )
    elif result.too_long:
        fate = "is left out" if head == "causal" else "is cut"
        fate += ", by objective dpo for either answer" if any(example.rejected for example in result.examples) else ""
        result.warnings.append(
            f"{result.too_long:,} records ({result.too_long / len(lengths):.1%}) are longer than data.max_length = "
            f"{data.max_length} tokens: each {fate}."
        )


def _row_lengths(examples: list[Example], data: DataSection, head: str, tokenizer: Any) -> Iterator[int]:
    if tokenizer is None:
        yield from (example.characters for example in examples)
    elif head == "causal":
        prompter = Prompter(tokenizer, data.template, data.learn_prompt)
        for example in examples:
            worse = rejected_length(example, prompter)  # of a pair the longer answer counts
            yield from (max(len(row.input_ids), worse) for row in prompter.pieces(example, data.max_length))
    else:
        for example in examples:
            yield len(tokenizer(*example.text).input_ids)


def _repeated(result: Checked, head: str) -> None:
    """Records that are there twice, and those that ask the same and answer otherwise."""
    whole = Counter((item_of(example), example.label or example.answer) for example in result.examples)
    result.duplicates = sum(count - 1 for count in whole.values())
    if result.duplicates:
        first = next(key for key, count in whole.items() if count > 1)
        alike = [e.where for e in result.examples if (item_of(e), e.label or e.answer) == first]
        result.warnings.append(f"Duplicates: {result.duplicates:,}, the first at {' and '.join(alike[:2])}.")
    if head == "classification":
        answers: dict[str, set[str]] = defaultdict(set)
        for asked, answer in whole:
            answers[asked].add(answer)
        if torn := [asked for asked, labels in answers.items() if len(labels) > 1]:
            example = next(example for example in result.examples if item_of(example) == torn[0])
            labels = ", ".join(sorted(answers[torn[0]]))
            result.warnings.append(f"Texts with several labels: {len(torn):,}, first {example.where} ({labels}).")
