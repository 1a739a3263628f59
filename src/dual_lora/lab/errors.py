"""Errors of the user, in one sentence: the command line prints it without a traceback."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from pathlib import PurePath

from dual_lora.lab.memory import memory_limit


class UserError(ValueError):
    """Wrong input or surroundings. The message says what was received, what was expected and the way out."""


class NotFinite(Exception):
    """A number was NaN or infinity. The message says where; the one who catches it says what follows."""


KEPT_OF_AN_ERROR = 2000  # characters
CALLED = {"rank": "r"}  # a word for a field of PEFT's that is not like its name
# torch on a CPU, a file that cannot be mapped, and a thread or process that cannot be started.
NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "can't start new thread")
BEGINNING = 4  # letters of a name, by which it is known
LISTED = 60  # more names than that hide the sentence that they end


def suggest(wrong: str, known: Iterable[str], where: str = "") -> str:
    """``" Did you mean 'x'?"`` for the known name nearest to ``wrong``, or all known names if none is near.

    where: a sentence that says where the names are listed, in place of so many that nobody would read them.
    """
    known = sorted(known)
    near = get_close_matches(wrong, known, n=1, cutoff=0.6) or [k for k in known if k.endswith(f".{wrong}")][:1]
    near = near or [k for k in known if k == CALLED.get(wrong)]
    near = near or [k for k in known if len(wrong) >= BEGINNING and k.startswith(wrong)][:1]
    if near:
        return f" Did you mean {near[0]!r}?"
    if where or len(known) > LISTED:
        return f" {where}" if where else ""
    return f" Known: {', '.join(known)}." if known else ""


def suggest_file(wrong: str, beside: Iterable[str]) -> str:
    """``" Did you mean 'x.yaml'?"`` for the file with nearly that name, or "". What all files of a kind end with does
    not count."""
    stem = PurePath(wrong).stem
    alike = [name for name in beside if SequenceMatcher(None, stem, PurePath(name).stem).ratio() >= 0.6]
    near = suggest(wrong, alike)
    return near if near.startswith(" Did") else ""


def described(error: BaseException, *plain: type[BaseException], lines: int | None = None) -> str:
    """An error in one line: its kind, its message, and what was noted on it.

    plain: kinds whose message says enough without the kind, as a UserError's does. lines: so many of the message's
    lines and no notes, of a library that goes on with lists and advice.
    """
    if full := memory_full(error):
        return full
    notes = getattr(error, "__notes__", []) if lines is None else []
    text = " ".join(" ".join([*str(error).strip().splitlines()[:lines], *notes]).split())
    kind = "" if text and isinstance(error, (UserError, *plain)) else type(error).__name__
    return ": ".join(filter(None, [kind, text]))[:KEPT_OF_AN_ERROR]


@contextmanager
def being_read(what: object) -> Iterator[None]:
    """Have an error of memory say what was being read."""
    try:
        yield
    except Exception as error:
        if memory_full(error):
            error.add_note(f"{what} was being read.")
        raise


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Turn the errors of a file's reader into a UserError that says, in one sentence, that the file is damaged."""
    try:
        with being_read(what):
            yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{what} is damaged ({described(error)}).") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk, a quota or a limit on a file's size ended a write.

    torch and safetensors wrap the system's error into their own kinds; the text survives.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    wrapped = (*map(os.strerror, full), "unexpected pos", "PytorchStreamWriter", "basic_ios::clear")
    return (isinstance(error, OSError) and error.errno in full) or any(text in str(error) for text in wrapped)


def memory_full(error: BaseException | None) -> str:
    """A sentence on how much memory there was no room for; "" for an error of another kind.

    torch's kinds are known by their names: whoever asks may not have imported it. What a library raised in its place
    has the first one as its cause.
    """
    while error is not None and not isinstance(error, UserError):
        if full := _memory_full(error):
            return full
        error = error.__cause__
    return ""


def _memory_full(error: BaseException) -> str:
    text = str(error)
    of_machine = isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY)
    of_machine = of_machine or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not of_machine and type(error).__name__ != "OutOfMemoryError":
        return ""
    asked = re.search(r"[Aa]llocate (\d+ bytes|[\d.]+ \wi?B)", text)  # torch on a CPU; torch on a device, numpy
    more = f" when {_amount(asked[1])} more were asked for" if asked else ""
    most = memory_limit() if of_machine else 0
    limit = f" (a command may take {_amount(f'{most} bytes')} of it)" if most else ""
    where = "".join(f" {note}" for note in getattr(error, "__notes__", []))
    return f"The {'machine' if of_machine else 'device'}'s memory is full{limit}{more}.{where}"


def _amount(text: str) -> str:
    from dual_lora.lab.terminal import size

    number, unit = text.split()
    return size(int(number)) if unit == "bytes" else text
