"""Ask an OpenAI-compatible server for the log-probabilities of given tokens. Only the URL that was named is contacted.

Servers that echo the prompt (vLLM, SGLang) tell those of a whole sequence at once. The others (llama.cpp) tell the
likeliest next tokens: there each token is asked for by itself, and one that is not among them has at most the
probability of the last one that is (its floor).
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify.logprobs import SPACES, Probe
from dual_lora.serving.body import bounded_json
from dual_lora.serving.http_request import Response, authorization, on_one_line, send_request

TOKENS = ("DUAL_LORA_API_KEY", "OPENAI_API_KEY")  # environment variables, the first that is set counts
LARGEST = 32 << 20  # bytes of an answer that are read
MOST_VALUES = 1_000_000  # of an answer: an echoed prompt has some dozens for each token
LONGEST = 1_000_000  # seconds
TOP = 20  # next tokens asked for; OpenAI allows 5
ASKED_SINGLY = 40  # tokens asked for one by one, where the server does not echo
NO_FLOOR = -math.inf


@dataclass
class Answer:
    """A server's answer: log-probabilities of the tokens at `kept` (indices into all places), and their floors.

    written: {token id: how the server writes it}, as far as it said. echoed: it told the prompt's own tokens.
    """

    found: Tensor
    floors: Tensor
    kept: list[int]
    written: dict[int, str]
    echoed: bool


class Endpoint:
    """A server by the URL that its clients use (`http://localhost:8000/v1`), and the name of a model there."""

    def __init__(self, url: str, model: str, timeout: float = 60.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint is {url!r}, expected a URL like http://localhost:8000/v1.")
        if parts.username or parts.password:
            raise UserError(f"--endpoint holds a password: give a token in the environment, as {TOKENS[0]}.")
        if parts.query or parts.fragment:
            raise UserError(f"--endpoint is {url!r}, expected a URL without ? and #, such as http://localhost:8000/v1.")
        if not 0 < timeout <= LONGEST:
            raise UserError(f"--timeout is {timeout:g}, expected seconds: more than 0, at most {LONGEST:,}.")
        path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
        self.url, self.model, self.timeout = f"{parts.scheme}://{parts.netloc}{path or '/v1'}", model, timeout

    def score(self, probes: Sequence[Probe], texts: dict[int, str]) -> Answer:
        """Log-probabilities of the probes' places. texts: how the adapter's tokenizer writes their tokens.

        Raises UserError where the server gives none.
        """
        first = self._complete(list(probes[0].ids), echo=True)
        echoed = _entries(first)
        if _is_echo(echoed, len(probes[0].ids)):
            return self._echoed(probes, echoed)
        return self._singly(probes, texts)

    def prompt_tokens(self, messages: Sequence[dict[str, Any]]) -> tuple[int | None, list[Entry]]:
        """Return how many tokens the server makes of a conversation, and the first token that it answers with.

        (None, []) where it has no chat.
        """
        body = {"messages": list(messages), "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
        try:
            answer = self._post("/chat/completions", body)
        except _Refused:
            return None, []
        return _prompt_tokens(answer), _entries(answer)

    def text_tokens(self, text: str) -> int | None:
        """Return how many tokens the server makes of a text; None if it does not say."""
        try:
            return _prompt_tokens(self._post("/completions", {"prompt": text, "max_tokens": 1, "temperature": 0}))
        except _Refused:
            return None

    def _echoed(self, probes: Sequence[Probe], first: list[Entry]) -> Answer:
        values: list[float | None] = []
        written: dict[int, str] = {}
        for i, probe in enumerate(probes):
            entries = first if i == 0 else _entries(self._complete(list(probe.ids), echo=True))
            if not _is_echo(entries, len(probe.ids)):
                raise UserError(f"{self.url} echoed one prompt and not another: it gives no usable log-probabilities.")
            written |= {token: entry.token for token, entry in zip(probe.ids, entries, strict=False)}
            values += [entries[place].logprob for place in probe.places]
        if any(value is None for value in values):
            raise UserError(f"{self.url} echoes prompts without their log-probabilities.")
        found = torch.tensor(values, dtype=torch.float64)
        return Answer(found, torch.full_like(found, NO_FLOOR), list(range(len(values))), written, True)

    def _singly(self, probes: Sequence[Probe], texts: dict[int, str]) -> Answer:
        every = [(probe, place) for probe in probes for place in probe.places]
        kept, short_digest = [], []
        written: dict[int, str] = {}
        step = max(1, math.ceil(len(every) / ASKED_SINGLY))
        for index in range(0, len(every), step):
            probe, place = every[index]
            answer = self._complete(list(probe.ids[:place]), echo=False)
            entries = _entries(answer)
            if not entries and _is_part_of_a_character(answer):
                continue  # which llama.cpp's server holds back, with its log-probabilities
            if not entries or not entries[0].others:
                raise UserError(self._gives_none())
            short_digest.append((probe.ids[place], entries[0]))
            written |= entries[0].names
            kept.append(index)
        if not kept:
            raise UserError(self._gives_none())
        blanks = any(entry.writes_blanks for _, entry in short_digest)
        floors = [min(entry.others.values()) for _, entry in short_digest]
        known = [entry.value_of(token, texts[token], blanks) for token, entry in short_digest]
        values = [floor if value is None else value for value, floor in zip(known, floors, strict=True)]
        found, least = torch.tensor(values, dtype=torch.float64), torch.tensor(floors, dtype=torch.float64)
        return Answer(found, least, kept, written, False)

    def _gives_none(self) -> str:
        return (
            f"{self.url} gives no log-probabilities: start the server with them (vLLM: --max-logprobs 20; llama.cpp's "
            "server and SGLang give them), or verify the files that it serves by --against."
        )

    def _complete(self, ids: list[int], echo: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1 if echo else TOP}
        if echo:
            body["echo"] = True
        try:
            return self._post("/completions", body)
        except _Refused as error:
            if error.status in (400, 422, 501):
                try:
                    body.pop("echo", None)
                    return self._post("/completions", body if echo else {**body, "logprobs": 5})
                except _Refused as second:
                    error = second
            raise UserError(str(error)) from None

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            headers |= authorization(*TOKENS)
        except ValueError as error:
            raise UserError(f"{self.url} cannot be asked: {error}.") from None
        request = urllib.request.Request(
            self.url + path, json.dumps({"model": self.model, **body}).encode(), headers, method="POST"
        )
        try:
            reply = send_request(request, self.timeout, LARGEST)
        except TimeoutError:
            raise UserError(f"{self.url} did not answer within {self.timeout:g} s (--timeout).") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self.url} cannot be reached: {_clean(str(reason) or type(error).__name__)}.") from None
        if reply.status >= 300:
            raise _Refused(self._error_text(path, reply), reply.status)
        if len(reply.body) > LARGEST:
            raise UserError(f"{self.url} answered with more than {LARGEST:,} bytes.")
        try:
            answer = bounded_json(reply.body, MOST_VALUES)
        except OverflowError:
            raise UserError(f"{self.url} answered with more than {MOST_VALUES:,} values.") from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self.url}{path} did not answer in JSON: is it an OpenAI-compatible server?")
        return answer

    def _error_text(self, path: str, reply: Response) -> str:
        if reply.is_redirect:
            return f"{self.url} sends on to another address, which is not followed: name that one."
        try:
            answer = bounded_json(reply.body, MOST_VALUES)
            answer = answer.get("error", answer) if isinstance(answer, dict) else answer  # OpenAI's way, or FastAPI's
            text = answer.get("message", answer.get("detail", "")) if isinstance(answer, dict) else str(answer)
        except (OverflowError, ValueError, RecursionError):
            text = ""
        if reply.status in (401, 403):
            text = f"it wants a token, in the environment as {' or '.join(TOKENS)}"
        elif reply.status == 404:
            text = f"no such path, or no model {self.model!r}. {_clean(str(text))}".rstrip()
        return f"{self.url}{path} refused (HTTP {reply.status}): {_clean(str(text)) or 'it said nothing'}."


@dataclass
class Entry:
    """One position: the token as the server writes it, its log-probability, those of the likeliest by text and, where
    they are told, by their ids, and the names of these."""

    token: str
    logprob: float | None
    others: dict[str, float]
    ids: dict[int, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    @property
    def writes_blanks(self) -> bool:
        """Whether a token here begins with a blank: a server that decodes each by itself leaves SentencePiece's out."""
        return any(name[:1] == " " and name.strip() for name in (n.translate(SPACES) for n in self.others))

    def value_of(self, token: int, text: str, blanks: bool) -> float | None:
        """Return the log-probability of a token among the likeliest: by its number, by its text, or where the server
        writes no blanks by its text without them, if only one there has it."""
        if self.ids:
            return self.ids.get(token)
        written = {name.translate(SPACES): value for name, value in self.others.items()}
        if text in written or blanks:
            return written.get(text)
        alike = [value for name, value in written.items() if name.strip() == text.strip() != ""]
        return alike[0] if len(alike) == 1 else None


