"""Batches padded to their longest row, in an order that depends on the seed and nothing else; the loss of one."""

import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, mse_loss

from dual_lora._warning import warn
from dual_lora.lab.data.encode import IGNORED, Encoded
from dual_lora.lab.errors import UserError

BATCHES_PER_POOL = 16  # rows of like length are put together within such a pool; larger pools pad less, mix less


def training_order(lengths: list[int], rows: int, batch: int, seed: int) -> list[int]:
    """Indices of ``rows`` training rows: whole passes in random order, rows of like length in the same batch.

    The whole order is fixed before training, so that a resumed run goes on with the very row that would have come.
    """
    chance = random.Random(seed)
    stream: list[int] = []
    while len(stream) < rows:
        one_pass = list(range(len(lengths)))
        chance.shuffle(one_pass)
        stream += one_pass
    stream = stream[:rows]
    # Pools are cut from the stream of all passes, not from each pass: their batches then stay aligned.
    pool = batch * BATCHES_PER_POOL
    order: list[int] = []
    for start in range(0, rows, pool):
        part = sorted(stream[start : start + pool], key=lambda i: lengths[i])
        batches = [part[i : i + batch] for i in range(0, len(part), batch)]
        last = [batches.pop()] if len(batches[-1]) < batch else []
        chance.shuffle(batches)
        order += [i for rows_of_batch in batches + last for i in rows_of_batch]
    return order


class Ordered:
    """A data set whose rows come in a given order: read from front to back it is the whole training run."""

    def __init__(self, rows: list[Encoded], order: list[int]):
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[self.order[index]]


@dataclass(frozen=True)
class Collator:
    """Rows to tensors. Language models: padded on the left, with position ids and the number of last positions
    whose logits are needed (``logits_to_keep``), if the model knows these arguments. Classifiers: padded on the right,
    with the tokens' types where rows have some and the model takes them.

    on_the_right: language models whose virtual tokens stand before the row. on_the_left: classifiers whose head reads
    the last position. unmasked: the type of a model that reads padding; rows of unequal length raise UserError.
    """

    pad: int
    classification: bool = False
    accepts: frozenset[str] = frozenset({"position_ids", "logits_to_keep", "token_type_ids"})
    type_pad: int = 0
    on_the_right: bool = False
    on_the_left: bool = False
    unmasked: str = ""

    def __call__(self, rows: list[Encoded]) -> dict[str, Any]:
        check_padding(self.unmasked, [len(row.input_ids) for row in rows])
        left = self.on_the_left if self.classification else not self.on_the_right
        batch: dict[str, Any] = {
            "input_ids": _padded([row.input_ids for row in rows], self.pad, left),
            "attention_mask": _padded([[1] * len(row.input_ids) for row in rows], 0, left),
        }
        if self.classification:
            batch["labels"] = torch.tensor([row.labels[0] for row in rows])
            if batch["labels"].is_floating_point():  # a value of -100 is one, and Trainer would not count it
                batch["labels"][batch["labels"] == IGNORED] = IGNORED - 1e-5
            if any(row.token_types for row in rows):
                types = [row.token_types or [0] * len(row.input_ids) for row in rows]
                batch["token_type_ids"] = _padded(types, self.type_pad, left)
        else:
            batch["labels"] = _padded([row.labels for row in rows], IGNORED, left)  # type: ignore[misc]
            if left:
                batch["position_ids"] = _positions(batch["attention_mask"])
                # The logits at a position tell the next token: one position more than there are labels.
                batch["logits_to_keep"] = min(batch["labels"].shape[1], max(row.label_tail for row in rows) + 1)
        return {k: v for k, v in batch.items() if k in _ALWAYS or k in self.accepts}


_ALWAYS = {"input_ids", "attention_mask", "labels"}


