"""Whether a run can be gone on with: by the same recipe, on the same inputs, in as many processes."""

from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder, run_at
from dual_lora.lab.model.weights import is_other_base, warn_of_doubt
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.read import read_recipe
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.sealed import check_seal


def recipe_of_run(out: str | Path) -> Recipe:
    """The recipe that a run folder was made with."""
    return read_recipe(run_at(out).recipe)


def check_same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Raise UserError where the recipe is another one than the run was started with."""
    old, new = _settings(recipe_of_run(folder.path)), _settings(recipe)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"The run {folder.path} was started with other values of {', '.join(changed)}: "
            "resume it without changes, or give another --out."
        )


_LENGTH = {"batch_size", "steps", "epochs", "patience"}  # a run may be made longer (`longer.py`)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that training depends on; the batch size counts together with the number of processes."""
    free: dict[str, Any] = {"evaluate": True, "about": True, "name": True, "origin": True, "train": _LENGTH}
    parts = recipe.model_dump(mode="json", exclude=free)
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def check_same_inputs(folder: RunFolder, now: dict[str, Any], way_out: str = "") -> None:
    """Raise UserError where the records or the base are not what the run was started with, as far as it noted them.

    now: "rows" and "weights", or one of them. way_out: what to do but to put them back.
    """
    before = folder.recorded().get("made_of")
    before = before if isinstance(before, dict) else {}
    words = {"rows": "training records (or their tokens)", "weights": "base model's weights"}
    changed = [words["rows"]] if "rows" in now and before.get("rows", now["rows"]) != now["rows"] else []
    weights = before.get("weights"), now.get("weights", {})
    changed += [words["weights"]] if is_other_base(*weights) else []
    if changed:
        what = " and ".join(changed)
        raise UserError(f"The run {folder.path} was started with other {what}: put them back{way_out}.")
    warn_of_doubt(*weights, f"the run {folder.path} was started with")


def check_same_batch_size(folder: RunFolder, batch_size: int, processes: int) -> None:
    """The order of the examples depends on the global batch size, over all processes."""
    try:
        record = read_object(folder.record)
        was_on = int(record["processes"])
        before, now = int(record.get("rows_at_once", batch_size * processes)), batch_size * processes
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"The record {folder.record} could not be read ({error!r}), so the run cannot be "
            "continued: start again with another --out."
        ) from None
    if before == now:
        return
    fitting = f"with --train.batch-size {before // processes}, or " if before % processes == 0 else ""
    raise UserError(
        f"The run {folder.path} took {before} examples at once, on {was_on} process(es); here it would "
        f"take {now}, on {processes} with a batch size of {batch_size}, and see other examples than before. Resume it "
        f"{fitting}on {was_on} process(es), or give another --out."
    )


def check_same_sharding(checkpoint: Path | None, trainer: Any) -> None:
    """Raise UserError for a launch that saves no adapter, and for a checkpoint that it would not read as it was
    written, or must not unpickle.

    One process, FSDP and DeepSpeed each have files of their own, and Trainer reads those of its launch alone.
    """
    now = _launch_sharding(trainer)
    if checkpoint is None:
        return
    before = _checkpoint_sharding(checkpoint)
    if now != before:
        raise UserError(f"The checkpoint {checkpoint} was written {before}, and this run is {now}. {_ADVICE[before]}.")
    if now == _DEEPSPEED:
        check_seal(checkpoint)


_ALONE, _FSDP, _DEEPSPEED = "without FSDP", "with FSDP", "with DeepSpeed"
_ADVICE = {
    _ALONE: "Start it without FSDP and DeepSpeed, as before",
    _FSDP: "Start it by `accelerate launch` with FSDP again; any number of processes will do, one too",
    _DEEPSPEED: "Start it by `accelerate launch` with DeepSpeed again, on as many processes",
}


def _launch_sharding(trainer: Any) -> str:
    """Return how this launch shards a model, which decides the checkpoint files that it reads."""
    if trainer.is_deepspeed_enabled:
        return _DEEPSPEED
    if not trainer.is_fsdp_enabled:
        return _ALONE
    kind = trainer.accelerator.state.fsdp_plugin.state_dict_type
    kind = getattr(kind, "name", str(kind))
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"FSDP's state_dict_type is {kind}, expected FULL_STATE_DICT: of the others transformers saves no adapter "
            "at the end, and a checkpoint in parts is read in a way that can run code. Set fsdp_state_dict_type in "
            "accelerate's configuration, or state_dict_type in train.arguments.fsdp_config."
        )
    return _FSDP


def _checkpoint_sharding(checkpoint: Path) -> str:
    if any(checkpoint.glob("global_step*")):
        return _DEEPSPEED
    return _FSDP if any(checkpoint.glob("pytorch_model_fsdp*")) else _ALONE
