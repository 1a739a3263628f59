"""A checkpoint looked at before Trainer reads it: it may be a stranger's, or have lost a file.

Trainer reads what it finds. A whole model in an adapter's checkpoint takes the place of the base, an adapter in a
folder of it is built with whatever its configuration asks for, without the optimizer's file it begins a new one, and
weights that are not there stay as they were drawn.
"""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.named_files import check_plain_names
from dual_lora.lab.model.pickled import check_no_views, check_unpacked, load_whole
from dual_lora.lab.read import entries_named, read_object
from dual_lora.verify.numbers import header

STATE = "trainer_state.json"
SHARDED = "pytorch_model_fsdp.bin"  # FSDP's weights, gathered
NEEDED = (STATE, "scheduler.pt", "rng_state*.pth")
WHOLE_MODEL = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")
SETTINGS = (  # of torch's optimizers, and of those that are like them
    *("initial_lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "maximize"),
    *("alpha", "centered", "decoupled_weight_decay"),
)
ADAPTER = ("adapter_model.*",)  # in a folder of its own


def check_checkpoint(checkpoint: Path, step: int, model: Any, arguments: Any, sharded: bool = False) -> None:
    """Raise UserError for a checkpoint that is not what this run writes at this step.

    model: with the method, not yet sharded. arguments: Trainer's. sharded: of FSDP, whose files have other names.
    """
    adapted = hasattr(model, "peft_config")
    optimizer = f"optimizer.{'bin' if sharded else 'pt'}"
    missing = [name for name in (*NEEDED, optimizer, *[SHARDED] * sharded) if not any(checkpoint.glob(name))]
    if missing:
        _refuse(checkpoint, f"has no {missing[0].replace('*', '')}")
    inside = (file for path in checkpoint.iterdir() if path.is_dir() for file in entries_named(path, *ADAPTER))
    for found in (*inside, *(entries_named(checkpoint, *WHOLE_MODEL) if adapted else ())):
        if sharded and found.name == SHARDED:
            continue
        _refuse(checkpoint, f"holds {found.relative_to(checkpoint)}, which this run does not write")
    check_plain_names(checkpoint)
    for file in entries_named(checkpoint, "*.bin", "*.pt", "*.pth"):
        check_unpacked(file)
    check_no_views(checkpoint / optimizer)
    if sharded:
        _check_sharded_weights(checkpoint, model, adapted, arguments.process_index == 0)
    else:
        _check_weights(checkpoint, model, adapted)
    _check_state(checkpoint, step, arguments)


def _check_weights(checkpoint: Path, model: Any, adapted: bool) -> None:
    """All that is trained is there; of weights that are tied one is. Their shapes are compared as they are loaded."""
    held: set[str] = set()
    for file in checkpoint.glob("adapter_model.safetensors" if adapted else "model*.safetensors"):
        try:
            held |= header(file).keys()
        except (OSError, SafetensorError) as error:
            _refuse(checkpoint, f"has a damaged {file.name} ({error})")
    own = get_peft_model_state_dict(model, save_embedding_layers=False) if adapted else model.state_dict()
    tied = {weight.data_ptr() for name, weight in own.items() if name in held}
    _refuse_missing(checkpoint, [n for n, weight in own.items() if n not in held and weight.data_ptr() not in tied])


def _check_sharded_weights(checkpoint: Path, model: Any, adapted: bool, first: bool) -> None:
    """All that is trained is there, and nothing else but what is no weight, unchanged: FSDP's file is read into the
    model by whatever names stand in it, a weight of the base too. first: whether this process has the base's values."""
    held = load_whole(checkpoint / SHARDED)
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        _refuse(checkpoint, f"has a damaged {SHARDED}")
    own, weights = model.state_dict(), dict(model.named_parameters())
    trained = {name for name in own if not adapted or (name in weights and weights[name].requires_grad)}
    saved = set(get_peft_model_state_dict(model, save_embedding_layers=False) if adapted else own)  # FSDP1's names
    tied = {own[name].data_ptr() for name in trained & held.keys()}
    if saved - held.keys():
        _refuse_missing(checkpoint, [name for name in trained - held.keys() if own[name].data_ptr() not in tied])
    of_method = {name for name in own if name.replace(f".{model.active_adapter}", "") in saved} if adapted else set()
    for name in sorted(map(str, held.keys() - trained - saved - of_method)):
        if name not in own or name in weights or (first and not torch.equal(own[name].cpu(), held[name])):
            _refuse(checkpoint, f"holds {name[:200]} in its {SHARDED}, which this run does not train")


def _refuse_missing(checkpoint: Path, missing: list[str]) -> None:
    if missing:
        others = f"{len(missing) - 1} more of the weights that are trained"
        _refuse(checkpoint, f"does not hold {min(missing)} and {others}")


def _check_state(checkpoint: Path, step: int, arguments: Any) -> None:
    """Check the fields that Trainer takes from a checkpoint instead of the recipe: its step, and how often it logs,
    saves and validates."""
    try:
        state = read_object(checkpoint / STATE)
    except (OSError, ValueError) as error:
        _refuse(checkpoint, f"has a damaged {STATE} ({error})")
    counts = {f"{what}_steps": getattr(arguments, f"{what}_steps", None) for what in ("logging", "save", "eval")}
    expected = {name: count for name, count in counts.items() if isinstance(count, int) and count > 0}
    for name, value in ({"global_step": step} | expected).items():
        if state.get(name) != value:
            _refuse(checkpoint, f"has {name} {state.get(name)!r:.100} in its {STATE}, expected {value}")


def keep_settings(trainer: Any, checkpoint: Path, longer: bool) -> None:
    """Have the trainer refuse a checkpoint whose optimizer or schedule has other settings than the recipe, which it
    would take over with their state. longer: whether `Longer` sets the rates anew."""
    load = trainer._load_optimizer_and_scheduler

    def loaded(folder: str | None) -> None:
        before = _settings(trainer)
        load(folder)
        for name, value in _settings(trainer).items():
            if name in before and before[name] != value:
                _refuse(checkpoint, f"has {name} {value!r:.100}, and the recipe {before[name]!r:.100}")
        plain = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        shapes, done = getattr(plain, "lr_lambdas", ()), plain.last_epoch
        step = int(checkpoint.name.rpartition("-")[2])
        if shapes and done != step and not (trainer.args.fp16 and 0 <= done < step):  # which leaves steps out
            _refuse(checkpoint, f"has a schedule of {done!r:.100} steps, expected {step}")
        for group, base, shape in zip(trainer.optimizer.param_groups, plain.base_lrs, shapes, strict=False):
            group["lr"] = group["lr"] if longer else base * shape(done)

    trainer._load_optimizer_and_scheduler = loaded


def _settings(trainer: Any) -> dict[str, Any]:
    """Return the recipe's settings of each group of weights; some optimizers keep numbers of theirs there as well."""
    groups = enumerate(trainer.optimizer.param_groups)
    found = {f"{name} of group {i}": group[name] for i, group in groups for name in SETTINGS if name in group}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()} | {  # FSDP's
        "base_lrs": list(trainer.lr_scheduler.state_dict()["base_lrs"])
    }


def _refuse(checkpoint: Path, why: str) -> Any:
    raise UserError(
        f"The checkpoint {checkpoint} {why}. Remove the checkpoint to go on from an earlier one or from the start."
    )
