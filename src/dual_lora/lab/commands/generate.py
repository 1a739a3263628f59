"""dual-lora generate"""

import sys
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.card import finish
from dual_lora.lab.commands.parameters import AutoDtype, Base, Device, Source
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.location import check_source
from dual_lora.lab.progress import stage


def generate(
    source: Source,
    prompt: Annotated[
        str | None, Parameter(help="The prompt; - or left out: read it from standard input.", allow_leading_hyphen=True)
    ] = None,
    *,
    system: Annotated[str | None, Parameter(help="System message of a chat model.")] = None,
    max_new_tokens: Annotated[int, Parameter(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, Parameter(help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int, Parameter(help="Seed for a temperature above 0.")] = 0,
    base: Base = None,
    dtype: AutoDtype = None,
    device: Device = None,
    without_adapter: Annotated[bool, Parameter(help="Answer with the untrained base.")] = False,
    json: Annotated[bool, Parameter(help="End with one line of JSON instead of streaming.")] = False,
) -> None:
    """Answer a prompt, word by word.

    Example: `dual-lora generate runs/mine "What is the capital of France?"`

    From standard input: `cat question.txt | dual-lora generate runs/mine`
    """
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise UserError("Give a prompt after the run folder, or pipe one into standard input.")
        prompt = sys.stdin.read().removesuffix("\n").removesuffix("\r")  # the end of the last line, not of the prompt
    assert prompt is not None
    if not prompt.strip():
        raise UserError("The prompt is empty.")
    check_source(source)
    with stage(f"loading {source}"):
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.model.generate import generate as answer
        from dual_lora.lab.model.opened import open_tuned

        use_device(device)
        tuned = open_tuned(source, base, dtype, unsaid="auto")
    pieces = answer(
        tuned, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        variant="base" if without_adapter else None,
    )  # fmt: skip
    text = ""
    for piece in pieces:
        text += piece
        if not json:
            print(piece, end="", flush=True)
    finish({"prompt": prompt, "answer": text}, "", json)
