"""A chat template is a program that comes with a model: it writes conversations within a time, or is ended."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from dual_lora.verify.time_limit import Late, ended_after

LONGEST = 20_000_000  # characters of one conversation: a tokenizer takes a second for each million
SECONDS = 60.0  # that a template may take in all, its compiling among it ...
EACH = 0.1  # ... and what each further conversation gives back of that; published templates take a millisecond

_left: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # seconds of each tokenizer


@contextmanager
def in_its_time(tokenizer: Any) -> Iterator[None]:
    """Give the tokenizer's template, inside, what is left of its time. Raises TimeoutError after that.

    Only in a process's main thread, and not on Windows, can it be ended.
    """
    left, began = _left.get(tokenizer, SECONDS), time.monotonic()
    try:
        with ended_after(max(left, EACH), with_process=True):
            yield
    except Late:
        raise TimeoutError(
            f"The chat template takes longer than {SECONDS:g} s for one conversation, or for several together: take "
            "another template."
        ) from None
    finally:
        _left[tokenizer] = min(SECONDS, left + EACH - (time.monotonic() - began))


def rendered(tokenizer: Any, messages: Sequence[Any], **more: Any) -> str:
    """The conversation as text. Raises TimeoutError where that takes too long, ValueError for a text without an end,
    and whatever the template raises.

    more: for `apply_chat_template`.
    """
    with in_its_time(tokenizer):
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
    if len(text) > LONGEST:
        raise ValueError(f"The chat template makes {len(text):,} characters of one conversation, at most {LONGEST:,}.")
    return text
