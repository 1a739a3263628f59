"""Fine-tune by a recipe: transformers' Trainer with a fixed order of rows, whole checkpoints and a full record.

A session goes three steps: everything is prepared (`_begin`), trained (`_fit`) and kept (`keep.keep`).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dual_lora._warning import warn
from dual_lora.lab.data.encode import rows_digest
from dual_lora.lab.data.overlap import undeclared, unlearned
from dual_lora.lab.errors import UserError, described, is_disk_full, memory_full
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_folder_atomically
from dual_lora.lab.model import precision
from dual_lora.lab.model.device import process_count
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.methods import apply_method, is_kind, method_config, plain_config
from dual_lora.lab.model.weights import weights_digest
from dual_lora.lab.progress import Bar, console
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run import longer
from dual_lora.lab.run.aligned import build_aligned, check_objective
from dual_lora.lab.run.best import Best, check_best, counts_from
from dual_lora.lab.run.checkpoint import check_checkpoint, keep_settings
from dual_lora.lab.run.failures import Diverged as Diverged
from dual_lora.lab.run.failures import clear_failures, note_failure
from dual_lora.lab.run.keep import RunResult as RunResult
from dual_lora.lab.run.keep import finished_result, keep
from dual_lora.lab.run.loop import build_trainer, check_names, check_patterns, check_precision
from dual_lora.lab.run.prepare import Prepared, prepare, show_gradients, wants_gradients
from dual_lora.lab.run.record import Record, reset_peak, surroundings
from dual_lora.lab.run.reporting import check_reports, reported
from dual_lora.lab.run.resume import (
    check_same_batch_size,
    check_same_inputs,
    check_same_recipe,
    check_same_sharding,
    recipe_of_run,
)
from dual_lora.lab.run.session import Begun, Fitted, Session, begin, seconds_before
from dual_lora.lab.run.watch import RankAllocation, Watch
from dual_lora.verify.callback import VerifyAdapter

# PEFT's methods that add a term to the loss which a model makes itself, and is not asked for here.
OWN_LOSS = ("SHADOW", "CPT")


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
            recipe = asked = precision.with_precision_of(recipe, before)
            check_same_recipe(recipe, folder)
            if (
                folder.result is not None
                and not longer.has_other_length(recipe, before)
                and (before_us := finished_result(folder))
            ):
                if progress and main:
                    console.print(longer.already_finished(folder, before_us.steps, recipe), soft_wrap=True)
                return before_us
        config = method_config(recipe.method, recipe.model.head, steps=10**6, fresh=[])  # with any number of steps
        recipe = precision.with_device_precision(recipe)
        if precision.is_auto(asked) and progress and main:
            console.print(str(precision.fast_precision()))
        with clear_failures(folder, recipe):
            task, name = names or (recipe.name, f"{recipe.method['name']}/seed-{recipe.train.seed}")
            with reported(to, task, name, folder.path) as reports:
                return _train(Session(recipe, asked, folder, main, progress), config, callbacks, reports, passing)
    except BaseException as error:
        if main:
            note_failure(folder, error)
        raise
    finally:
        if main:
            folder.close()


def _train(
    session: Session, config: Any, callbacks: Sequence[TrainerCallback], reports: dict[str, Any], passing: bool
) -> RunResult:
    _check(session, config)
    begun = _begin(session)
    fitted = _fit(session, begun, callbacks, reports)
    return keep(session, begun, fitted, passing)


def _check(session: Session, config: Any) -> None:
    """Raise UserError for errors in the recipe, before data and model are read; the folder stays empty."""
    recipe = session.recipe
    check_names(recipe.train)
    check_precision(recipe)
    check_best(recipe.train)
    check_objective(recipe, config)
    if session.main and (why := undeclared(recipe.data)):
        warn(f"The sets overlap: {why}", stacklevel=2)
    if session.main and recipe.model.head == "classification" and (labels := unlearned(recipe.data)):
        shown = ", ".join(map(repr, labels[:5])) + (", …" if len(labels) > 5 else "")
        warn(
            f"Test or validation records have labels that no training record has ({shown}): `dual-lora "
            "evaluate` stops at the first one. `dual-lora check-data` counts the labels of each set.",
            stacklevel=2,
        )


def _begin(session: Session) -> Begun:
    """Make data, model and method, and find the checkpoint to go on from; write recipe and record."""
    recipe, folder = session.recipe, session.folder
    start, checkpoint = folder.last_checkpoint()
    known = longer.ends_of(folder.recorded()) if checkpoint else []
    ready = prepare(recipe, session.progress, known)
    config, model = _with_method(recipe, ready)
    if checkpoint:
        longer.check_longer(folder, ready.steps, start, plain_config(config))
    if checkpoint and is_kind(config, "ADALORA"):
        warn(
            "AdaLoRA's checkpoints do not hold the averages by which it chooses ranks, so the run begins anew.",
            stacklevel=2,
        )
        start, checkpoint = 0, None
        if session.main:
            folder.keep_newest(0)
    ends = [end for end in known if end < ready.steps]
    record = _record(session, ready, config, model, ends)
    if checkpoint:
        check_same_batch_size(folder, recipe.train.batch_size, record.processes)
        check_same_inputs(folder, record.made_of, ", or begin anew with --overwrite or in another --out")
    earlier = seconds_before(folder, start)
    if session.main:
        begin(recipe, folder, record.written(), start)
        if wants_gradients(config):
            write_folder_atomically(folder.start, lambda part: model.save_pretrained(str(part)), listed=True, anew=True)
    return Begun(ready, config, model, record, start, checkpoint, ends, earlier)


def _with_method(recipe: Recipe, ready: Prepared) -> tuple[Any, Any]:
    """The method's configuration (None for full fine-tuning), and the model with it."""
    loaded, part = ready.loaded, recipe.train
    config = method_config(recipe.method, recipe.model.head, ready.steps, loaded.fresh)
    if any(is_kind(config, kind) for kind in OWN_LOSS):
        raise UserError(
            f"dual-lora cannot train the method {recipe.method['name']}: the method adds a loss of its own, and this "
            "command computes only the model's. Train it with transformers' Trainer."
        )
    if wants_gradients(config):
        show_gradients(loaded.model, config, ready, part.batch_size, ready.collator(loaded.model))
    model = apply_method(loaded, config, recipe.model, part.seed)
    check_patterns("train.rates", part.rates, model)
    return config, model


