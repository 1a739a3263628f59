"""Work on what comes from a stranger, ended after a time."""

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = 1.0  # seconds after which it is told once more
STUCK = 15.0  # seconds of all processors that what heeds no signal has besides


class Late(BaseException):
    """No Exception: while it compiles `{{ 9**9**9 }}`, Jinja takes any for a sum that has to wait until it renders."""


@contextmanager
def ended_after(seconds: float, with_process: bool = False) -> Iterator[None]:
    """Raise Late inside, after so many seconds. Only in a process's main thread, and not on Windows.

    with_process: one operation of Python's, as a comparison of lists of lists of lists, heeds no signal. The system
    ends it then, together with the process, which shows where it was.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    ended = False

    def late(*_: object) -> None:
        if not ended:
            raise Late

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, late)
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    if with_process:
        faulthandler.register(signal.SIGPROF, file=2, all_threads=False, chain=True)
        profiled = signal.setitimer(signal.ITIMER_PROF, seconds + STUCK)
    try:
        yield
    finally:
        ended = True
        left = max(others - (time.monotonic() - began), 1e-3) if others else 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        if with_process:
            signal.setitimer(signal.ITIMER_PROF, *profiled)
            faulthandler.unregister(signal.SIGPROF)
