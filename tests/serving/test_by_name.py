"""Requests by model name, around a small ASGI app: each is answered with its own adapter's weights, to its end."""

import asyncio
import errno
import gc
import gzip
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_in import File, Refused, Request, asked, files_of, main_of, started

from dual_lora.serving import by_name, vllm_endpoint
from dual_lora.serving.by_name import ByName
from dual_lora.serving.files import FILES, AdapterError
from dual_lora.serving.vllm_endpoint import OWN

BAD_NAMES = ["", " ", "m", "m ", "a-lora", "..", "../adapter", "/etc", "a//b", "a/./b", "a\x1b[31m", "a\nb", "x" * 201]
FORM = b"multipart/form-data; boundary=edge"


class Server:
    """The middleware around an app that answers with the weights that the engine has, before and after some time."""

    def __init__(self, folder, **other):
        self.endpoint, self.engine, self.other = started(folder, **other)
        self.served = self.endpoint.served
        self.app = ByName(self.answer, self.served.turns, self.served.named, OWN)
        self.one = main_of(self.endpoint)
        self.shown, self.pieces, self.headers = [], 0, []

    async def answer(self, scope, receive, send):
        body, more, self.headers = b"", True, scope.get("headers")
        while more and scope["type"] == "http" and scope["method"] == "POST":
            message = await receive()
            self.pieces += 1
            body, more = body + message["body"], message.get("more_body")
        before = self.engine.loaded
        self.shown.append(self.served.cards[0].name)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not self.engine.paused or scope["type"] != "http" or not body
        said = json.dumps([body.decode(errors="replace"), before, self.engine.loaded]).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": said})

    async def ask(self, body, method="POST", path="/v1/completions", kind=b"application/json", parts=2, more=()):
        """(status, answer). more: further headers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = len(data) // parts or 1
        left = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
        sent = []

        async def receive():
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode()), *more]
        await self.app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    def run(self, *bodies):
        async def together():
            return await asyncio.gather(*(self.ask(body) for body in bodies))

        return asyncio.run(together())

    def names(self, named, **other):
        return asked(self.endpoint, "POST", {"adapters": named, **other}, "adapters")


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    assert server.names({"b": server.other})[0] == 200
    return server


def test_each_request_has_its_own_weights_to_its_end(server):
    bodies = [{"model": model, "n": n} for n, model in enumerate(["m", "b", "b", "m", "b", None, "b", "m"])]
    for body, (status, (echo, before, after)) in zip(bodies, server.run(*bodies), strict=True):
        assert status == 200
        assert json.loads(echo) == body, "the body reaches the route as it came"
        assert before == after == (server.other if body["model"] == "b" else server.one)
    assert server.engine.asked.count("reload_weights") == 1, "those that wait for one adapter go together"
    assert server.shown == ["m", "m", "m", "m", "b", "b", "b", "b"], "an answer has the first name of vLLM's list"
    assert {card.name for card in server.served.cards} == {"m", "b"}
    assert server.served.turns.running == 0


DEEP = b'{"model": "b", "x": ' + b'{"x": ' * 100_000 + b"1" + b"}" * 100_001
FORMED = b'--edge\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--edge--\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *((b"application/json", body) for body in (b"{", b"[1]", b"null", b'"b"', DEEP, b"\xff")),
        (b"application/json", b'{"model": "b", "x": ' + b"9" * 5000 + b"}"),
        (FORM, FORMED),
        (b"application/x-www-form-urlencoded", b"model=b"),
        (b"application/json", gzip.compress(b'{"model": "b"}')),
        *((kind, b'{"model": "b"}') for kind in (b"text/plain", b"text/plain;application/json", FORM, b"")),
    ],
    ids=[
        *("cut", "list", "null", "text", "deep", "no text", "digits", "form", "encoded form", "packed"),
        *("a page's text", "a page's other text", "a page's form", "a page's bytes"),
    ],
)
def test_what_is_no_object_of_json_is_refused_while_adapters_have_names(kind, body, server):
    status, said = asyncio.run(server.ask(body, kind=kind))
    assert (status, server.engine.asked) == (400, [])
    assert "has to be a JSON object" in said["error"]["message"]
    server.names({"b": None})
    status, (echo, before, _) = asyncio.run(server.ask(body, kind=kind))
    assert (status, echo, before) == (200, body.decode(errors="replace"), server.one), "then the route says what it is"


@pytest.mark.parametrize(
    "body", [b"", b'{"model": 3}', b'{"model": {"b": 1}}', b'{"model": ["b", "m"]}', b'{"x": "model"}']
)
def test_an_object_without_a_name_has_the_servers_own_adapter(body, server):
    assert asyncio.run(server.ask(body))[1] == [body.decode(), server.one, server.one]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "b"}',
        b'{"model": "m", "model": "b"}',
        b'{"model": "m", "mo\\u0064el": "\\u0062"}',
        '{"model": "b"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"model": "b"}',
    ],
    ids=["plain", "twice", "escaped", "UTF-16", "mark"],
)
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (b"application/json", []),
        (b"application/json; x=multipart/", []),
        (b"application/json", [(b"Content-Type", FORM), (b"Content-Encoding", b"gzip")]),
        (b"Application/JSON ; charset=utf-8", [(b"transfer-encoding", b"chunked")]),
    ],
)
def test_the_route_reads_what_was_read_here(kind, more, body, server):
    """Whatever another reader might take from the body or its headers: it gets neither."""
    status, (echo, *weights) = asyncio.run(server.ask(body, kind=kind, more=[*more, (b"x-own", b"1")]))
    assert (status, echo, weights) == (200, '{"model": "b"}', [server.other] * 2)
    assert server.headers == [(b"x-own", b"1"), (b"content-type", b"application/json"), (b"content-length", b"14")]


def test_numbers_and_texts_come_as_they_are(server):
    body = {
        "model": "b",
        "f": 0.1,
        "big": 10**40,
        "no": float("inf"),
        "text": "é\ud800\n",
        "list": [1, -0.0, None, True],
    }
    echo = asyncio.run(server.ask(body))[1][0]
    assert json.loads(echo) == body


def test_what_cannot_reach_the_model_waits_for_nobody(server):
    async def main():
        await server.served.turns.enter("b")
        for method, path, body in (
            ("GET", "/health", b""),
            ("POST", "/resume", b""),
            ("POST", f"{OWN}adapters", b"{}"),
        ):
            assert (await asyncio.wait_for(server.ask(body, method, path), 1))[0] == 200
        waits = asyncio.ensure_future(server.ask({"x": 1}, path="/unknown"))
        await asyncio.sleep(0.1)
        assert not waits.done(), "nobody knows what a route does with it"
        server.served.turns.leave()
        assert (await waits)[1][1] == server.one

    asyncio.run(main())


@pytest.mark.parametrize("behind", [False, True], ids=["alone", "another layer behind"])
def test_a_path_that_leads_nowhere_swaps_nothing(behind, server):
    """vLLM asks for its key below /v1 alone: anybody else could have the server swap, while all others wait."""

    def route(path):
        found = {True: SimpleNamespace(name="FULL"), False: SimpleNamespace(name="NONE")}
        return SimpleNamespace(matches=lambda scope: (found[scope["path"] == path], {}))

    layers = [SimpleNamespace(cls=ByName), *[SimpleNamespace(cls=object)] * behind]
    app = SimpleNamespace(user_middleware=layers, router=SimpleNamespace(routes=[route("/v1/completions")]))
    middleware = server.app
    server.app = lambda scope, receive, send: middleware({**scope, "app": app}, receive, send)

    async def go():
        at_first = (await server.ask({"model": "b"}, path="/nowhere"))[1][1]
        return at_first, (await server.ask({"model": "b"}))[1][1]

    assert asyncio.run(go()) == (server.other if behind else server.one, server.other)


@pytest.mark.parametrize(
    ("option", "variable", "keys"),
    [
        (["one", "two"], "three", ["one", "two"]),
        (None, "three", ["three"]),
        ([""], "three", []),
        ("one", None, ["one"]),
        (None, None, []),
    ],
)
def test_the_server_s_key_is_asked_for_on_every_path(option, variable, keys, tmp_path, monkeypatch):
    """vLLM asks for it below /v1 alone in many versions: anybody else could use the model by `/invocations`, and have
    the server swap."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    server = Server(tmp_path, args=SimpleNamespace(api_server_count=1, api_key=option))
    server.names({"b": server.other})
    assert server.endpoint.keys == set(keys)
    added = []
    app = SimpleNamespace(add_api_route=lambda *_, **__: None, add_middleware=lambda *_, **with_: added.append(with_))
    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=Refused, Request=Request))
    server.endpoint.attach_router(app)
    server.app = ByName(server.answer, **added[0])

    def ask(*headers, **other):
        return asyncio.run(server.ask({"model": "b"}, path="/invocations", more=headers, **other))

    wrong = [b"", b"Bearer", b"Bearer ", b"Bearer four", b"Basic one", b"one", b"Bearer one two", b"Bearer \xff"]
    for told in [[], *([(b"authorization", each)] for each in wrong)]:
        status, said = ask(*told)
        assert status == (401 if keys else 200)
        if keys:
            assert "needs the server's key" in said["error"]["message"]
            assert server.engine.asked == []
            assert server.pieces == 0, "nothing was read"
    for key in keys:
        assert ask((b"authorization", f"bearer {key}".encode()))[1][1] == server.other
    assert ask(method="GET")[0] == 200
    server.endpoint.keys.add("schlüssel")
    assert ask((b"authorization", "Bearer schlüssel".encode("latin-1")))[0] == 200


