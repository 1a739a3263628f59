"""Whether a run can be gone on with: by the same recipe, with the same rows at once, sharded as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import parse_yaml, read_object, read_yaml_text
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.folder import RunFolder


def recipe_of_run(out: str | Path) -> Recipe:
    """The recipe that a run folder was made with."""
    folder = RunFolder(Path(out))
    if not folder.is_run:
        raise UserError(f"{out} is not a run: it holds no recipe.yaml.")
    return build_recipe(parse_yaml(read_yaml_text(folder.recipe), str(folder.recipe)), str(folder.recipe))


def same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Raise UserError where the recipe is another one than the run was started with."""
    old, new = recipe_of_run(folder.path).model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [
        f"{part}.{key}" if isinstance(old[part], dict) else part
        for part in old
        if part not in ("evaluate", "about", "name", "origin")
        for key in (set(old[part]) | set(new[part]) if isinstance(old[part], dict) else [""])
        if (part, key) != ("train", "batch_size")  # which counts together with the number of processes
        if (old[part].get(key) != new[part].get(key) if isinstance(old[part], dict) else old[part] != new[part])
    ]
    if changed:
        raise UserError(
            f"The run {folder.path} was started with other values of {', '.join(sorted(changed))}: "
            "resume it without changes, or give another --out."
        )


def same_rows_at_once(folder: RunFolder, batch_size: int, processes: int) -> None:
    """The order of the examples depends on the global batch size, over all processes."""
    try:
        record = read_object(folder.record)
        was_on = int(record["processes"])
        before, now = int(record.get("rows_at_once", batch_size * processes)), batch_size * processes
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"The record {folder.record} could not be read ({error!r}), so how the run was made is not known: begin it "
            "anew in another --out."
        ) from None
    if before == now:
        return
    fitting = f"with --train.batch-size {before // processes}, or " if before % processes == 0 else ""
    raise UserError(
        f"The run {folder.path} took {before} examples at once, on {was_on} process(es); here it would "
        f"take {now}, on {processes} with a batch size of {batch_size}, and see other examples than before. Resume it "
        f"{fitting}on {was_on} process(es), or give another --out."
    )


def same_sharding(checkpoint: Path, trainer: Any) -> None:
    """FSDP's checkpoints hold the adapter and the optimizer under other names, and Trainer reads its own kind alone."""
    before, now = (checkpoint / "pytorch_model_fsdp.bin").is_file(), trainer.is_fsdp_enabled
    if before == now:
        return
    if before:
        advice = "Start it by `accelerate launch` with FSDP again; any number of processes will do, one too"
    else:
        advice = "Start it without FSDP, as before"
    raise UserError(
        f"The checkpoint {checkpoint} was written {'with' if before else 'without'} FSDP, and this run is "
        f"{'with' if now else 'without'} it. {advice}."
    )
