"""Whatever a server answers, `verify` says one sentence about it, in bearable time, and asks no other address."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import faulty
import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify.endpoint import Endpoint
from dual_lora.lab.verify.verify import verify
from dual_lora.serving.client import AdapterServer, ServerError


@pytest.fixture(scope="module")
def run_folder(tiny_values, tmp_path_factory):
    return faulty.trained(tmp_path_factory.mktemp("runs") / "dual", tiny_values, "dual_lora")


@contextlib.contextmanager
def saying(*parts, close=True, drip=b""):
    """A server of bytes: the same answer to each connection. Yields its URL and the requests that it got.

    drip: what it goes on with, ten times a second.
    """
    asked, end = [], threading.Event()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            got = connection.recv(1 << 20)
            asked.append(got)
            for part in parts:
                connection.sendall(part)
            while drip and not end.wait(0.1):
                connection.sendall(drip)
            if not close:
                end.wait(20)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", asked
        end.set()


def http(body, status="200 OK", length=None, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": length or len(body), **headers}
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"Connection: close\r\n\r\n" + body


def choice(**logprobs):
    return {"choices": [{"text": "x", "logprobs": logprobs or None}]}


def lists(values, tokens=None, tops=None):
    tokens = tokens or ["a"] * len(values)
    return choice(tokens=tokens, token_logprobs=values, top_logprobs=tops)


NAN, INF = float("nan"), float("inf")
ANSWERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "HTTP 0.9": b"<html>hello</html>",
    "a status of letters": b"HTTP/1.1 OK\r\n\r\n",
    "a thousand headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "a header without end": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000,
    "HTML": http(b"<html>Welcome</html>"),
    "an error in HTML": http(b"<html>Bad gateway\n</html>", "502 Bad Gateway"),
    "an error of nothing": http(b"", "500 "),
    "an error of control characters": http({"error": {"message": "\x1b[31mno\nmore"}}, "500 X"),
    "an error of a list": http([1, 2], "500 X"),
    "an error nested deeply": http(b"[" * 60_000, "500 X"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "an empty body": http(b""),
    "not UTF-8": http(b'{"choices": "\xff"}'),
    "JSON that ends early": http(json.dumps(lists([-1.0, -2.0])).encode()[:-9]),
    "a body that ends early": http(lists([-1.0]), length=9999),
    "a length of letters": http(b"{}", length="abc"),
    "a negative length": http(b"{}", length=-1),
    "torn chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    "chunks of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    "compressed": http(b"\x1f\x8b\x08\x00\x00", **{"Content-Encoding": "gzip"}),
    "a list": http([]),
    "a number": http(b"3"),
    "null": http(b"null"),
    "nested deeply": http(b'{"a":' * 50_000),
    "choices of null": http({"choices": None}),
    "no choices": http({"choices": []}),
    "choices of numbers": http({"choices": [3]}),
    "logprobs of null": http(choice()),
    "logprobs of text": http({"choices": [{"logprobs": "many"}]}),
    "logprobs: null": http(lists([None] * 8)),
    "logprobs: NaN": http(lists([NAN] * 8, tops=[{"a": NAN}] * 8)),
    "logprobs: infinite": http(lists([INF] * 8, tops=[{"a": INF}] * 8)),
    "logprobs: text": http(lists(["-1"] * 8, tops=[{"a": "-1"}] * 8)),
    "logprobs: truth": http(lists([True] * 8, tops=[{"a": True}] * 8)),
    "lists of other lengths": http(choice(tokens=["a"], token_logprobs=[-1.0, -2.0], top_logprobs=None)),
    "contents of null": http(choice(content=[None])),
    "contents without tokens": http(choice(content=[{"logprob": -1.0}])),
    "contents of NaN": http(
        choice(content=[{"token": "a", "logprob": NAN, "top_logprobs": [{"token": "a", "logprob": NAN}]}])
    ),
    "other numbers of tokens": http(lists([None] + [-1.0] * 4000)),
    "tops of null": http(lists([-1.0], tops=[None])),
    "values without an end": http(b'{"choices": [' + b"[]," * 1_000_000 + b"[]]}"),
    "an error of values without an end": http(b'{"error": {"message": [' + b"[]," * 1_000_000 + b"[]]}}", "500 X"),
    "too much": [b"HTTP/1.1 200 OK\r\n\r\n", *([b" " * (1 << 20)] * 40)],
}

SAID = {"values without an end": "1,000,000 values", "an error of values without an end": "it said nothing"}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.timeout(60)
def test_one_sentence(name, run_folder):
    parts = ANSWERS[name] if isinstance(ANSWERS[name], list) else [ANSWERS[name]]
    with saying(*parts, close=name not in SAID) as (url, _), pytest.raises(UserError) as caught:
        verify(run_folder, endpoint=url, model="m", timeout=5)
    said = str(caught.value)
    print(f"{name}: {said}")
    assert said.isprintable(), said
    assert len(said) < 500
    assert "None" not in said
    assert "Error(" not in said
    assert SAID.get(name, "") in said


@pytest.mark.timeout(60)
def test_a_server_that_says_nothing(run_folder):
    with saying(close=False) as (url, _), pytest.raises(UserError, match="did not answer within 1 s"):
        verify(run_folder, endpoint=url, model="m", timeout=1)


HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
DRIPS = {
    "a body": (HEAD % b"200 OK" + b"\r\n", b" "),
    "an error's body": (HEAD % b"500 X" + b"Content-Length: 99999\r\n\r\n", b" "),
    "an error's body that never comes": (HEAD % b"500 X" + b"Content-Length: 9\r\n\r\n", None),
    "a redirection's body": (HEAD % b"302 X" + b"Location: /x\r\nContent-Length: 99999\r\n\r\n", b" "),
    "an error in chunks": (HEAD % b"400 X" + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers": (HEAD % b"500 X", b"X: y\r\n"),
}


@pytest.mark.timeout(60)
def test_a_server_that_drips():
    """All of them at once, as each is waited for."""

    def asked(what):
        head, drip = DRIPS[what]
        more = {"close": False} if drip is None else {"drip": drip}
        with saying(head, **more) as (url, _):
            with pytest.raises(UserError, match="did not answer within 1 s"):
                Endpoint(url, "m", timeout=1).text_tokens("x")
            with pytest.raises(ServerError, match="did not answer within 1 s"):
                AdapterServer(url, "m", timeout=1).complete([[1]], 1)
        return what

    began = time.monotonic()
    with ThreadPoolExecutor(len(DRIPS)) as pool:
        assert list(pool.map(asked, DRIPS)) == list(DRIPS)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none(seconds):
    with pytest.raises(UserError, match="--timeout is"):
        Endpoint("http://localhost:1/v1", "m", timeout=seconds)


@pytest.mark.parametrize("status", ["301 X", "302 X", "303 X", "307 X", "308 X"])
def test_no_other_address_is_asked(status, run_folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with saying(http({})) as (elsewhere, asked):
        there = http(b"", status, Location=f"{elsewhere}/completions")
        with saying(there) as (url, _), pytest.raises(UserError, match="another address"):
            verify(run_folder, endpoint=url, model="m", timeout=5)
    assert asked == []
