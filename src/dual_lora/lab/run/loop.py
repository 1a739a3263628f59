"""A recipe's training loop: transformers' Trainer with our loss, our order of rows and our optimizers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from dual_lora._warning import warn
from dual_lora.lab.data.batches import Ordered, mean_loss
from dual_lora.lab.data.encode import IGNORED, Encoded
from dual_lora.lab.errors import UserError, described, suggest
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.device import best_device, process_count
from dual_lora.lab.model.location import check_searched
from dual_lora.lab.model.methods import is_kind
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.permission import import_allowed
from dual_lora.lab.recipe.schema import Recipe, TrainSection
from dual_lora.lab.run.watch import Watch

if TYPE_CHECKING:
    from dual_lora.lab.run.prepare import Prepared

MOST_WORKERS = 256  # processes that read data
LORAPLUS = "loraplus"  # the one optimizer that is not transformers'


def build_trainer(
    model: Any,
    recipe: Recipe,
    folder: RunFolder,
    ready: Prepared,
    watch: Watch,
    first: Sequence[TrainerCallback],
    callbacks: Sequence[TrainerCallback],
    reports: dict[str, Any],
) -> Trainer:
    """The Trainer for a run's steps over its rows, in their order. first: before `watch`. reports: see `reporting`."""
    held = _filled_up(ready.validation, recipe.evaluate.batch_size * process_count() if process_count() > 1 else 1)
    with recipe_environment(recipe) as precision:
        trainer = _Trainer(
            recipe.train.rates,
            model=model,
            args=arguments_of(recipe, precision, folder, ready.steps, bool(held), reports),
            train_dataset=Ordered(ready.rows, ready.order),  # type: ignore[arg-type]
            eval_dataset=Ordered(held, list(range(len(held)))) if held else None,  # type: ignore[arg-type]
            data_collator=ready.collator(model),
            compute_loss_func=_Loss(
                watch, recipe.train.label_smoothing, _labels_in(ready.validation) / max(1, len(held))
            ),
            callbacks=[*first, watch, *callbacks],
            optimizers=(optimizer_of(model, recipe), None),
        )
    return trainer


@contextmanager
def recipe_environment(recipe: Recipe) -> Iterator[str]:
    """Make the recipe count inside, whatever a launcher says. Yields the precision for Trainer, see
    `_mixed_precision`."""
    under_deepspeed, asked = _deepspeed(), _mixed_precision(recipe)
    wanted = {"ACCELERATE_MIXED_PRECISION": "no" if asked == "none" else asked}
    if under_deepspeed:  # transformers refuses other values than the recipe's
        wanted = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "auto"}
    launched = {name: os.environ.get(name) for name in wanted}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if not under_deepspeed and precision not in (None, "no", asked):  # "no" is what accelerate says of its own accord
        warn(
            f"The launcher asks for mixed precision {precision!r}, and the recipe, which counts, has train.autocast "
            f"{asked!r}: name the same in both.",
            stacklevel=3,
        )
    os.environ.update(wanted)
    try:
        yield asked
    finally:
        for name, value in launched.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _deepspeed_file() -> bool:
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none"


def check_precision(recipe: Recipe) -> None:
    """Raise UserError for an autocast that DeepSpeed would leave out."""
    asked, launched = recipe.train.autocast, os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if _deepspeed() and not _deepspeed_file() and asked not in ("none", launched):
        raise UserError(
            f"train.autocast is {asked!r}, but DeepSpeed has no autocast (accelerate's mixed_precision: {launched!r}). "
            "Set model.dtype: bfloat16 and train.autocast: none. Or set mixed_precision: bf16 in accelerate's "
            "configuration, which rounds the base."
        )


def _mixed_precision(recipe: Recipe) -> str:
    """The recipe's autocast; of DeepSpeed its precision, which is the base's: transformers has to be told the same."""
    asked = recipe.train.autocast
    if not _deepspeed():
        return asked
    check_precision(recipe)
    # A file of DeepSpeed's own gets the recipe's, and transformers says where it names another one.
    launched = asked if _deepspeed_file() else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    rounds = {"bf16": "bfloat16", "fp16": "float16"}.get(launched)
    if rounds not in (None, recipe.model.dtype):
        warn(
            f"DeepSpeed's mixed precision {launched!r} rounds the base model, and model.dtype is "
            f"{recipe.model.dtype!r}: name model.dtype: {rounds}, so that it is opened so again; else set "
            "mixed_precision to 'no' and train.autocast to none.",
            stacklevel=2,
        )
    return "none" if launched == "no" else launched


