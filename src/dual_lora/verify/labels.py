"""What a batch of training rows teaches: whether answers carry the loss, padding does not, and answers learn to end."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that losses of PyTorch leave out
MARK = "xyzzy"  # an answer, to find what a chat template writes after one


def label_problems(batch: dict[str, Any], tokenizer: Any = None) -> tuple[list[str], list[str]]:
    """(problems, notes) of a batch with input_ids and labels [rows, tokens]; nothing of a batch of another kind."""
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not _is_tokens(ids) or not _is_tokens(labels) or ids.shape != labels.shape:  # type: ignore[union-attr]
        return [], ["the batches hold no labels of tokens: what carries the loss was not checked"]
    assert isinstance(ids, Tensor)
    assert isinstance(labels, Tensor)
    learned = labels != IGNORED
    if not bool(learned.any()):
        return [f"no token of the first {len(ids)} rows carries the loss: every label is {IGNORED}"], []
    problems, notes = [], []
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(learned)
    if bool((learned & ~real).any()):
        problems.append("padding carries the loss: there are labels where the attention mask is 0")
    if float((labels != ids)[learned & real].float().mean()) > 0.5:
        problems.append(
            "most labels are not the token at their own place: transformers' models shift labels themselves"
        )
    if bool(learned[real].all()):
        notes.append("every token carries the loss, prompts too")
    ends = end_tokens(tokenizer)
    if ends:
        is_end = torch.isin(ids, torch.tensor(sorted(ends), device=ids.device)) & real
        if not bool((is_end & learned).any()):
            written = " or ".join(repr(tokenizer.decode([end])) for end in sorted(ends))
            hidden = " It stands in the rows, but its label is ignored." if bool(is_end.any()) else ""
            problems.append(
                f"no row of the first {len(ids)} teaches the end of an answer ({written}): the model will not learn to "
                f"stop.{hidden}".removesuffix(".")
            )
    return problems, notes


def end_tokens(tokenizer: Any) -> set[int]:
    """The token that ends a text, and the one that the chat template writes after an answer."""
    ends: set[int] = set()
    if isinstance(getattr(tokenizer, "eos_token_id", None), int):
        ends.add(tokenizer.eos_token_id)
    if not getattr(tokenizer, "chat_template", None):
        return ends
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(MARK)[2]
    except Exception:  # a template is a program of somebody else's, and may refuse any conversation
        return ends
    following = tokenizer(after, add_special_tokens=False).input_ids
    return ends | set(next(([i] for i in following if tokenizer.decode([i]).strip()), []))


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
