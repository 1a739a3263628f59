"""The real lengths of a recipe's rows, in its model's tokens: what memory depends on is the longest batch.

Of many records some are read: the longest ones by their characters, and others drawn at random.
"""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from dual_lora.lab.errors import UserError

if TYPE_CHECKING:
    from dual_lora.lab.data.encode import Encoded
    from dual_lora.lab.data.formats import Example
    from dual_lora.lab.recipe.schema import Recipe

LONGEST, DRAWN = 128, 1000  # records that are written in tokens
MOST_BYTES = 300_000_000  # of files of records: reading more takes longer than the rest of an estimate


class Lengths(NamedTuple):
    """longest, usual: tokens of the longest row and of the mean one. logits: last positions of the longest answer that
    are computed, None for all. records: that there are; seen: that were looked at. classes: labels of the records of a
    classifier, None of others."""

    longest: int
    usual: float
    logits: int | None
    records: int
    seen: int
    classes: int | None = None

    @property
    def words(self) -> str:
        """Say in words which records were looked at."""
        of = f"{self.seen:,} of {self.records:,} records" if self.seen < self.records else f"{self.records:,} records"
        return f"longest of {of}, the mean one has {self.usual:.0f}"


def lengths_of(recipe: Recipe) -> Lengths | str:
    """The lengths of the training rows, or why they are not known: the records or the tokenizer are not here."""
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.data.records import find, joined
    from dual_lora.lab.model.load import load_tokenizer, quiet
    from dual_lora.lab.model.location import is_here

    source = recipe.data.train or ""
    if not source:
        return "the recipe names no training records"
    if "hub:" in source:
        return "the records are on a hub"
    if not is_here(recipe.model.path):
        return "the model's tokenizer is not here"
    try:
        if sum(find(one).stat().st_size for one in joined(source)) > MOST_BYTES:
            return f"the files of records have more than {MOST_BYTES / 1e6:.0f} MB"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the run begins
            examples = load_split(recipe.data, "train")
            with quiet():
                rows = _rows(recipe, some := _some(examples), load_tokenizer(recipe.model.path))
    except (UserError, OSError) as error:
        return str(error).rstrip(".")
    kept = [row for row in rows if len(row.input_ids) <= recipe.data.max_length]
    if not kept:
        return "every record is longer than data.max_length"
    drawn = kept[LONGEST:] or kept
    asked = recipe.model.head == "causal" and knows_logits(recipe.model.path)
    tails = max(row.label_tail for row in kept) + 1 if asked else None
    usual = sum(len(row.input_ids) for row in drawn) / len(drawn)
    classes = len({example.label for example in examples}) if recipe.model.head == "classification" else None
    return Lengths(max(len(row.input_ids) for row in kept), usual, tails, len(examples), len(some), classes)


def _some(examples: list[Example]) -> list[Example]:
    """The longest ones first, then others."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].characters)
    rest = order[LONGEST:]
    chosen = order[:LONGEST] + random.Random(0).sample(rest, min(DRAWN, len(rest)))
    return [examples[i] for i in chosen]


def _rows(recipe: Recipe, examples: list[Example], tokenizer: Any) -> list[Encoded]:
    from dual_lora.lab.data.encode import Encoded, Prompter

    length = recipe.data.max_length
    if recipe.model.head == "causal":
        prompter = Prompter(tokenizer, recipe.data.template, recipe.data.learn_prompt)
        return [row for example in examples for row in prompter.pieces(example, length)]
    return [Encoded(e.where, tokenizer(*e.text, truncation=True, max_length=length).input_ids, [0]) for e in examples]


def knows_logits(path: str) -> bool:
    """Whether the model computes the logits of its last positions alone when it is told to."""
    import inspect

    from dual_lora.lab.cost.options import model_config

    config, _ = model_config(path)
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM._model_mapping
    kind = known.get(type(config), None)
    return kind is not None and "logits_to_keep" in inspect.signature(kind.forward).parameters