class _Trainer(Trainer):
    """Trainer with rows in the order that was fixed for the run, and a learning rate of its own for some parameters."""

    def __init__(self, rates: dict[str, float], **options: Any):
        self.rates = {Pattern(text, "train.rates"): factor for text, factor in rates.items()}
        super().__init__(**options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.rates:
            _set_rates(optimizer, self.model if model is None else model, self.rates)
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():  # Trainer gathers the mean of all processes, and with a count would add them up
            options["num_items_in_batch"] = None
        loss = super().compute_loss(model, inputs, *args, **options)
        if torch.is_grad_enabled() and isinstance(loss, torch.Tensor):
            loss = loss + orthogonality(self.model) / self.current_gradient_accumulation_steps
        return loss


def _filled_up(rows: Sequence[Encoded], multiple: int) -> list[Encoded]:
    """Append rows without labels until all batches are full; accelerate would fill them with repeated rows."""
    blank = [
        replace(row, labels=[math.nan if isinstance(label, float) else IGNORED for label in row.labels])
        for row in rows[:1]  # whole: some models take rows of one length only
    ]
    return [*rows, *blank * (-len(rows) % multiple)]


def _labels_in(rows: Sequence[Encoded]) -> int:
    """Tokens to be told, classes or values."""
    return sum(isinstance(label, float) or label != IGNORED for row in rows for label in row.labels)


def orthogonality(model: Any) -> torch.Tensor | float:
    """AdaLoRA's regulariser, orth_reg_weight · mean ‖PPᵀ - I‖ over its factors P; 0 for other methods.

    PEFT adds it to the loss that a model makes itself, and is not asked for one here.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get(getattr(model, "active_adapter", None)) if isinstance(configs, dict) else None
    if not is_kind(config, "ADALORA"):
        return 0.0
    factors = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (".lora_A." in n or ".lora_B." in n)]
    grams = [p @ p.T if ".lora_A." in n else p.T @ p for n, p in factors]
    norms = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return float(config.orth_reg_weight) * torch.stack(norms).mean()  # type: ignore[union-attr]


def _set_rates(optimizer: torch.optim.Optimizer, model: Any, rates: dict[Pattern, float]) -> None:
    """Move the parameters that a pattern fits (the first one counts) to groups with that multiple of their rate."""
    factors = {
        id(parameter): next((factor for pattern, factor in rates.items() if pattern.search(name)), 1.0)
        for name, parameter in model.named_parameters()
    }
    for group in list(optimizer.param_groups):
        held = group["params"]
        group["params"] = [p for p in held if factors[id(p)] == 1.0]
        for factor in sorted(set(rates.values()) - {1.0}):
            if moved := [p for p in held if factors[id(p)] == factor]:
                optimizer.add_param_group({**group, "params": moved, "lr": group["lr"] * factor})


def check_patterns(field: str, patterns: Iterable[str], model: Any) -> None:
    """Raise UserError for a pattern of parameter names that fits no trainable parameter of the model."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in [Pattern(text, field) for text in patterns]:
        if not any(pattern.search(name) for name in names):
            raise UserError(f"{field}: {pattern.text!r} fits no trainable parameter, for example {names[:3]}.")


class _Loss:
    """Mean cross-entropy over the answer's tokens (or the classes) of all micro-batches of an optimizer step.

    Of a validation batch the sum, by its rows and the labels that a validation row has on average: Trainer takes the
    mean over rows, which is then that over all labels, however many rows are in a batch.
    """

    def __init__(self, watch: Watch, smoothing: float, labels_a_row: float):
        self.watch, self.smoothing, self.labels_a_row = watch, smoothing, labels_a_row

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return mean_loss(outputs, labels, len(labels) * self.labels_a_row)
        loss = mean_loss(outputs, labels, num_items_in_batch, self.smoothing)
        self.watch.losses.append(loss.detach())
        return loss


# Fields of TrainingArguments that a recipe may set. Not among them: whatever names a folder, a server or a token, what
# the recipe has fields for, and what gives a step or the validation other rows than the recipe (auto_find_batch_size,
# split_batches, dataloader_drop_last).
_ALLOWED = """
    activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bf16_full_eval
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout eval_accumulation_steps eval_delay
    eval_on_start fp16_full_eval fsdp fsdp_config full_determinism gradient_checkpointing_kwargs
    include_num_input_tokens_seen jit_mode_eval lr_scheduler_kwargs neftune_noise_alpha optim_args
    optim_target_modules parallelism_config skip_memory_metrics tf32 torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps use_cache use_cpu use_liger_kernel warmup_ratio warmup_steps
"""
ARGUMENTS = frozenset(_ALLOWED.split())


def arguments_of(
    recipe: Recipe, precision: str, folder: RunFolder, steps: int, validating: bool, reports: dict[str, Any],
    kind: type[TrainingArguments] = TrainingArguments, more: Mapping[str, Any] | None = None,
) -> TrainingArguments:  # fmt: skip
    """Return the arguments for Trainer, or for a trainer of TRL's whose arguments extend Trainer's."""
    part = recipe.train
    values: dict[str, Any] = {
        "output_dir": str(folder.checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": part.batch_size,
        "per_device_eval_batch_size": recipe.evaluate.batch_size,
        "gradient_accumulation_steps": part.accumulate,
        "learning_rate": part.learning_rate,
        "weight_decay": part.weight_decay,
        "lr_scheduler_type": part.schedule,
        "warmup_steps": round(part.lr_warmup * steps),
        "max_grad_norm": part.max_grad_norm,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "seed": part.seed,
        "optim": "adamw_torch" if part.optimizer == LORAPLUS or ":" in part.optimizer else part.optimizer,
        "logging_steps": part.log_every,
        "logging_nan_inf_filter": False,
        "save_steps": part.checkpoint_every,
        "save_total_limit": None,  # old checkpoints go when the new one is known to be whole, see Watch.on_save
        "eval_strategy": "steps" if validating else "no",
        "eval_steps": part.validate_every,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "use_cpu": best_device() == "cpu",  # else Trainer refuses bf16 there
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    known = kind.__dataclass_fields__
    renamed = "activation_checkpointing" in known  # within transformers 5; TRL's default is on
    values["activation_checkpointing" if renamed else "gradient_checkpointing"] = part.gradient_checkpointing
    try:
        asked = {name: value for name, value in reports.items() if name in known}
        return kind(**{**values, **(more or {}), **part.arguments, **asked})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"train: {described(error, Exception)}") from error


def check_names(part: TrainSection) -> None:
    """Raise UserError for an optimizer or a further argument that transformers does not know."""
    known = TrainingArguments.__dataclass_fields__.keys()  # of this version of transformers
    for key in part.arguments:
        if key not in known:
            raise UserError(f"train.arguments has no field {key!r}.{suggest(key, ARGUMENTS & known)}")
        if key not in ARGUMENTS:
            raise UserError(
                f"train.arguments may not set {key!r}. It sets how a run trains. It cannot set where files go or what "
                "is sent, or what has a field of its own in a recipe (such as train.batch_size). Allowed are "
                f"{', '.join(sorted(ARGUMENTS))}."
            )
    searched = part.arguments.get("optim_target_modules") or []
    check_searched("train.arguments.optim_target_modules", [searched] if isinstance(searched, str) else list(searched))
    if isinstance(part.arguments.get("fsdp_config"), str):
        raise UserError("train.arguments.fsdp_config names a file, which may have no end: write its values here.")
    workers = part.arguments.get("dataloader_num_workers", 0)
    if not (isinstance(workers, int) and 0 <= workers <= MOST_WORKERS):
        raise UserError(
            f"train.arguments.dataloader_num_workers is {workers!r}, expected 0 to {MOST_WORKERS} processes."
        )
    if _custom_factory(part.optimizer):
        if unused := [key for key in part.arguments if key.startswith("adam_")]:
            raise UserError(f"train.arguments.{unused[0]} has no effect on {part.optimizer}: leave it out.")
        return
    optimizers = [LORAPLUS, *(name.value for name in OptimizerNames)]
    if part.optimizer not in optimizers:
        raise UserError(f"train.optimizer is {part.optimizer!r}.{suggest(part.optimizer, optimizers)}")


def _custom_factory(name: str) -> Any:
    """Import the factory that `MODULE:FACTORY` names; None for an optimizer by name."""
    module, colon, factory = name.rpartition(":")
    found = getattr(import_allowed(module, f"train.optimizer {name!r}"), factory, None) if colon else None
    if colon and not callable(found):
        raise UserError(f"train.optimizer is {name!r}, but {module} has nothing to call that is named {factory!r}.")
    return found


def optimizer_of(model: Any, recipe: Recipe) -> torch.optim.Optimizer | None:
    """LoRA+'s optimizer, which PEFT builds, or the user's own; None leaves the choice to Trainer's ``optim``."""
    part = recipe.train
    if own := _custom_factory(part.optimizer):
        trained = [p for p in model.parameters() if p.requires_grad]
        made = own([{"params": trained, "weight_decay": part.weight_decay}], lr=part.learning_rate)
        if not isinstance(made, torch.optim.Optimizer):
            raise UserError(f"train.optimizer made a {type(made).__name__}, expected a torch.optim.Optimizer.")
        return made
    if part.optimizer != LORAPLUS:
        return None
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=part.learning_rate,
        loraplus_lr_ratio=part.loraplus_ratio,
        loraplus_weight_decay=part.weight_decay,
        loraplus_lr_embedding=part.learning_rate,  # else 1e-6, and of other methods' embeddings the rate itself
        betas=(part.arguments.get("adam_beta1", 0.9), part.arguments.get("adam_beta2", 0.999)),
        eps=part.arguments.get("adam_epsilon", 1e-8),
    )
    # PEFT finds the factors on the output's side by "lora_B" in their names; D is one too.
    slow, _, fast, _ = optimizer.param_groups
    outer = {id(p) for name, p in model.named_parameters() if ".dual_lora_D." in name}
    fast["params"] += [p for p in slow["params"] if id(p) in outer]
    slow["params"] = [p for p in slow["params"] if id(p) not in outer]
    return optimizer