@pytest.mark.parametrize("model", ["b", "m"])
def test_a_request_in_the_background_would_outlive_its_turn(model, server):
    """One of the server's own names would go on with the weights of whoever comes next."""
    [(status, said)] = server.run({"model": model, "background": True})
    assert status == 400
    assert "background" in said["error"]["message"]
    assert server.engine.asked == []


def test_a_request_in_the_background_where_no_adapter_has_a_name(server):
    server.names({"b": None})
    assert server.run({"model": "m", "background": True})[0][1][1] == server.one


def test_a_client_that_reads_nothing_loses_its_turn(server, monkeypatch):
    monkeypatch.setattr(by_name, "PATIENCE", 0.05)

    async def main():
        async def receive():
            return {"type": "http.request", "body": b"{}"}

        async def never(message):
            await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        with pytest.raises(asyncio.TimeoutError):
            await server.app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, never)
        assert server.served.turns.running == 0
        assert (await server.ask({"model": "b"}))[0] == 200

    asyncio.run(main())


def test_a_client_that_reads_slowly_loses_its_turn_too(server, monkeypatch):
    """Its patience is one for the whole answer; a busy server's own delays are not the reader's."""
    monkeypatch.setattr(by_name, "PATIENCE", 0.2)

    async def answer(wait, count):
        async def app(scope, receive, send):
            for _ in range(count):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})

        async def receive():
            return {"type": "http.request", "body": b"{}"}

        async def slowly(message):
            await wait()

        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        named = ByName(app, server.served.turns, server.served.named, OWN)
        await named({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, slowly)

    async def busy():
        time.sleep(0.01)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(answer(lambda: asyncio.sleep(0.05), 100))
    assert server.served.turns.running == 0
    asyncio.run(answer(busy, 60))


def test_a_body_in_pieces_comes_to_the_route_in_one(server):
    """Of a million pieces each cost as much as all that were left: minutes, in which nobody else was answered."""
    asked = {"model": "b", "prompt": "x" * 1000}
    assert asyncio.run(server.ask(asked, parts=500))[1] == [json.dumps(asked), server.other, server.other]
    assert server.pieces == 1


def test_a_client_that_goes_within_its_body(server):
    sent = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return sent.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"9")]}
    asyncio.run(server.app(scope, receive, None))
    assert (server.headers, server.served.turns.running) == ([], 0), "the route is not asked"


