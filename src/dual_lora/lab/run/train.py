"""Fine-tune by a recipe: transformers' Trainer with a fixed order of rows, whole checkpoints and a full record."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dual_lora._warning import warn
from dual_lora.lab.data.encode import rows_digest
from dual_lora.lab.data.overlap import undeclared
from dual_lora.lab.errors import UserError, described, is_disk_full, memory_full
from dual_lora.lab.model import precision
from dual_lora.lab.model.device import process_count
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.methods import apply_method, is_kind, method_config, plain_config
from dual_lora.lab.model.note import name_in_adapter, write_note
from dual_lora.lab.model.opened import Tuned, untrained_model
from dual_lora.lab.model.weights import weights_digest
from dual_lora.lab.progress import Bar, console, stage
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run import longer
from dual_lora.lab.run.aligned import build_aligned, check_objective
from dual_lora.lab.run.best import Best, check_best, counts_from
from dual_lora.lab.run.failures import Diverged as Diverged
from dual_lora.lab.run.failures import check_finite, clear_failures, note_failure
from dual_lora.lab.run.folder import (
    RunFolder,
    check_same_inputs,
    recipe_of_run,
    same_recipe,
    same_rows_at_once,
    same_sharding,
)
from dual_lora.lab.run.hub_card import card_text
from dual_lora.lab.run.loop import build_trainer, check_names, check_patterns, check_precision
from dual_lora.lab.run.prepare import prepare, save_as_change, show_gradients, wants_gradients
from dual_lora.lab.run.record import peak_memory, read_metrics, reset_peak, surroundings
from dual_lora.lab.run.reporting import check_reports, reported
from dual_lora.lab.run.session import begin, seconds_before
from dual_lora.lab.run.watch import RankAllocation, Watch
from dual_lora.lab.run.write import write_atomically, write_folder_atomically, write_json
from dual_lora.lab.verify import fingerprint
from dual_lora.verify.callback import VerifyAdapter

# PEFT's methods that add a term to the loss which a model makes itself, and is not asked for here.
OWN_LOSS = ("SHADOW", "CPT")


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
    best_step: int | None = None  # of the lowest validation loss, where train.patience or train.keep_best ask for it
    stopped_early: bool = False  # by train.patience
    stopped_by: int = field(default=0, compare=False)  # the signal that interrupted this session, 0 for none
    tuned: Tuned | None = field(default=None, repr=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """Plain values, for record.json and ``--json``."""
        later = {"best_step", "stopped_early"}  # only where there is something to say
        names = [f.name for f in fields(self) if f.name not in ("stopped_by", "tuned")]
        return {name: value for name in names if (value := getattr(self, name)) or name not in later}


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
    names: tuple[str, str] | None = None,
    passing: bool = False,
) -> RunResult:
    """Train by ``recipe`` into the folder ``out``.

    resume: go on from the last whole checkpoint of ``out``, or from the start if there is none; the adapter comes out
    as if the run had never stopped. A finished run is left as it is. overwrite: remove the run that is in ``out``.
    callbacks: further callbacks of transformers' Trainer, after ours (the recipe does not record them).
    report_to: wandb, mlflow, tensorboard, trackio. names: of task and run in such reports; the recipe's unless told.
    passing: the adapter is not kept afterwards, so nothing is noted for `verify`.
    Raises UserError for everything that a person can put right; the last checkpoint stays in any case.
    """
    folder = RunFolder(Path(out))
    main = int(os.environ.get("RANK", "0")) == 0
    to = check_reports(report_to)
    if main:
        folder.open(resume, overwrite)
    reset_peak()
    asked = recipe
    try:
        if resume and folder.is_run:
            before = recipe_of_run(folder.path)
            recipe = asked = precision.settled_as(recipe, before)
            same_recipe(recipe, folder)
            if folder.result is not None and not longer.changed(recipe, before) and (finished := _finished(folder)):
                return finished
        recipe = precision.settled_here(recipe)
        if precision.leaves_open(asked) and progress and main:
            console.print(str(precision.fast_precision()))
        with clear_failures(folder, recipe):
            task, name = names or (recipe.name, f"{recipe.method['name']}/seed-{recipe.train.seed}")
            with reported(to, task, name, folder.path) as reports:
                return _train(recipe, asked, folder, main, progress, callbacks, reports, passing)
    except BaseException as error:
        if main:
            note_failure(folder, error)
        raise
    finally:
        if main:
            folder.close()


def _train(
    recipe: Recipe,
    asked: Recipe,
    folder: RunFolder,
    main: bool,
    progress: bool,
    more: Sequence[TrainerCallback],
    reports: dict[str, Any],
    passing: bool,
) -> RunResult:
    part = recipe.train
    # With any number of steps: a wrong field shows before data and model are read, and the folder stays empty.
    method_config(recipe.method, recipe.model.head, steps=10**6, fresh=[])
    check_names(part)
    check_precision(recipe)
    check_best(part)
    check_objective(recipe, method_config(recipe.method, recipe.model.head, steps=10**6, fresh=[]))
    if main and (why := undeclared(recipe.data)):
        warn(f"The sets are not apart: {why}", stacklevel=2)
    start, checkpoint = folder.last_checkpoint()
    known = longer.ends_of(folder.recorded()) if checkpoint else []
    ready = prepare(recipe, progress, known)
    loaded, steps, tokens = ready.loaded, ready.steps, ready.tokens
    config = method_config(recipe.method, recipe.model.head, steps, loaded.fresh)
    if any(is_kind(config, kind) for kind in OWN_LOSS):
        raise UserError(
            f"The method {recipe.method['name']} adds a loss of its own to the model's, which is not asked for one "
            "here: train it with transformers' Trainer."
        )
    if wants_gradients(config):
        show_gradients(loaded.model, config, ready, part.batch_size, ready.collator(loaded.model))
    model = apply_method(loaded, config, recipe.model, part.seed)
    check_patterns("train.rates", part.rates, model)

    if checkpoint:
        longer.check_longer(folder, steps, start, plain_config(config))
    ends = [end for end in known if end < steps]
    if checkpoint and is_kind(config, "ADALORA"):
        warn(
            "AdaLoRA's checkpoints do not hold the averages by which it chooses ranks, so the run begins anew.",
            stacklevel=2,
        )
        start, checkpoint = 0, None
        if main:
            folder.keep_newest(0)
    counts = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all_parameters": sum(p.numel() for p in model.parameters()),
        "examples": len(ready.rows),
        "left_out": ready.left_out,
    }
    processes = process_count()
    made_of: dict[str, Any] = {"rows": rows_digest(ready.rows), "weights": weights_digest(recipe.model)}
    if checkpoint:
        same_rows_at_once(folder, part.batch_size, processes)
        check_same_inputs(folder, made_of, ", or begin anew with --overwrite or in another --out")
    record = {"state": "running", "method": plain_config(config), "seed": part.seed, "classes": ready.classes}
    record |= {"processes": processes, "rows_at_once": part.batch_size * processes, "made_of": made_of}
    record |= {"extended": ends} if ends else {}
    if recipe.origin is not None:
        record["origin"] = recipe.origin.model_dump(mode="json")
    chosen = folder.recorded().get("precision") if folder.is_run else None  # by an earlier session of this run
    record["precision"] = chosen or precision.record_of(asked, recipe)
    record |= {"total_steps": steps, **counts, **surroundings()}
    earlier = seconds_before(folder, start)
    if main:
        begin(recipe, folder, record, start)
        if wants_gradients(config):
            write_folder_atomically(folder.start, lambda part: model.save_pretrained(str(part)), listed=True)

    with Bar("training", steps, progress and main, start) as bar, quiet():
        watch = Watch(folder, bar, tokens, earlier, part.keep_checkpoints, main)
        best = Best(part, folder, counts_from(config), main) if part.patience or part.keep_best else None
        checks = [] if config is None else [VerifyAdapter(tokenizer=loaded.tokenizer)]
        callbacks = [*_callbacks_of(config), *checks, *more]
        callbacks += [longer.Longer(ends[-1], progress and main)] if ends else []
        with _clear_beginning(watch, checkpoint, part.arguments):
            build = build_trainer if recipe.objective.name == "sft" else build_aligned
            trainer = build(model, recipe, folder, ready, watch, [best] if best else [], callbacks, reports)
            for noisy in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(noisy)
            same_sharding(checkpoint, trainer)
            with watch.interruptible():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    done = trainer.state.global_step
    seconds = earlier + watch.seconds()
    lines = read_metrics(folder.metrics)
    result = RunResult(
        folder=str(folder.path),
        state="finished" if done >= steps or (best and best.stopped and not watch.stopped_by) else "interrupted",
        steps=done,
        loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        validation_loss=next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None),
        seconds=round(seconds, 3),
        tokens=tokens[done],
        tokens_per_second=round(tokens[done] / seconds, 1) if seconds else 0.0,
        peak_memory=peak_memory(),
        adapter_bytes=0,
        stopped_by=watch.stopped_by,
        best_step=best.step if best else None,
        stopped_early=bool(best and best.stopped),
        **counts,
    )
    if result.state == "finished":
        check_finite(model, done)
        _as_opened(trainer, model)
        if best:
            best.put_back(model)
        target = folder.full_model if config is None else folder.adapter
        labels = len(ready.classes) or None
        untrained = partial(untrained_model, recipe.model, recipe.train.seed, labels, str(model.device))
        tuned = result.tuned = Tuned(
            model.eval(),
            loaded.tokenizer,
            str(folder.path),
            recipe,
            ready.classes,
            run=folder.path,
            untrained=untrained,
        )

        def complete(part: Path) -> None:
            if not (passing or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
                fingerprint.leave(tuned, part)
            result.adapter_bytes = sum(f.stat().st_size for f in part.glob("*.safetensors"))
            card = part / "README.md"
            text = card_text(folder, recipe, card, record={**record, "result": result.summary()}, fresh=True)
            write_atomically(card, text)

        if main and (ends or start):
            longer.forget_scores(folder)
        noted = "" if ready.classes or config is None else ", fingerprint (for `dual-lora verify`)"
        with stage(f"saving {target}: weights{noted}, card", progress):
            _save(trainer, tuned, recipe, target, main, made_of["weights"], complete)
    if main:
        record |= {"state": result.state, "result": result.summary()}
        record["problems"] = [problem for check in checks for problem in check.problems]
        write_json(folder.record, record)
    return result


def _as_opened(trainer: Trainer, model: Any) -> None:
    """The model as whoever opens the adapter has it: without training's autocast, with an optimizer's averages in."""
    # Not accelerate's `unwrap_model`, which takes transformers' own decorators off as well.
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        model.forward = forward
    put_in: Any = getattr(trainer.optimizer, "eval", None)  # of optimizers that keep averages (schedule-free)
    if callable(put_in):
        put_in()


@contextmanager
def _clear_beginning(watch: Watch, checkpoint: Path | None, arguments: Iterable[str]) -> Iterator[None]:
    """Errors before the first step: the checkpoint was not what it should be, or a further argument."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if watch.begun or memory_full(error) or is_disk_full(error):
            raise
        if checkpoint is not None:
            raise UserError(
                f"The checkpoint {checkpoint} could not be read: {described(error)} Remove it to go on from an "
                "earlier one or from the start."
            ) from error
        if not arguments:
            raise
        raise UserError(
            f"Training could not begin: {described(error)} Look at train.arguments ({', '.join(arguments)})."
        ) from error


