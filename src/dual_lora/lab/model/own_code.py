"""A model's own code: it runs if a person says so at a terminal, and otherwise never."""

from __future__ import annotations

import contextlib
import sys


def own_code() -> dict[str, bool]:
    """Return transformers' option for a model's own code: none where a person can answer its question; elsewhere no,
    for it would take a line that was piped in for the answer."""
    return {} if sys.stdin is not None and sys.stdin.isatty() else {"trust_remote_code": False}


def unasked() -> contextlib.AbstractContextManager[None]:
    """Inside, nothing that loads a model asks where nobody can answer. Parts of one ask by themselves, whatever
    `own_code` says: a tower with a configuration of its own, or the two tokenizers of a RAG model."""
    from dual_lora.verify.own_code import not_asked  # late: it brings PEFT, and a line of help needs none of it

    return not_asked() if own_code() else contextlib.nullcontext()


def own_code_hint(error: Exception) -> str:
    """Return a hint for an error where a model has code of its own, and nobody could be asked whether to run it; else
    ""."""
    asked = "trust_remote_code" in str(error) and own_code()
    return " Its own code was not run: give the command at a terminal, which asks about it." if asked else ""


def is_plain(loaded: object) -> bool:
    """Whether a model or a tokenizer is of transformers' own classes. What its files say of other code (`auto_map`) was
    not used then. It would be saved with whatever is made of it, and llama.cpp's converter runs it unasked."""
    return type(loaded).__module__.startswith("transformers.")
