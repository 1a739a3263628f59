"""dual-lora train"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dual_lora._warning import warn
from dual_lora.lab.commands.card import duration, facts_card, finish, size
from dual_lora.lab.commands.parameters import Device, Json, ReportTo, flag_values, flags
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.interrupt import Stopped, exit_status
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.read import build_recipe, read_recipe, recipe_values
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run import early

if TYPE_CHECKING:
    from dual_lora.lab.run.train import RunResult

RecipeFlags: Any = flags(Recipe)


def train(
    recipe: Annotated[str | None, Parameter(help="Recipe file, or the name of a shipped recipe.")] = None,
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the run. [default: runs/NAME]")] = None,
    resume: Annotated[bool, Parameter(help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, Parameter(help="Remove the run in the folder first.")] = False,
    analyze_every: Annotated[
        int | None,
        Parameter(
            help="Steps between two records of the adapter's signs, zeros and flips (analysis/live.jsonl in the run; "
            "`dual-lora analyze` reads it)."
        ),
    ] = None,
    report_to: ReportTo = (),
    device: Device = None,
    json: Json = False,
    given: Annotated[
        RecipeFlags | None,
        Parameter(name="*", negative_bool="no-", show_default=False, consume_multiple=True),
    ] = None,
) -> None:
    """Fine-tune a model, by a recipe or by options.

    Example: `dual-lora train boolq-smollm2 --method.name lora --train.steps 40`

    Your own data:

    `dual-lora train --model.path my-model --data.train my.jsonl --out runs/mine`

    After an interruption: `dual-lora train --resume --out runs/mine`

    Many devices: `accelerate launch -m dual_lora.lab.cli train boolq-smollm2`

    Every field of a recipe is an option. `--help` shows the usual ones, `--help-all` shows all.
    """
    chosen = _chosen(recipe, flag_values(given), out, resume)
    folder = out or Path("runs") / chosen.name
    early.check(chosen, folder, resume, overwrite)
    with stage(f"{chosen.name}: {chosen.method['name']} on {chosen.model.path}, into {folder}"):
        from dual_lora.lab.model.device import use_device
        from dual_lora.lab.run.hub_card import too_long_note
        from dual_lora.lab.run.train import run

        use_device(device)
        if recipe is not None:
            _warn_of_dropped(recipe, flag_values(given), chosen)

    looks = _analysis_callbacks(chosen, folder, analyze_every)
    result = run(chosen, folder, resume=resume, overwrite=overwrite, callbacks=looks, report_to=report_to)
    share = result.trainable_parameters / result.all_parameters
    loss = f"{result.loss:.4f}" if result.loss is not None else "–"
    facts = {
        "steps": f"{result.steps} in {duration(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s"
        + _early_stop_note(chosen, result),
        "examples": f"{result.examples:,}{too_long_note(chosen, result.left_out)}{_train_limit_note(chosen, result)}",
        "loss": loss + (f", validation {result.validation_loss:.4f}" if result.validation_loss is not None else ""),
        "trainable": f"{result.trainable_parameters:,} parameters ({share:.2%})",
        "memory": f"{size(result.peak_memory)} at the peak",
        "folder": f"{folder}" + (f" ({size(result.adapter_bytes)} of weights)" if result.adapter_bytes else ""),
        "next": _next(chosen, folder),
    }
    if result.state != "finished":
        facts["next"] = RunFolder(folder).resume_command
    finish(result.summary(), facts_card(f"{chosen.name} · {chosen.method['name']} · {result.state}", facts), json)
    if result.state != "finished":
        raise SystemExit(exit_status(Stopped(result.stopped_by)))


def _early_stop_note(recipe: Recipe, result: RunResult) -> str:
    """Say that validations ended the run, and whose weights are saved."""
    count = recipe.train.patience
    validations = "a validation" if count == 1 else f"{count} validations"
    ended = f", ended by {validations} without a lower loss" if result.stopped_early else ""
    if not (recipe.train.keep_best and result.best_step):
        return ended
    if result.state != "finished":  # no adapter is there yet
        return f"{ended}, lowest validation loss at step {result.best_step}"
    return f"{ended}, weights of step {result.best_step} saved"


def _train_limit_note(recipe: Recipe, result: RunResult) -> str:
    """Say that the recipe takes this many records and no more, which it also does of records other than its own."""
    read = result.examples + result.left_out * (recipe.model.head == "causal")  # a classifier's are cut
    return f" (data.train_limit: {read:,})" if read == recipe.data.train_limit else ""


def _next(recipe: Recipe, folder: Path) -> str:
    """A command that this recipe has everything for."""
    data, run = recipe.data, quote(str(folder))
    there = {"test": data.test or data.tests, "validation": data.validation or data.holdout, "train": True}
    if there[recipe.evaluate.split]:
        return f"dual-lora evaluate {run}"
    if recipe.model.head == "causal":
        return f'dual-lora generate {run} "…"'
    return f"dual-lora evaluate {run} --data.test FILE"


def _analysis_callbacks(recipe: Recipe, folder: Path, every: int | None) -> list[Any]:
    if every is None:
        return []
    if every < 1:
        raise UserError(f"--analyze-every is {every}, expected at least 1 optimizer step.")
    if recipe.method["name"] == "full":
        raise UserError("--analyze-every looks at an adapter, and full fine-tuning has none: compare its checkpoints.")
    from dual_lora.lab.analysis.callback import AnalysisCallback

    return [AnalysisCallback(folder / "analysis" / "live.jsonl", every)]


def _warn_of_dropped(source: str, overrides: dict[str, Any], chosen: Recipe) -> None:
    """Say which settings of the recipe's method another method does not take over: its size may be another."""
    before = recipe_values(source)[0].get("method") or {}
    if "method" not in overrides or not isinstance(before, dict) or chosen.method["name"] == "full":
        return
    dropped = {key: value for key, value in before.items() if key != "name" and key not in chosen.method}
    if dropped:
        from dual_lora.lab.model.methods import method_fields

        method_fields(str(chosen.method["name"]))  # raises UserError for a name that is no method's
        given = ", ".join(f"{key}: {value}" for key, value in dropped.items())
        warn(
            f"method {chosen.method['name']} does not take over the recipe's {given}. What you do not set yourself "
            "(--method.r, …) has that method's own default.",
            stacklevel=3,
        )


def _chosen(source: str | None, overrides: dict[str, Any], out: Path | None, resume: bool) -> Recipe:
    if source is not None:
        return read_recipe(source, overrides)
    if resume:
        if out is None:
            raise UserError("--resume needs --out, the folder of the run, or the recipe that it was made with.")
        if not (out / "recipe.yaml").is_file():
            raise UserError(f"There is no run in {out} (it holds no recipe.yaml): name the recipe to begin one there.")
        return read_recipe(out, overrides)
    if not overrides:
        raise UserError(
            "Say what to train: a recipe (`dual-lora recipes` lists them), or --model.path and --data.train."
        )
    return build_recipe(Recipe.merged({"name": (out.resolve().name if out else "") or "run"}, overrides), "flags")
