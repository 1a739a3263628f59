"""Replace the adapter of a running vLLM server: `POST /v1/dual_lora/adapter {"adapter": "runs/other/adapter"}`.

`PUT` to the same address brings the adapter's two files in the request itself, for a trainer on another machine.

Only the factors are new. The base model's weights are read again from its own file, so that no swap leaves a trace:
back on an earlier adapter, the weights are what they were, bit for bit. vLLM adds these routes only where the user
asks for them: `VLLM_PLUGINS=dual_lora vllm serve …`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .compose import FILES, AdapterError, ComposedWeights, checkpoint_of
from .vllm import KEY, LOAD_FORMAT

logger = logging.getLogger(__name__)
ROUTE = "/v1/dual_lora/adapter"  # below /v1, where `vllm serve --api-key` asks for the key


class AdapterEndpoint:
    """What vLLM's entry point `vllm.endpoint_plugins` asks for. State is the adapter's folder, or None: the base."""

    name = "dual_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.engine: Any = None
        self.adapter: str | None = None
        self.whole = True  # False: the weights are those of no one model
        self.files: Any = None  # the folder of an adapter that came by a request; it goes when the next one works

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's server."""
        from fastapi import HTTPException, Request

        async def now() -> dict[str, str | None]:
            if not self.whole and not self.lock.locked():
                raise HTTPException(500, self._left())
            return {KEY: self.adapter}

        async def answer(adapter: str | None, files: Any = None) -> dict[str, str | None]:
            try:
                async with self.lock:
                    await self.swap(adapter)
                    self.files = files
            except AdapterError as error:
                raise HTTPException(400, f"{error} {self._left()}") from error
            except Exception as error:  # a worker's, which has changed its weights by then
                raise HTTPException(500, f"The swap failed: {error} {self._left()}") from error
            return {KEY: self.adapter}

        async def by_folder(request: Request) -> dict[str, str | None]:
            try:
                body = await request.json()
            except ValueError as error:
                raise HTTPException(400, f"The request is no JSON: {error}.") from error
            wanted = body.get(KEY, 0) if isinstance(body, dict) else 0
            if not isinstance(wanted, str | None):
                raise HTTPException(400, f'Expected {{"{KEY}": "FOLDER"}}, or null for the base model, got {body!r}.')
            return await answer(wanted)

        async def by_files(request: Request) -> dict[str, str | None]:
            form = await request.form(max_files=len(FILES), max_fields=0)
            if set(form) != set(FILES) or any(isinstance(part, str) for part in form.values()):
                raise HTTPException(400, f"Expected the files {' and '.join(FILES)} as a form, got {sorted(form)}.")
            folder = tempfile.TemporaryDirectory(prefix="adapter-")
            for name in FILES:
                with (Path(folder.name) / name).open("xb") as file:
                    await asyncio.to_thread(shutil.copyfileobj, form[name].file, file)
            return await answer(folder.name, folder)

        # As objects: FastAPI reads annotations, which are strings here and name what only this function imported.
        by_folder.__annotations__["request"] = by_files.__annotations__["request"] = Request
        for method, handler in (("GET", now), ("POST", by_folder), ("PUT", by_files)):
            app.add_api_route(ROUTE, handler, methods=[method], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Remember the engine. Called by vLLM once it runs."""
        self.engine = engine_client
        if engine_client is not None:
            load = engine_client.vllm_config.load_config
            self.adapter = load.model_loader_extra_config.get(KEY) if load.load_format == LOAD_FORMAT else None

    async def swap(self, adapter: str | None) -> None:
        """Let the server have another adapter; None: the base model alone.

        Raises AdapterError with the server as it was. Requests under way are finished with the old adapter first.
        """
        config = self.engine.vllm_config
        if config.load_config.load_format != LOAD_FORMAT:
            raise AdapterError(f"The server was started without --load-format {LOAD_FORMAT}.")
        if adapter is not None:
            await asyncio.to_thread(self._check, config.model_config, adapter)
        await self.engine.pause_generation(mode="wait", clear_cache=True)
        self.whole = False
        try:
            await self._load(adapter)
            self.adapter, self.whole = adapter, True
        except Exception:
            await self._load_what_is_left()
            raise
        finally:
            if self.whole:
                await self.engine.reset_prefix_cache()
                await self.engine.resume_generation()

    async def _load_what_is_left(self) -> None:
        """After a failed swap the adapter as before, or else the base model. If both fail, the server stays paused."""
        for known in dict.fromkeys((self.adapter, None)):
            try:
                await self._load(known)
            except Exception:
                logger.exception("%s cannot be loaded", known or "The base model")
            else:
                self.adapter, self.whole = known, True
                return

    def _left(self) -> str:
        if not self.whole:
            return "The server has parts of two models and answers nothing until a swap works."
        return f"The server has {self.adapter or 'the base model'}."

    async def _load(self, adapter: str | None) -> None:
        extra = {**self.engine.vllm_config.load_config.model_loader_extra_config, KEY: adapter}
        await self.engine.collective_rpc("update_config", args=({"load_config": {"model_loader_extra_config": extra}},))
        await self.engine.collective_rpc("reload_weights")

    def _check(self, model_config: Any, adapter: str) -> None:
        """Everything that can be wrong with a folder, found before anything is changed."""
        composed = ComposedWeights(copy.deepcopy(model_config.hf_config), adapter)
        folder = Path(model_config.model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
        composed.check(checkpoint_of(folder))