def _callbacks_of(config: Any) -> list[TrainerCallback]:
    """What a method needs to be told while it trains."""
    if is_kind(config, "DUAL_LORA"):
        from dual_lora import DualLoraCallback

        return [DualLoraCallback()]
    return [RankAllocation()] if is_kind(config, "ADALORA") else []


def _save(
    trainer: Trainer, tuned: Tuned, recipe: Recipe, target: Path, main: bool, base: dict[str, str],
    complete: Callable[[Path], None],
) -> None:  # fmt: skip
    def write(folder: Path) -> None:
        with quiet():
            if (start := target.with_name("start")).is_dir():
                save_as_change(trainer.model, start, folder)
            else:
                trainer.save_model(str(folder))  # gathers sharded weights where there are several devices
            tuned.tokenizer.save_pretrained(str(folder))
        name_in_adapter(folder, tuned.model, tuned.classes)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it stands in the recipe
        write_note(folder, recipe, tuned.classes, base)
        complete(folder)  # before the folder is listed: fingerprint and card are ours too

    if main:
        write_folder_atomically(target, write, listed=True)
    else:
        trainer.save_model(str(target.with_name(target.name + ".part")))


def _finished(folder: RunFolder) -> RunResult | None:
    record = folder.recorded()
    try:
        return RunResult(**record["result"]) if record.get("state") == "finished" else None
    except (KeyError, TypeError):
        return None
