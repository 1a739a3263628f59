"""Regular expressions out of files, with a time limit: some search a short text for longer than anybody waits."""

import re
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from dual_lora._trial import tried
from dual_lora.lab.errors import UserError

LONGEST = 10_000  # characters of a pattern
SECONDS = 5.0  # that all searches of a pattern may take together ...
EACH = 0.01  # ... and what every further one adds to that
COMPILED = 10.0  # that it may take to be compiled, the start of a process among them
# Counted repeats, which are written out: of hundreds, or several; and sets whose every character is looked up twice.
_SLOW = re.compile(r"\{[\d,]*\d{3}|\{\d.*\{\d|\(\?[a-zA-Z]*i.*\[|\[.*\(\?[a-zA-Z]*i", re.DOTALL)

_TRIAL = """
import json, sys
path, text = json.load(sys.stdin)
sys.path.append(path)
import regex
regex.compile(text)
"""


@lru_cache
def compiled(text: str) -> Any:
    """The pattern, by the package `regex`, which knows time limits. Raises ValueError for one that cannot be used."""
    import regex

    if len(text) > LONGEST:
        raise ValueError(f"it is no regular expression of at most {LONGEST:,} characters: it has {len(text):,}")
    _try_to_compile(text)
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None


def _try_to_compile(text: str) -> None:
    """Raise ValueError for a pattern that takes too long to compile, which has no time limit: `a{9999}` within another
    such repeat is written out. Tried in a process that can be ended."""
    import regex

    if not _SLOW.search(text):
        return
    try:
        tried(_TRIAL, [str(Path(regex.__file__).parents[1]), text], COMPILED)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{text[:200]!r} takes too long to be compiled as a regular expression (more than {COMPILED:g} seconds): "
            "write it without repeats inside repeats"
        ) from None


class Pattern:
    """A regular expression of the setting `where`. `search` raises UserError once it has taken too long."""

    def __init__(self, text: str, where: str):
        self.text, self.where = text, where
        self._compiled = compiled(text)
        self._left = SECONDS

    def search(self, text: str) -> Any:
        began = time.perf_counter()
        try:
            return self._compiled.search(text, timeout=max(self._left, EACH))
        except TimeoutError:
            raise UserError(
                f"{self.where}: the regular expression {self.text!r} takes too long on {text[:80]!r} (more than "
                f"{SECONDS:g} seconds): write it without repeats inside repeats."
            ) from None
        finally:
            self._left += EACH - (time.perf_counter() - began)
