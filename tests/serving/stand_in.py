"""A stand-in for vLLM's engine and for FastAPI, which are in vLLM's environment alone; and two adapters for it."""

import asyncio
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from adapters import METHODS, trained

from dual_lora.serving.files import FILES
from dual_lora.serving.vllm_endpoint import AdapterEndpoint


class Engine:
    """Keeps what it was asked for; the worker's weights are the adapter that was loaded last."""

    def __init__(self, base, adapter, load_format="dual_lora"):
        from transformers import AutoConfig

        extra = {"adapter": adapter, "num_threads": 2}
        self.vllm_config = SimpleNamespace(
            load_config=SimpleNamespace(load_format=load_format, model_loader_extra_config=extra),
            model_config=SimpleNamespace(hf_config=AutoConfig.from_pretrained(base), model=str(base), revision=None),
        )
        self.asked, self.extra, self.loaded, self.fails = [], extra, adapter, set()
        self.paused, self.on_load = False, lambda: None

    async def collective_rpc(self, method, args=()):
        self.asked.append(method)
        await asyncio.sleep(0)
        assert self.paused
        if method == "update_config":
            self.extra = args[0]["load_config"]["model_loader_extra_config"]
        elif self.extra["adapter"] in self.fails:
            self.loaded = "half of one"
            raise RuntimeError("the worker has no memory left")
        else:
            self.loaded = self.extra["adapter"]
            self.on_load()

    async def pause_generation(self, **kwargs):
        self.asked.append("pause")
        self.paused = True

    async def resume_generation(self):
        self.asked.append("resume")
        self.paused = False

    async def reset_prefix_cache(self):
        self.asked.append("reset")


@dataclasses.dataclass
class Card:
    """vLLM's BaseModelPath."""

    name: str
    model_path: str


def started(folder, args=None, extra=None, **other):
    for name in ("one", "other"):
        (folder / name).mkdir(parents=True)
        trained(METHODS["dual-lora"](), folder / name)
    engine = Engine(folder / "one" / "base", str(folder / "one" / "adapter"), **other)
    engine.vllm_config.load_config.model_loader_extra_config.update(extra or {})
    endpoint = AdapterEndpoint()
    models = SimpleNamespace(base_model_paths=[Card("m", "base")], lora_requests={"a-lora": None})
    state = SimpleNamespace(openai_serving_models=models)
    asyncio.run(endpoint.init_state(engine, state, args or SimpleNamespace(api_server_count=None)))
    endpoint.served.cards = models.base_model_paths
    return endpoint, engine, str(folder / "other" / "adapter")


def main_of(endpoint):
    return endpoint.served.main and endpoint.served.main.folder


class Refused(Exception):
    """FastAPI's HTTPException, which is in vLLM's environment alone."""


class Request:
    """Starlette's: what is received, in parts of 100,000 bytes. scope["form"]: the files that the body stands for."""

    def __init__(self, scope=None, receive=None, body=b"", headers=()):
        self.scope, self.body_parts, self.taken = scope or {}, [body], 0
        self.headers = {"content-type": "application/json", **dict(headers)}
        self.receive = receive or self._receive

    async def _receive(self):
        self.taken += 1
        return {"type": "http.request", "body": self.body_parts.pop(0), "more_body": bool(self.body_parts)}

    async def body(self):
        message = await self.receive()
        whole = message["body"]
        while message["more_body"]:
            message = await self.receive()
            whole += message["body"]
        return whole

    async def form(self, **limits):
        body = await self.body()
        if isinstance(self.scope.get("form"), Exception):
            raise self.scope["form"]
        return self.scope["form"] if "form" in self.scope else json.loads(body)


class File:
    """Starlette's UploadFile."""

    def __init__(self, data):
        self.file = io.BytesIO(data)


def files_of(folder):
    """An adapter's two files as a form."""
    return {name: File((Path(folder) / name).read_bytes()) for name in FILES}


def routes_of(endpoint):
    """Each route's own function, by method and the path's last part."""
    routes = {}

    def add(path, call, methods, **_):
        routes[methods[0], path.rpartition("/")[2]] = call

    app = SimpleNamespace(add_api_route=add, add_middleware=lambda *_, **__: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=Refused, Request=Request))
        endpoint.attach_router(app)
    return routes


async def answered(call, body=None, request=None, **parameters):
    """(status, answer) of one of them."""
    if body is not None or request is not None:
        request = [request or Request(body=body if isinstance(body, bytes) else json.dumps(body).encode())]
    try:
        return 200, await call(*(request or []), **parameters)
    except Refused as error:
        return error.args


def asked(endpoint, method, body=None, path="adapter", request=None, **parameters):
    return asyncio.run(answered(routes_of(endpoint)[method, path], body, request, **parameters))
