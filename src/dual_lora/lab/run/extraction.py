"""The answer in a generated text: by a regular expression, or by the rule of the commonsense protocol.

LLM-Adapters and DoRA after it (commonsense_evaluate.py, extract_answer) take the first label of the task's kind that
the text holds, wherever it stands, and count a text without one as wrong.
"""

import re
from functools import lru_cache

from dual_lora.lab.errors import UserError
from dual_lora.lab.patterns import Pattern

COMMONSENSE = "commonsense"
# What goes on before or behind a number, or a word: other digits and signs that change its value, parts joined to it.
_NUMBER_BEFORE = re.compile(r"(\d[/,:^×*]?|[-–−±≤≥≠√.]|(^|\s)[<>])$")
_NUMBER_BEHIND = re.compile(r"[./,:^×*–−-]?\d|[+#]")
_WORD_BEFORE = re.compile(r"\w[.'’/&-]$")
_WORD_BEHIND = re.compile(r"\d|[.'’/&-]\w|[+#]")

# Every task has the labels of one kind: BoolQ; PIQA; SIQA, ARC and OpenBookQA; HellaSwag; WinoGrande. The first three
# have fewer answers than five in most questions, yet all five labels are looked for.
LABELS = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)


def answer_in(text: str, extract: str, target: str) -> str:
    """What ``text`` answers, "" if nothing. extract: a regular expression (its last group, or all of it), or
    "commonsense": the first label of the kind that ``target``, the right answer, is of.

    Raises UserError for a target that is no label of the commonsense tasks.
    """
    pattern = _labels_like(target) if extract == COMMONSENSE else extract
    match = _pattern(pattern).search(text)
    return (match[match.lastindex or 0] if match else "").strip()


def piece_in(text: str, extract: str) -> str:
    """What the pattern takes out of the middle of a word or a number, as "4" of "3/4"; "" where it takes all of it.

    A mark that the pattern holds before it ("####", "answer") may stand right at it.
    """
    match = _pattern(extract).search(text)
    if match is None:
        return ""
    first, last = match.span(match.lastindex or 0)
    found, before, behind = text[first:last].strip(), text[:first], text[last:]
    if not found or text[first:last] != found:  # it stands between blanks
        return ""
    begins = _NUMBER_BEFORE if found[0].isdigit() else _WORD_BEFORE
    ends = _NUMBER_BEHIND if found[-1].isdigit() else _WORD_BEHIND
    marked = bool(text[match.start() : first].strip())
    cut = begins.search(before) or (not marked and _cased(before[-1:]) and found[0].isalnum())
    cut = cut or (found[-1].isalnum() and ends.match(behind)) or (_cased(found[-1]) and _cased(behind[:1]))
    return found if cut else ""


def _cased(sign: str) -> bool:
    """Whether it is a letter of a script that writes blanks between words, as far as capital letters tell."""
    return sign.lower() != sign.upper()


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
