"""The answer in a generated text: by a regular expression, or by the rule of the commonsense protocol.

LLM-Adapters and DoRA after it (commonsense_evaluate.py, extract_answer) take the first label of the task's kind that
the text holds, wherever it stands, and count a text without one as wrong.
"""

import re
from functools import lru_cache

from dual_lora.lab.errors import UserError
from dual_lora.lab.patterns import Pattern

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


def answer_in(text: str, extract: str, target: str) -> str:
    """What ``text`` answers, "" if nothing. extract: a regular expression (its last group, or all of it), or
    "commonsense": the first label of the kind that ``target``, the right answer, is of.

    Raises UserError for a target that is no label of the commonsense tasks.
    """
    pattern = _labels_like(target) if extract == COMMONSENSE else extract
    match = _pattern(pattern).search(text)
    return (match[match.lastindex or 0] if match else "").strip()


def part_in(text: str, extract: str) -> str:
    """What the pattern takes of ``text`` if that is less than the words it stands in, as "4" of "3/4"; else ""."""
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
