"""One request over HTTP. The whole answer, an error's body included, comes within one deadline; no redirection is
followed."""

import contextlib
import http.client
import os
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


def authorization(*variables: str) -> dict[str, str]:
    """The header with the key out of the first of these environment variables that is set; {} without one.

    Raises ValueError for a key that cannot stand in a header. http.client's own error would show the key.
    """
    name = next((name for name in variables if os.environ.get(name)), None)
    if name is None:
        return {}
    key = os.environ[name].strip()
    if max(key, default="") > "\xff" or not key.isprintable():
        raise ValueError(f"the key in {name} holds characters that cannot be sent")
    return {"Authorization": f"Bearer {key}"}


def on_one_line(text: str) -> str:
    """A server's words without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _recording_sockets(sockets: list[socket.socket]) -> list[urllib.request.BaseHandler]:
    """Return handlers that append the socket of each connection that they open to `sockets`. The connection itself lets
    go of it when the head of an answer is there."""

    def open_as(kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        class Recording(kind):  # type: ignore[valid-type,misc]
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)

        return Recording

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
    deadline, sockets = time.monotonic() + seconds, list[socket.socket]()
    try:
        return _with_deadline(seconds, lambda: _open_and_read(request, seconds, largest, deadline, sockets))
    except TimeoutError:
        for opened in sockets:  # its reader would go on where a server ends neither its "100 Continue" nor its trailers
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        raise


def _open_and_read(
    request: urllib.request.Request,
    seconds: float,
    largest: int,
    deadline: float,
    sockets: list[socket.socket],
) -> Response:
    opener = urllib.request.build_opener(_NoRedirect, *_recording_sockets(sockets))
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
