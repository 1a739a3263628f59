"""The formats of records: what an example is, and how one is made of a record, whatever format it came in."""

import contextlib
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.data.guess import field_options, guess
from dual_lora.lab.data.records import Record
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

    @property
    def characters(self) -> int:
        """Characters of its texts or messages."""
        return sum(map(len, self.text)) or sum(len(str(message["content"])) for message in self.messages)

    def answer_with(self, choice: str) -> str:
        """The answer if ``choice`` were right: the target in it replaced where it stands last, not within a word."""
        words = list(re.finditer(rf"(?<!\w){re.escape(self.target)}(?!\w)", self.answer))
        start = words[-1].start() if words else self.answer.rfind(self.target)
        if start < 0:
            return choice
        return f"{self.answer[:start]}{choice}{self.answer[start + len(self.target) :]}"


OPTIONAL = {"input", "tools", "choices"}  # fields that a record need not have


def format_of(records: list[Record], data: DataSection) -> str:
    """The format that these records have, by the first. Raises UserError where none fits, with the fields to name."""
    first = records[0]
    named = {ours: first.values[theirs] for ours, theirs in data.fields.items() if theirs in first.values}
    if form := _format(first.values | named, data.fields):
        return form
    fields = {"text": "NAME", "label": "NAME"}
    with contextlib.suppress(UserError):
        fields = guess(records, data.fields).fields or fields
    raise UserError(
        f"{first.where}: fields {', '.join(map(str, first.values))} fit no format; expected messages (or "
        "conversations), or instruction and output, or prompt and answer (or completion), or text and label, or text. "
        f"Say which field is which: {field_options(fields)}, in a recipe data.fields: "
        f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in fields.items())}}}."
    )


def _format(values: dict[str, Any], named: Container[str]) -> str:
    """The format of a record: one of which a field was named in data.fields, before any other that fits; or ""."""
    if set(values) == {"line"}:
        return "facts" if "||" in str(values["line"]) else "document"
    fitting = {form: keys for form, (_, *known) in _FORMATS.items() for keys in reversed(known) if keys <= set(values)}
    return min(fitting, key=lambda form: not any(key in named for key in fitting[form]), default="")


def example_of(record: Record, form: str) -> Example:
    """A record of this format as an example. Raises UserError, with file and line, where it lacks a field."""
    return _FORMATS[form][0](record)


def _chat(record: Record) -> Example:
    return _conversation(record, _messages(record, "messages" if "messages" in record.values else "conversations"))


# ShareGPT's names of those who speak; of the others (tools, observations) each tool has its own.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _messages(record: Record, name: str) -> list[dict[str, Any]]:
    """A field's messages, {role, content}; ShareGPT's {from, value} become these."""
    messages = value_of(record, name)
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"{record.where}: {name} has to be a list of {{role, content}}, or of {{from, value}}.")
    return [_message(message, name, record.where) for message in messages]


