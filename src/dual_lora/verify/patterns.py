"""The regular expressions of a PEFT configuration, tried before PEFT searches with them.

A configuration may come with somebody else's adapter, and Python's `re`, which PEFT takes, can search a short name for
ever; nothing can stop it, and no other thread runs meanwhile.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SECONDS = 10.0  # for all patterns on all names, the start of a process among them

_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save")
# The forms in which PEFT uses a pattern, tried by the same engine in a process that can be ended.
_TRIAL = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for form in (pattern, rf"(.*\.)?({pattern})$", rf"(^|.*\.){pattern}($|\..*)", rf"(?:^|.*?\.){pattern}\.(\d+)\."):
        try:
            found = re.compile(form)
        except Exception:
            continue
        for name in names:
            found.fullmatch(name), found.match(name)
"""


def check_patterns(values: dict[str, Any], model: Any) -> None:
    """Raise ValueError for a pattern that is none, or that takes too long on the model's names.

    values: the configuration as a dictionary. model: what it is to adapt; its weights are not looked at.
    """
    tried = []
    for field, text in _patterns(values):
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"{field} {text[:200]!r} is not a regular expression: {error}") from None
        if len(re.findall(r"[*+?{|]", text)) > 1:  # with one repeat a search ends soon
            tried.append((field, text))
    if not tried:
        return
    names = sorted({name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()})
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([[text for _, text in tried], names]).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        field, text = tried[int((error.stdout or b"0").split()[-1])]
        raise ValueError(
            f"{field} {text[:200]!r} takes too long on this model's names (more than {SECONDS:g} seconds): write it "
            "without repeats inside repeats."
        ) from None


def _patterns(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields and their regular expressions. Lists of plain names are compared by PEFT, not searched with."""
    for field, value in values.items():
        if field.endswith("_pattern") and field != "layers_pattern":
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{field} is {value!r:.200}, expected names or regular expressions with values.")
            yield from ((field, str(key)) for key in value or {})
        elif field in _PATTERNS:
            if isinstance(value, str):
                yield field, value
            elif field in ("layers_pattern", "modules_to_save") and isinstance(value, list | tuple | set):
                yield from ((field, str(each)) for each in value)