def test_a_body_without_an_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(by_name, "LARGEST", 100)
    assert server.run({"model": "b", "prompt": "x" * 40})[0][0] == 200
    ((status, said),) = server.run({"model": "b", "prompt": "x" * 400})
    assert (status, "longer than 100 bytes" in said["error"]["message"]) == (413, True)
    assert server.served.turns.running == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" + b"{}," * 6_000_000 + b"{}]", "12,000,002 values"),
        (("[" + "{}," * 6_000_000 + "{}]").encode("utf-16"), "12,000,002 values"),
        (b'"' * 12_000_000, "12,000,000 values"),
        (b"[" + (b"1" * 4299 + b",") * 25_000 + b"1]", "13,437,500 values"),
    ],
    ids=["objects", "in UTF-16", "texts", "numbers"],
)
@pytest.mark.timeout(60)
def test_values_without_an_end_are_refused(body, said, server):
    """While a body is taken apart no other request is answered: such ones took minutes, or gigabytes."""
    status, answer = asyncio.run(server.ask(body))
    assert (status, said in answer["error"]["message"]) == (400, True)
    assert server.served.turns.running == 0


def test_signs_in_a_text_are_no_values(server, monkeypatch):
    from dual_lora.serving import body

    monkeypatch.setattr(body, "MOST_VALUES", 20)
    prompt = '{"a": [1, 2, 3]}, \\"' * 50
    assert server.run({"model": "b", "prompt": prompt})[0][1][1] == server.other


