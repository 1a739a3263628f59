"""Several adapters in one real vLLM server, asked for by name; and what a swap does to a running answer."""

import http.client
import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from vllm_server import ask, folder, logprobs, needs_vllm, served, verdict  # noqa: F401

from dual_lora.serving.vllm_endpoint import FILES_BYTES, ROUTE

pytestmark = needs_vllm


def checksums(url):
    """vLLM's own, of all of the server's weights."""
    status, answer = ask(f"{url.removesuffix('/v1')}/weight_checker", "POST", {"action": "checksum"})
    assert status == 200, answer
    return answer


def test_three_adapters_and_the_base_in_one_server(folder, tmp_path):  # noqa: F811
    extra = {"adapters": {"one": str(folder / "one")}, "limit_bytes": 2 << 20}  # two of them fit
    with served(folder, None, tmp_path / "log", extra=extra, VLLM_SERVER_DEV_MODE="1") as url:
        base, bits = logprobs(url), checksums(url)
        named = {"other": str(folder / "other"), "loha": str(folder / "loha")}
        status, answer = ask(f"{url}/dual_lora/adapters", "POST", {"adapters": named})
        assert (status, sorted(answer["adapters"])) == (200, ["loha", "one", "other"])
        assert {model["id"] for model in ask(f"{url}/models")[1]["data"]} == {"m", "one", "other", "loha"}
        for name in ("one", "other", "loha"):
            assert verdict(folder, name, url, name) == "on"
        expected = {name: logprobs(url, name) for name in ("one", "other", "loha", "m")}
        assert expected["m"] == base
        assert len({json.dumps(one) for one in expected.values()}) == 4
        assert checksums(url) == bits, "the base is what it was, bit for bit"

        order = ["one", "other", "m", "one", "loha", "m", "other", "loha", "one"]
        with ThreadPoolExecutor(len(order)) as threads:
            answers = list(threads.map(lambda name: logprobs(url, name), order))
        for name, answer in zip(order, answers, strict=True):
            # Of tokens that are asked for together the last bits depend on how many there are.
            assert answer["tokens"] == expected[name]["tokens"], name
            assert answer["token_logprobs"] == pytest.approx(expected[name]["token_logprobs"], abs=1e-4)

        assert ask(f"{url}/dual_lora/adapters", "POST", {"adapters": {"other": str(folder / "nothing")}})[0] == 400
        assert ask(f"{url}/dual_lora/adapters", "POST", {"adapters": {"loha": None}})[0] == 200
        asked = {"model": "loha", "prompt": "The sky", "max_tokens": 1}
        assert ask(f"{url}/completions", "POST", asked)[0] == 404
        assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": str(folder / "loha")})[0] == 200
        assert logprobs(url) == expected["loha"]
        assert logprobs(url, "other") == expected["other"]
        assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": None})[0] == 200
        assert logprobs(url) == base
        assert checksums(url) == bits


def test_a_key_is_asked_for_on_every_path(folder, tmp_path):  # noqa: F811
    extra = {"adapters": {"one": str(folder / "one")}}
    with served(folder, None, tmp_path / "log", "--api-key", "first", "second", extra=extra) as url:
        asked = {"model": "one", "prompt": "The sky", "max_tokens": 1}
        for path in (f"{url}/completions", *(url.removesuffix("v1") + name for name in ("tokenize", "invocations"))):
            for key in (None, "wrong"):
                assert ask(path, "POST", asked, key=key)[0] == 401, path
            for key in ("first", "second"):
                assert ask(path, "POST", asked, key=key)[0] == 200, path


def test_a_running_answer_keeps_its_adapter(folder, tmp_path):  # noqa: F811
    with served(folder, "one", tmp_path / "log") as url:
        asked = {
            "model": "m", "prompt": "The sky", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        ended = {}

        def read():
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                lines = []
                for line in answer:
                    lines.append(line)
                    begun.set()
            pieces = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
            ended["stream"] = time.monotonic()
            return "".join(piece["choices"][0]["text"] for piece in pieces)

        begun = threading.Event()
        alone = read()
        begun.clear()
        with ThreadPoolExecutor(3) as threads:
            stream = threads.submit(read)
            assert begun.wait(60)
            swaps = [
                threads.submit(ask, f"{url}/dual_lora/adapter", "POST", {"adapter": str(folder / name)})
                for name in ("other", "loha")
            ]
            for name, swap in zip(("other", "loha"), swaps, strict=True):
                assert swap.result() == (200, {"adapter": str(folder / name)})
                assert time.monotonic() >= ended.get("stream", float("inf")), "the swap did not wait"
            assert stream.result() == alone
        now = ask(f"{url}/dual_lora/adapter")[1]["adapter"]
        assert now in (str(folder / "other"), str(folder / "loha"))
        assert verdict(folder, now, url) == "on"


def test_a_request_that_is_too_large_is_refused_before_it_is_sent(folder, tmp_path):  # noqa: F811
    with served(folder, "one", tmp_path / "log") as url:
        before = logprobs(url)
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.putrequest("PUT", ROUTE)
        connection.putheader("Content-Type", "multipart/form-data; boundary=edge")
        connection.putheader("Content-Length", str(FILES_BYTES + 1))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413
        assert "larger than" in json.load(answer)["error"]["message"]
        connection.close()
        assert logprobs(url) == before
