"""Whether a candidate makes the same tokens of the same words: its tokenizer and its chat template."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from dual_lora.lab.data.encode import fixed_date
from dual_lora.lab.verify.diagnose import Finding
from dual_lora.lab.verify.endpoint import Answer, Endpoint
from dual_lora.lab.verify.logprobs import SPACES, Probe
from dual_lora.lab.verify.prompts import BUILT_IN
from dual_lora.verify.template import rendered

OTHER: Final = "other tokenizer"
TEMPLATE: Final = "wrong chat template"
PLAIN = BUILT_IN[:3]
CONVERSATIONS = 3
OTHERWISE = 0.25  # share of tokens: some are no text by themselves, and are written in several ways


def plain_counts(tokenizer: Any) -> dict[str, int]:
    """{text: number of its tokens} without special ones."""
    return {text: len(tokenizer(text, add_special_tokens=False).input_ids) for text in PLAIN}


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Hash the tokenizer's vocabulary: every token with its number."""
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def hash_of_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def compare_tokenizers(own: Any, other: Any, texts: Sequence[str], conversations: Sequence[Probe]) -> Finding | None:
    """Return the first difference between two tokenizers on these texts and conversations; None if there is none."""
    for text in texts:
        if own(text, add_special_tokens=False).input_ids != other(text, add_special_tokens=False).input_ids:
            return Finding(OTHER, f"it makes other tokens of {shortened(text)!r}")
    for conversation in conversations:
        written = [_written(tokenizer, conversation.messages) for tokenizer in (own, other)]
        if written[1] is None:
            return Finding(TEMPLATE, "it has no chat template, and the adapter was trained with one")
        if written[0] != written[1]:
            return Finding(
                TEMPLATE,
                f"it writes a conversation as {shortened(written[1])!r}, the adapter as {shortened(written[0])!r}",
            )
    return None


def compare_hashes(hashes: tuple[str, str | None], other: Any, chat: bool) -> Finding | None:
    """The same where only the hashes of tokenizer and template are known."""
    if hash_of_tokenizer(other) != hashes[0]:
        return Finding(OTHER, "its vocabulary is not that of the adapter's tokenizer")
    if chat and hash_of_template(other) != hashes[1]:
        return Finding(TEMPLATE, "its chat template is not the one that the adapter was saved with")
    return None


def compare_server(
    endpoint: Endpoint,
    answer: Answer,
    texts: dict[int, str],
    plain: dict[str, int],
    conversations: Sequence[Probe],
    right: bool,
) -> tuple[Finding | None, list[str]]:
    """Compare a server's tokens with the adapter's, by the numbers of tokens that it counts and the tokens that it
    writes; returns a finding, None if they agree, and notes.

    texts: how the adapter's tokenizer writes tokens, by their ids. right: its weights are the adapter's, so that an
    answer with another first token had another prompt.
    """
    written = {i: (theirs, texts[i]) for i, theirs in answer.written.items() if i in texts and theirs.strip()}
    differing = [
        pair
        for pair in written.values()
        if _without_blanks(pair[0]) != _without_blanks(pair[1]) and not _is_number(pair[0])
    ]
    if len(differing) > OTHERWISE * len(written):
        theirs, ours = differing[0]
        return Finding(
            OTHER, f"of {len(written)} tokens it writes {len(differing)} otherwise, {theirs!r} for {ours!r}"
        ), []
    for text, count in plain.items():
        made = endpoint.text_tokens(text)
        if made is not None and not count <= made <= count + 2:  # with the tokens that begin and end a text
            return Finding(OTHER, f"it makes {made} tokens of {shortened(text)!r}, the adapter's tokenizer {count}"), []
    asked, otherwise = 0, 0
    whole = [conversation for conversation in conversations if conversation.start]
    for conversation in whole[:CONVERSATIONS]:
        tokens, entries = endpoint.prompt_tokens(conversation.messages)
        if tokens is None:
            return None, ["the server counts no tokens of a conversation: its chat template was not checked"]
        if tokens != conversation.start:
            return Finding(
                TEMPLATE, f"it makes {tokens} tokens of a conversation, the adapter's template {conversation.start}"
            ), []
        if conversation.first is not None and entries:
            asked += 1
            otherwise += _without_blanks(entries[0].token) != _without_blanks(conversation.first)
    if right and asked and otherwise > asked / 2:
        return Finding(
            TEMPLATE, f"it begins {otherwise} of {asked} answers otherwise, though its weights are right"
        ), []
    if whole:
        return None, []
    why = "are longer than what was asked" if conversations else "use no chat template"
    return None, [f"the adapter's prompts {why}: no chat template was checked"]


def _without_blanks(text: str) -> str:
    """A token without the blanks around it, which servers write in several ways."""
    return text.translate(SPACES).strip()


def _is_number(text: str) -> bool:
    """Whether a server writes the token's number in place of its text, as vLLM does if it is told to."""
    return text.startswith("token_id:")


def _written(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str | None:
    if not tokenizer.chat_template:
        return None
    more = fixed_date(tokenizer)
    return rendered(tokenizer, messages, add_generation_prompt=True, **more)


def shortened(text: str | None) -> str:
    """The beginning of a text, for a sentence."""
    return "" if text is None else text if len(text) <= 60 else text[:60] + "…"
