"""The model that a request's body names, read so that no route behind can read another one.

A route may take JSON, a form of parts or an encoded form, by parsers that differ where a request breaks the rules of
HTTP. So what those rules leave open, or forbid, is refused: two types, a parameter twice, a part with two names.
"""

import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_plus

# Read while no other request is: some hundred megabytes may be one picture, but not values or fields without an end.
MOST_VALUES = 10_000_000  # of JSON: a batch of prompts as numbers has millions
MOST_FIELDS = 2000  # of a form; Starlette reads 1000, and as many files
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_SPACE = rb"[ \t]*"
_PARAMETER = re.compile(
    _SPACE + rb";" + _SPACE + rb"(?:(" + _TOKEN + rb")" + _SPACE + rb"=" + _SPACE + rb"(" + _TOKEN
    + rb"|\"(?:[^\"\\\x00-\x1f\x7f]|\\[^\x00-\x1f\x7f])*\"))?"
)  # fmt: skip
_KIND = re.compile(_TOKEN + rb"(?:/" + _TOKEN + rb")?")
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_LINE = re.compile(rb"(" + _TOKEN + rb"):([^\r\n\x00]*)")


class Unclear(ValueError):
    """A body that two readers may read differently."""


def read_body(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> dict[str, Any]:
    """A JSON object's fields; of a form its model alone, if it names one. {} for all else, of which the route says what
    is wrong. Raises Unclear.

    headers: as ASGI has them.
    """
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    if len(kinds) > 1:
        raise Unclear(f"The request has {len(kinds)} Content-Type headers: give one.")
    kind, options = _with_parameters(kinds[0], "Content-Type") if kinds and kinds[0].strip() else (b"", {})
    if kind.startswith(b"multipart/"):
        found, said = _models_in_parts(options, body), {}
    else:
        said = json_object(body)
        found = _models_in_encoded(body) if kind == b"application/x-www-form-urlencoded" else []
    if len(found) + ("model" in said) > 1:
        raise Unclear(f"The form has {len(found) + ('model' in said)} fields named model: give one.")
    return {**said, "model": found[0]} if found else said


def json_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; {} for all else. Raises Unclear for one with two models, for values without an end, and for what
    another reader may get further with: a nesting (the stack that is left differs), a number of thousands of digits."""
    try:
        said = text if isinstance(text, str) else text.decode(json.detect_encoding(text), "surrogatepass")
        if (count := values_in(said, MOST_VALUES)) > MOST_VALUES:
            raise Unclear(f"The request has {count:,} values, of which at most {MOST_VALUES:,} are read.")
        body = json.loads(said, object_pairs_hook=_Fields)
    except Unclear:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    except (ValueError, RecursionError):
        raise Unclear("The request is nested too deeply, or holds a number of thousands of digits.") from None
    if not isinstance(body, _Fields):
        return {}
    if body.models > 1:
        raise Unclear(f"The request has {body.models} fields named model: give one.")
    return body


def values_in(text: str, most: int) -> int:
    """Return an upper bound of a JSON text's values: the separators outside strings. Of more than `most` strings only
    that there are more."""
    bare = text.replace("\\\\", "").replace('\\"', "")
    if (count := bare.count('"')) <= most:
        outside = "".join(bare.split('"')[::2])
        count = sum(map(outside.count, ",[{"))
    return count


class _Fields(dict[str, Any]):
    """A JSON object. models: how often it names one; of a name that stands there twice readers take either."""

    __slots__ = ("models",)

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.models = sum(name == "model" for name, _ in pairs)


def _with_parameters(value: bytes, field: str) -> tuple[bytes, dict[bytes, bytes]]:
    """A header's value in lower case and its parameters, by RFC 9110. Raises Unclear where the rules are broken."""
    value = value.strip(b" \t")
    first = _KIND.match(value)
    at = first.end() if first else 0
    options: dict[bytes, bytes] = {}
    while first and at < len(value):
        found = _PARAMETER.match(value, at)
        if found is None:
            break
        name, given = found[1], found[2]
        if name is not None:
            if name.lower() in options:
                raise Unclear(f"The header {field} has the parameter {name.decode()} twice: give it once.")
            options[name.lower()] = given[1:-1] if given.startswith(b'"') else given
        at = found.end()
    if not first or at < len(value):
        raise Unclear(
            f"The header {field} is {value.decode('latin-1')!r:.200}, expected a value and parameters as in "
            '"text/plain; charset=utf-8".'
        )
    return first[0].lower(), options


def _models_in_parts(options: dict[bytes, bytes], body: bytes) -> list[str]:
    """The values of a form's parts named model."""
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary) or any(name.startswith(b"boundary*") for name in options):
        raise Unclear("The header Content-Type names no boundary of at most 70 plain characters.")
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise Unclear("The form is not in UTF-8, as its Content-Type says: send it in UTF-8.")
    _check_count(body.count(b"\r\n--" + boundary))
    before, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if before or not parts or not re.match(rb"--(\r\n|$)", parts[-1]):
        raise Unclear("The form does not begin and end with its boundary.")
    found = [value for part in parts[:-1] for name, value in [_part(part)] if name == b"model"]
    try:
        return [value.decode() for value in found]
    except UnicodeDecodeError:  # which some readers take for Latin-1
        raise Unclear("The form's model is not in UTF-8: send it in UTF-8.") from None


def _check_count(count: int) -> None:
    if count > MOST_FIELDS:
        raise Unclear(f"The form has {count:,} fields, of which at most {MOST_FIELDS:,} are read.")


def _part(part: bytes) -> tuple[bytes, bytes]:
    """Name and value of a form's part."""
    head, end, value = part.partition(b"\r\n\r\n")
    lines = [_LINE.fullmatch(line) for line in head.split(b"\r\n")[1:]]
    named = [line[2] for line in lines if line and line[1].lower() == b"content-disposition"]
    if not part.startswith(b"\r\n") or not end or not all(lines) or len(named) != 1:
        raise Unclear("A part of the form has no headers of which one is Content-Disposition.")
    kind, options = _with_parameters(named[0], "Content-Disposition")
    name = options.get(b"name")
    if kind != b"form-data" or name is None or b"\\" in name or any(key.startswith(b"name*") for key in options):
        raise Unclear('A part of the form has no plain name, as in Content-Disposition: form-data; name="model".')
    return name, value


def _models_in_encoded(body: bytes) -> list[str]:
    """The values of an encoded form's fields named model. Raises Unclear where a semicolon ends a field for some
    readers and not for others, and one of both has it."""
    _check_count(body.count(b"&") + body.count(b";"))
    readings = [_fields_called_model(re.split(ends, body)) for ends in (rb"&", rb"[&;]")]
    if readings[0] != readings[1]:
        raise Unclear("The form has a field named model next to a semicolon: write the semicolon as %3B.")
    return readings[0]


def _fields_called_model(fields: Iterable[bytes]) -> list[str]:
    parts = (field.partition(b"=") for field in fields)
    return [unquote_plus(v.decode("latin-1")) for n, _, v in parts if unquote_plus(n.decode("latin-1")) == "model"]
