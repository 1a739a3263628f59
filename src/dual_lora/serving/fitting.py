"""Does an adapter's folder fit a base model? Told by names and shapes, before anything is allocated or read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dual_lora.verify.patterns import check_patterns

from .files import AdapterError, Shapes

_FROM_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # LoRA's starts that take their share out of W


def first_line(error: Exception) -> str:
    """What an error says, as one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].removesuffix(".")


def method_of(folder: Path) -> Any:
    """The adapter's PEFT configuration. Raises AdapterError for one that can't act on the base's checkpoint."""
    from peft import PeftConfig

    try:  # of our own method PEFT knows: whoever imports this module has imported the package
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except KeyError as error:
            raise ValueError(f"its peft_type is {error}, which this PEFT does not know") from error
        if getattr(config, "layer_replication", None) or getattr(config, "megatron_config", None):
            raise ValueError("layers that are replicated, or Megatron's, are not those of the base's checkpoint")
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(_FROM_THE_BASE):
            raise ValueError(f"its start ({start}) changed the base: merge it and serve the merged folder")
    except Exception as error:  # whatever a foreign file makes PEFT raise
        raise AdapterError(f"{folder} does not fit the base model: {first_line(error)}.") from error
    config.inference_mode = True
    return config


def check_before_loading(model: nn.Module, folder: Path, config: Any, files: Shapes) -> None:
    """Raise AdapterError unless the files hold the tensors that the configuration asks for on this model.

    model: on the meta device, as all that is made of it: a rank of billions in somebody's configuration allocates
    nothing. A few methods (BOFT, SHiRA) cannot be made there; of theirs no number may be larger than all dimensions.
    """
    from peft import get_peft_model

    try:
        check_patterns(config.to_dict(), model)
    except ValueError as error:
        raise AdapterError(f"{folder} does not fit the base model: {error}") from error
    sizes = {size for shape in files.values() for size in shape} | {
        size for p in model.parameters() for size in p.shape
    }
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except Exception:
        for name, value in vars(config).items():
            if isinstance(value, int) and value > max(sizes, default=0) and "seed" not in name:
                raise AdapterError(
                    f"{folder} does not fit the base model: {name} is {value}, larger than all of its tensors' sizes."
                ) from None
        return  # what else is wrong PEFT says when it loads
    check_shapes(adapted, folder, files)


def check_shapes(adapted: Any, folder: Path, files: Shapes) -> None:
    """Raise AdapterError unless a PEFT model's tensors are those of the files."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(adapted.base_model, BaseTuner):
        kind = adapted.peft_config["default"].peft_type
        raise AdapterError(
            f"{folder} is an adapter of the kind {getattr(kind, 'value', kind)}, which has no weights to merge."
        )
    # True and False, since "auto" asks a hub for the model that the adapter's file names as its base.
    expected, known = (get_peft_model_state_dict(adapted, save_embedding_layers=saved) for saved in (False, True))
    for name in sorted(files.keys() & known.keys()):
        shape = files[name]
        if shape != tuple(known[name].shape):
            raise AdapterError(
                f"{folder} does not fit the base model: {name} has the shape {shape}, where configuration and base "
                f"ask for {tuple(known[name].shape)}."
            )
    missing = sorted(name for name in expected if name not in files)
    if missing:
        raise AdapterError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors: it was not saved whole, or "
            "its base is another model."
        )
    unknown = sorted(files.keys() - known.keys())
    if unknown:
        raise AdapterError(
            f"{folder} has {unknown[0]} and {len(unknown) - 1} more tensors that the base model has no layer "
            "for: is its base another model?"
        )
