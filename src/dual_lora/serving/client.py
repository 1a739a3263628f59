"""A trainer's side of a vLLM server that has `dual_lora.serving`: send the factors, ask for completions.

Only the address that the caller names is contacted. Full weights never travel: a server composes W + ΔW itself.
"""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import FILES
from .vllm_endpoint import ROUTE

KEY_VARIABLE = "OPENAI_API_KEY"


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

    Attributes:
        bytes_sent: what `send` has sent in all, in bytes.
    """

    def __init__(self, url: str, model: str, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}, expected an address like http://localhost:8000/v1.")
        self.url, self.model, self.timeout = url.rstrip("/").removesuffix("/v1"), model, timeout
        self.bytes_sent = 0

    def send(self, model: Any, adapter_name: str = "default") -> int:
        """Let the server have a PEFT model's adapter as it is now; returns the bytes sent. Raises ServerError."""
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=[adapter_name])
            saved = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
            files = {name: (saved / name).read_bytes() for name in FILES}
        edge = uuid.uuid4().hex
        body = b""
        for name, data in files.items():
            head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
            body += head.encode() + data + b"\r\n"
        body += f"--{edge}--\r\n".encode()
        self._ask("PUT", ROUTE, body, f"multipart/form-data; boundary={edge}")
        self.bytes_sent += len(body)
        return len(body)

    def complete(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Completion]:
        """One completion for each prompt of token ids. sampling: vLLM's settings, as temperature and top_p."""
        if not prompts:
            return []
        wanted = {"logprobs": 0, "return_token_ids": True, "skip_special_tokens": False, **sampling}
        asked = {"model": self.model, "prompt": [list(p) for p in prompts], "max_tokens": max_tokens, **wanted}
        answer = self._ask("POST", "/v1/completions", json.dumps(asked).encode(), "application/json")
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompts) or any(choice.get("token_ids") is None for choice in choices):
            raise ServerError(f"{self.url} gives no token ids for its completions: is it a vLLM of 0.10 or later?")
        return [
            Completion(list(prompt), choice["token_ids"], choice["logprobs"]["token_logprobs"])
            for prompt, choice in zip(prompts, choices, strict=True)
        ]

    def _ask(self, method: str, path: str, body: bytes, kind: str) -> Any:
        headers = {"Content-Type": kind}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(10_000).decode(errors="replace")
            hint = (
                " Was it started with VLLM_PLUGINS=dual_lora and --load-format dual_lora?" if error.code == 404 else ""
            )
            raise ServerError(f"{self.url}{path} answers {error.code}: {said}{hint}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self.url}{path} cannot be asked: {error}") from error
