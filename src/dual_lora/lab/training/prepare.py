"""What a run starts from: the loaded model, the encoded rows and their order."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from dual_lora.lab.data.batches import Collator, accepted_arguments, training_order
from dual_lora.lab.data.encode import VALUE, Encoded, Prompter, class_names, encode_all, encode_texts
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.models import Loaded
from dual_lora.lab.recipe import Recipe
from dual_lora.lab.tuned import load_base


@dataclass
class Prepared:
    """left_out: examples longer than data.max_length. order: indices into rows, for the whole run."""

    loaded: Loaded
    rows: list[Encoded]
    validation: list[Encoded]
    classes: list[str]
    left_out: int
    steps: int
    order: list[int]
    rows_a_step: int

    @property
    def tokens(self) -> list[int]:
        """Tokens seen after each number of steps, padding left out."""
        lengths = [len(self.rows[i].input_ids) for i in self.order]
        steps = (sum(lengths[i : i + self.rows_a_step]) for i in range(0, len(lengths), self.rows_a_step))
        return [0, *itertools.accumulate(steps)]

    def collator(self, model: Any) -> Collator:
        return Collator(self.loaded.tokenizer.pad_token_id, bool(self.classes), accepted_arguments(model))


def prepare(recipe: Recipe) -> Prepared:
    """Read the data, load the model, fix the order. Raises UserError for records that do not fit the head."""
    part = recipe.train
    examples = load_split(recipe.data, "train")
    head = recipe.model.head
    _fits_head(examples[0], head)
    classes = class_names(examples) if head == "classification" else [VALUE] if head == "regression" else []
    if head == "classification" and len(classes) < 2:
        raise UserError(f"The training records hold one class only ({classes[0]}); a classifier needs two.")
    held = load_split(recipe.data, "validation") if part.validate_every else []
    set_seed(part.seed)
    loaded = load_base(recipe.model, part.seed, len(classes) or None)
    rows, left_out = _encoded(recipe, examples, loaded, classes)
    validation = _encoded(recipe, held, loaded, classes)[0] if held else []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows_a_step = part.batch_size * part.accumulate * world
    steps = part.steps or math.ceil(len(rows) * part.epochs / rows_a_step)
    lengths = [len(row.input_ids) for row in rows]
    order = training_order(lengths, steps * rows_a_step, part.batch_size * world, part.seed)
    return Prepared(loaded, rows, validation, classes, left_out, steps, order, rows_a_step)


def _encoded(recipe: Recipe, examples: list[Any], loaded: Loaded, classes: list[str]) -> tuple[list[Encoded], int]:
    if classes:
        return encode_texts(examples, loaded.tokenizer, recipe.data.max_length, classes)
    prompter = Prompter(loaded.tokenizer, recipe.data.template, recipe.data.learn_prompt)
    return encode_all(examples, prompter, recipe.data.max_length)


def _fits_head(example: Any, head: str) -> None:
    if head != "causal" and not example.text:
        raise UserError(f"{example.where}: model.head is {head}, but the record has no text and label.")
    if head == "causal" and not example.messages:
        raise UserError(f"{example.where}: the record has a text and a label: set model.head to classification.")
