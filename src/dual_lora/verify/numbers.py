"""Whether an adapter, of any method of PEFT, holds finite floating-point numbers where it computes with such."""

import re
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import safe_open
from torch import Tensor

# As a file's header names them: what PEFT computes with as it is. F8_E8M0 is a scale, and smaller ones need some.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# What methods store as whole numbers.
_WHOLE = re.compile(r"(\.dual_lora_(left|seed)|_indices|\.frod_s_(indices|size)(\.\w+)?)$")
_BUFFERS = {"I32", "I64", "BOOL"}  # counters, positions and masks of modules that are saved whole


def header(file: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type, as "F32", and the shape of every tensor in a safetensors file, by its name. No tensor is read.

    Raises OSError and SafetensorError for a file that cannot be read or is damaged.
    """
    if not S_ISREG(Path(file).stat().st_mode):  # a pipe would be waited for
        raise OSError(f"{file} is no regular file")
    with safe_open(str(file), framework="pt") as held:
        parts = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118  (not a mapping)
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def check_numbers(kinds: Mapping[str, str], what: str) -> None:
    """Raise ValueError unless what an adapter's method trained is stored as floating-point numbers.

    kinds: each tensor's type, as its file's header names it. Loading would turn others into numbers in silence: the
    imaginary part is dropped, and sums of U8 are those of remainders. what: the file's name in a sentence.
    """
    # VeRA's shared matrices, saved with its trained vectors, have the first part of the prefix alone.
    prefixes = "|".join(re.escape(prefix.removesuffix("lambda_")) for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values())
    trained = re.compile(rf"(^|\.)({prefixes}|adaption_|prefix_task_)|(^|[._])(weight|bias|embeddings)$")
    wrong = [
        name
        for name, kind in sorted(kinds.items())
        if kind not in FLOATS
        and not (kind.startswith(("I", "U")) and _WHOLE.search(name))
        and not (kind in _BUFFERS and not trained.search(name))
    ]
    if wrong:
        others = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise ValueError(
            f"{what} holds {wrong[0]}{others} as {kinds[wrong[0]]}, expected floating-point numbers "
            f"({', '.join(sorted(FLOATS))}): save the adapter again as it was trained."
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; in floats of eight bits as well, which `isfinite` does not know."""
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())