def left_padded(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and position_ids [rows, longest] with padding on the left."""
    mask = _padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": _padded(rows, pad), "attention_mask": mask, "position_ids": _positions(mask)}


def _padded(rows: list[list[int]], pad: int, left: bool = True) -> torch.Tensor:
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def longest_first(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, the longest first: too little memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def to_device(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch where the model is."""
    return {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def aligned(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, positions, vocabulary] and the labels [rows, positions] that they tell: each the next token.

    logits: of all positions of `labels` or of the last ones, perhaps with virtual tokens before them.
    """
    logits = logits[:, -labels.shape[1] :]
    return logits[:, :-1], labels[:, labels.shape[1] - logits.shape[1] + 1 :]


def mean_loss(outputs: Any, labels: torch.Tensor, count: Any = None, smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy of the labels that count, divided by ``count`` or by their number; of values the squared
    error. A value of NaN is no label.

    smoothing: share of each target that is spread evenly over the vocabulary.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    if labels.is_floating_point():
        known = ~labels.isnan()
        total = mse_loss(logits.flatten().float()[known], labels[known], reduction="sum")
        return total / (count if count is not None else known.sum())
    if labels.dim() == 2:
        logits, labels = aligned(logits, labels)
    total = cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return total / (count if count is not None else (labels != IGNORED).sum())


_KNOWN = {"position_ids", "logits_to_keep", "cache", "token_type_ids"}


# What stands before a row goes into the state of these, masked or not, or into the mixing of tokens.
UNMASKED = {"rwkv", "recurrent_gemma", "xlstm", "fnet", "yoso"}
# Decoders out of encoder-decoders: they count positions from a row's first token, masked or not.
COUNTED = {
    "bart", "mbart", "pegasus", "blenderbot", "blenderbot-small", "marian", "mvp", "plbart", "prophetnet", "trocr",
    "bigbird_pegasus",
}  # fmt: skip
CONVOLVED = {"mobilebert", "convbert", "canine", "nystromformer"}  # what follows a row goes into its last tokens


def kind_of_unmasked(model: Any) -> str:
    """The type of a model that reads padding, "" for all others."""
    plain = unwrapped(model)
    kind = str(getattr(plain.config, "model_type", ""))
    return kind if kind in UNMASKED or (kind in COUNTED and type(plain).__name__.endswith("ForCausalLM")) else ""


def check_padding(unmasked: str, lengths: list[int]) -> None:
    """Raise UserError where such a model would get rows of unequal length."""
    if unmasked and len(set(lengths)) > 1:
        raise UserError(
            f"A model of type {unmasked} reads padding, so its results would depend on the other rows of a batch. Set "
            "train.batch_size: 1 (with train.accumulate) and evaluate.batch_size: 1."
        )


def row_by_row(model: Any) -> bool:
    """Whether padding at its left changes a row's results: read into a state, or behind an adapter's virtual tokens."""
    return kind_of_unmasked(model) != "" or learns_prompts(model)


def learns_prompts(model: Any) -> bool:
    """Whether an adapter puts virtual tokens before the row: padding on the left would stand between the two."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def unwrapped(model: Any) -> Any:
    """The model of transformers, with its adapters' layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted_arguments(model: Any) -> frozenset[str]:
    """Return those of our arguments that the base model's forward takes (`cache` is what older ones call
    `past_key_values`)."""
    return frozenset(inspect.signature(unwrapped(model).forward).parameters) & _KNOWN


def collator(tokenizer: Any, classification: bool, model: Any) -> Collator:
    """Return a function that turns rows into tensors, for this model and its tokenizer."""
    kind = getattr(unwrapped(model).config, "model_type", "")
    if kind in CONVOLVED:
        warn(
            f"A model of type {kind} reads padding behind a row, so its scores depend on the other rows of a batch. "
            "Set evaluate.batch_size: 1 to avoid that.",
            stacklevel=2,
        )
    return Collator(
        tokenizer.pad_token_id,
        classification,
        accepted_arguments(model),
        tokenizer.pad_token_type_id,
        on_the_right=learns_prompts(model),
        on_the_left=kind == "xlnet",  # its head reads the last position
        unmasked=kind_of_unmasked(model),
    )
