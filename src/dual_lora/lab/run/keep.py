"""The end of a session: what the run came to, and what it leaves: adapter or model, note, card and record."""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_atomically, write_folder_atomically, write_json
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.note import name_in_adapter, write_note
from dual_lora.lab.model.opened import Tuned, untrained_model
from dual_lora.lab.progress import stage
from dual_lora.lab.read import read_object
from dual_lora.lab.run import longer
from dual_lora.lab.run.failures import check_finite
from dual_lora.lab.run.hub_card import card_text
from dual_lora.lab.run.prepare import save_as_change, wants_gradients
from dual_lora.lab.run.record import peak_memory, read_metrics
from dual_lora.lab.run.session import Begun, Fitted, Session
from dual_lora.lab.verify import fingerprint


@dataclass
class RunResult:
    """The result of a run. Sizes in bytes, times in seconds of training proper (all sessions of a resumed run)."""

    folder: str
    state: str  # "finished", or "interrupted" with a checkpoint to resume from
    steps: int
    loss: float | None  # of the last log line
    validation_loss: float | None  # of the last validation; of the weights that are saved, where they are the best ones
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


def keep(session: Session, begun: Begun, fitted: Fitted, passing: bool) -> RunResult:
    """Write what was trained, if it was trained to its end, and the record. passing: see `train.run`."""
    result = _result(session, begun, fitted)
    if result.state == "finished":
        result.tuned = _tuned(session, begun, fitted)
        _save(session, begun, fitted, result, passing)
    if session.main:
        begun.record.state, begun.record.result = result.state, result.summary()
        begun.record.problems = [problem for check in fitted.checks for problem in check.problems]
        write_json(session.folder.record, begun.record.written())
    return result


def finished_result(folder: RunFolder) -> RunResult | None:
    """Return the result in the record of a run that has weights; None where that does not say that it is finished.

    Raises UserError for a record that cannot be read: a finished run has no checkpoints, and would be trained anew.
    """
    try:
        record = read_object(folder.record)
        return RunResult(**record["result"]) if record.get("state") == "finished" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The record {folder.record} cannot be read ({error!r:.200}), and {folder.result} may be finished. Put the "
            "record back, or begin anew with --overwrite or in another --out."
        ) from None


def _result(session: Session, begun: Begun, fitted: Fitted) -> RunResult:
    best, watch, record = fitted.best, fitted.watch, begun.record
    done = fitted.trainer.state.global_step
    early = best is not None and best.stopped
    seconds, tokens = begun.earlier + watch.seconds(), begun.ready.tokens[done]
    lines = read_metrics(session.folder.metrics)
    finished = done >= begun.ready.steps or (early and not watch.stopped_by)
    validation_loss = next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None)
    if finished and best is not None and best.weights:
        validation_loss = best.loss
    return RunResult(
        folder=str(session.folder.path),
        state="finished" if finished else "interrupted",
        steps=done,
        loss=watch.newest_loss(lines),
        validation_loss=validation_loss,
        seconds=round(seconds, 3),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else 0.0,
        peak_memory=peak_memory(),
        trainable_parameters=record.trainable_parameters,
        all_parameters=record.all_parameters,
        adapter_bytes=0,
        examples=record.examples,
        left_out=record.left_out,
        best_step=best.step if best else None,
        stopped_early=early,
        stopped_by=watch.stopped_by,
    )


def _tuned(session: Session, begun: Begun, fitted: Fitted) -> Tuned:
    """The trained model, as whoever opens the run has it."""
    recipe, model, ready = session.recipe, begun.model, begun.ready
    check_finite(model, fitted.trainer.state.global_step)
    _prepare_for_use(fitted.trainer, model)
    if fitted.best:
        fitted.best.put_back(model)
    labels = len(ready.classes) or None
    untrained = partial(untrained_model, recipe.model, recipe.train.seed, labels, str(model.device))
    path = session.folder.path
    return Tuned(model.eval(), ready.loaded.tokenizer, str(path), recipe, ready.classes, run=path, untrained=untrained)


def _prepare_for_use(trainer: Trainer, model: Any) -> None:
    """The model as whoever opens the adapter has it: without training's autocast, with an optimizer's averages in."""
    # Not accelerate's `unwrap_model`, which takes transformers' own decorators off as well.
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        model.forward = forward
    put_in: Any = getattr(trainer.optimizer, "eval", None)  # of optimizers that keep averages (schedule-free)
    if callable(put_in):
        put_in()


def _save(session: Session, begun: Begun, fitted: Fitted, result: RunResult, passing: bool) -> None:
    """The adapter or model in its folder, whole or not at all. `result` learns its size and its card says the rest."""
    folder, recipe, trainer, tuned = session.folder, session.recipe, fitted.trainer, result.tuned
    assert tuned is not None
    target = folder.full_model if begun.config is None else folder.adapter
    in_parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    def write(part: Path) -> None:
        with quiet():
            if wants_gradients(begun.config):  # whose start this session has written: any other is a stranger's
                save_as_change(trainer.model, folder.start, part)
            else:
                trainer.save_model(str(part))  # gathers sharded weights where there are several devices
            tuned.tokenizer.save_pretrained(str(part))
        name_in_adapter(part, tuned.model, tuned.classes)
        (part / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all of it stands in the recipe
        write_note(part, recipe, tuned.classes, begun.record.made_of["weights"])
        if not (passing or in_parts):  # before the folder is listed: fingerprint and card are ours too
            fingerprint.write_for_run(tuned, part)
        result.adapter_bytes = sum(f.stat().st_size for f in part.glob("*.safetensors"))
        card, record = part / "README.md", {**begun.record.written(), "result": result.summary()}
        write_atomically(card, card_text(folder, recipe, card, record=record, fresh=True))

    if session.main and (begun.ends or begun.start):
        longer.forget_scores(folder)
    noted = "" if begun.ready.classes or begun.config is None else ", fingerprint (for `dual-lora verify`)"
    with stage(f"saving {target}: weights{noted}, card", session.progress):
        if session.main:
            write_folder_atomically(target, write, listed=True, anew=True)
        else:
            trainer.save_model(str(target.with_name(target.name + ".part")))
