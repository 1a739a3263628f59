"""Records without an answer: what a model is asked by, in the formats that it was trained on."""

import contextlib
from dataclasses import replace
from typing import Any

from dual_lora.lab.data.examples import in_words, read_examples
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.guess import field_options, guess, marks_records
from dual_lora.lab.data.records import Record, find, read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.read import delimiter_of
from dual_lora.lab.recipe.schema import FIELDS, DataSection

NONE = "1"  # instead of an answer, which no reader of a format does without; nobody is shown it
ANSWERS = ("answer", "output", "label")
ASKED_BY = ("prompt", "messages", "conversations", "instruction", "text", "line")


def read_questions(source: str, data: DataSection, head: str) -> tuple[list[Record], list[Example]]:
    """The records of a file as they are, and what each asks; a label or an answer that a record has is its `label` or
    `answer`, and "" where it has none.

    head: the model's. Raises UserError, with file and line, for a record without what is asked by.
    """
    records = read_records(source, None if _has_header(source, data) else data.columns)
    if source.endswith(".txt"):
        name = "text" if head != "causal" else "line" if data.format == "facts" else "prompt"
        called = data.fields.get(name, name)  # as in the training records
        records = [Record({called: record.values["line"]}, record.where) for record in records]
    if records:
        _check_has_question(records, data, head)
    theirs = {ours: data.fields.get(ours, ours) for ours in ANSWERS}
    filled = [
        Record(_with_placeholder_answer(record.values, theirs, head), record.where, found=tuple(record.names))
        for record in records
    ]
    needed = {ours: name for ours, name in data.fields.items() if ours not in theirs}
    plain = data.model_copy(update={"fields": needed, "answers": "label", "columns": None, "group": None})
    examples = read_examples(source, plain, filled)
    asked = [_question_of(example, record, theirs, data) for example, record in zip(examples, records, strict=True)]
    for example in asked:
        if head != "causal" and not example.text:
            raise UserError(f"{example.where}: the record has no field text, which a classifier needs.")
        if head == "causal" and not example.messages:
            raise UserError(f"{example.where}: the record has only a text, and a language model needs a prompt.")
    return records, asked


def _check_has_question(records: list[Record], data: DataSection, head: str) -> None:
    """Raise UserError for records without any field that a model is asked by, with the field that is likely it."""
    record = records[0]
    names = {data.fields.get(ours, ours) for ours in ASKED_BY}
    if names.isdisjoint(record.values):
        found = [str(name) for name in record.values]
        expected = [data.fields[ours] for ours in ASKED_BY if ours in data.fields] or [*ASKED_BY[:-1]]
        ours = ("prompt", "answer") if head == "causal" else ("text", "label")
        seen = records[:100]
        asking = [name for name in found if not marks_records(seen, name)] or found
        longest = max(asking, key=lambda name: sum(len(str(each.values.get(name, ""))) for each in seen))
        likely = {ours[0]: longest}
        with contextlib.suppress(UserError):
            fields = guess(records).fields
            asked = next((ours for ours in ASKED_BY if fields.get(ours, ours) in record.values), "")
            if (asked == "text") == (head != "causal"):
                likely = {asked: fields.get(asked, asked)} | fields
            elif head == "causal" and fields:
                likely = dict(zip(ours, fields.values(), strict=False))
        raise UserError(
            f"{record.where}: no field to predict from. Expected {', '.join(expected)}; the record has "
            f"{', '.join(found)}. Name the field: {field_options(likely)}."
        )


def is_blank(example: Example) -> bool:
    """Whether a record asks nothing: its texts, or all its messages, are empty."""
    parts = example.text or [message.get("content") for message in example.prompt]
    return not any(part.strip() if isinstance(part, str) else part for part in parts)


def _has_header(source: str, data: DataSection) -> bool:
    """Whether a table's first line names what is asked by, although the training records' had no such line."""
    if not data.columns or not source.endswith((".csv", ".tsv")):
        return False
    with find(source).open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline().rstrip("\r\n")
    first = line.split("\t" if source.endswith(".tsv") else delimiter_of(line))
    return not {data.fields.get(name, name) for name in FIELDS}.isdisjoint(name.strip('"') for name in first)


def _with_placeholder_answer(values: dict[str, Any], theirs: dict[str, str], head: str) -> dict[str, Any]:
    """A record with something instead of its answer."""
    filled = {name: value for name, value in values.items() if name not in theirs.values()}
    filled |= {"label": NONE} | ({"answer": NONE, "output": NONE} if head == "causal" else {})
    messages = values.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        before = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        filled["messages"] = [*before, {"role": "assistant", "content": NONE}]
    if isinstance(values.get("line"), str):
        filled["line"] = f"{values['line'].partition('||')[0]}||{NONE}"
    return filled


def _question_of(example: Example, record: Record, theirs: dict[str, str], data: DataSection) -> Example:
    """The example with the record's own answer, if it has one."""
    if data.answers == "text" and example.messages:
        example = in_words(example)
    if example.text:
        label = record.values.get(theirs["label"])
        return replace(example, label="" if label is None else str(label).strip())
    given = record.values.get(theirs["answer"], record.values.get(theirs["output"]))
    return replace(example, answer="" if given is None else str(given), target="", where=example.where)
