"""The start of a run: the loaded model, the encoded rows and their order; of LoRA-GA, gradients of the first rows.

LoRA-GA (Wang et al., arXiv 2407.05000): before the factors are made, PEFT wants to see gradients of the full weights.
It averages those of the first batches of the run's own data order, and puts the leading directions into A and B.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import set_seed

from dual_lora._warning import warn
from dual_lora.lab.data.batches import Collator, collator, mean_loss, to_device, training_order
from dual_lora.lab.data.classes import classes_of, fit_head
from dual_lora.lab.data.encode import Encoded, Prompter, encode_all, encode_texts
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.bounds import check_config
from dual_lora.lab.model.device import process_count
from dual_lora.lab.model.load import Loaded
from dual_lora.lab.model.note import name_classes
from dual_lora.lab.model.opened import load_base
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.schema import Recipe

GRADIENT_BATCHES = 8  # that LoRA-GA's start sees
NEXT_SEED = 1_000_003  # between the orders of a run's passes before and after it was made longer
MOST_ENDS = 1000
MOST_ROWS = 50_000_000  # of a run, repeats counted; their order is a list in memory


@dataclass
class InOrder:
    """Training rows. left_out: examples longer than data.max_length. order: indices into rows, for the whole run."""

    rows: list[Encoded]
    left_out: int
    steps: int
    order: list[int]
    rows_a_step: int


@dataclass
class Prepared(InOrder):
    """The rows with the model, before it has its method."""

    loaded: Loaded
    validation: list[Encoded]
    classes: list[str]
    examples: list[Example]  # of the rows, as they were read
    held: list[Example]  # of the validation rows

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens seen after each number of steps, padding left out."""
        lengths = [len(self.rows[i].input_ids) for i in self.order]
        steps = (sum(lengths[i : i + self.rows_a_step]) for i in range(0, len(lengths), self.rows_a_step))
        return [0, *itertools.accumulate(steps)]

    def collator(self, model: Any) -> Collator:
        return collator(self.loaded.tokenizer, bool(self.classes), model)


def prepare(recipe: Recipe, progress: bool = False, ends: Sequence[int] = ()) -> Prepared:
    """Read the data, load the model, fix the order (ends: see `in_order`).

    Raises UserError for records that do not fit the head.
    """
    part = recipe.train
    examples = load_split(recipe.data, "train")
    classes = classes_of(recipe.model.head, examples)
    held = load_split(recipe.data, "validation") if part.validate_every else []
    fit_head(held, recipe.model.head)
    check_examples(recipe, [*examples, *held])
    set_seed(part.seed)
    with stage(f"loading {recipe.model.path}", progress):
        loaded = load_base(recipe.model, part.seed, len(classes) or None)
        name_classes(loaded.model, classes)
        ordered = in_order(recipe, examples, loaded.tokenizer, classes, process_count(), ends)
    _warn_of_positions(loaded.model.config, max(len(row.input_ids) for row in ordered.rows))
    validation = _validation_rows(recipe, held, loaded.tokenizer, classes) if held else []
    kept = {row.where for row in [*ordered.rows, *validation]}
    own, also = ([example for example in each if example.where in kept] for each in (examples, held))
    return Prepared(**vars(ordered), loaded=loaded, validation=validation, classes=classes, examples=own, held=also)


