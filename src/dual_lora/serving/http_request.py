"""One request over HTTP. The whole answer, an error's body included, comes within one deadline; no redirection is
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


class Response(NamedTuple):
    """The response of a server. body: as far as it was read."""

    status: int
    body: bytes

    @property
    def is_redirect(self) -> bool:
        """Whether it names another address, to which no request is sent."""
        return 300 <= self.status < 400


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirection: urllib would take the key, and the request, to whatever address an answer
    names."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _recording_connections(connections: list[http.client.HTTPConnection]) -> list[urllib.request.BaseHandler]:
    """Return handlers that append each connection that they open to `connections`."""

    def open_as(kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        def opened(*args: Any, **options: Any) -> http.client.HTTPConnection:
            connections.append(kind(*args, **options))
            return connections[-1]

        return opened

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(open_as(http.client.HTTPConnection), req)  # type: ignore[arg-type]

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(open_as(http.client.HTTPSConnection), req)  # type: ignore[arg-type]

    return [Plain(), Secure()]


def send_request(request: urllib.request.Request, seconds: float, largest: int) -> Response:
    """Send a request and read up to `largest` bytes of the answer and one more. Proxies are the environment's.

    Raises TimeoutError where all of it takes longer than `seconds`, OSError and http.client.HTTPException where the
    server cannot be reached or speaks no HTTP.
    """
    deadline, connections = time.monotonic() + seconds, list[http.client.HTTPConnection]()
    try:
        return _with_deadline(seconds, lambda: _open_and_read(request, seconds, largest, deadline, connections))
    except TimeoutError:
        for connection in connections:  # its reader would wait on for a server that never ends its "100 Continue"
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        raise


def _open_and_read(
    request: urllib.request.Request,
    seconds: float,
    largest: int,
    deadline: float,
    connections: list[http.client.HTTPConnection],
) -> Response:
    opener = urllib.request.build_opener(_NoRedirect, *_recording_connections(connections))
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
            return Response(reply.status, _read(reply, largest + 1, deadline))
        except http.client.HTTPException:
            if reply.status < 300:
                raise
            return Response(reply.status, b"")  # the status says enough


def _read(reply: Any, limit: int, deadline: float) -> bytes:
    """The body, or so much of it. A reader that nobody waits for any more ends with the next piece that comes."""
    pieces: list[bytes] = []
    left = limit
    while left and (piece := reply.read1(min(left, PIECE))):
        if time.monotonic() > deadline:
            raise TimeoutError
        pieces.append(piece)
        left -= len(piece)
    if left and (reply.length or 0) > 0:
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(pieces)


def _with_deadline(seconds: float, work: Callable[[], Response]) -> Response:
    """Return what `work` returns. Raises TimeoutError if it takes longer; a socket's own limit is for each read."""
    result: Future[Response] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)