class _Refused(Exception):
    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


def _entries(answer: dict[str, Any]) -> list[Entry]:
    """The positions of an answer, in either form: parallel lists (vLLM, OpenAI), or a list of contents (llama.cpp)."""
    try:
        logprobs = answer["choices"][0].get("logprobs")
        if not isinstance(logprobs, dict):
            return []
        if isinstance(logprobs.get("content"), list):
            return [_entry_of_content(item) for item in logprobs["content"]]
        tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
        tops = logprobs.get("top_logprobs") or [None] * len(tokens)
        return [_entry(str(t), v, dict(top or {})) for t, v, top in zip(tokens, values, tops, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return []


def _prompt_tokens(answer: dict[str, Any]) -> int | None:
    """Return how many tokens of the prompt an answer counts, if it says so."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _is_part_of_a_character(answer: dict[str, Any]) -> bool:
    """Whether the token that was generated is a part of a character of several bytes."""
    try:
        return "\ufffd" in answer["choices"][0]["text"]
    except (KeyError, IndexError, TypeError):
        return False


def _entry_of_content(item: dict[str, Any]) -> Entry:
    others: dict[str, float] = {}
    ids: dict[int, float] = {}
    names: dict[int, str] = {}
    for each in item.get("top_logprobs") or []:
        if (value := _number(each["logprob"])) is not None:
            others[str(each["token"])] = value
            if isinstance(each.get("id"), int):
                ids[each["id"]] = value
                names[each["id"]] = str(each["token"])
    return Entry(str(item["token"]), _number(item["logprob"]), others, ids, names)


def _entry(token: str, value: Any, top: dict[str, Any]) -> Entry:
    others = {name: x for name, v in top.items() if (x := _number(v)) is not None}
    numbers = {name.removeprefix("token_id:"): x for name, x in others.items() if name.startswith("token_id:")}
    return Entry(token, _number(value), others, {int(n): x for n, x in numbers.items() if n.isdecimal()})


def _number(value: Any) -> float | None:
    """Return a number of an answer. JSON has no minus infinity: servers say null, or a very low number. Nor has it an
    end of whole numbers."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return max(float(value), -1e4) if known else None


def _is_echo(entries: list[Entry], length: int) -> bool:
    """Whether these are the prompt's own tokens, with or without the one that was generated."""
    return len(entries) in (length, length + 1) and all(entry.logprob is not None for entry in entries[1:length])


def _clean(text: str) -> str:
    """A server's words as one line without control characters."""
    return on_one_line(text)[:300].rstrip(".")
