"""Answer one prompt, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TextIteratorStreamer

from dual_lora.lab.data.encode import Prompter
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import Tuned


def generate(
    tuned: Tuned,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    variant: str | None = None,
) -> Iterator[str]:
    """The answer in pieces as they come. variant: "base" for the untrained model. Written as the run's prompts were."""
    if temperature < 0:
        raise UserError(f"temperature is {temperature}, expected 0 or more.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    if tuned.classes:
        raise UserError(f"{tuned.source} is a classifier, it writes no text.")
    prompter = Prompter(tuned.tokenizer, tuned.recipe.data.template if tuned.recipe else "auto")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    ids = torch.tensor([prompter.prompt_ids((*messages, {"role": "user", "content": prompt}))])
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        choice = {"do_sample": True, "temperature": temperature}
    streamer = TextIteratorStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def work(model: Any) -> None:
        try:
            torch.manual_seed(seed)
            with torch.inference_mode():
                model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=torch.ones_like(ids).to(model.device),
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    eos_token_id=tuned.tokenizer.eos_token_id,
                    pad_token_id=tuned.tokenizer.pad_token_id,
                    **choice,
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    with tuned.as_variant(variant or tuned.variants[-1]) as model:
        thread = threading.Thread(target=work, args=(model,), daemon=True)
        thread.start()
        yield from streamer
        thread.join()
    if failed:
        raise failed[0]