def test_names_that_are_refused_change_nothing(server, tmp_path):
    before = asked(server.endpoint, "GET", path="adapters")
    assert before == (200, {"adapters": {"b": server.other}, "limit_bytes": 0, "loaded": server.one})
    for body in (
        {"adapters": {"c": server.other, "d": str(tmp_path / "nothing")}},
        *({"adapters": {name: server.other}} for name in BAD_NAMES),
        {"adapters": {"c": 3}},
        {"adapters": {"c": "a\0b"}},
        {"adapters": {"c": "x" * 10_000}},
        {"adapters": [server.other]},
        {"adapters": {"c": server.other}, "limit_bytes": -1},
        {"adapters": {"c": server.other}, "limit_bytes": True},
        {"limit": 5},
        {},
        None,
        b"{",
    ):
        status, said = asked(server.endpoint, "POST", body if body is not None else b"null", "adapters")
        assert status == 400, body
        assert "\n" not in said
        assert len(said) < 1000
        assert asked(server.endpoint, "GET", path="adapters") == before
    assert server.engine.asked == []
    assert server.names({"b": None}, limit_bytes=7)[1] == {"adapters": {}, "limit_bytes": 7, "loaded": server.one}
    assert [card.name for card in server.served.cards] == ["m"]


def put(server, name, files):
    request = Request(scope={"form": files}, body=b"the files")
    return asked(server.endpoint, "PUT", path="{name:path}", request=request, name=name)


def test_an_adapter_that_is_sent_has_a_name(server):
    before = server.run({"model": "m"})[0][1][1]
    status, said = put(server, "org/c", files_of(server.other))
    assert status == 200
    folder = said["adapters"]["org/c"]
    assert said["adapters"]["b"] == server.other
    assert server.run({"model": "org/c"})[0][1][1] == folder
    assert server.run({"model": "m"})[0][1][1] == before == main_of(server.endpoint)
    assert (Path(folder) / FILES[1]).read_bytes() == (Path(server.other) / FILES[1]).read_bytes()

    again = put(server, "org/c", files_of(server.one))[1]["adapters"]["org/c"]
    assert again != folder
    assert server.run({"model": "org/c"})[0][1][1] == again
    gc.collect()
    assert not Path(folder).exists(), "nobody has it any more"
    server.names({"org/c": None})
    gc.collect()
    assert Path(again).exists(), "its weights are loaded, and may have to be loaded again"
    assert server.run({"model": "m"})[0][0] == 200
    gc.collect()
    assert not Path(again).exists()


