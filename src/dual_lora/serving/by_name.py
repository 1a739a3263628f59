"""Requests by model name: each waits for the turn of the adapter that it names, and keeps it to its last byte.

An ASGI middleware around vLLM's own routes, for which one set of weights is all there is.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from .body import Unclear, json_object, read_body
from .turns import Turns

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
LARGEST = 1 << 28  # bytes of a body, pictures in base64 among it; vLLM itself has no bound
PATIENCE = 60.0  # seconds: who does not read an answer for so long, in all, would keep all others waiting


class ByName:
    """names: of adapters, as requests give them in `model`. own: the path below which our own routes lie.

    Every POST with a body takes a turn, whatever its path: a route of which nothing is known here may reach the model.
    One that names no adapter (a served name of the base, a body that is neither JSON nor a form) has the turn of None.
    So has a websocket, which says only later what it asks for: one that asks for an adapter by name is closed.
    """

    def __init__(self, app: Any, turns: Turns, names: Collection[str], own: str):
        self.app, self.turns, self.names, self.own = app, turns, names, own

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if not self._may_reach_the_model(scope):
            await self.app(scope, receive, send)
            return
        said: dict[str, Any] | Unclear = {}
        if scope["type"] == "websocket":
            receive = self._without_names(receive, send)
        else:
            whole, receive = await _read(receive)
            if len(whole) > LARGEST:
                await _refuse(
                    send, 413, f"The request's body is longer than {LARGEST:,} bytes, which are read at most."
                )
                return
            try:
                said = read_body(scope["headers"], whole)
            except Unclear as error:
                said = error
        try:
            await self._enter_turn(said)
        except Unclear as error:
            await _refuse(send, 400, str(error))
            return
        except Exception as error:
            await _refuse(send, 503, str(error))
            return
        try:
            await self.app(scope, receive, _with_read_timeout(send))
        finally:
            self.turns.leave()

    async def _enter_turn(self, said: dict[str, Any] | Unclear) -> None:
        """Wait for the turn of the adapter that the request names, which may have got its name meanwhile. Raises
        Unclear, without a turn."""
        while True:
            name = self._name_in(said)
            await self.turns.enter(name)
            try:
                if name is not None or self._name_in(said) is None:
                    return
            except Unclear:
                self.turns.leave()
                raise
            self.turns.leave()

    def _name_in(self, said: dict[str, Any] | Unclear) -> str | None:
        """Return the adapter's name in a request. Raises Unclear for a request that cannot be answered by name."""
        if isinstance(said, Unclear):
            if self.names:
                raise said
            return None
        if self.names and said.get("background"):
            raise Unclear("No request can run in the background here: the turn of its adapter ends with its answer.")
        model = said.get("model")
        return model if isinstance(model, str) and model in self.names else None

    def _without_names(self, receive: Receive, send: Send) -> Receive:
        """Receive what comes through a websocket, up to a message that asks for an adapter by name, or until others
        have waited for its turn for PATIENCE seconds in all: unlike a request, it has no end of its own."""
        left, seen, waited = PATIENCE, time.monotonic(), False

        def have_others_patience() -> bool:
            nonlocal left, seen, waited
            now, wait = time.monotonic(), self.turns.somebody_waits
            left -= now - seen if waited and wait else 0.0
            seen, waited = now, wait
            return left > 0

        async def checked() -> Message:
            coming = asyncio.ensure_future(receive())
            try:
                while have_others_patience() and not coming.done():
                    await asyncio.wait({coming}, timeout=PATIENCE / 10)
                if left <= 0:
                    return await closed(f"Others have waited for their turn for {PATIENCE:g} seconds.")
            finally:
                coming.cancel()
            message = coming.result()
            try:
                name = json_object(message.get("text") or message.get("bytes") or "").get("model")
                if not isinstance(name, str) or name not in self.names:
                    return message
            except Unclear:
                pass
            return await closed(
                "A websocket is answered by the server's own adapter alone: ask for this one over HTTP."
            )

        async def closed(why: str) -> Message:
            await send({"type": "websocket.close", "code": 1008, "reason": why})
            return {"type": "websocket.disconnect", "code": 1008, "reason": why}

        return checked

    def _may_reach_the_model(self, scope: Message) -> bool:
        if scope["type"] != "http":
            return scope["type"] == "websocket"
        headers = dict(scope["headers"])
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] == "POST" and has_body and not path.startswith(self.own)


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


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, or a little more than LARGEST of it, and the same to be received again, in one piece: it may have
    come as millions, with one byte each."""
    message, body = await receive(), bytearray()
    while len(body) <= LARGEST:
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
        message = await receive()
    whole = bytes(body)
    left = [{**message, "body": whole} if message["type"] == "http.request" else message]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return whole, again


async def _refuse(send: Send, status: int, why: str) -> None:
    """Send an error in the form that OpenAI's clients read."""
    body = json.dumps({"error": {"message": why, "type": "ServerError", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
