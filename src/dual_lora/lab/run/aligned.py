"""DPO and GRPO by TRL: its trainers run the loop, on the laboratory's prompts, into the laboratory's run folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dual_lora.lab.data.encode import Prompter
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.opened import BESIDE_THE_BASE
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.loop import arguments_of, optimizer_of, recipe_environment
from dual_lora.lab.run.rewards import rewards_of
from dual_lora.lab.run.watch import Watch
from dual_lora.verify.template import in_its_time

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from dual_lora.lab.run.prepare import Prepared


def check_objective(recipe: Recipe, config: Any) -> None:
    """Raise UserError for what DPO and GRPO cannot do. config: the method's, None for full fine-tuning."""
    name, part = recipe.objective.name, recipe.train
    if name == "sft":
        return
    if find_spec("trl") is None:
        raise UserError(f'objective {name} needs the package trl: pip install "dual-lora[align]".')
    if recipe.model.head != "causal":
        raise UserError(f"objective {name} needs a language model, and model.head is {recipe.model.head}.")
    kind = getattr(config, "peft_type", None)
    kind = getattr(kind, "value", kind)
    if kind not in BESIDE_THE_BASE - {"ADALORA"}:
        raise UserError(
            f"objective {name} compares with the base, which is the model with its adapter off: take dual_lora, lora "
            f"or another adapter that leaves the base as it is, not {recipe.method['name']}."
        )
    unread = {"train.label_smoothing": part.label_smoothing, "train.rates": part.rates} | {
        "data.learn_prompt": recipe.data.learn_prompt
    }
    if asked := [field for field, value in unread.items() if value]:
        raise UserError(f"objective {name} does not read {asked[0]}: leave it out.")
    if name == "grpo":
        rows, group = part.batch_size * part.accumulate, recipe.objective.completions
        if rows % group:
            raise UserError(
                f"A step has {rows} answers (train.batch_size {part.batch_size} times train.accumulate "
                f"{part.accumulate}), expected a multiple of objective.completions, {group}."
            )
        if part.validate_every:
            raise UserError("objective grpo has no validation loss: leave train.validate_every out, and evaluate.")


def build_aligned(
    model: Any,
    recipe: Recipe,
    folder: RunFolder,
    ready: Prepared,
    watch: Watch,
    first: Sequence[TrainerCallback],
    callbacks: Sequence[TrainerCallback],
    reports: dict[str, Any],
) -> Trainer:
    """TRL's trainer for the recipe. first: callbacks before `watch`."""
    make = _dpo if recipe.objective.name == "dpo" else _grpo
    _limit_template(ready.loaded.tokenizer)
    with recipe_environment(recipe) as precision:
        trainer = make(
            recipe,
            ready,
            watch,
            lambda kind, more: arguments_of(
                recipe, precision, folder, ready.steps, bool(ready.validation), reports, kind, more
            ),
            model=model,
            processing_class=ready.loaded.tokenizer,
            callbacks=[*first, watch, *callbacks],
            optimizers=(optimizer_of(model, recipe), None),
        )
    return trainer


def _no_card(*_: Any, **__: Any) -> None:
    """In place of TRL's card, in the folder of the checkpoints: the run has one of its own, and `--overwrite` removes
    nothing that a run does not write."""


def _dpo(recipe: Recipe, ready: Prepared, watch: Watch, arguments: Any, model: Any, **options: Any) -> Trainer:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Dpo(DPOTrainer):  # type: ignore[misc, unused-ignore]
        def training_step(self, *given: Any, **more: Any) -> Any:
            loss = super().training_step(*given, **more)  # type: ignore[no-untyped-call, unused-ignore]
            watch.losses.append(loss.detach())
            return loss

        create_model_card = _no_card

    beta = 0.1 if recipe.objective.beta is None else recipe.objective.beta
    more = {"beta": beta, "max_length": recipe.data.max_length}
    sets = [
        Dataset.from_list([_pair(e, ready.loaded.tokenizer, recipe) for e in examples]) if examples else None
        for examples in (ready.examples, ready.held)
    ]
    trainer: Trainer = Dpo(
        model=model, args=arguments(DPOConfig, more), train_dataset=sets[0], eval_dataset=sets[1], **options
    )
    if "ref" in model.peft_config:  # a copy of the fresh adapter: the base is the same, and takes no memory
        model.delete_adapter("ref")
    return trainer


def _grpo(recipe: Recipe, ready: Prepared, watch: Watch, arguments: Any, model: Any, **options: Any) -> Trainer:
    from datasets import Dataset
    from transformers import GenerationConfig
    from trl import GRPOConfig, GRPOTrainer

    from dual_lora.lab.model.generate import ends_of

    class Grpo(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        def training_step(self, *given: Any, **more: Any) -> Any:
            loss = super().training_step(*given, **more)  # type: ignore[no-untyped-call, unused-ignore]
            watch.losses.append(loss.detach())
            return loss

        create_model_card = _no_card

    asked = recipe.objective
    # What the model's makers set for `generate` (beams, forbidden words) does not count here either; its ends do.
    base = model.get_base_model()
    base.generation_config = GenerationConfig(eos_token_id=ends_of(model, ready.loaded.tokenizer) or None)
    more = {
        "beta": asked.beta or 0.0,
        "num_generations": asked.completions,
        "max_completion_length": asked.max_new_tokens,
        "temperature": asked.temperature,
    }
    rows = [{"prompt": _prompt(e, ready.loaded.tokenizer, recipe), "expected": e.target} for e in ready.examples]
    trainer: Trainer = Grpo(
        model=model,
        reward_funcs=rewards_of(recipe),  # type: ignore[arg-type, unused-ignore]
        args=arguments(GRPOConfig, more),
        train_dataset=Dataset.from_list(rows),
        **options,
    )
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    return trainer


def _limit_template(tokenizer: Any) -> None:
    """Make a conversation that the tokenizer's template writes end, from here on, within the time that it has
    elsewhere: TRL has answers written too, which the encoding of prompts does not."""
    write = tokenizer.apply_chat_template

    def limited(*given: Any, **more: Any) -> Any:
        try:
            with in_its_time(tokenizer):
                return write(*given, **more)
        except TimeoutError as error:
            raise UserError(str(error)) from None

    tokenizer.apply_chat_template = limited


def _prompt(example: Example, tokenizer: Any, recipe: Recipe) -> Any:
    """The prompt as messages, which TRL writes by the tokenizer's template, or as text by the recipe's."""
    prompter = Prompter(tokenizer, recipe.data.template)
    return list(example.prompt) if prompter.kind == "chat" else prompter.prompt_text(example.prompt)


def _pair(example: Example, tokenizer: Any, recipe: Recipe) -> dict[str, Any]:
    prompt = _prompt(example, tokenizer, recipe)
    answers = {"chosen": example.answer, "rejected": example.rejected}
    if isinstance(prompt, str):
        return {"prompt": prompt, **answers}
    return {"prompt": prompt, **{k: [{"role": "assistant", "content": text}] for k, text in answers.items()}}