def test_what_is_sent_and_refused_changes_nothing(server, monkeypatch):
    before = asked(server.endpoint, "GET", path="adapters")
    good = files_of(server.other)
    for name in BAD_NAMES:
        request = Request(body=b"{}")
        status, said = asked(server.endpoint, "PUT", path="{name:path}", request=request, name=name)
        assert (status, request.taken) == (400, 0), "refused before the files are read"
        assert "The names are as they were." in said
    torn = File(Path(server.other, FILES[1]).read_bytes()[:-9])
    for files in ({}, {**good, "more": torn}, {**good, FILES[1]: "text"}, {**good, FILES[1]: torn}):
        assert put(server, "c", files)[0] == 400
        assert asked(server.endpoint, "GET", path="adapters") == before
    monkeypatch.setattr(vllm_endpoint.shutil, "copyfileobj", full_disk)
    main = asked(server.endpoint, "PUT", request=Request(scope={"form": good}))
    for status, said in (put(server, "c", good), main):
        assert status == 507
        assert "No space left" in said
    assert asked(server.endpoint, "GET", path="adapters") == before
    assert server.engine.asked == []


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_name_with_another_folder_is_the_other_adapter_from_now_on(server):
    assert server.run({"model": "b"})[0][1][1] == server.other
    server.names({"b": server.one})
    assert server.run({"model": "b"})[0][1][1] == server.one
    server.names({"b": None})
    server.names({"c": server.other})
    assert server.run({"model": "c"}, {"model": "b"})[1][1][1] == server.one, "vLLM itself says that there is no b"


def test_a_request_that_came_before_its_name(server):
    """While it waits the name is given: it has that adapter's weights, and no others under that name."""

    async def main():
        await server.served.turns.enter("b")
        early = [asyncio.ensure_future(server.ask({"model": name})) for name in ("two", "m")]
        await asyncio.sleep(0.01)
        await server.served.give_names({"two": server.other})
        server.served.turns.leave()
        return [answer[1] for _, answer in await asyncio.gather(*early)]

    assert asyncio.run(main()) == [server.other, server.one]


@pytest.mark.parametrize("body", [b"model=two", b'{"model": "m", "background": true}'])
def test_a_request_that_came_before_the_first_name(body, server):
    server.names({"b": None})

    async def main():
        turn = object()
        await server.served.turns.enter(turn)
        early = asyncio.ensure_future(server.ask(body))
        await asyncio.sleep(0.01)
        await server.served.give_names({"two": server.other})
        server.served.turns.leave()
        return await early

    assert asyncio.run(main())[0] == 400


def test_a_running_request_cannot_name_what_is_not_listed_yet(server):
    """vLLM reads a request's model a little later than we do: until then it lists no name that is new."""

    def listed():
        return [card.name for card in server.served.cards]

    async def main():
        await server.served.turns.enter(None)
        await server.served.give_names({"two": server.other, "b": server.one})
        before = listed()
        await asyncio.sleep(0.01)
        before_the_end = listed()
        server.served.turns.leave()
        await asyncio.sleep(0.01)
        assert server.served.turns.running == 0
        return before, before_the_end, listed()

    assert asyncio.run(main()) == (["m", "b"], ["m", "b"], ["m", "two", "b"])


def test_a_name_that_changes_while_its_adapter_is_loaded(server):
    """A request that comes after the answer to the change has the new adapter, though the old one is on its way."""

    async def main():
        load = server.engine.collective_rpc
        changed = []

        async def slowly(method, args=()):
            if not changed and method == "reload_weights":
                changed.append(True)
                await server.served.give_names({"b": server.one})
                after.append(asyncio.ensure_future(server.ask({"model": "b"})))
                await asyncio.sleep(0.01)
            await load(method, args)

        after = []
        server.engine.collective_rpc = slowly
        await server.ask({"model": "b"})
        assert (await after[0])[1][1] == server.one

    asyncio.run(main())


def test_files_that_have_changed_are_not_served_in_silence(server):
    file = Path(server.other) / "adapter_model.safetensors"
    written = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))  # as rsync leaves it
    [(status, said)] = server.run({"model": "b"})
    assert status == 503
    assert "have changed" in said["error"]["message"]
    assert server.engine.asked == []
    server.names({"b": server.other})
    assert server.run({"model": "b"})[0][0] == 200


