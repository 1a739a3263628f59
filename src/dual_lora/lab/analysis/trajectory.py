"""A run's states in their order: the start (made again from the seed), every whole checkpoint, the end."""

from collections import defaultdict
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peft import set_peft_model_state_dict

from dual_lora.lab.analysis.matrices import Difference
from dual_lora.lab.analysis.opened_run import OpenedRun
from dual_lora.lab.analysis.updates import LayerUpdate, adapted_layers, full_updates, linear_layers, snapshot
from dual_lora.lab.errors import UserError, described
from dual_lora.lab.files.folder import RunFolder, run_at
from dual_lora.lab.model.bounds import check_finite_weights, check_stored_numbers
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.read import read_object


class State(NamedTuple):
    """A saved state: the optimizer step and its folder (None: the start)."""

    step: int
    folder: Path | None


def states_of(run: Path, limit: int | None = None) -> list[State]:
    """The states of a run; with a limit, so many spread evenly, start and end always among them.

    Raises UserError when not even the end or a checkpoint is there.
    """
    folder = run_at(run)
    steps = folder.whole_checkpoints()
    if folder.result is not None:
        end = _last_step(folder)
        steps[end] = folder.result
    if not steps:
        raise UserError(
            f"{run} holds neither a finished adapter nor a whole checkpoint: let it run, with train.checkpoint_every "
            "and train.keep_checkpoints set so that the states you want to see are kept."
        )
    found = [State(0, None), *(State(step, steps[step]) for step in sorted(steps))]
    if limit is None or len(found) <= limit:
        return found
    if limit < 2:
        raise UserError(f"{limit} states asked for, expected at least 2: the start and the end.")
    chosen = sorted({round(k * (len(found) - 1) / (limit - 1)) for k in range(limit)})
    return [found[k] for k in chosen]


def _last_step(folder: RunFolder) -> int:
    try:
        return int(read_object(folder.record)["result"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder.record} does not say how many steps the run took ({error!r}).") from None


def updates_in(opened: OpenedRun, state: State, layers: list[str], stack: ExitStack) -> dict[str, LayerUpdate]:
    """The updates at one state, by layer; an adapted model is put into that state.

    stack: closes the files that a full run's updates are read from.
    """
    if opened.is_full:
        return stack.enter_context(full_updates_of(state, opened.model, layers))
    if state.folder is not None:
        load_adapter_into(opened.model, state.folder)
    found = snapshot(opened.model)
    for name, origin in opened.origin.items():
        found[name] = LayerUpdate(partial(_difference_from, found[name], origin))
    return {name: found[name] for name in layers if name in found}


def _difference_from(now: LayerUpdate, start: LayerUpdate) -> Difference:
    return Difference(now.update(), start.update())


def full_updates_of(state: State, base: Any, layers: list[str]) -> AbstractContextManager[dict[str, LayerUpdate]]:
    """The updates of full fine-tuning at a state; none at the start."""
    if state.folder is None:
        return nullcontext({})
    files = sorted(state.folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{state.folder} holds no safetensors file.")
    return full_updates(files, base, layers)


def load_adapter_into(model: Any, folder: Path) -> None:
    """Put an adapter's saved tensors into the model. Raises UserError where they are missing, damaged or do not fit."""
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"The checkpoint {folder} holds no adapter_model.safetensors.")
    check_stored_numbers(file, f"The adapter {folder}")
    try:
        tensors = load_file(file)
        check_finite_weights(tensors, f"The adapter {folder}")
        taken: Any = set_peft_model_state_dict(model, tensors)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} does not fit the run's recipe: {described(error, Exception, lines=1)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"The adapter file {file} is damaged: {error}") from error
    names: defaultdict[Any, set[str]] = defaultdict(set)  # of a tensor that layers share: a file has it once
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].add(name)
    own = [p for layer in adapted_layers(model).values() for p in layer.parameters() if p.requires_grad]
    missing = [min(names[p]) for p in own if names[p] <= {*taken.missing_keys}]
    if missing or taken.unexpected_keys:  # PEFT says nothing, and a layer would keep what it had in the state before
        first = f"it lacks {missing[0]}" if missing else f"no layer has its {taken.unexpected_keys[0]}"
        raise UserError(f"{file} does not fit the run's recipe: {first}.")


def chosen_layers(opened: OpenedRun, pattern: str | None) -> list[str]:
    """The run's layers whose name the regular expression finds. Raises UserError when there is none."""
    names = linear_layers(opened.model) if opened.is_full else list(adapted_layers(opened.model))
    if not names:
        raise UserError(
            f"The method {opened.recipe.method['name']} of {opened.path} changes no weights of linear layers, so there "
            "is no update to look at (prompt tuning and its like change the input)."
        )
    if not pattern:
        return names
    try:
        wanted = Pattern(pattern, "--layers")
    except ValueError as error:
        raise UserError(f"--layers {error}.") from None
    found = [name for name in names if wanted.search(name)]
    if not found:
        raise UserError(f"--layers {pattern!r} matches none of {len(names)} layers, such as {names[0]}.")
    return found
