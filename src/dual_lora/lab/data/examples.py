"""Examples: what a record asks and what the right answer is, whatever format it came in."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.data.records import Record, read_records, whole_text
from dual_lora.lab.data.values import is_missing, list_in, text_in, value_of, written
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection


@dataclass(frozen=True)
class Example:
    """One task. Generation uses messages, answer, target, choices, references; classification text and label."""

    where: str
    messages: tuple[dict[str, Any], ...] = ()  # the conversation, the trained answers included
    tools: tuple[Any, ...] = ()
    answer: str = ""  # the text to produce after the last prompt
    target: str = ""  # what exact_match looks for, and what a choice is: usually a part of the answer
    choices: tuple[str, ...] = ()
    text: tuple[str, ...] = ()  # one text, or a pair
    label: str = ""
    part: str = ""  # the test set among several (data.tests)
    group: str = ""  # what it belongs to (data.group)
    rejected: str = field(default="", repr=False)  # an answer that is worse (preference)
    whole: bool = field(default=False, repr=False)  # a text without a prompt, learned from its beginning

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """The conversation up to the last answer."""
        return self.messages[:-1]

    def answer_with(self, choice: str) -> str:
        """The answer if ``choice`` were right: the target in it replaced where it stands last, not within a word."""
        words = list(re.finditer(rf"(?<!\w){re.escape(self.target)}(?!\w)", self.answer))
        start = words[-1].start() if words else self.answer.rfind(self.target)
        if start < 0:
            return choice
        return f"{self.answer[:start]}{choice}{self.answer[start + len(self.target) :]}"


def load_split(data: DataSection, split: str) -> list[Example]:
    """The examples of "train", "validation" or "test" as the recipe wants them, limits and holdout applied."""
    if split == "validation" and not data.validation and data.holdout:
        return _limited(_parted(data)[1], data.test_limit, data.seed)
    if split == "train":
        examples = _parted(data)[0] if data.holdout and not data.validation else _read(data, "train")
        return _limited(examples, data.train_limit, data.seed)
    if split == "test" and data.tests:
        if data.test:
            raise UserError("The recipe names both data.test and data.tests: keep one of them.")
        parts = ((name, _tested(read_examples(source, data), data)) for name, source in data.tests.items())
        return [replace(example, part=name) for name, examples in parts for example in examples]
    return _tested(_read(data, split), data)


def _tested(examples: list[Example], data: DataSection) -> list[Example]:
    """As many of a test set's examples as the recipe wants."""
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
        return [example for one in source.split(" + ") for example in read_examples(one.strip(), data)]
    records = records_of(source, data) if records is None else records
    if data.fields:
        free = {o for o, t in data.fields.items() if o in _FREE and any(t in r.values for r in records)}
        renamed = [
            {o: r.values.get(t) if o in free else value_of(r, t) for o, t in data.fields.items()} for r in records
        ]
        records = [replace(r, values=r.values | values) for r, values in zip(records, renamed, strict=True)]
    form, _ = _FORMATS[data.format if data.format != "auto" else _guess(records[0], data.fields)]
    examples = [form(record) for record in records]
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


def records_of(source: str, data: DataSection) -> list[Record]:
    """The records of one source; a text file that is no list of facts is one text."""
    records = read_records(source, data.columns)
    if not source.endswith(".txt"):
        return records
    form = guess_format(records[0], data) if data.format == "auto" else data.format
    return whole_text(source) if form == "document" else records


def as_whole(text: str) -> str:
    """A whole number without the ".0" that a table with an empty cell in its column adds; any other text as it is."""
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def item_of(example: Example) -> str:
    """What is asked, without the answer; where nothing is asked, all of it."""
    return repr(example.prompt or example.messages) if example.messages else repr(example.text)


def _read(data: DataSection, split: str) -> list[Example]:
    source = getattr(data, split)
    if not source:
        way_out = " (or data.holdout, to take them out of the training records)" if split == "validation" else ""
        raise UserError(f"No {split} records are named: set data.{split}, or give --data.{split} FILE{way_out}.")
    return read_examples(source, data)


def _parted(data: DataSection) -> tuple[list[Example], list[Example]]:
    examples = _read(data, "train")
    if data.holdout >= len(examples):
        raise UserError(f"data.holdout is {data.holdout}, but {data.train} holds only {len(examples)} records.")
    if data.group is not None:
        return _parted_by_group(examples, data)
    held = set(random.Random(data.seed).sample(range(len(examples)), data.holdout))
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def _parted_by_group(examples: list[Example], data: DataSection) -> tuple[list[Example], list[Example]]:
    """Whole groups are held out, until they hold `holdout` records or a few more. One without a group is its own."""
    group_of = [example.group or example.where for example in examples]
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


