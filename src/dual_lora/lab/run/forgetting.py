"""What a run has forgotten: the rise of the loss on text that is not the task's, from the base to the adapter.

As PEFT's method comparison measures it: mean loss a token over whole texts, each cut to 768 tokens.
"""

from __future__ import annotations

from typing import Any

from dual_lora.lab.data.encode import IGNORED, Encoded
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.recipe.schema import EvaluatePart
from dual_lora.lab.run.scoring import Rows, loss_rows

NAME = "forgetting"
LONGEST = 768  # tokens of a text, as in PEFT's comparison


def forgetting_rows(tuned: Tuned, spec: EvaluatePart) -> Rows:
    """For each text its tokens, and its summed loss (nats) with the base and with the adapter.

    Raises UserError for an encoder, and for records without a text.
    """
    assert spec.forgetting is not None
    if tuned.classes or (tuned.recipe is not None and tuned.recipe.model.head != "causal"):
        raise UserError("evaluate.forgetting needs a language model: an encoder has no loss on plain text.")
    texts = encoded_texts(spec.forgetting, tuned.tokenizer, _positions(tuned.model))
    size = spec.batch_size
    with tuned.as_variant("tuned") as model:
        after = loss_rows(model, tuned.tokenizer, texts, size)
    with tuned.as_variant("base") as model:
        before = loss_rows(model, tuned.tokenizer, texts, size)
    return [
        {"where": text.where, "tokens": b["tokens"], "base_nats": a["nats"], "nats": b["nats"]}
        for text, a, b in zip(texts, before, after, strict=True)
    ]


def forgetting_figures(rows: Rows) -> dict[str, float]:
    """forgetting: the rise of the mean loss a token, in nats. text_loss: that loss with the adapter."""
    tokens = sum(row["tokens"] for row in rows)
    after, before = (sum(row[key] for row in rows) / tokens for key in ("nats", "base_nats"))
    return {NAME: after - before, "text_loss": after}


def encoded_texts(source: str, tokenizer: Any, longest: int) -> list[Encoded]:
    """The texts of a file, every token but the first as a label; those of one token say nothing and are left out."""
    found = []
    for record in read_records(source):
        text = record.values.get("text", record.values.get("line"))
        if not isinstance(text, str):
            raise UserError(
                f"{record.where}: a text for evaluate.forgetting is missing, found "
                f"{', '.join(map(str, record.values))}; expected a field text, or a .txt file with one text a line."
            )
        ids = tokenizer(text, truncation=True, max_length=longest).input_ids
        if len(ids) > 1:
            found.append(Encoded(record.where, ids, [IGNORED, *ids[1:]]))
    if not found:
        raise UserError(f"{source} holds no text of two tokens or more.")
    return found


def _positions(model: Any) -> int:
    return min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
