"""A trainer's side of a vLLM server that has `dual_lora.serving`: send the factors, ask for completions.

Only the address that the caller names is contacted. Full weights never travel: a server composes W + ΔW itself.
"""

import http.client
import json
import math
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .body import bounded_json
from .files import FILES
from .http_request import authorization, on_one_line, send_request
from .vllm_endpoint import NAMES_ROUTE, ROUTE

KEY_VARIABLE = "OPENAI_API_KEY"
LARGEST = 1 << 30  # bytes of an answer that are read
MOST_VALUES = 50_000_000  # of an answer, six for each token; what has more fills the memory
SAID = 10_000  # of an error, bytes that are shown


class ServerError(RuntimeError):
    """A server that cannot be reached, or says no; the message holds what it said."""


@dataclass
class Completion:
    """Token ids of a prompt and of its completion, and the log-probability of each of the completion's tokens."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class AdapterServer:
    """A vLLM server by the address that its clients use, `http://localhost:8000/v1`, and the name of its model.

    timeout: seconds for a request and its whole answer.

    Attributes:
        bytes_sent: what `send` has sent in all, in bytes.
    """

    def __init__(self, url: str, model: str, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}, expected an address like http://localhost:8000/v1.")
        self.url, self.model, self.timeout = url.rstrip("/").removesuffix("/v1"), model, timeout
        self.bytes_sent = 0

    def send(self, model: Any, adapter_name: str = "default", name: str | None = None) -> int:
        """Let the server have a PEFT model's adapter as it is now; returns the bytes sent. Raises ServerError.

        name: by which requests then ask for it as their `model`; None: it takes the place of the main adapter.
        """
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[adapter_name])
            saved = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
            files = {file: (saved / file).read_bytes() for file in FILES}
        edge = uuid.uuid4().hex
        body = b""
        for file, data in files.items():
            head = f'--{edge}\r\nContent-Disposition: form-data; name="{file}"; filename="{file}"\r\n\r\n'
            body += head.encode() + data + b"\r\n"
        body += f"--{edge}--\r\n".encode()
        route = ROUTE if name is None else f"{NAMES_ROUTE}/{urllib.parse.quote(name, safe='')}"
        self._request("PUT", route, body, f"multipart/form-data; boundary={edge}")
        self.bytes_sent += len(body)
        return len(body)

    def complete(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Completion]:
        """One completion for each prompt of token ids. sampling: vLLM's settings, as temperature and top_p."""
        if not prompts:
            return []
        wanted = {"logprobs": 0, "return_token_ids": True, "skip_special_tokens": False, **sampling}
        asked = {"model": self.model, "prompt": [list(p) for p in prompts], "max_tokens": max_tokens, **wanted}
        answer = self._request("POST", "/v1/completions", json.dumps(asked).encode(), "application/json")
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            done = [
                Completion(list(prompt), _whole(choice["token_ids"]), _finite(choice["logprobs"]["token_logprobs"]))
                for prompt, choice in zip(prompts, choices, strict=True)
            ]
            if any(len(one.tokens) != len(one.logprobs) for one in done):
                raise ValueError("it counts tokens and log-probabilities differently")
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise ServerError(
                f"{self.url} gives no token ids with log-probabilities for {len(prompts)} completions "
                f"({type(error).__name__}: {error}): is it a vLLM of 0.22 or later? "
                "(Earlier ones let a request's Host header past the key.)"
            ) from error
        return done

    def _request(self, method: str, path: str, body: bytes, kind: str) -> Any:
        try:
            headers = {"Content-Type": kind, **authorization(KEY_VARIABLE)}
            request = urllib.request.Request(self.url + path, body, headers, method=method)
            reply = send_request(request, self.timeout, LARGEST)
            if reply.status < 300:
                return bounded_json(reply.body, MOST_VALUES)
        except TimeoutError as error:
            raise ServerError(f"{self.url}{path} did not answer within {self.timeout:g} s.") from error
        except OverflowError as error:
            raise ServerError(
                f"{self.url}{path} cannot be asked: it answers with more than {MOST_VALUES:,} values"
            ) from error
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise ServerError(f"{self.url}{path} cannot be asked: {on_one_line(str(error)[:SAID])}") from None
        if reply.is_redirect:
            raise ServerError(f"{self.url}{path} sends on to another address, which is not followed: name that one.")
        hint = " Was it started with VLLM_PLUGINS=dual_lora and --load-format dual_lora?" if reply.status == 404 else ""
        text = reply.body[:SAID].decode(errors="replace")
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)  # no code for the terminal
        raise ServerError(f"{self.url}{path} answers {reply.status}: {text}{hint}")


def _whole(numbers: Any) -> list[int]:
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError("its token ids are no whole numbers")
    return list(numbers)


def _finite(numbers: Any) -> list[float]:
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError("its log-probabilities are no finite numbers")
    return list(numbers)
