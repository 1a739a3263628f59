"""What a swap asks of a server, in which order; a refused adapter changes nothing. The engine is a stand-in."""

import asyncio
import sys
from types import SimpleNamespace

import pytest
from adapters import METHODS, trained

from dual_lora.serving.compose import AdapterError
from dual_lora.serving.vllm_endpoint import FILES, AdapterEndpoint


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

    async def collective_rpc(self, method, args=()):
        self.asked.append(method)
        if method == "update_config":
            self.extra = args[0]["load_config"]["model_loader_extra_config"]
        elif self.extra["adapter"] in self.fails:
            self.loaded = "half of one"
            raise RuntimeError("the worker has no memory left")
        else:
            self.loaded = self.extra["adapter"]

    async def pause_generation(self, **kwargs):
        self.asked.append("pause")

    async def resume_generation(self):
        self.asked.append("resume")

    async def reset_prefix_cache(self):
        self.asked.append("reset")


def started(folder, **other):
    for name in ("one", "other"):
        (folder / name).mkdir(parents=True)
        trained(METHODS["dual-lora"](), folder / name)
    engine = Engine(folder / "one" / "base", str(folder / "one" / "adapter"), **other)
    endpoint = AdapterEndpoint()
    asyncio.run(endpoint.init_state(engine, None, None))
    return endpoint, engine, str(folder / "other" / "adapter")


class Refused(Exception):
    """FastAPI's HTTPException, which is in vLLM's environment alone."""


class Request:
    def __init__(self, body):
        self.body = body

    async def json(self):
        return self.body

    async def form(self, **limits):
        return self.body


def asked(endpoint, method, body=None):
    """(status, answer) of the route's own function."""
    routes = {}
    app = SimpleNamespace(add_api_route=lambda path, call, methods, **_: routes.update({methods[0]: call}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=Refused, Request=Request))
        endpoint.attach_router(app)
    try:
        return 200, asyncio.run(routes[method](*([] if method == "GET" else [Request(body)])))
    except Refused as error:
        return error.args


def test_swap(tmp_path):
    endpoint, engine, other = started(tmp_path)
    assert endpoint.adapter == engine.loaded
    asyncio.run(endpoint.swap(other))
    assert engine.asked == ["pause", "update_config", "reload_weights", "reset", "resume"]
    assert engine.loaded == endpoint.adapter == other
    assert engine.extra["num_threads"] == 2, "the loader's other settings stay"
    asyncio.run(endpoint.swap(None))
    assert engine.loaded is endpoint.adapter is None


def test_a_bad_folder_does_not_stop_the_server(tmp_path):
    endpoint, engine, _ = started(tmp_path)
    before = endpoint.adapter
    with pytest.raises(AdapterError, match="is missing"):
        asyncio.run(endpoint.swap(str(tmp_path / "nothing")))
    assert engine.asked == []
    assert engine.loaded == endpoint.adapter == before


def test_a_failed_swap_brings_the_old_adapter_back(tmp_path):
    endpoint, engine, other = started(tmp_path)
    before = endpoint.adapter
    engine.fails = {other}
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(endpoint.swap(other))
    assert engine.loaded == endpoint.adapter == before
    assert engine.asked[-2:] == ["reset", "resume"]


@pytest.mark.parametrize("old_is_gone", [True, False], ids=["base", "old adapter"])
def test_after_a_failed_swap_the_server_says_what_it_has(old_is_gone, tmp_path):
    endpoint, engine, other = started(tmp_path)
    before = endpoint.adapter
    engine.fails = {other, before} if old_is_gone else {other}
    status, said = asked(endpoint, "POST", {"adapter": other})
    assert status == 500
    assert "no memory" in said
    left = None if old_is_gone else before
    assert engine.loaded == endpoint.adapter == left
    assert f"The server has {left or 'the base model'}." in said
    assert engine.asked[-2:] == ["reset", "resume"]


def test_a_server_of_parts_answers_nothing_until_a_swap_works(tmp_path):
    endpoint, engine, other = started(tmp_path)
    engine.fails = {other, endpoint.adapter, None}
    status, said = asked(endpoint, "POST", {"adapter": other})
    assert status == 500
    assert "parts of two models" in said
    assert "resume" not in engine.asked
    assert asked(endpoint, "GET")[0] == 500
    engine.fails = set()
    assert asked(endpoint, "POST", {"adapter": other}) == (200, {"adapter": other})
    assert asked(endpoint, "GET") == (200, {"adapter": engine.loaded})
    assert engine.asked[-1] == "resume"


def test_a_form_of_texts_in_the_place_of_files(tmp_path):
    endpoint, engine, _ = started(tmp_path)
    status, said = asked(endpoint, "PUT", dict.fromkeys(FILES, "a text"))
    assert status == 400
    assert "Expected the files" in said
    assert engine.asked == []


def test_a_server_without_the_loader_is_told(tmp_path):
    endpoint, engine, other = started(tmp_path, load_format="auto")
    assert endpoint.adapter is None
    with pytest.raises(AdapterError, match="--load-format dual_lora"):
        asyncio.run(endpoint.swap(other))
    assert engine.asked == []
