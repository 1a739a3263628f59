"""Replace the adapter of a running vLLM server: `POST /v1/dual_lora/adapter {"adapter": "runs/other/adapter"}`.

`PUT` to the same address brings the adapter's two files in the request itself, for a trainer on another machine.
`POST /v1/dual_lora/adapters {"adapters": {"NAME": "FOLDER"}}` gives further adapters names, by which requests then ask
for them as their `model`; `PUT /v1/dual_lora/adapters/NAME` brings the files of such a one. vLLM adds these routes only
if the user asks for them: `VLLM_PLUGINS=dual_lora vllm serve …`.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .body import is_json
from .by_name import ByName
from .files import FILES, AdapterError
from .served import ServedAdapters
from .vllm import KEY, LIMIT, NAMED, check_limit

OWN = "/v1/dual_lora/"  # below /v1, where `vllm serve --api-key` asks for the key
ROUTE, NAMES_ROUTE = f"{OWN}adapter", f"{OWN}adapters"
JSON_BYTES, FILES_BYTES = 1 << 20, 2 << 30  # the largest requests that are read
AS_THEY_WERE = "The names are as they were."


class AdapterEndpoint:
    """The object that vLLM's entry point `vllm.endpoint_plugins` asks for."""

    name = "dual_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.served = ServedAdapters()
        self.keys: set[str] = set()

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called by vLLM once the engine runs."""
        self.keys.update(_keys_of(args))
        if engine_client is not None:
            processes = getattr(args, "api_server_count", 1) or 1
            await self.served.start(engine_client, state.openai_serving_models, processes)

    def attach_router(self, app: Any) -> None:
        """Add the routes, and the turns of requests, to vLLM's server."""
        from fastapi import HTTPException, Request

        routes = _Routes(self.served, HTTPException)
        # As objects: FastAPI reads annotations, which are strings here, and FastAPI is there in vLLM's server alone.
        for handler in (_Routes.by_folder, _Routes.by_files, _Routes.give_names, _Routes.give_name_by_files):
            handler.__annotations__["request"] = Request
        for method, path, call in (
            ("GET", ROUTE, routes.now),
            ("POST", ROUTE, routes.by_folder),
            ("PUT", ROUTE, routes.by_files),
            ("GET", NAMES_ROUTE, routes.names),
            ("POST", NAMES_ROUTE, routes.give_names),
            ("PUT", f"{NAMES_ROUTE}/{{name:path}}", routes.give_name_by_files),
        ):
            app.add_api_route(path, call, methods=[method], response_model=None)
        app.add_middleware(ByName, turns=self.served.turns, names=self.served.named, own=OWN, keys=self.keys)


def _keys_of(args: Any) -> list[str]:
    """The keys that vLLM takes: those of its option, or else that of its environment variable."""
    given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return [key for key in ([given] if isinstance(given, str) else given) if key]


