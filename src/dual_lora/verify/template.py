"""A chat template is a program that comes with a model: it writes a conversation within a time, or is ended."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SECONDS = 60.0  # for one conversation, the compiling of the template among them; published ones take a millisecond
AGAIN = 1.0  # seconds after which it is told once more


class _Late(BaseException):
    """No Exception: while it compiles `{{ 9**9**9 }}`, Jinja takes any for a sum that has to wait until it renders."""


def rendered(tokenizer: Any, messages: Sequence[Any], **more: Any) -> str:
    """The conversation as text. Raises TimeoutError where that takes too long, and whatever the template raises.

    more: for `apply_chat_template`. Only in a process's main thread, and not on Windows, can it be ended.
    """
    try:
        with _ended_after(SECONDS):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
    except _Late:
        raise TimeoutError(f"The chat template takes longer than {SECONDS:g} s for one conversation.") from None


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    ended = False

    def late(*_: object) -> None:
        if not ended:
            raise _Late

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        ended = True
        left = max(others - (time.monotonic() - began), 1e-3) if others else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
