"""What may leave this machine: no paths of its folders, no tokens."""

from __future__ import annotations

import re
from pathlib import Path

# A POSIX path of two parts or more, one in the home folder, one of Windows; not what stands behind "//" in a URL.
_PATH = re.compile(r"(?<![\w.:/~])(?:~?/[^\s/\"'`|<>]+(?:/[^\s/\"'`|<>]*)+|~/[^\s\"'`|<>]+|[A-Za-z]:\\[^\s\"'`|<>]+)")
_FILE_URL = re.compile(r"file://")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
REMOVED = "(removed)"


def public(text: object) -> str:
    """A text without local paths, of which the last part stays, and without tokens and passwords in URLs."""
    text = _CREDENTIALS.sub("", _TOKEN.sub(REMOVED, _FILE_URL.sub("", str(text))))
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def cell(text: object) -> str:
    """The same in one line of a Markdown table: what means something to Markdown or HTML is written out."""
    return re.sub(r"([\\|<>`*_\[\]!#])", r"\\\1", " ".join(public(text).split()))


def source_name(source: str) -> str:
    """Records by name: a hub's name as it is, of a file its name alone."""
    parts = [part.strip() for part in source.split(" + ")]
    return " + ".join(public(part) if part.startswith("hub:") else Path(part.replace("\\", "/")).name for part in parts)


def is_hub_name(name: str) -> bool:
    """Whether a hub could have a model of that name."""
    return _HUB_NAME.fullmatch(name) is not None and not name.endswith(".gguf")


def hub_name(path: str) -> str | None:
    """The name of a model on the hub; None for a folder, a file or a package on this machine."""
    return path if is_hub_name(path) and not Path(path).exists() else None