def _limited(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


_FREE = {"input", "tools", "choices"}  # fields that a record need not have


def guess_format(record: Record, data: DataSection) -> str:
    """The format that records like this one have. Raises UserError where none fits."""
    values = record.values | {
        ours: record.values[theirs] for ours, theirs in data.fields.items() if theirs in record.values
    }
    return _guess(replace(record, values=values), data.fields)


def _guess(record: Record, named: Container[str]) -> str:
    """The format of a record: one of which a field was named in data.fields, before any other that fits."""
    if set(record.values) == {"line"}:
        return "facts" if "||" in str(record.values["line"]) else "document"
    fitting = [form for form, (_, keys) in _FORMATS.items() if keys <= set(record.values)]
    if fitting:
        return min(fitting, key=lambda form: not any(key in named for key in _FORMATS[form][1]))
    raise UserError(
        f"{record.where}: fields {', '.join(map(str, record.values))} fit no format; expected messages, or "
        "instruction and output, or prompt and answer, or text and label, or text. Map names with "
        "data.fields: {text: sentence}."
    )


def _chat(record: Record) -> Example:
    messages = value_of(record, "messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise UserError(f"{record.where}: messages has to be a list of {{role, content}}.")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{record.where}: the last message has to be the assistant's, it is the answer to learn.")
    answer = answer_of(messages[-1], record.where)
    return _generation(record, tuple(messages), answer, tuple(list_in(record, "tools")))


# What an assistant's message may hold next to its content. Templates write it, or leave it out, each in its own way.
_MORE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def answer_of(message: dict[str, Any], where: str) -> str:
    """What a message of the assistant says: its content. Raises UserError where it holds more.

    In a prompt it may hold what it likes: the template knows how to write it.
    """
    if unread := [name for name in _MORE if _says_more(message.get(name))]:
        raise UserError(
            f"{where}: a message of the assistant holds {' and '.join(unread)}, and content alone is learned: write "
            "into content what is to be answered."
        )
    return text_of(message, where)


def _says_more(value: Any) -> bool:
    """Whether it is more than a blank, an empty list or mapping, or false."""
    return not is_missing(value.strip() if isinstance(value, str) else value or None)


def text_of(message: dict[str, Any], where: str) -> str:
    """What a message says, of which text is made. Raises UserError for one that is no text."""
    content = message["content"]
    if isinstance(content, str | int | float):
        return written(content, where)
    raise UserError(
        f"{where}: the content of the message of role {message['role']!r} is "
        f"{'null' if content is None else type(content).__name__}, expected text. Calls of tools (tool_calls) and "
        "parts are learned as text: write into content what is to be answered."
    )


def _instruction(record: Record) -> Example:
    text = text_in(record, "instruction")
    if not is_missing(record.values.get("input")):
        text = f"{text}\n\n{text_in(record, 'input')}"
    answer = text_in(record, "output")
    return _generation(record, _turn(text, answer), answer)


def _prompt(record: Record) -> Example:
    answer = text_in(record, "answer")
    return _generation(record, _turn(text_in(record, "prompt"), answer), answer)


def _facts(record: Record) -> Example:
    facts, bar, sentence = str(value_of(record, "line")).partition("||")
    if not bar or not sentence.strip():
        raise UserError(f"{record.where}: expected facts||sentence, found {record.values['line'][:60]!r}.")
    return _generation(record, _turn(facts.strip(), sentence.strip()), sentence.strip())


def _generation(record: Record, messages: tuple[Any, ...], answer: str, tools: tuple[Any, ...] = ()) -> Example:
    if not answer.strip():
        raise UserError(f"{record.where}: the answer is empty, there is nothing to learn from.")
    before = {name: record.values.get(name) for name in ("system", "history")}
    said = [message["content"] for message in messages]
    if unread := [name for name, value in before.items() if not is_missing(value) and value not in said]:
        warn(f"Records hold {' and '.join(unread)}, which is not read: write it as one of the messages.", stacklevel=2)
    target = record.values.get("answer")
    target = answer if is_missing(target) else text_in(record, "answer")
    choices = list_in(record, "choices") or _choices_in(str(messages[-2]["content"]) if len(messages) > 1 else "")
    named = tuple(written(choice, f"{record.where}: a choice") for choice in choices)
    return Example(record.where, messages, tools, answer, target, named)


def _turn(prompt: str, answer: str) -> tuple[dict[str, Any], ...]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def _choices_in(prompt: str) -> list[str]:
    """The choices of the LLM-Adapters tasks, which stand in the question's last line."""
    _, found, rest = prompt.rpartition("Answer format:")
    words = rest.split()
    return words[0].split("/") if found and len(words) == 1 and "/" in words[0][1:-1] else []


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
    messages = (*example.messages[:-2], *_turn(question.strip(), right))
    return replace(example, messages=messages, answer=right, target=right, choices=tuple(texts.values()))


def _labelled_text(record: Record) -> Example:
    texts = [text_in(record, "text")]
    if "text_pair" in record.values:
        texts.append(text_in(record, "text_pair"))
    label = text_in(record, "label").strip()
    if not label:
        raise UserError(f"{record.where}: the label is empty: give this class a name, or leave the record out.")
    return Example(record.where, text=tuple(texts), label=label)


def _document(record: Record) -> Example:
    text = text_in(record, "text" if "text" in record.values else "line")
    if not text.strip():
        raise UserError(f"{record.where}: the text is empty, there is nothing to learn from.")
    return Example(record.where, ({"role": "assistant", "content": text},), answer=text, target=text, whole=True)


def _preference(record: Record) -> Example:
    """Texts, or conversations of which the last messages differ."""
    chosen, rejected = value_of(record, "chosen"), value_of(record, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        before = record.values.get("prompt")
        before = before if isinstance(before, list) else _turn(text_in(record, "prompt"), "")[:1] if before else ()
        one, other = (_chat(replace(record, values={"messages": [*before, *m]})) for m in (chosen, rejected))
        return replace(one, rejected=other.answer)
    chosen, rejected = text_in(record, "chosen"), text_in(record, "rejected")
    return replace(_generation(record, _turn(text_in(record, "prompt"), chosen), chosen), rejected=rejected)


# Of each format what makes an example of a record, and the fields by which it is known.
_FORMATS: dict[str, tuple[Callable[[Record], Example], set[str]]] = {
    "chat": (_chat, {"messages"}),
    "instruction": (_instruction, {"instruction", "output"}),
    "prompt": (_prompt, {"prompt", "answer"}),
    "text": (_labelled_text, {"text", "label"}),
    "facts": (_facts, {"line"}),
    "document": (_document, {"text"}),
    "preference": (_preference, {"chosen", "rejected"}),
}
