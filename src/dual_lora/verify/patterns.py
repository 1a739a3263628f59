"""The regular expressions of a PEFT configuration, tried before PEFT searches with them.

A configuration may come with somebody else's adapter, and Python's `re`, which PEFT takes, can search a short name for
ever; nothing can stop it, and no other thread runs meanwhile.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

from dual_lora._trial import tried

SECONDS = 10.0  # for all patterns on all names, the start of a process among them
LONGEST = 10_000  # characters of a pattern
MOST_NAMES, MOST_PATTERNS = (
    20_000,
    1000,
)  # names in a list, which are compared; patterns, each of which is searched with
MOST_CHARACTERS = 200_000  # of all names with values together, which are compiled; the largest real ones have 40,000
MOST_COMPARED = 20_000_000  # names in a list times modules of the model: seconds of PEFT's time

_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save")
_COMPLEX = re.compile(r"[*+?{|].*[*+?{|]|\[|\(\?", re.DOTALL)  # with one repeat and no set a search ends soon
# Compiled and searched with as PEFT does it, by the same engine in a process that can be ended.
_TRIAL = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    try:
        re.compile(pattern)
    except Exception as error:
        print(json.dumps(str(error)), flush=True)
        break
    for form in (pattern, rf"(.*\.)?({pattern})$", rf"(^|.*\.){pattern}($|\..*)", rf"(?:^|.*?\.){pattern}\.(\d+)\."):
        try:
            found = re.compile(form)
        except Exception:
            continue
        for name in names:
            found.fullmatch(name), found.match(name)
"""


def check_patterns(values: dict[str, Any], model: Any) -> None:
    """Raise ValueError for a pattern that is none, for names without an end, and for what takes too long on the model's
    names.

    values: the configuration as a dictionary. model: what it is to adapt; its weights are not looked at.
    """
    names = sorted({name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()})
    _check_counts(values, len(names))
    _keep_compiled(values)
    complex_ones = []
    for field, text in _patterns(values):
        if len(text) > LONGEST:
            raise ValueError(f"{field} has {len(text):,} characters, at most {LONGEST:,} are read.")
        if _COMPLEX.search(text):
            complex_ones.append((field, text))
            continue
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(_is_none(field, text, error)) from None
    if not complex_ones:
        return
    try:
        done = tried(_TRIAL, [[text for _, text in complex_ones], names], SECONDS)
    except subprocess.TimeoutExpired as error:
        field, text = complex_ones[int((error.stdout or b"0").split()[-1])]
        raise ValueError(
            f"{field} {text[:200]!r} takes too long on this model's names (more than {SECONDS:g} seconds): write it "
            "without repeats inside repeats."
        ) from None
    results = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or isinstance(results[-1], str):
        field, text = complex_ones[max((each for each in results if isinstance(each, int)), default=0)]
        reason = results[-1] if results and isinstance(results[-1], str) else "it was not tried"
        raise ValueError(_is_none(field, text, reason))


def _is_none(field: str, text: str, why: object) -> str:
    return f"{field} {text[:200]!r} is not a regular expression: {why}"


def _check_counts(values: dict[str, Any], modules: int) -> None:
    for field, value in values.items():
        if not isinstance(value, dict | list | tuple | set):
            continue
        searched = _is_looked_up(field, value)
        most = MOST_PATTERNS if searched else min(MOST_NAMES, MOST_COMPARED // max(1, modules))
        if len(value) > most and (searched or any(isinstance(each, str) for each in value)):
            raise ValueError(
                f"{field} has {len(value):,} names, at most {most:,} are looked for in a model of {modules:,} modules: "
                "write fewer, or a regular expression."
            )


def _keep_compiled(values: dict[str, Any]) -> None:
    """PEFT looks all names up again for every layer, and `re` keeps 512 of them: with one more each is compiled anew
    each time. Raises ValueError for more characters than are compiled in a moment."""
    names = [str(name) for field, each in values.items() if _is_looked_up(field, each) for name in each]
    if (count := sum(map(len, names))) > MOST_CHARACTERS:
        raise ValueError(
            f"The names with a rank or an alpha of their own have {count:,} characters, at most {MOST_CHARACTERS:,} "
            "are looked for: write regular expressions, of which one fits many layers."
        )
    kept = getattr(re, "_MAXCACHE", None)
    if kept is not None and kept < 2 * len(names) + 512:
        setattr(re, "_MAXCACHE", 2 * len(names) + 512)  # noqa: B010 (not of its interface)


def _is_looked_up(field: str, value: Any) -> bool:
    return isinstance(value, dict) and field.endswith("_pattern")


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
