"""A request's JSON, read once and written anew: no route behind can read another model in it.

Parsers differ in what they take from a body that breaks the rules, or leaves something open: two types, two models, a
part with two names, another encoding. So what is handed on is this reader's own writing.
"""

import json
from dataclasses import dataclass
from typing import Any

# Read while no other request is: some hundred megabytes may be one picture, but not values without an end.
MOST_VALUES = 10_000_000  # a batch of prompts as numbers has millions
BYTES_A_VALUE = 8  # outside strings: what is longer counts as several, because long numbers take long to read


class Unclear(ValueError):
    """A request that cannot be answered by name."""


@dataclass(frozen=True)
class Asked:
    """What a request says. model: "" where it names none. body: the JSON object that the route gets."""

    model: str
    background: bool
    body: bytes


def is_json(kind: str) -> bool:
    """Whether a request's Content-Type says JSON. A browser sends no such request for a page of another server, unless
    the server has agreed; a text or a form it sends unasked."""
    return kind.partition(";")[0].strip().lower() == "application/json"


def read_body(body: bytes, kind: str) -> Asked:
    """A JSON object, or nothing. Raises Unclear for all else, and for values, a nesting or numbers without an end.

    kind: what the request says that its body is (Content-Type).
    """
    if not body:
        return Asked("", False, b"")
    try:
        values = bounded_json(body, MOST_VALUES) if is_json(kind) else None
        whole = json.dumps(values).encode()
    except OverflowError as error:
        raise Unclear(
            f"The request has {error} (a long number counts as several), of which at most {MOST_VALUES:,} are read."
        ) from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Unclear(
            "While adapters have names here, the body of a request has to be a JSON object that is not nested too "
            "deeply, and its Content-Type application/json. For forms, as of sound, serve one adapter."
        )
    model = values.get("model")
    return Asked(model if isinstance(model, str) else "", bool(values.get("background")), whole)


def bounded_json(body: bytes, most: int) -> Any:
    """The value of a body. Raises OverflowError for values without an end, which take longer to read than to send, and
    ValueError or RecursionError as `json.loads` does."""
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    if (count := _values_in(text, most)) > most:
        raise OverflowError(f"{count:,} values")
    return json.loads(text)


def _values_in(text: str, most: int) -> int:
    """Return an upper bound of a JSON text's values: the separators outside strings, or what lies there in lengths of
    BYTES_A_VALUE. Of more than `most` strings only that there are more."""
    bare = text.replace("\\\\", "").replace('\\"', "")
    if (count := bare.count('"')) <= most:
        outside = "".join(bare.split('"')[::2])
        count = max(sum(map(outside.count, ",[{")), len(outside) // BYTES_A_VALUE)
    return count