class _Routes:
    """The server's routes. Status 400 says what is wrong with a request, and what is served now."""

    def __init__(self, served: ServedAdapters, error: Any):
        self.served, self.error = served, error  # FastAPI's exception, which has a status

    async def now(self) -> dict[str, str | None]:
        """The folder of the adapter that is served, null for the base model."""
        served = self.served
        if not served.whole and not served.swapping:
            raise self.error(500, served.left())
        return {KEY: served.main and served.main.folder}

    async def by_folder(self, request: Any) -> dict[str, str | None]:
        """Serve the adapter in a folder of the server's."""
        body = await self._json_of(request)
        wanted = body.get(KEY, 0) if isinstance(body, dict) else 0
        if not isinstance(wanted, str | None):
            raise self.error(400, f'Expected {{"{KEY}": "FOLDER"}}, or null for the base model, got {body!r:.200}.')
        return await self._swap(wanted)

    async def by_files(self, request: Any) -> dict[str, str | None]:
        """Serve the adapter whose files the request brings."""
        with self._refused(self.served.left()):
            self.served.check_start()
        folder = await self._brought(request)
        return await self._swap(folder.name, folder)

    async def names(self) -> dict[str, Any]:
        """The adapters that have names."""
        served = self.served
        named = {name: adapter.folder for name, adapter in served.named.items()}
        return {NAMED: named, LIMIT: served.limit_bytes, "loaded": served.loaded and served.loaded.folder}

    async def give_names(self, request: Any) -> dict[str, Any]:
        """Give names to the adapters in folders of the server's, or take names away."""
        body = await self._json_of(request)
        named = body.get(NAMED, {}) if isinstance(body, dict) and not body.keys() - {NAMED, LIMIT} else None
        if not body or not isinstance(named, dict) or not all(isinstance(f, str | None) for f in named.values()):
            form = f'{{"{NAMED}": {{"NAME": "FOLDER"}}, "{LIMIT}": BYTES}}'
            raise self.error(400, f"Expected {form}, with null as folder to take a name away, got {body!r:.200}.")
        with self._refused(AS_THEY_WERE):
            await self.served.give_names(named, check_limit(body[LIMIT]) if LIMIT in body else None)
        return await self.names()

    async def give_name_by_files(self, request: Any, name: str) -> dict[str, Any]:
        """Give a name to the adapter whose files the request brings."""
        with self._refused(AS_THEY_WERE):
            self.served.check_names([name])
        folder = await self._brought(request)
        with self._refused(AS_THEY_WERE):
            await self.served.give_names({name: folder.name}, kept=folder)
        return await self.names()

    async def _swap(self, adapter: str | None, kept: Any = None) -> dict[str, str | None]:
        try:
            await self.served.swap(adapter, kept)
        except AdapterError as error:
            raise self.error(400, f"{error} {self.served.left()}") from error
        except Exception as error:  # a worker's, which has changed its weights by then
            raise self.error(500, f"The swap failed: {error} {self.served.left()}") from error
        return {KEY: adapter}

    async def _brought(self, request: Any) -> Any:
        """The adapter's two files in a temporary folder, which goes with the last reference to it."""
        try:
            form = await self._form_of(request)
            if set(form) != set(FILES) or any(isinstance(part, str) for part in form.values()):
                raise self.error(400, f"Expected the files {' and '.join(FILES)} as a form, got {sorted(form)}.")
            folder = tempfile.TemporaryDirectory(prefix="adapter-")
            for name in FILES:
                with (Path(folder.name) / name).open("xb") as file:
                    await asyncio.to_thread(shutil.copyfileobj, form[name].file, file)
        except OSError as error:
            raise self.error(507, f"The adapter cannot be stored: {error}. {self.served.left()}") from error
        return folder

    @contextmanager
    def _refused(self, left: str) -> Iterator[None]:
        """Turn ValueError into status 400 with its message. left: what the server has afterwards, in a sentence."""
        try:
            yield
        except ValueError as error:
            raise self.error(400, f"{error} {left}") from error

    def _limited(self, request: Any, most: int) -> Any:
        """The same request, of which no more than so many bytes are read."""
        too_large = self.error(413, f"The request is larger than the {most:,} bytes that are read of one.")
        length, read = request.headers.get("content-length", "0"), 0
        if length.isdecimal() and int(length) > most:
            raise too_large

        async def receive() -> Any:
            nonlocal read
            message = await request.receive()
            read += len(message.get("body", b""))
            if read > most:
                raise too_large
            return message

        return type(request)(request.scope, receive)

    async def _json_of(self, request: Any) -> Any:
        if not is_json(request.headers.get("content-type", "")):  # else any web page could have a browser send it
            raise self.error(415, "The request's Content-Type is not application/json.")
        try:
            return json.loads(await self._limited(request, JSON_BYTES).body())
        except (ValueError, RecursionError) as error:
            raise self.error(400, f"The request is no JSON: {error}.") from error

    async def _form_of(self, request: Any) -> Any:
        try:
            return await self._limited(request, FILES_BYTES).form(max_files=len(FILES), max_fields=0)
        except (self.error, OSError):
            raise
        except Exception as error:  # the reader's own, or of a client that has gone
            raise self.error(400, f"The form cannot be read: {getattr(error, 'detail', error)}") from error
