"""Fine-tune by a recipe: transformers' Trainer with a fixed order of rows, whole checkpoints and a full record."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dual_lora.lab.data.batches import Collator, Ordered, accepted_arguments, training_order
from dual_lora.lab.data.encode import IGNORED, Encoded, Prompter, class_names, encode_all, encode_texts
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.folder import RunFolder, mark_whole, write_atomically, write_folder_atomically
from dual_lora.lab.gradient_start import show_gradients, wants_gradients
from dual_lora.lab.methods import apply_method, is_kind, method_config
from dual_lora.lab.models import best_device, quiet
from dual_lora.lab.progress import Bar
from dual_lora.lab.recipe import Recipe, build_recipe
from dual_lora.lab.record import peak_memory, read_metrics, surroundings
from dual_lora.lab.tuned import Tuned, load_base, write_note


@dataclass
class RunResult:
    """What a run came to. Sizes in bytes, times in seconds of training proper (all sessions of a resumed run)."""

    folder: str
    state: str  # "finished", or "interrupted" with a checkpoint to resume from
    steps: int
    loss: float | None  # of the last log line
    validation_loss: float | None
    seconds: float
    tokens: int  # seen in training, padding left out
    tokens_per_second: float
    peak_memory: int
    trainable_parameters: int
    all_parameters: int
    adapter_bytes: int
    examples: int
    left_out: int  # examples longer than data.max_length
    tuned: Tuned | None = field(default=None, repr=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """Plain values, for record.json and ``--json``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tuned"}


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train by ``recipe`` into the folder ``out``.

    resume: go on from the last whole checkpoint of ``out``, or from the start if there is none; the adapter comes out
    as if the run had never stopped. A finished run is left as it is. overwrite: remove the run that is in ``out``.
    callbacks: further callbacks of transformers' Trainer, after ours (the recipe does not record them).
    Raises UserError for everything that a person can put right; the last checkpoint stays in any case.
    """
    folder = RunFolder(Path(out))
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        folder.open(resume, overwrite)
    try:
        if resume and folder.is_run:
            _same_recipe(recipe, folder)
            if folder.result is not None and (finished := _finished(folder)):
                return finished
        with _clear_failures(folder):
            return _train(recipe, folder, main, progress, callbacks)
    except BaseException as error:
        if main:
            _note_failure(folder, error)
        raise
    finally:
        if main:
            folder.close()


def recipe_of_run(out: str | Path) -> Recipe:
    """The recipe that a run folder was made with."""
    import yaml

    folder = RunFolder(Path(out))
    if not folder.is_run:
        raise UserError(f"{out} is not a run: it holds no recipe.yaml.")
    return build_recipe(yaml.safe_load(folder.recipe.read_text(encoding="utf-8")), str(folder.recipe))


def _train(
    recipe: Recipe, folder: RunFolder, main: bool, progress: bool, more: Sequence[TrainerCallback] = ()
) -> RunResult:
    part = recipe.train
    method_config(
        recipe.method, recipe.model.head, steps=10**6, fresh=[]
    )  # a wrong field shows before anything is loaded
    rows, classes, left_out, loaded, steps = _prepare(recipe)
    config = method_config(recipe.method, recipe.model.head, steps, loaded.fresh)
    classification = recipe.model.head == "classification"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows_a_step = part.batch_size * part.accumulate * world
    lengths = [len(row.input_ids) for row in rows]
    order = training_order(lengths, steps * rows_a_step, part.batch_size * world, part.seed)
    if wants_gradients(config):
        collate = Collator(loaded.tokenizer.pad_token_id, classification, accepted_arguments(loaded.model))
        show_gradients(loaded.model, config, [rows[i] for i in order], part.batch_size, collate, mean_loss)
    model = apply_method(loaded, config, recipe.model.path, part.seed)
    tokens = [
        0,
        *itertools.accumulate(
            sum(lengths[i] for i in order[s * rows_a_step : (s + 1) * rows_a_step]) for s in range(steps)
        ),
    ]
    collator = Collator(loaded.tokenizer.pad_token_id, classification, accepted_arguments(model))
    validation = _validation_rows(recipe, loaded.tokenizer, classes)

    checkpoint = folder.last_checkpoint()
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    counts = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "examples": len(rows),
        "left_out": left_out,
    }
    record: dict[str, Any] = {"state": "running", "method": _plain(config), "seed": part.seed, "classes": classes}
    record |= {"total_steps": steps, **counts, **surroundings()}
    earlier = _seconds_before(folder, start)
    if main:
        if not folder.is_run:
            write_atomically(folder.recipe, recipe.to_yaml())
        write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False))
        kept = [line for line in read_metrics(folder.metrics) if line["step"] <= start]
        write_atomically(folder.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    with Bar("training", steps, progress and main, start) as bar:
        watch = _Watch(folder, bar, tokens, earlier, part.keep_checkpoints, main)
        callbacks: list[TrainerCallback] = [watch]
        if is_kind(config, "DUAL_LORA"):
            from dual_lora import DualLoraCallback

            callbacks.append(DualLoraCallback())
        if is_kind(config, "ADALORA"):
            callbacks.append(_RankAllocation())
        with quiet():
            trainer = Trainer(
                model=model,
                args=_arguments(recipe, folder, steps, bool(validation)),
                train_dataset=Ordered(rows, order),  # type: ignore[arg-type]
                eval_dataset=Ordered(validation, list(range(len(validation)))) if validation else None,  # type: ignore[arg-type]
                data_collator=collator,
                compute_loss_func=_Loss(watch),
                callbacks=[*callbacks, *more],
                optimizers=(_optimizer(model, recipe), None),
            )
            for noisy in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(noisy)
            # Rows come in the order that was fixed above; Trainer would shuffle them.
            trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)  # type: ignore[method-assign,assignment,arg-type]
            with watch.interruptible():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    done = trainer.state.global_step
    seconds = earlier + watch.seconds()
    lines = read_metrics(folder.metrics)
    result = RunResult(
        folder=str(folder.path),
        state="finished" if done >= steps else "interrupted",
        steps=done,
        loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        validation_loss=next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None),
        seconds=round(seconds, 3),
        tokens=tokens[done],
        tokens_per_second=round(tokens[done] / seconds, 1) if seconds else 0.0,
        peak_memory=peak_memory(),
        adapter_bytes=0,
        **counts,
    )
    if result.state == "finished":
        _check_finite(model, done)
        target = folder.full_model if config is None else folder.adapter
        _save(trainer, loaded.tokenizer, recipe, classes, target, main)
        result.adapter_bytes = sum(f.stat().st_size for f in target.glob("*.safetensors")) if main else 0
        result.tuned = Tuned(model.eval(), loaded.tokenizer, str(folder.path), recipe, classes, run=folder.path)
    if main:
        record |= {"state": result.state, "result": result.summary()}
        write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False))
    return result


def _prepare(recipe: Recipe) -> tuple[list[Encoded], list[str], int, Any, int]:
    """Rows to train on, class names, number of examples left out, the loaded model, the number of steps."""
    examples = load_split(recipe.data, "train")
    classification = recipe.model.head == "classification"
    _fits_head(examples[0], classification)
    classes = class_names(examples) if classification else []
    if classification and len(classes) < 2:
        raise UserError(f"The training records hold one class only ({classes[0]}); a classifier needs two.")
    set_seed(recipe.train.seed)
    loaded = load_base(recipe.model, recipe.train.seed, len(classes) or None)
    if classification:
        rows, left_out = encode_texts(examples, loaded.tokenizer, recipe.data.max_length, classes)
    else:
        rows, left_out = encode_all(examples, Prompter(loaded.tokenizer, recipe.data.template), recipe.data.max_length)
    part = recipe.train
    rows_a_step = part.batch_size * part.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    return rows, classes, left_out, loaded, part.steps or math.ceil(len(rows) * part.epochs / rows_a_step)


def _fits_head(example: Any, classification: bool) -> None:
    if classification and not example.text:
        raise UserError(f"{example.where}: model.head is classification, but the record has no text and label.")
    if not classification and not example.messages:
        raise UserError(f"{example.where}: the record has a text and a label: set model.head to classification.")


def _validation_rows(recipe: Recipe, tokenizer: Any, classes: list[str]) -> list[Encoded]:
    if not recipe.train.validate_every:
        return []
    examples = load_split(recipe.data, "validation")
    if classes:
        return encode_texts(examples, tokenizer, recipe.data.max_length, classes)[0]
    return encode_all(examples, Prompter(tokenizer, recipe.data.template), recipe.data.max_length)[0]


def _arguments(recipe: Recipe, folder: RunFolder, steps: int, validating: bool) -> TrainingArguments:
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
        "bf16": part.autocast == "bf16",
        "fp16": part.autocast == "fp16",
        "seed": part.seed,
        "optim": "adamw_torch" if part.optimizer == "loraplus" else part.optimizer,
        "logging_steps": part.log_every,
        "logging_nan_inf_filter": False,
        "save_steps": part.checkpoint_every,
        "save_total_limit": None,  # old checkpoints go when the new one is known to be whole, see _Watch.on_save
        "eval_strategy": "steps" if validating else "no",
        "eval_steps": part.validate_every,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "use_cpu": best_device() == "cpu",  # else Trainer refuses bf16 there
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": [],
    }
    known = TrainingArguments.__dataclass_fields__
    if part.gradient_checkpointing:  # renamed within transformers 5
        values["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    for key in part.arguments:
        if key not in known:
            raise UserError(f"train.arguments has no field {key!r}.{suggest(key, known)}")
    try:
        return TrainingArguments(**{**values, **part.arguments})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from error


def _optimizer(model: Any, recipe: Recipe) -> torch.optim.Optimizer | None:
    """LoRA+'s optimizer, which PEFT builds; None leaves the choice to Trainer's ``optim``."""
    part = recipe.train
    if part.optimizer != "loraplus":
        return None
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=part.learning_rate,
        loraplus_lr_ratio=part.loraplus_ratio,
        weight_decay=part.weight_decay,
    )


def mean_loss(outputs: Any, labels: torch.Tensor, count: Any = None) -> torch.Tensor:
    """Summed cross-entropy of the labels that count, divided by ``count`` or by their number."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    if labels.dim() == 2:
        labels = labels[:, labels.shape[1] - logits.shape[1] + 1 :]  # the last positions, shifted by one
        logits = logits[:, :-1]
    total = cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (count if count is not None else (labels != IGNORED).sum())


