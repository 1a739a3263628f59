"""Replace the adapter of a running vLLM server: `POST /v1/dual_lora/adapter {"adapter": "runs/other/adapter"}`.

`PUT` to the same address brings the adapter's two files in the request itself, for a trainer on another machine.
`POST /v1/dual_lora/adapters {"adapters": {"NAME": "FOLDER"}}` gives further adapters names, by which requests then ask
for them as their `model`; `PUT /v1/dual_lora/adapters/NAME` brings the files of such a one. vLLM adds these routes only
if the user asks for them: `VLLM_PLUGINS=dual_lora vllm serve …`.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .by_name import ByName
from .files import FILES, AdapterError
from .served import ServedAdapters
from .vllm import KEY, LIMIT, NAMED, check_limit

OWN = "/v1/dual_lora/"  # below /v1, where `vllm serve --api-key` asks for the key
ROUTE, NAMES_ROUTE = f"{OWN}adapter", f"{OWN}adapters"
JSON_BYTES, FILES_BYTES = 1 << 20, 2 << 30  # the largest requests that are read


class AdapterEndpoint:
    """What vLLM's entry point `vllm.endpoint_plugins` asks for."""

    name = "dual_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.served = ServedAdapters()

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called by vLLM once the engine runs."""
        if engine_client is not None:
            processes = getattr(args, "api_server_count", 1) or 1
            await self.served.start(engine_client, state.openai_serving_models, processes)

    def attach_router(self, app: Any) -> None:
        """Add the routes, and the turns of requests, to vLLM's server."""
        from fastapi import HTTPException, Request

        served = self.served

        def limited(request: Any, most: int) -> Any:
            """The same request, of which no more than so many bytes are read."""
            too_large = HTTPException(413, f"The request is larger than the {most:,} bytes that are read of one.")
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

            return Request(request.scope, receive)

        async def json_of(request: Any) -> Any:
            try:
                return json.loads(await limited(request, JSON_BYTES).body())
            except (ValueError, RecursionError) as error:
                raise HTTPException(400, f"The request is no JSON: {error}.") from error

        @contextmanager
        def refused(left: str) -> Iterator[None]:
            """What is wrong with a request, as status 400. left: what the server has afterwards, in a sentence."""
            try:
                yield
            except ValueError as error:
                raise HTTPException(400, f"{error} {left}") from error

        as_they_were = "The names are as they were."

        async def swap(adapter: str | None, kept: Any = None) -> dict[str, str | None]:
            try:
                await served.swap(adapter, kept)
            except AdapterError as error:
                raise HTTPException(400, f"{error} {served.left()}") from error
            except Exception as error:  # a worker's, which has changed its weights by then
                raise HTTPException(500, f"The swap failed: {error} {served.left()}") from error
            return {KEY: adapter}

        async def now() -> dict[str, str | None]:
            if not served.whole and not served.swapping:
                raise HTTPException(500, served.left())
            return {KEY: served.main and served.main.folder}

        async def by_folder(request: Request) -> dict[str, str | None]:
            body = await json_of(request)
            wanted = body.get(KEY, 0) if isinstance(body, dict) else 0
            if not isinstance(wanted, str | None):
                raise HTTPException(
                    400, f'Expected {{"{KEY}": "FOLDER"}}, or null for the base model, got {body!r:.200}.'
                )
            return await swap(wanted)

        async def form_of(request: Any) -> Any:
            try:
                return await limited(request, FILES_BYTES).form(max_files=len(FILES), max_fields=0)
            except (HTTPException, OSError):
                raise
            except Exception as error:  # the reader's own, or of a client that has gone
                raise HTTPException(400, f"The form cannot be read: {getattr(error, 'detail', error)}") from error

        async def brought(request: Any) -> Any:
            """The adapter's two files in a temporary folder, which goes with the last reference to it."""
            try:
                form = await form_of(request)
                if set(form) != set(FILES) or any(isinstance(part, str) for part in form.values()):
                    raise HTTPException(400, f"Expected the files {' and '.join(FILES)} as a form, got {sorted(form)}.")
                folder = tempfile.TemporaryDirectory(prefix="adapter-")
                for name in FILES:
                    with (Path(folder.name) / name).open("xb") as file:
                        await asyncio.to_thread(shutil.copyfileobj, form[name].file, file)
            except OSError as error:
                raise HTTPException(507, f"The adapter cannot be stored: {error}. {served.left()}") from error
            return folder

        async def by_files(request: Request) -> dict[str, str | None]:
            with refused(served.left()):
                served.check_start()
            folder = await brought(request)
            return await swap(folder.name, folder)

        async def names() -> dict[str, Any]:
            named = {name: adapter.folder for name, adapter in served.named.items()}
            return {NAMED: named, LIMIT: served.limit_bytes, "loaded": served.loaded and served.loaded.folder}

        async def give_names(request: Request) -> dict[str, Any]:
            body = await json_of(request)
            named = body.get(NAMED, {}) if isinstance(body, dict) and not body.keys() - {NAMED, LIMIT} else None
            if not body or not isinstance(named, dict) or not all(isinstance(f, str | None) for f in named.values()):
                form = f'{{"{NAMED}": {{"NAME": "FOLDER"}}, "{LIMIT}": BYTES}}'
                raise HTTPException(
                    400, f"Expected {form}, with null as folder to take a name away, got {body!r:.200}."
                )
            with refused(as_they_were):
                await served.give_names(named, check_limit(body[LIMIT]) if LIMIT in body else None)
            return await names()

        async def give_name_by_files(request: Request, name: str) -> dict[str, Any]:
            with refused(as_they_were):
                served.check_names([name])
            folder = await brought(request)
            with refused(as_they_were):
                await served.give_names({name: folder.name}, kept=folder)
            return await names()

        # As objects: FastAPI reads annotations, which are strings here and name what only this function imported.
        for handler in (by_folder, by_files, give_names, give_name_by_files):
            handler.__annotations__["request"] = Request
        for method, path, call in (
            ("GET", ROUTE, now),
            ("POST", ROUTE, by_folder),
            ("PUT", ROUTE, by_files),
            ("GET", NAMES_ROUTE, names),
            ("POST", NAMES_ROUTE, give_names),
            ("PUT", f"{NAMES_ROUTE}/{{name:path}}", give_name_by_files),
        ):
            app.add_api_route(path, call, methods=[method], response_model=None)
        app.add_middleware(ByName, turns=served.turns, names=served.named, own=OWN)
