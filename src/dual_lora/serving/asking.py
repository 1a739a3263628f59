"""One question over HTTP. The whole answer, an error's body included, comes within one deadline; no redirection is
followed."""

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

PIECE = 1 << 16  # bytes that are read at a time


class Reply(NamedTuple):
    """What a server said. body: as far as it was read."""

    status: int
    body: bytes

    @property
    def sends_on(self) -> bool:
        """Whether it names another address, which is not asked."""
        return 300 <= self.status < 400


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the key, and the question, to whatever address an answer names."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _recording_connections(kept: list[http.client.HTTPConnection]) -> list[urllib.request.BaseHandler]:
    """Handlers that put each connection that they open into a list."""

    def open_as(kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        def opened(*args: Any, **options: Any) -> http.client.HTTPConnection:
            kept.append(kind(*args, **options))
            return kept[-1]

        return opened

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(open_as(http.client.HTTPConnection), req)  # type: ignore[arg-type]

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(open_as(http.client.HTTPSConnection), req)  # type: ignore[arg-type]

    return [Plain(), Secure()]


def ask(request: urllib.request.Request, seconds: float, largest: int) -> Reply:
    """Send a request and read up to `largest` bytes of the answer and one more. Proxies are the environment's.

    Raises TimeoutError where all of it takes longer than `seconds`, OSError and http.client.HTTPException where the
    server cannot be reached or speaks no HTTP.
    """
    ends, kept = time.monotonic() + seconds, list[http.client.HTTPConnection]()
    try:
        return _with_time_limit(seconds, lambda: _answer(request, seconds, largest, ends, kept))
    except TimeoutError:
        for connection in kept:  # its reader would wait on for a server that never ends its "100 Continue"
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise


def _answer(
    request: urllib.request.Request,
    seconds: float,
    largest: int,
    ends: float,
    kept: list[http.client.HTTPConnection],
) -> Reply:
    opener = urllib.request.build_opener(_NoRedirect, *_recording_connections(kept))
    try:
        reply = opener.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        reply = error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        raise
    with reply:
        try:
            return Reply(reply.status, _read(reply, largest + 1, ends))
        except http.client.HTTPException:
            if reply.status < 300:
                raise
            return Reply(reply.status, b"")  # the status says enough


def _read(reply: Any, most: int, ends: float) -> bytes:
    """The body, or so much of it. A reader that nobody waits for any more ends with the next piece that comes."""
    pieces: list[bytes] = []
    left = most
    while left and (piece := reply.read1(min(left, PIECE))):
        if time.monotonic() > ends:
            raise TimeoutError
        pieces.append(piece)
        left -= len(piece)
    if left and (reply.length or 0) > 0:
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(pieces)


def _with_time_limit(seconds: float, work: Callable[[], Reply]) -> Reply:
    """Return what `work` returns. Raises TimeoutError if it takes longer; a socket's own limit is for each read."""
    came: Future[Reply] = Future()

    def run() -> None:
        try:
            came.set_result(work())
        except BaseException as error:
            came.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return came.result(seconds)