class _Loss:
    """Mean cross-entropy over the answer's tokens (or the classes) of all micro-batches of an optimizer step."""

    def __init__(self, watch: _Watch):
        self.watch = watch

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = mean_loss(outputs, labels, num_items_in_batch)
        if torch.is_grad_enabled():
            self.watch.losses.append(loss.detach())
        return loss


class _Watch(TrainerCallback):
    """Shows progress, writes metrics, declares checkpoints whole, stops at NaN and at Ctrl-C."""

    def __init__(self, folder: RunFolder, bar: Bar, tokens: list[int], earlier: float, keep: int, main: bool):
        self.folder, self.bar, self.tokens, self.earlier = folder, bar, tokens, earlier
        self.keep, self.main = keep, main
        self.losses: list[torch.Tensor] = []
        self.stop = False
        self._start: float | None = None
        self._first = 0
        self._end: float | None = None

    def seconds(self) -> float:
        """Training time of this session."""
        return (self._end or time.perf_counter()) - self._start if self._start is not None else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start, self._first = time.perf_counter(), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        loss = float(sum(self.losses)) if self.losses else math.nan  # one wait for the device a step
        self.losses.clear()
        if not math.isfinite(loss):
            raise _Diverged(f"The loss became {loss} at step {step}.")
        rate = (self.tokens[step] - self.tokens[self._first]) / self.seconds()
        self.bar.to(step, f"loss {loss:.4f} · {rate:,.0f} tokens/s")
        if self.stop:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            _check_finite(model, step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not self.main or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}}
        line |= {"tokens": self.tokens[state.global_step], "seconds": round(self.earlier + self.seconds(), 3)}
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if self.main:
            mark_whole(self.folder.checkpoints / f"checkpoint-{state.global_step}")
            self.folder.keep_newest(self.keep)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after the current step, with a checkpoint; the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def finish_step(*_: Any) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, finish_step)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class _RankAllocation(TrainerCallback):
    """AdaLoRA gives its ranks away only if it is told of every step; without this it is LoRA, silently."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


class _Diverged(Exception):
    pass


class Diverged(UserError):
    """Training stopped because the loss or a weight was no number any more."""


def _check_finite(model: Any, step: int) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise _Diverged(f"The weight {name} holds NaN or infinity after step {step}.")


def _save(trainer: Trainer, tokenizer: Any, recipe: Recipe, classes: list[str], target: Path, main: bool) -> None:
    def write(folder: Path) -> None:
        with quiet():
            trainer.save_model(str(folder))  # gathers sharded weights where there are several devices
            tokenizer.save_pretrained(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it stands in the recipe
        write_note(folder, recipe, classes)

    if main:
        write_folder_atomically(target, write)
    else:
        trainer.save_model(str(target.with_name(target.name + ".part")))


def _plain(config: Any) -> dict[str, Any]:
    """The method's configuration, every default included, in plain values."""
    if config is None:
        return {"name": "full"}
    return json.loads(json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)))


