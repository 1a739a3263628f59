"""dual-lora chat"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish
from dual_lora.lab.commands.parameters import AutoDtype, Base, Device, Source
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.model.location import check_source
from dual_lora.lab.progress import stage

if TYPE_CHECKING:
    from dual_lora.lab.model.chat import Conversation

HELP = (
    "/exit ends, /clear forgets what was said, /system TEXT says who the model is (and forgets), "
    "/adapter on|off answers with or without the adapter, Ctrl-C stops an answer."
)
WORDS = ("/exit", "/clear", "/system", "/adapter", "/help")


def chat(
    source: Source,
    *,
    system: Annotated[str | None, Parameter(help="System message of the chat.")] = None,
    once: Annotated[
        str | None, Parameter(help="Ask only this question and end; needs no terminal.", allow_leading_hyphen=True)
    ] = None,
    max_new_tokens: Annotated[int, Parameter(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, Parameter(help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, Parameter(help="Seed for a temperature above 0.")] = 0,
    without_adapter: Annotated[bool, Parameter(help="Start with the adapter switched off.")] = False,
    base: Base = None,
    dtype: AutoDtype = None,
    device: Device = None,
    json: Annotated[bool, Parameter(help="With --once: one line of JSON instead of streaming.")] = False,
) -> None:
    """Chat with a run, an adapter or a model. It remembers the conversation; /adapter switches the adapter off and on.

    Example: `dual-lora chat runs/mine --system "Answer in one sentence."`

    In a script: `dual-lora chat runs/mine --once "Is the sky blue?"`

    While it runs: /exit, /clear, /system TEXT, /adapter on|off, /help.
    """
    if once is None and not sys.stdin.isatty():
        raise UserError("A conversation needs a terminal: give one question with --once TEXT, or use `generate`.")
    if once is None and json:
        raise UserError("--json goes with --once TEXT.")
    check_source(source)
    with stage(f"loading {source}"):
        from dual_lora.lab.model.chat import Conversation
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.model.opened import open_tuned

        use_device(device)
        tuned = open_tuned(source, base, dtype, unsaid="auto")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    talk = Conversation(tuned, system, options)
    if without_adapter:
        talk.switch(False)
    if once is not None:
        answer = _answer(talk, once, (lambda _: None) if json else _print)
        finish({"prompt": once, "answer": answer}, "", json)
        return
    print(HELP)
    while (line := _typed(talk)) is not None:
        _do(talk, line)


def _typed(talk: Conversation) -> str | None:
    """The next line; None at the end of the input and at /exit."""
    try:
        line = input("> " if talk.adapter else "(base) > ").strip()
    except EOFError:
        print()
        return None
    return None if line in ("/exit", "/quit") else line


def _do(talk: Conversation, line: str) -> None:
    word, _, rest = line.partition(" ")
    try:
        if not line:
            return
        if word == "/clear":
            talk.clear()
        elif word == "/system":
            talk.begin(rest.strip() or None)
        elif word == "/adapter":
            if rest.strip() not in ("on", "off"):
                raise UserError("Write /adapter on or /adapter off.")
            talk.switch(rest.strip() == "on")
        elif word == "/help":
            print(HELP)
        elif word.startswith("/") and word[1:].isalpha():
            raise UserError(f"There is no {word}.{suggest(word, WORDS)}")
        else:
            _answer(talk, line, _print)
            print()
    except UserError as error:
        print(error)
    except KeyboardInterrupt:
        print(" … stopped")


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def _answer(talk: Conversation, prompt: str, show: Callable[[str], None]) -> str:
    text = ""
    for piece in talk.ask(prompt):
        text += piece
        show(piece)
    return text