def _message(message: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    if {"role", "content"} <= set(message):
        return message
    if not {"from", "value"} <= set(message):
        raise UserError(
            f"{where}: a message of {name} holds {', '.join(map(str, message)) or 'nothing'}, expected role and "
            "content, or from and value."
        )
    if (speaker := str(message["from"])) not in _SPEAKERS:
        raise UserError(
            f"{where}: a message of {name} is from {speaker!r}, expected one of {', '.join(_SPEAKERS)}. Other roles "
            "are written as {role, content}, as the model's chat template has them."
        )
    return {"role": _SPEAKERS[speaker], "content": message["value"]}


def _conversation(record: Record, messages: list[dict[str, Any]]) -> Example:
    """A conversation whose last message is learned."""
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{record.where}: the last message has to be the assistant's, it is the answer to learn.")
    answer = answer_of(messages[-1], record.where)
    return _generation(record, tuple(messages), answer, tuple(list_in(record, "tools")))


# What an assistant's message may hold next to its content. Templates write it, or leave it out, each in its own way.
_MORE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def answer_of(message: dict[str, Any], where: str) -> str:
    """Return the content of an assistant's message. Raises UserError where the message holds more.

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
    """Return the content of a message as text. Raises UserError for content that is no text."""
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
    answer = text_in(record, "output", learned=True)
    return _generation(record, turn(text, answer), answer)


def _prompt(record: Record) -> Example:
    """Texts, or as TRL has it, messages in both fields."""
    learned = "completion" if "completion" in record.values and "answer" not in record.values else "answer"
    if isinstance(record.values.get("prompt"), list) and isinstance(record.values.get(learned), list):
        messages = [*_messages(record, "prompt"), *_messages(record, learned)]
        return _conversation(replace(record, values=record.values | {"answer": None}), messages)
    answer = text_in(record, learned, learned=True)
    return _generation(record, turn(text_in(record, "prompt"), answer), answer)


def _facts(record: Record) -> Example:
    facts, bar, sentence = str(value_of(record, "line")).partition("||")
    if not bar or not sentence.strip():
        raise UserError(f"{record.where}: expected facts||sentence, found {record.values['line'][:60]!r}.")
    return _generation(record, turn(facts.strip(), sentence.strip()), sentence.strip())


def _generation(record: Record, messages: tuple[Any, ...], answer: str, tools: tuple[Any, ...] = ()) -> Example:
    if not answer.strip():
        raise UserError(f"{record.where}: the answer is empty, there is nothing to learn from.")
    before = {name: record.values.get(name) for name in ("system", "history", "completion")}
    contents = [message["content"] for message in messages]
    if unread := [name for name, value in before.items() if not is_missing(value) and value not in contents]:
        warn(f"Records hold {' and '.join(unread)}, which is not read: write it as one of the messages.", stacklevel=2)
    target = record.values.get("answer")
    target = answer if is_missing(target) else text_in(record, "answer")
    choices = list_in(record, "choices") or _choices_in(str(messages[-2]["content"]) if len(messages) > 1 else "")
    named = tuple(written(choice, f"{record.where}: a choice") for choice in choices)
    return Example(record.where, messages, tools, answer, target, named)


def turn(prompt: str, answer: str) -> tuple[dict[str, Any], ...]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def _choices_in(prompt: str) -> list[str]:
    """The choices of the LLM-Adapters tasks, which stand in the question's last line."""
    _, found, rest = prompt.rpartition("Answer format:")
    words = rest.split()
    return words[0].split("/") if found and len(words) == 1 and "/" in words[0][1:-1] else []


def _labelled_text(record: Record) -> Example:
    texts = [text_in(record, "text")]
    if "text_pair" in record.values:
        texts.append(text_in(record, "text_pair"))
    label = text_in(record, "label", learned=True).strip()
    if not label:
        raise UserError(f"{record.where}: the label is empty: give this class a name, or leave the record out.")
    return Example(record.where, text=tuple(texts), label=label)


def _document(record: Record) -> Example:
    text = text_in(record, "text" if "text" in record.values else "line", learned=True)
    if not text.strip():
        raise UserError(f"{record.where}: the text is empty, there is nothing to learn from.")
    return Example(record.where, ({"role": "assistant", "content": text},), answer=text, target=text, whole=True)


def _preference(record: Record) -> Example:
    """Texts, or conversations of which the last messages differ."""
    chosen, rejected = value_of(record, "chosen"), value_of(record, "rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        before = record.values.get("prompt")
        before = before if isinstance(before, list) else turn(text_in(record, "prompt"), "")[:1] if before else ()
        one, other = (_chat(replace(record, values={"messages": [*before, *m]})) for m in (chosen, rejected))
        return replace(one, rejected=other.answer)
    chosen, rejected = text_in(record, "chosen", learned=True), text_in(record, "rejected")
    return replace(_generation(record, turn(text_in(record, "prompt"), chosen), chosen), rejected=rejected)


# Of each format what makes an example of a record, and the fields by which it is known.
_FORMATS: dict[str, tuple[Callable[[Record], Example], *tuple[set[str], ...]]] = {
    "chat": (_chat, {"messages"}, {"conversations"}),
    "instruction": (_instruction, {"instruction", "output"}),
    "prompt": (_prompt, {"prompt", "answer"}, {"prompt", "completion"}),
    "text": (_labelled_text, {"text", "label"}),
    "facts": (_facts, {"line"}),
    "document": (_document, {"text"}),
    "preference": (_preference, {"chosen", "rejected"}),
}