def _same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    old, new = recipe_of_run(folder.path).model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [
        f"{part}.{key}" if isinstance(old[part], dict) else part
        for part in old
        if part not in ("evaluate", "about", "name")
        for key in (set(old[part]) | set(new[part]) if isinstance(old[part], dict) else [""])
        if (old[part].get(key) != new[part].get(key) if isinstance(old[part], dict) else old[part] != new[part])
    ]
    if changed:
        raise UserError(
            f"The run {folder.path} was started with other values of {', '.join(sorted(changed))}: "
            "resume it without changes, or give another --out."
        )


def _finished(folder: RunFolder) -> RunResult | None:
    try:
        record = json.loads(folder.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return RunResult(**record["result"]) if record.get("state") == "finished" else None


def _seconds_before(folder: RunFolder, step: int) -> float:
    """Training time up to ``step`` in earlier sessions, as far as metrics.jsonl tells."""
    return max((line["seconds"] for line in read_metrics(folder.metrics) if line["step"] <= step), default=0.0)


@contextmanager
def _clear_failures(folder: RunFolder) -> Iterator[None]:
    """Failures of training in one sentence, with what is left to go on from."""
    try:
        yield
    except UserError:
        raise
    except _Diverged as error:
        way_out = "Lower train.learning_rate, or use bfloat16 or float32 instead of float16."
        raise Diverged(f"{error} Training stopped. {_kept_checkpoint(folder)} {way_out}") from error
    except KeyboardInterrupt:
        print_message = f"Interrupted. {_kept_checkpoint(folder)}"
        raise KeyboardInterrupt(print_message) from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device's memory is full: lower train.batch_size (and raise train.accumulate), "
            "or set train.gradient_checkpointing."
        ) from error
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise UserError(f"The disk is full, writing {folder.path} failed. {_kept_checkpoint(folder)}") from error


def _kept_checkpoint(folder: RunFolder) -> str:
    last = folder.last_checkpoint()
    if last is None:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {last}; `dual-lora train --resume --out {folder.path}` goes on from it."


def _note_failure(folder: RunFolder, error: BaseException) -> None:
    """Let record.json say that the run stopped, and why."""
    with suppress(OSError, ValueError):
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        if record["state"] == "running":
            record |= {"state": "stopped", "error": str(error) or type(error).__name__}
            write_atomically(folder.record, json.dumps(record, indent=1, ensure_ascii=False))


def _is_disk_full(error: BaseException) -> bool:
    """torch and safetensors wrap the system's error into their own kinds, the text survives."""
    full = (errno.ENOSPC, errno.EDQUOT)
    wrapped = ("No space left on device", "unexpected pos", "PytorchStreamWriter")  # the latter two: torch.save
    return (isinstance(error, OSError) and error.errno in full) or any(text in str(error) for text in wrapped)
