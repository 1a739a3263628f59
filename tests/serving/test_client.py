"""What a trainer's side of a server sends, and what it makes of bad answers: one sentence, and no other address."""

import contextlib
import json
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler

import peft
import pytest
from adapters import METHODS, small

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify.endpoint import Endpoint
from dual_lora.serving import client
from dual_lora.serving.client import AdapterServer, ServerError
from dual_lora.serving.http_request import send_request
from listening import listening


@contextlib.contextmanager
def answering(status=200, body=b"{}", headers=None):
    """A server that gives the same answer to all; yields its URL and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            asked.append((self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length", 0)))))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST

    with listening(Handler) as server:
        yield f"{server.address}/v1", asked


def told(**changed):
    choice = {"index": 0, "token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, -1]}, **changed}
    return json.dumps({"choices": [choice]}).encode()


def test_completions():
    with answering(body=told()) as (url, asked):
        [done] = AdapterServer(url, "m", timeout=5).complete([[1, 2]], 2, temperature=0)
    assert (done.prompt, done.tokens, done.logprobs) == ([1, 2], [5, 6], [-0.5, -1])
    [(method, path, body)] = asked
    assert (method, path) == ("POST", "/v1/completions")
    assert json.loads(body)["prompt"] == [[1, 2]]


@pytest.mark.parametrize("name", [None, "org/mine", "../adapter"])
def test_an_adapter_is_sent_with_or_without_a_name(name):
    model = peft.get_peft_model(small(), METHODS["dual-lora"]())
    with answering() as (url, asked):
        sent = AdapterServer(url, "m", timeout=5).send(model, name=name)
    [(method, path, body)] = asked
    assert method == "PUT"
    assert path == f"/v1/dual_lora/adapter{'' if name is None else 's/' + name.replace('/', '%2F')}"
    assert len(body) == sent
    assert b'name="adapter_config.json"' in body
    assert b'name="adapter_model.safetensors"' in body


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<html>", "cannot be asked"),
        (told()[:-5], "cannot be asked"),
        (b"[" * 100_000, "cannot be asked"),
        (b"[]", "no token ids"),
        (b'{"choices": null}', "no token ids"),
        (b'{"choices": []}', "no token ids"),
        (told(token_ids=None), "no token ids"),
        (told(token_ids=["a", "b"]), "no whole numbers"),
        (told(token_ids=[5]), "counts tokens"),
        (told(logprobs=None), "no token ids with log-probabilities"),
        (told(logprobs={"token_logprobs": [None, -1]}), "no finite numbers"),
        (told(logprobs={"token_logprobs": [float("nan"), -1]}), "no finite numbers"),
        (told(logprobs={"token_logprobs": [float("-inf"), -1]}), "no finite numbers"),
        (told(logprobs={"token_logprobs": [10**400, -1]}), "too large"),
    ],
)
def test_bad_answers_are_one_sentence(body, why):
    with answering(body=body) as (url, _), pytest.raises(ServerError, match=why) as raised:
        AdapterServer(url, "m", timeout=5).complete([[1, 2]], 2)
    assert "\n" not in str(raised.value)


def test_values_without_an_end(monkeypatch):
    monkeypatch.setattr(client, "MOST_VALUES", 5)
    with answering(body=told()) as (url, _), pytest.raises(ServerError, match="more than 5 values"):
        AdapterServer(url, "m", timeout=5).complete([[1, 2]], 2)


def test_an_error_s_text_holds_no_codes():
    with answering(500, b"\x1b[2Jno\xc2\x9b") as (url, _), pytest.raises(ServerError, match="no") as raised:
        AdapterServer(url, "m", timeout=5).complete([[1, 2]], 2)
    assert str(raised.value).isprintable()


def test_a_body_that_ends_early():
    with answering(body=told(), headers={"Content-Length": "9999"}) as (url, _), pytest.raises(ServerError):
        AdapterServer(url, "m", timeout=1).complete([[1, 2]], 2)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_other_address_is_asked(status, monkeypatch):
    """It would get the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with answering(body=told()) as (elsewhere, asked):
        there = {"Location": f"{elsewhere}/completions"}
        with answering(status, b"", there) as (url, _), pytest.raises(ServerError, match="another address"):
            AdapterServer(url, "m", timeout=5).complete([[1, 2]], 2)
    assert asked == []


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"


@contextlib.contextmanager
def going_on(head, piece):
    """A server that never ends its answer; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def go_on():
            connection, _ = server.accept()
            with contextlib.suppress(OSError), connection:
                connection.recv(1 << 16)
                connection.sendall(head)
                while piece:
                    connection.sendall(piece)

        threading.Thread(target=go_on, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("head", "piece"), [(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (CHUNKED, b"A: b\r\n" * 1000)])
def test_a_server_that_never_ends_its_head_or_its_trailers_keeps_no_thread(head, piece):
    """http.client reads on as long as they come, with nobody waiting for it any more."""
    with going_on(head, piece) as address:
        before = set(threading.enumerate())
        with pytest.raises(TimeoutError):
            send_request(urllib.request.Request(address), 0.5, 100)
        started = set(threading.enumerate()) - before
        for thread in started:
            thread.join(10)
        assert not [thread for thread in started if thread.is_alive()]


def test_a_server_that_speaks_no_http_sends_no_codes():
    with going_on(b"\x1b[2J\x1b]0;mine\x07\r\n", b"") as address, pytest.raises(ServerError) as raised:
        AdapterServer(address, "m", timeout=5).complete([[1, 2]], 2)
    assert str(raised.value).isprintable()
    assert raised.value.__suppress_context__


def test_no_error_shows_the_key(monkeypatch):
    """http.client shows the header that it refuses."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nmore")
    with pytest.raises(ServerError, match="key in OPENAI_API_KEY") as raised:
        AdapterServer("http://127.0.0.1:1/v1", "m").complete([[1, 2]], 2)
    assert "secret" not in str(raised.value)
    monkeypatch.delenv("DUAL_LORA_API_KEY", raising=False)
    with pytest.raises(UserError, match="key in OPENAI_API_KEY") as refused:
        Endpoint("http://127.0.0.1:1/v1", "m", timeout=1)._post("/completions", {})
    assert "secret" not in str(refused.value)
