"""A chat template is a program that comes with a model: it writes a conversation within a time, or is ended."""

from collections.abc import Sequence
from typing import Any

from dual_lora.verify.time_limit import Late, ended_after

LONGEST = 20_000_000  # characters of one conversation: a tokenizer takes a second for each million
SECONDS = 60.0  # for one conversation, the compiling of the template among them; published ones take a millisecond


def rendered(tokenizer: Any, messages: Sequence[Any], **more: Any) -> str:
    """The conversation as text. Raises TimeoutError where that takes too long, ValueError for a text without an end,
    and whatever the template raises.

    more: for `apply_chat_template`. Only in a process's main thread, and not on Windows, can it be ended.
    """
    try:
        with ended_after(SECONDS):
            text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
    except Late:
        raise TimeoutError(f"The chat template takes longer than {SECONDS:g} s for one conversation.") from None
    if len(text) > LONGEST:
        raise ValueError(f"The chat template makes {len(text):,} characters of one conversation, at most {LONGEST:,}.")
    return text