@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_files_that_change_while_they_are_read(whose, server):
    """The weights are then those of no file that was checked: the adapter before is loaded again, if it is the same."""
    folder = server.other if whose == "adapter" else Path(server.one).with_name("base")
    server.engine.on_load = lambda: rewritten(folder)
    status, said = asked(server.endpoint, "POST", {"adapter": server.other})
    assert (status, "have changed since" in said) == (400, True)
    assert main_of(server.endpoint) == server.one
    if whose == "adapter":
        assert server.engine.loaded == server.one
        assert not server.engine.paused
    else:
        assert server.engine.paused
        assert "answers nothing" in said


def test_files_that_change_while_a_swap_waits(server):
    async def main():
        await server.served.turns.enter(None)
        swap = asyncio.ensure_future(server.served.swap(server.other))
        while not server.served.turns._queue:
            await asyncio.sleep(0.01)
        rewritten(server.other)
        server.served.turns.leave()
        with pytest.raises(AdapterError, match="have changed since"):
            await swap

    asyncio.run(main())
    assert server.engine.asked == []
    assert main_of(server.endpoint) == server.one


def test_a_failed_swap_does_not_bring_back_what_has_changed(server):
    rewritten(server.one)
    server.engine.fails = {server.other}
    status, said = asked(server.endpoint, "POST", {"adapter": server.other})
    assert status == 500
    assert "The server has the base model." in said
    assert server.engine.loaded is main_of(server.endpoint) is None


def test_a_base_that_has_changed_is_not_mixed_with_the_old_one(server):
    rewritten(Path(server.one).with_name("base"))
    status, said = asked(server.endpoint, "POST", {"adapter": server.other})
    assert status == 400
    assert "start it again" in said
    assert [status for status, _ in server.run({"model": "b"}, {"model": "m"})] == [503, 200]
    assert server.engine.asked == []


def rewritten(folder):
    """The same bytes in the place of a folder's weights, at another time."""
    [file] = Path(folder).glob("*.safetensors")
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


def test_a_websocket_is_closed(server):
    """It has no end, so that others would wait for their turn for ever, and says only later what it asks for."""
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(server.app({"type": "websocket", "headers": []}, None, send))
    assert sent == ["websocket.close"]


def test_an_adapter_that_a_worker_cannot_load(server):
    server.engine.fails = {server.other}
    answers = server.run({"model": "b"}, {"model": "b"}, {"model": "m"})
    assert [status for status, _ in answers] == [503, 503, 200]
    assert "no memory" in answers[0][1]["error"]["message"]
    assert answers[2][1][1] == server.one == main_of(server.endpoint)
    assert server.engine.asked.count("update_config") == 2, "tried once for both, then the one before"


def test_a_server_of_parts_answers_nothing(server):
    server.engine.fails = {server.other, server.one, None}
    assert [status for status, _ in server.run({"model": "b"}, {"model": "m"})] == [503, 503]
    assert server.engine.paused
    server.engine.fails = set()
    assert server.run({"model": "m"})[0][0] == 503, "until a swap works"
    assert asked(server.endpoint, "POST", {"adapter": server.one})[0] == 200
    assert [answer[1] for _, answer in server.run({"model": "b"}, {"model": "m"})] == [server.other, server.one]


def test_names_at_the_start(tmp_path):
    limit, folders = 10**9, {}
    for name in ("good", "bad"):
        folders[name] = tmp_path / name
    server = Server(
        folders["good"], extra={"adapters": {"b": str(folders["good"] / "other" / "adapter")}, "limit_bytes": limit}
    )
    assert server.run({"model": "b"})[0][1][1] == server.other
    assert server.engine.extra["limit_bytes"] == limit
    with pytest.raises(ValueError, match="is missing"):
        Server(folders["bad"], extra={"adapters": {"b": str(tmp_path / "nothing")}})


def test_several_processes_that_take_requests(tmp_path):
    """One would report, and after a failed swap bring back, an adapter in whose place another has put its own."""
    server = Server(tmp_path, args=SimpleNamespace(api_server_count=2))
    for status, said in (server.names({"b": server.other}), asked(server.endpoint, "POST", {"adapter": server.other})):
        assert status == 400
        assert "--api-server-count 1" in said
    assert server.engine.asked == []
    assert asked(server.endpoint, "GET") == (200, {"adapter": server.one})
