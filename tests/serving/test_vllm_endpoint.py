"""What a swap asks of a server, in which order; a refused adapter changes nothing. The engine is a stand-in."""

import asyncio
import json

import pytest
from stand_in import Request, answered, asked, main_of, routes_of, started

from dual_lora.serving import vllm_endpoint
from dual_lora.serving.files import FILES, AdapterError
from dual_lora.serving.vllm_endpoint import FILES_BYTES, JSON_BYTES


def test_swap(tmp_path):
    endpoint, engine, other = started(tmp_path)
    assert main_of(endpoint) == engine.loaded
    asyncio.run(endpoint.served.swap(other))
    assert engine.asked == ["pause", "update_config", "reload_weights", "reset", "resume"]
    assert engine.loaded == main_of(endpoint) == other
    assert engine.extra["num_threads"] == 2, "the loader's other settings stay"
    asyncio.run(endpoint.served.swap(None))
    assert engine.loaded is main_of(endpoint) is None


def test_a_bad_folder_does_not_stop_the_server(tmp_path):
    endpoint, engine, _ = started(tmp_path)
    before = main_of(endpoint)
    with pytest.raises(AdapterError, match="is missing"):
        asyncio.run(endpoint.served.swap(str(tmp_path / "nothing")))
    assert engine.asked == []
    assert engine.loaded == main_of(endpoint) == before


def test_a_failed_swap_brings_the_old_adapter_back(tmp_path):
    endpoint, engine, other = started(tmp_path)
    before = main_of(endpoint)
    engine.fails = {other}
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(endpoint.served.swap(other))
    assert engine.loaded == main_of(endpoint) == before
    assert engine.asked[-2:] == ["reset", "resume"]


@pytest.mark.parametrize("old_is_gone", [True, False], ids=["base", "old adapter"])
def test_after_a_failed_swap_the_server_says_what_it_has(old_is_gone, tmp_path):
    endpoint, engine, other = started(tmp_path)
    before = main_of(endpoint)
    engine.fails = {other, before} if old_is_gone else {other}
    status, said = asked(endpoint, "POST", {"adapter": other})
    assert status == 500
    assert "no memory" in said
    left = None if old_is_gone else before
    assert engine.loaded == main_of(endpoint) == left
    assert f"The server has {'one/adapter' if left else 'the base model'}." in said
    assert engine.asked[-2:] == ["reset", "resume"]


def test_a_server_of_parts_answers_nothing_until_a_swap_works(tmp_path):
    endpoint, engine, other = started(tmp_path)
    engine.fails = {other, main_of(endpoint), None}
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


def test_a_form_that_cannot_be_read(tmp_path):
    """What Starlette says of it comes in another shape than all else that the route says."""
    endpoint, engine, _ = started(tmp_path)
    status, said = asked(endpoint, "PUT", request=Request(scope={"form": Unreadable("Missing boundary.")}))
    assert status == 400
    assert said == "The form cannot be read: Missing boundary."
    assert engine.asked == []


class Unreadable(Exception):
    """Starlette's HTTPException, of which FastAPI's is a kind."""

    def __init__(self, detail):
        self.detail = detail


def test_a_server_without_the_loader_is_told(tmp_path):
    endpoint, engine, other = started(tmp_path, load_format="auto")
    assert main_of(endpoint) is None
    with pytest.raises(AdapterError, match="--load-format dual_lora"):
        asyncio.run(endpoint.served.swap(other))
    assert engine.asked == []


@pytest.mark.parametrize(("method", "path", "most"), [
    ("POST", "adapter", JSON_BYTES), ("POST", "adapters", JSON_BYTES), ("PUT", "adapter", FILES_BYTES)
])  # fmt: skip
def test_a_request_that_is_too_large_is_not_read(method, path, most, tmp_path, monkeypatch):
    endpoint, engine, _ = started(tmp_path)
    announced = Request(body=b"{}", headers={"content-length": str(most + 1)})
    status, said = asked(endpoint, method, path=path, request=announced)
    assert status == 413
    assert f"{most:,} bytes" in said
    assert announced.taken == 0, "refused before the first byte of it is read"

    monkeypatch.setattr(vllm_endpoint, "JSON_BYTES", 500)
    monkeypatch.setattr(vllm_endpoint, "FILES_BYTES", 500)
    silent = Request(headers={"transfer-encoding": "chunked"})
    silent.body_parts = [bytes(100)] * 100
    status, said = asked(endpoint, method, path=path, request=silent)
    assert (status, silent.taken) == (413, 6), "no more is read than what shows that it is too large"
    assert engine.asked == []


@pytest.mark.parametrize(
    "kind", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
@pytest.mark.parametrize(("path", "body"), [("adapter", b'{"adapter": null}'), ("adapters", b'{"limit_bytes": 1}')])
def test_a_web_page_in_a_browser_swaps_nothing(path, body, kind, tmp_path):
    """A browser sends these kinds for any page, to a server on the user's own machine too; JSON it asks for first."""
    endpoint, engine, _ = started(tmp_path)
    page = Request(body=body, headers={"content-type": kind, "origin": "https://elsewhere.example"})
    status, said = asked(endpoint, "POST", path=path, request=page)
    assert (status, page.taken, engine.asked, endpoint.served.limit_bytes) == (415, 0, [], 0)
    assert "application/json" in said


def test_two_swaps_at_once_come_one_after_the_other(tmp_path):
    endpoint, engine, other = started(tmp_path)
    before, routes = main_of(endpoint), routes_of(endpoint)

    async def both(*folders):
        bodies = (json.dumps({"adapter": folder}).encode() for folder in folders)
        return await asyncio.gather(*(answered(routes["POST", "adapter"], body) for body in bodies))

    assert asyncio.run(both(other, None)) == [(200, {"adapter": other}), (200, {"adapter": None})]
    assert engine.asked == ["pause", "update_config", "reload_weights", "reset", "resume"] * 2
    assert main_of(endpoint) == engine.loaded
    engine.fails = {other}
    (failed, _), (worked, _) = asyncio.run(both(other, before))
    assert (failed, worked) == (500, 200)
    assert main_of(endpoint) == engine.loaded == before


def test_a_swap_waits_for_the_running_requests(tmp_path):
    endpoint, engine, other = started(tmp_path)
    turns = endpoint.served.turns

    async def main():
        await turns.enter(None)
        swap = asyncio.ensure_future(endpoint.served.swap(other))
        await asyncio.sleep(2)
        assert not swap.done()
        assert engine.asked == []
        turns.leave()
        await swap
        assert engine.loaded == other

    asyncio.run(main())