def check_examples(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Raise UserError for records without what the objective needs."""
    name = recipe.objective.name
    for example in examples if name != "sft" else ():
        if example.whole or not example.prompt:
            raise UserError(f"{example.where}: objective {name} needs a prompt.")
        if name == "dpo" and not example.rejected:
            raise UserError(f"{example.where}: objective dpo needs the fields prompt, chosen and rejected.")


def _warn_of_positions(config: Any, longest: int) -> None:
    """Warn of rows longer than the model's trained positions, beyond which some models compute worse results."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(known, int) and 0 < known < longest:
        warn(
            f"The longest training record has {longest:,} tokens, and the model knows {known:,} positions: set "
            f"data.max_length to {known} or less.",
            stacklevel=3,
        )


def in_order(
    recipe: Recipe,
    examples: list[Example],
    tokenizer: Any,
    classes: list[str],
    processes: int,
    ends: Sequence[int] = (),
) -> InOrder:
    """The rows of a run and the order in which so many processes together take them.

    ends: the steps that a run was to have before it was made longer. What follows each of them begins a new pass.
    """
    part = recipe.train
    rows, left_out = _encode(recipe, examples, tokenizer, classes)
    rows_a_step = part.batch_size * part.accumulate * processes
    if recipe.objective.name == "grpo":  # a prompt has several answers
        rows_a_step = max(1, rows_a_step // recipe.objective.completions)
    asked = part.steps or max(1.0, len(rows) * part.epochs / rows_a_step)
    if asked * rows_a_step > MOST_ROWS:  # before `ceil`, as it may be infinite
        raise UserError(
            f"train asks for {asked:,.0f} steps of {rows_a_step:,} examples; at most {MOST_ROWS:,} examples in all are "
            "put in order: lower train.steps, train.epochs, train.accumulate or the batch size."
        )
    if len(ends) > MOST_ENDS:  # each begins a pass over all rows
        raise UserError(f"The run was made longer {len(ends):,} times by its record, expected at most {MOST_ENDS:,}.")
    steps = math.ceil(asked)
    lengths = [len(row.input_ids) for row in rows]
    order: list[int] = []
    for number, end in enumerate([*(e for e in ends if e < steps), steps]):
        rows_more = end * rows_a_step - len(order)
        order += training_order(lengths, rows_more, part.batch_size * processes, part.seed + number * NEXT_SEED)
    return InOrder(rows, left_out, steps, order, rows_a_step)


def _encode(recipe: Recipe, examples: list[Example], tokenizer: Any, classes: list[str]) -> tuple[list[Encoded], int]:
    if classes:
        return encode_texts(examples, tokenizer, recipe.data.max_length, classes)
    prompter = Prompter(tokenizer, recipe.data.template, recipe.data.learn_prompt)
    return encode_all(examples, prompter, recipe.data.max_length, pairs=recipe.objective.name == "dpo")


def _validation_rows(recipe: Recipe, examples: list[Example], tokenizer: Any, classes: list[str]) -> list[Encoded]:
    """The rows of the validation loss, which counts answers alone, as an evaluation does."""
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"learn_prompt": False})})
    rows, left_out = _encode(plain, examples, tokenizer, classes)
    if left_out and not classes:
        warn(
            f"The validation loss leaves out {left_out} of {len(examples)} validation records, which are longer than "
            f"data.max_length ({recipe.data.max_length}).",
            stacklevel=3,
        )
    return rows


def wants_gradients(config: Any) -> bool:
    """Whether the method starts from gradients."""
    return getattr(config, "init_lora_weights", None) == "lora_ga"


def show_gradients(model: Any, config: Any, ready: InOrder, batch_size: int, collate: Collator) -> None:
    """Run forward and backward on the first rows and leave each target's gradient where PEFT's start looks for it."""
    from peft.tuners.lora.loraga import preprocess_loraga
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    check_config(config, model, "method")
    _maybe_include_all_linear_layers(config, model)  # get_peft_model resolves "all-linear" too late for this

    def passes() -> None:
        first = [ready.rows[i] for i in ready.order[: GRADIENT_BATCHES * batch_size]]
        for start in range(0, len(first), batch_size):
            batch = to_device(model, collate(first[start : start + batch_size]))
            labels = batch.pop("labels")
            mean_loss(model(**batch), labels).backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook")  # the first layer's input is no tensor to train
        preprocess_loraga(model, config, passes)


def save_as_change(model: Any, start: Path, folder: Path) -> None:
    """Save the adapter so that it fits the untouched base: PEFT takes the start in `start` off, at twice the rank.

    The start subtracted itself from the base weights, by gradients that are gone when the adapter is loaded.
    """
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
