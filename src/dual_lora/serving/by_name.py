"""Requests by model name: each waits for the turn of the adapter that it names, and keeps it to its last byte.

An ASGI middleware around vLLM's own routes, for which one set of weights is all there is.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from email import message_from_bytes
from email.utils import collapse_rfc2231_value
from typing import Any

from .turns import Turns

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PATIENCE = 60.0  # seconds: who does not read an answer for so long would keep all others waiting


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
        if scope["type"] == "websocket":
            receive = self._without_names(receive, send)
        body, receive = await _read(scope, receive)
        model = body.get("model")
        if isinstance(model, tuple):
            await _refuse(send, 400, f"The form has {len(model)} fields named model: give one.")
            return
        name = model if isinstance(model, str) and model in self.names else None
        if self.names and body.get("background"):
            why = "No request can run in the background here: the turn of its adapter ends with its answer."
            await _refuse(send, 400, why)
            return
        try:
            await self.turns.enter(name)
        except Exception as error:
            await _refuse(send, 503, str(error))
            return
        try:
            await self.app(scope, receive, lambda message: asyncio.wait_for(send(message), PATIENCE))
        finally:
            self.turns.leave()

    def _without_names(self, receive: Receive, send: Send) -> Receive:
        """What comes through a websocket, up to a message that asks for an adapter by name."""

        async def checked() -> Message:
            message = await receive()
            name = _object_of(message.get("text") or message.get("bytes") or "").get("model")
            if not isinstance(name, str) or name not in self.names:
                return message
            why = "A websocket is answered by the server's own adapter alone: ask for this one over HTTP."
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


async def _read(scope: Message, receive: Receive) -> tuple[dict[str, Any], Receive]:
    """What the body says, of a form only its model (a tuple of several); and the same body to be received again."""
    if scope["type"] != "http":
        return {}, receive
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    whole = b"".join(message.get("body", b"") for message in messages)
    kind = dict(scope["headers"]).get(b"content-type", b"")
    if b"multipart/" in kind.lower():  # sound, with other fields
        models = tuple(_models_in_form(kind, whole))
        return {"model": models[0] if len(models) == 1 else models} if models else {}, again
    return _object_of(whole), again


def _models_in_form(kind: bytes, body: bytes) -> list[str]:
    """The values of the fields named model, by the boundary that the content type gives."""
    boundary = message_from_bytes(b"Content-Type: " + kind + b"\n\n").get_boundary()
    found = []
    for part in body.split(b"--" + boundary.encode("latin-1", "replace"))[1:] if boundary else []:
        head, _, value = part.lstrip(b"\r\n").partition(b"\r\n\r\n")
        name = message_from_bytes(head + b"\r\n\r\n").get_param("name", header="content-disposition")
        if name is not None and collapse_rfc2231_value(name) == "model":
            found.append(value.removesuffix(b"\r\n").decode(errors="replace"))
    return found


def _object_of(text: str | bytes) -> dict[str, Any]:
    """A JSON object; an empty one for all else, of which the route says what is wrong."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


async def _refuse(send: Send, status: int, why: str) -> None:
    """An error as OpenAI's clients read it."""
    body = json.dumps({"error": {"message": why, "type": "ServerError", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
