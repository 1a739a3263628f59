"""What a person did wrong, in one sentence: the command line prints it without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input or surroundings. The message says what was received, what was expected and the way out."""


def suggest(wrong: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the known name nearest to ``wrong``, or all known names if none is near."""
    known = sorted(known)
    near = get_close_matches(wrong, known, n=1, cutoff=0.6) or [k for k in known if k.endswith(f".{wrong}")][:1]
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""
