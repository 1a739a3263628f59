"""Files that servers read: an adapter's folder as PEFT saves it, and the base model's checkpoint. Headers alone.

Does the one fit the other? Told by names and shapes, before anything is allocated or read.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from dual_lora.verify.bounds import check_bounds, check_kinds
from dual_lora.verify.numbers import check_numbers, header
from dual_lora.verify.patterns import check_patterns
from dual_lora.verify.sources import check_sources

FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_BYTES, HEADER_BYTES = 1 << 22, 1 << 24  # largest that are read; the largest real ones have a tenth of that
# Numbers of a configuration that are no sizes: seeds, and when AdaLoRA and AdaMSS cut ranks.
_NO_SIZE = re.compile("seed|step|warmup|tinit|tfinal|deltaT|interval")
Shapes = dict[str, tuple[int, ...]]


class AdapterError(ValueError):
    """An adapter that can't be served, in one sentence."""


def _paths(folder: str | Path) -> list[Path]:
    paths = [Path(folder) / name for name in FILES]
    for file in paths:
        try:
            found = S_ISREG(file.stat().st_mode)  # `is_file` of Python 3.14 says nothing of names that cannot be
        except (FileNotFoundError, NotADirectoryError):
            found = False
        except (OSError, ValueError) as error:  # a name that is too long, or none
            raise AdapterError(f"No adapter's folder can have the name {str(folder)!r:.100}.") from error
        if not found:
            raise AdapterError(f"{file.name} is missing in {folder}: expected an adapter's folder as PEFT saves it.")
    return paths


def shapes_of(folder: str | Path) -> Shapes:
    """Names and shapes of an adapter's tensors. Raises AdapterError for a file that is missing, half-written or not of
    floating-point numbers."""
    config, weights = _paths(folder)
    try:
        _check_sizes(config, weights)
        _check_kind(json.loads(config.read_text("utf-8")), config)
        held = header(weights)
    except AdapterError:
        raise
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{folder} is damaged or still being written: {first_line(error)}.") from error
    try:
        check_numbers({name: kind for name, (kind, _) in held.items()}, str(folder))
    except ValueError as error:
        raise AdapterError(str(error)) from error
    return {name: shape for name, (_, shape) in held.items()}


def _check_kind(values: Any, config: Path) -> None:
    kind = values.get("peft_type") if isinstance(values, dict) else values
    if not isinstance(kind, str):
        raise AdapterError(f"{config.name} in {config.parent} names no method as its peft_type: is it an adapter's?")


def _check_sizes(config: Path, weights: Path) -> None:
    """Raise AdapterError for what would be read for seconds, while nothing else runs in the process."""
    size = config.stat().st_size
    if size > CONFIG_BYTES:
        raise AdapterError(f"{config.name} in {config.parent} has {size:,} bytes; at most {CONFIG_BYTES:,} are read.")
    with weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < header <= weights.stat().st_size:
        raise AdapterError(
            f"The header of {weights.name} in {weights.parent} has {header:,} bytes; at most {HEADER_BYTES:,} are read."
        )


def version_of(folder: str | Path) -> tuple[tuple[int, ...], ...]:
    """Return what tells an adapter's files from others that have come in their place. Raises AdapterError if one is
    missing."""
    return version_of_files(_paths(folder))


def version_of_files(files: Iterable[Path]) -> tuple[tuple[int, ...], ...]:
    states = [file.stat() for file in sorted(files)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states)


def checkpoint_of(folder: str | Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Names of a checkpoint's tensors, with shape and whether they are floating-point; reads headers only."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= {name: (shape, kind in ("F32", "BF16", "F16")) for name, (kind, shape) in header(file).items()}
    if not found:
        raise AdapterError(f"{folder} holds no *.safetensors file: which model is the base?")
    return found


def first_line(error: Exception) -> str:
    """Return an error's message as one line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].removesuffix(".")


def method_of(folder: Path) -> Any:
    """The adapter's PEFT configuration. Raises AdapterError for one that can't act on the base's checkpoint."""
    from peft import PeftConfig

    from ..method.lora_fields import keeps_base

    try:  # of our own method PEFT knows: whoever imports this module has imported the package
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except KeyError as error:
            raise ValueError(f"its peft_type is {error}, which this PEFT does not know") from error
        if getattr(config, "layer_replication", None) or getattr(config, "megatron_config", None):
            raise ValueError("layers that are replicated, or Megatron's, are not those of the base's checkpoint")
        if config.peft_type == "FROD":
            raise ValueError("its factors are computed from the base's weights: merge it and serve the merged folder")
        if not keeps_base(config):
            start = config.init_lora_weights
            raise ValueError(f"its start ({start}) changed the base: merge it and serve the merged folder")
    except Exception as error:  # whatever a foreign file makes PEFT raise
        raise AdapterError(f"{folder} does not fit the base model: {first_line(error)}.") from error
    config.inference_mode = True
    return config


def check_before_loading(model: nn.Module, folder: Path, config: Any, files: Shapes) -> None:
    """Raise AdapterError unless the files hold the tensors that the configuration asks for on this model.

    model: on the meta device, as all that is made of it: a rank of billions in somebody's configuration allocates
    nothing. A few methods (BOFT, SHiRA) cannot be made there, nor an AdaLoRA whose ranks were cut; of theirs no number
    may be larger than all dimensions.
    """
    from peft import get_peft_model

    try:
        check_kinds(config)
        check_sources(config, model)
        check_patterns(config.to_dict(), model)
        check_bounds(config, model)
    except ValueError as error:
        raise AdapterError(f"{folder} does not fit the base model: {error}") from error
    sizes = {size for shape in files.values() for size in shape} | {
        size for p in model.parameters() for size in p.shape
    }
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        check_shapes(adapted, folder, files)
    except AdapterError:
        raise
    except Exception:  # what else is wrong PEFT says when it loads
        for name, value in vars(config).items():
            largest = 0 if _NO_SIZE.search(name) else _largest(value)
            if largest > max(sizes, default=0):
                raise AdapterError(
                    f"{folder} does not fit the base model: {name} is {largest}, larger than all of its tensors' sizes."
                ) from None


def _largest(value: Any) -> int:
    """The largest number in a field of a configuration; of a list (AdaLoRA's masks) its length."""
    if isinstance(value, dict):
        return max(map(_largest, value.values()), default=0)
    return value if isinstance(value, int) else len(value) if isinstance(value, list) else 0


def _is_count(name: str, known: Mapping[str, Any]) -> bool:
    """Whether a tensor is the count of a warm-up, which a layer has read and, if it has ended, not kept."""
    layer, _, kind = name.rpartition(".")
    return kind == "dual_lora_left" and f"{layer}.dual_lora_A" in known


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
    unknown = sorted(name for name in files.keys() - known.keys() if not _is_count(name, known))
    if unknown:
        raise AdapterError(
            f"{folder} has {unknown[0]} and {len(unknown) - 1} more tensors that the base model has no layer "
            "for: is its base another model?"
        )
