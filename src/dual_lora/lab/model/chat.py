"""A conversation with a model: what was said so far, and whether its adapter is on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.generate import answer_to
from dual_lora.lab.model.opened import Tuned


class Conversation:
    """options: `answer_to`'s. adapter: whether the adapter answers, or the base."""

    def __init__(self, tuned: Tuned, system: str | None, options: dict[str, Any]):
        self.tuned, self.options = tuned, options
        self.adapter = "tuned" in tuned.variants
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget everything, and begin with this system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def clear(self) -> None:
        """Forget what was said, but not the system message."""
        self.messages = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []

    def switch(self, on: bool) -> None:
        """Answer with the adapter or without it from here on. Raises UserError where there is only one of them."""
        wanted = "tuned" if on else "base"
        if wanted not in self.tuned.variants:
            raise UserError(f"{self.tuned.source} has no {'adapter' if on else 'base to compare with'}.")
        self.adapter = on

    def ask(self, prompt: str) -> Iterator[str]:
        """The answer in pieces. It and the prompt are kept; of one that is stopped, what was said until then.

        Raises UserError for an empty prompt, and for a conversation that is longer than the model can read.
        """
        if not prompt.strip():
            raise UserError("The prompt is empty.")
        asked = [*self.messages, {"role": "user", "content": prompt}]
        variant = None if self.adapter else "base"
        reply = ""
        pieces = answer_to(self.tuned, asked, variant=variant, **self.options)
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    reply += piece
                    yield piece
            finally:
                if reply:
                    self.messages = [*asked, {"role": "assistant", "content": reply}]