def _record(session: Session, ready: Prepared, config: Any, model: Any, ends: list[int]) -> Record:
    recipe, folder, processes = session.recipe, session.folder, process_count()
    chosen = folder.recorded().get("precision") if folder.is_run else None  # by an earlier session of this run
    return Record(
        method=plain_config(config),
        seed=recipe.train.seed,
        classes=ready.classes,
        processes=processes,
        rows_at_once=recipe.train.batch_size * processes,
        made_of={"rows": rows_digest(ready.rows), "weights": weights_digest(recipe.model)},
        extended=ends,
        origin=None if recipe.origin is None else recipe.origin.model_dump(mode="json"),
        precision=chosen or precision.record_of(session.asked, recipe),
        total_steps=ready.steps,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=sum(p.numel() for p in model.parameters()),
        examples=len(ready.rows),
        left_out=ready.left_out,
        surroundings=surroundings(),
    )


def _fit(session: Session, begun: Begun, more: Sequence[TrainerCallback], reports: dict[str, Any]) -> Fitted:
    """Train to the end, or until somebody stops it."""
    recipe, folder, main, ready = session.recipe, session.folder, session.main, begun.ready
    part, shown = recipe.train, session.progress and main
    with Bar("training", ready.steps, shown, begun.start) as bar, quiet():
        watch = Watch(folder, bar, ready.tokens, begun.earlier, part.keep_checkpoints, main)
        best = Best(part, folder, counts_from(begun.config), main) if part.patience or part.keep_best else None
        answers = not all(example.whole for example in ready.examples)
        checks = [] if begun.config is None else [VerifyAdapter(tokenizer=ready.loaded.tokenizer, answers=answers)]
        callbacks = [*_callbacks_of(begun.config), *checks, *more]
        callbacks += [longer.Longer(begun.ends[-1], shown)] if begun.ends else []
        with _clear_start_errors(watch, begun.checkpoint, part.arguments):
            build = build_trainer if recipe.objective.name == "sft" else build_aligned
            trainer = build(begun.model, recipe, folder, ready, watch, [best] if best else [], callbacks, reports)
            for noisy in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(noisy)
            check_same_sharding(begun.checkpoint, trainer)
            if begun.checkpoint and not trainer.is_deepspeed_enabled:  # whose are sealed
                check_checkpoint(
                    begun.checkpoint, begun.start, begun.model, trainer.args, bool(trainer.is_fsdp_enabled)
                )
                keep_settings(trainer, begun.checkpoint, bool(begun.ends))
            if begun.checkpoint and not begun.ends and shown:
                console.print(f"Continuing from step {begun.start} of {ready.steps}.")
            with watch.interruptible():
                trainer.train(resume_from_checkpoint=str(begun.checkpoint) if begun.checkpoint else None)
    return Fitted(trainer, watch, best, checks)


@contextmanager
def _clear_start_errors(watch: Watch, checkpoint: Path | None, arguments: Iterable[str]) -> Iterator[None]:
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
    """Return the callbacks that a method needs while it trains."""
    if is_kind(config, "DUAL_LORA"):
        from dual_lora import DualLoraCallback

        return [DualLoraCallback()]
    return [RankAllocation()] if is_kind(config, "ADALORA") else []
