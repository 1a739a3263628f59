"""Requests to stop: by Ctrl-C, by SIGTERM (docker stop, SLURM, kill) or by SIGUSR1 (SLURM's warning before it)."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked for the end: wherever Ctrl-C is handled, this is as well."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(*([message] if message else []))
        self.number = number or signal.SIGINT


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a program that a signal ended: 128 and the signal's number (Ctrl-C: 130)."""
    return 128 + getattr(error, "number", signal.SIGINT)


@contextmanager
def resumable() -> Iterator[None]:
    """Say, where stopped, that the same command goes on, and end with the status that a shell expects."""
    try:
        yield
    except KeyboardInterrupt as error:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(exit_status(error)) from None


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call `handle` with the number of every such signal inside. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, _: handle(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_at_once(number: int) -> None:
    """A handler that ends what goes on, as Ctrl-C does."""
    raise Stopped(number)
