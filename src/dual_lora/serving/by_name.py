"""Requests by model name: each waits for the turn of the adapter that it names, and keeps it to its last byte.

An ASGI middleware around vLLM's own routes, for which one set of weights is all there is.
"""

import asyncio
import functools
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from .body import Asked, Unclear, read_body
from .turns import Turns

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LARGEST = 1 << 28  # bytes of a body, pictures in base64 among it; vLLM itself has no bound
PATIENCE = 60.0  # seconds: who does not read an answer for so long, in all, would keep all others waiting


class ByName:
    """names: of adapters, as requests give them in `model`. own: the path below which our own routes lie. keys: the
    server's, of which a request that may reach the model has to have one, whatever its path; none: nobody needs one.

    Every POST with a body takes a turn, whatever its route: one of which nothing is known here may reach the model.
    One that names no adapter (a served name of the base) has the turn of None. While adapters have names, only JSON is
    taken, and the route gets it as this reader has understood it. A websocket, which says only later what it asks for
    and has no end of its own, is closed.
    """

    def __init__(self, app: Any, turns: Turns, names: Collection[str], own: str, keys: Collection[str] = ()):
        self.app, self.turns, self.names, self.own, self.keys = app, turns, names, own, keys

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send(
                {"type": "websocket.close", "code": 1008, "reason": "This server swaps adapters between requests."}
            )
            return
        if not self._may_reach_the_model(scope):
            await self.app(scope, receive, send)
            return
        if self.keys and not _has_key(scope, self.keys):
            await _refuse(send, 401, "The request needs the server's key: Authorization: Bearer KEY.")
            return
        whole = await _read(receive)
        if whole is None:  # the client has gone
            return
        if len(whole) > LARGEST:
            await _refuse(send, 413, f"The request's body is longer than {LARGEST:,} bytes, which are read at most.")
            return
        # Read only where adapters have names.
        asked = functools.cache(functools.partial(read_body, whole, _content_type(scope)))
        try:
            await self._enter_turn(asked)
        except Unclear as error:
            await _refuse(send, 400, str(error))
            return
        except Exception as error:
            await _refuse(send, 503, str(error))
            return
        try:
            if self.names:
                whole = asked().body
                scope = _as_json(scope, whole)
            await self.app(scope, _handed_on(whole, receive), _with_read_timeout(send))
        finally:
            self.turns.leave()

    async def _enter_turn(self, asked: Callable[[], Asked]) -> None:
        """Wait for the turn of the adapter that the request names, which may have got its name meanwhile. Raises
        Unclear, without a turn."""
        while True:
            name = self._name_in(asked)
            await self.turns.enter(name)
            try:
                if name is not None or self._name_in(asked) is None:
                    return
            except Unclear:
                self.turns.leave()
                raise
            self.turns.leave()

    def _name_in(self, asked: Callable[[], Asked]) -> str | None:
        """Return the adapter's name in a request. Raises Unclear for a request that cannot be answered by name."""
        if not self.names:
            return None
        request = asked()
        if request.background:
            raise Unclear("No request can run in the background here: the turn of its adapter ends with its answer.")
        return request.model if request.model in self.names else None

    def _may_reach_the_model(self, scope: Message) -> bool:
        if scope["type"] != "http":
            return False
        headers = dict(scope["headers"])
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] == "POST" and has_body and not path.startswith(self.own) and _has_route(scope)


def _has_key(scope: Message, keys: Collection[str]) -> bool:
    """Whether a request has one of the keys. Many versions of vLLM look at those below /v1 alone."""
    kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    digest = hashlib.sha256(given.decode("latin-1").encode()).digest()  # as vLLM reads it
    same = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return kind.lower() == b"bearer" and any(same)


def _content_type(scope: Message) -> str:
    """What a request says that its body is: the first such header, as Starlette reads it."""
    types = (value for name, value in scope["headers"] if name.lower() == b"content-type")
    return next(types, b"").decode("latin-1")


def _has_route(scope: Message) -> bool:
    """Whether the server may do more with a request than refuse it. Otherwise a path that leads nowhere would have
    adapters swapped."""
    app = scope.get("app")
    layers = getattr(app, "user_middleware", None)
    if app is None or not layers or layers[-1].cls is not ByName:  # the one behind this one may answer by itself
        return True
    return any(route.matches(scope)[0].name == "FULL" for route in app.router.routes)


def _with_read_timeout(send: Send) -> Send:
    """Wrap `send` so that a request ends after waiting for its reader for PATIENCE seconds in all."""
    left = PATIENCE

    async def sent(message: Message) -> None:
        nonlocal left
        sending = asyncio.ensure_future(send(message))
        try:
            await asyncio.sleep(0)  # what need not wait for the reader is done by then, however busy the loop is
            began = time.monotonic()
            await asyncio.wait_for(sending, left)
            left -= time.monotonic() - began
        finally:
            sending.cancel()

    return sent


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or a little more than LARGEST of it; None where the client goes before its end."""
    body, more = bytearray(), True
    while more and len(body) <= LARGEST:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _handed_on(body: bytes, receive: Receive) -> Receive:
    """Receive a body that was read, in one piece, and then what comes: it may have come as millions of pieces."""
    left = [body]

    async def receive_left() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return receive_left


def _as_json(scope: Message, body: bytes) -> Message:
    """The request with the headers of a JSON body, whatever it called its own."""
    replaced = (b"content-type", b"content-length", b"content-encoding", b"transfer-encoding")
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    return {
        **scope,
        "headers": [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }


async def _refuse(send: Send, status: int, why: str) -> None:
    """Send an error in the form that OpenAI's clients read."""
    body = json.dumps({"error": {"message": why, "type": "ServerError", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
