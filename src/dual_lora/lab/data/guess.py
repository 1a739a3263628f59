"""A guess of what records are for: format, task, and which column is which. A person reads it before it counts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from shlex import quote
from typing import Any, Literal

from dual_lora.lab.data.records import Record, column_name
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import FIELDS

Head = Literal["causal", "classification", "regression"]
SEEN = 2000  # records that are looked at
MOST_CLASSES = 200
HEADS = {"causal": "language model", "classification": "classifier", "regression": "regression"}  # as people say it
DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([ T].*)?")  # and perhaps a time
MOST_NAMES = 1000  # of columns, of which a table that people write has some dozens
# What people call the fields of a format, the likeliest first.
NAMES = {
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
    "instruction": ("instruction",),
    "output": ("output",),
    "prompt": ("prompt", "question", "query", "input", "request", "source", "user"),
    "answer": ("answer", "completion", "response", "reply", "output", "assistant", "target", "summary", "chosen"),
    "text": ("text", "sentence", "review", "content", "body", "comment", "message", "tweet", "document", "description"),
    "label": ("label", "labels", "class", "category", "sentiment", "target", "rating", "stars", "score", "intent", "y"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "text2"),
}
FIRST_OF_PAIR = ("sentence1", "premise", "text1")
NUMBERED = re.compile(r"(.*?[^\W\d])(_?)(1|2|(?<=_)[ab])")  # question1 and question2, text_a and text_b
SECOND = {"1": "2", "a": "b"}
# What a person can name of a format, the second text of a pair among it.
HOLDS: dict[str, tuple[str, ...]] = {
    "text": ("text", "text_pair", "label"),
    "prompt": ("prompt", "answer"),
    "instruction": ("instruction", "input", "output", "answer"),
    "document": ("text",),
    "chat": ("messages",),
}
COMMA = re.compile(r"[-+]?\d+,\d+")  # a number, as many languages write it
# How a person names the columns: of `recipes init`, of a command without such options, and of those with a recipe's.
INIT_OPTIONS = "--text and --label, or --prompt and --answer"
OTHER_COMMAND = f"`dual-lora recipes init` takes {INIT_OPTIONS}"
RECIPE_OPTIONS = "--data.fields.text and --data.fields.label, or --data.fields.prompt and --data.fields.answer"


@dataclass(frozen=True)
class Guess:
    """format, head and fields: as a recipe has them. names: of the columns. classes: of a classification.

    rivals: further columns that could be the label, where nobody named one.
    """

    format: str
    head: Head
    fields: dict[str, str] = field(default_factory=dict)  # ours: theirs
    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)


def guess(records: list[Record], given: Mapping[str, str] | None = None, options: str = OTHER_COMMAND) -> Guess:
    """The likeliest use of these records. given: ours: theirs, of fields that a person named. options: that name them.

    Raises UserError where no two columns look like a question and its answer, naming the columns.
    """
    seen = records[:SEEN]
    names = list(dict.fromkeys(str(name) for record in seen for name in record.values))
    if len(names) > MOST_NAMES:
        raise UserError(
            f"The first {len(seen):,} records have {len(names):,} different fields, expected at most {MOST_NAMES:,}. "
            f"Does the file have values in place of names, such as {names[-1][:40]!r}?"
        )
    given = {ours: theirs for ours, theirs in (given or {}).items() if theirs}
    for ours, theirs in given.items():
        if theirs not in names:
            raise UserError(f"There is no column {theirs!r} for {ours}: found {_listed(names)}.")
        if others := sorted(other for other in given if other != ours and given[other] == theirs):
            raise UserError(
                f"The column {theirs!r} is named as the {' and as the '.join(sorted([ours, *others]))}: name another "
                "column for one of them."
            )
    found = replace(_likeliest(seen, [name for name in names if name.strip()], given, options), names=names)
    for ours, theirs in given.items():
        if ours not in HOLDS.get(found.format, ()):
            raise UserError(
                f"The column {theirs!r} is named as the {ours}, and the others look like records of the format "
                f"{found.format}, which have none. Name the columns of one task ({options})."
            )
    return found


def _likeliest(seen: list[Record], names: list[str], given: dict[str, str], options: str) -> Guess:
    if names == ["line"]:
        facts = all("||" in str(record.values["line"]) for record in seen)
        return Guess("facts" if facts else "document", "causal", {}, names)
    others = [name for name in names if name not in given.values()]
    found = {ours: _first_known(others, known) for ours, known in NAMES.items()} | given
    if found["messages"] and isinstance(seen[0].values.get(found["messages"]), list):
        return _guess_of("chat", "causal", found, names, ("messages",))
    if not given and {"chosen", "rejected"} <= set(names):
        return Guess("preference", "causal", {}, names)
    if not given and {"instruction", "output"} <= set(names):
        return _guess_of("instruction", "causal", found, names, ("instruction", "output"))
    first, second = _pair(seen, names, found)
    if given.get("text_pair") == first:
        first, second = second, first
    if second and "text" not in given and given.get("text_pair", second) == second:
        found |= {"text": first, "text_pair": second}
    if given.get("label") and not (found["text"] or found["prompt"]):
        found["text"] = _longest(seen, [n for n in others if n != found["text_pair"] and _sentences(seen, n)])
    labelled = _labelled(seen, found, names, given)
    if labelled is not None:
        return labelled
    if found["prompt"] and found["answer"] and found["prompt"] != found["answer"]:
        return _guess_of("prompt", "causal", found, names, ("prompt", "answer"))
    by_values = _by_values(seen, names, found, given)
    if by_values and given.get("label", by_values.fields.get("label")) != by_values.fields.get("label"):
        raise UserError(
            f"The column {given['label']!r} is named as the label, and no other one is known to hold its text. Found "
            f"{_listed(names)}: name two of them ({options})."
        )
    return by_values or _refuse_unclear(names, options)


def _pair(seen: list[Record], names: list[str], found: Mapping[str, str]) -> tuple[str, str]:
    """The two columns of texts that are compared: by a name that is known, or by a name of two numbers."""
    first = _first_known(names, FIRST_OF_PAIR)
    if found["text_pair"] and first:
        return first, found["text_pair"]
    lowered = {name.strip().lower(): name for name in reversed(names)}
    for name, theirs in lowered.items():
        parts = NUMBERED.fullmatch(name)
        other = parts and lowered.get(f"{parts[1]}{parts[2]}{SECOND.get(parts[3], '')}")
        if other and found["text"] in ("", theirs, other) and _sentences(seen, theirs) and _sentences(seen, other):
            return theirs, other
    return "", ""


def _sentences(seen: list[Record], name: str) -> bool:
    values = _values(seen, name)
    return sum(isinstance(value, str) and " " in value.strip() for value in values) * 2 > len(values)


def _labelled(seen: list[Record], found: dict[str, str], names: list[str], given: Mapping[str, str]) -> Guess | None:
    """A text with a class or a number; None where the columns do not look so."""
    if not found["label"] or {"prompt", "answer"} & set(given):
        return None
    text = found["text"] or (found["prompt"] if found["label"] != found["answer"] else "")
    if not text or text == found["label"]:
        return None
    pair = ("text_pair",) if found["text_pair"] and found["text_pair"] not in (text, found["label"]) else ()
    values = _values(seen, found["label"])
    head, classes = _kind_of(values)
    if head == "causal":
        _check_label(found["label"], values, "label" in given)
        return None
    used = ("text", "label", *pair)
    rivals = [] if given.get("label") else _rivals(seen, names, [text, *(found[ours] for ours in used[1:])])
    return _guess_of("text", head, found | {"text": text}, names, used, classes, rivals)


def _rivals(seen: list[Record], names: list[str], taken: list[str]) -> list[str]:
    """Columns that could be the label as well: by their names, or because their values repeat as classes do."""
    free = [name for name in names if name not in taken and not _dates(seen, name)]
    kinds = {name: _kind_of(_values(seen, name)) for name in free}
    return [
        name
        for name, (head, classes) in kinds.items()
        if (head != "causal" and _first_known([name], NAMES["label"]))
        or (head == "classification" and len(classes) <= len(seen) // 5)
    ]


def _check_label(name: str, values: list[Any], given: bool) -> None:
    """Raises UserError, saying why the column is no label, where a person named it or it looks like one."""
    words = [str(value).strip() for value in values]
    if any(isinstance(value, list) for value in values):
        raise UserError(
            f"The column {name!r} holds lists, expected one class or one number a record. Several classes a record "
            "are not supported: keep one of them, or make a column of yes and no for each class."
        )
    if words and all(COMMA.fullmatch(word) or _number(word) is not None for word in words):
        raise UserError(f"The column {name!r} holds numbers with a comma ({words[0]!r}): write them with a point.")
    if given:
        raise UserError(
            f"The column {name!r} has {len(set(words)):,} different values in {len(words):,} records, which are "
            "neither classes nor numbers: name another column as the label."
        )


def _by_values(
    seen: list[Record], names: list[str], found: Mapping[str, str], given: Mapping[str, str]
) -> Guess | None:
    """Guess from the values of columns whose names say nothing: the longest texts, one of few values or another text.

    found: ours: theirs, columns whose names say that they hold texts. Values that repeat in another one are classes.
    """
    text, pair = found["text"], found["text_pair"]
    texts = [name for name in names if name != given.get("text_pair") and _all_texts(seen, name)]
    longest = text if text in texts else _longest(seen, texts)
    if longest:
        free = [name for name in names if name not in (longest, pair) and not _dates(seen, name)]
        kinds = {name: _kind_of(_values(seen, name)) for name in free}
        most = len(seen) - 1 if text == longest and len(names) == 2 else len(seen) // 5
        labels = [n for n, (head, classes) in kinds.items() if head == "classification" and len(classes) <= most]
        if labels:
            used = ("text", "label", *(("text_pair",) if pair not in ("", longest) else ()))
            fields, (head, classes) = {**found, "text": longest, "label": labels[0]}, kinds[labels[0]]
            return _guess_of("text", head, fields, names, used, classes, labels[1:])
        if len(names) == 2 and len(texts) == 2 and not marks_records(seen, names[0]):
            return _guess_of("prompt", "causal", {"prompt": names[0], "answer": names[1]}, names, ("prompt", "answer"))
        if names == texts == [longest]:
            return _guess_of("document", "causal", {"text": longest}, names, ("text",))
    return None


def _all_texts(seen: list[Record], name: str) -> bool:
    return all(isinstance(value, str) for value in _values(seen, name))


def _longest(seen: list[Record], names: list[str]) -> str:
    """The column with the most characters; empty where there is none."""
    return max(names, key=lambda name: sum(len(str(value)) for value in _values(seen, name)), default="")


def _dates(seen: list[Record], name: str) -> bool:
    values = _values(seen, name)
    return bool(values) and all(DATE.fullmatch(str(value).strip()) for value in values)


def marks_records(records: list[Record], name: str) -> bool:
    """Whether a field holds nothing but numbers and dates, which mark a record and ask nothing."""
    values = _values(records, name)
    if any(isinstance(value, list | dict) for value in values):
        return False
    return all(_number(word) is not None or DATE.fullmatch(word.strip()) for word in map(str, values))


def _listed(names: list[str]) -> str:
    return ", ".join(map(column_name, names))


def _refuse_unclear(names: list[str], options: str) -> Guess:
    raise UserError(
        f"What is to be learned is not clear from the columns {_listed(names)}: name a text and its class, or a "
        f"prompt and its answer ({options})."
    )


def field_options(fields: Mapping[str, str]) -> str:
    """The options by which every command takes these columns. fields: ours: theirs."""
    return " ".join(f"--data.fields.{ours} {quote(theirs)}" for ours, theirs in fields.items())


def _guess_of(
    form: str,
    head: Head,
    found: Mapping[str, str],
    names: list[str],
    used: Iterable[str],
    classes: list[str] | None = None,
    rivals: list[str] | None = None,
) -> Guess:
    assert set(used) <= set(FIELDS)
    fields = {ours: found[ours] for ours in used if found[ours] != ours}
    return Guess(form, head, fields, names, classes or [], rivals or [])


def _first_known(names: list[str], known: Iterable[str]) -> str:
    spelled = {name.strip().lower().replace(" ", "_"): name for name in reversed(names)}
    return next((spelled[name] for name in known if name in spelled), "")


def _values(seen: list[Record], name: str) -> list[Any]:
    return [record.values.get(name) for record in seen if record.values.get(name) not in (None, "")]


def _kind_of(values: list[Any]) -> tuple[Head, list[str]]:
    """Classes, numbers, or texts ("causal"), by the values of one column."""
    if not values or any(isinstance(value, list | dict) for value in values):
        return "causal", []
    words = [str(value).strip() for value in values]
    classes = sorted(set(words))
    if 2 <= len(classes) <= MOST_CLASSES and (len(classes) * 2 <= len(words) or len(classes) <= 3):
        fractions = all(_number(word) is not None for word in classes) and any("." in word for word in classes)
        if not (fractions and len(classes) > 10):
            return "classification", classes
    return ("regression", []) if all(_number(word) is not None for word in words) else ("causal", [])


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
