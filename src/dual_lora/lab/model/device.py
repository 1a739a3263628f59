"""Where a process computes, and how many were launched together."""

import os

from dual_lora.lab.errors import UserError, described


def is_sharded_launch() -> bool:
    """Whether accelerate has started this process to share out the weights (FSDP, ZeRO-3).

    Such a model may be larger than a card: it waits in the host's memory and comes onto the cards in parts.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return fsdp or (zero and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def process_count() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def best_device() -> str:
    """The accelerator of this process (its own one under ``accelerate launch``), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise UserError unless torch can compute on ``device`` ("cpu", "cuda", "cuda:1", ...) here."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = described(error, Exception, lines=1).rstrip(".")
        raise UserError(
            f"The device {device!r} cannot be used here ({reason}): the best there is is {best_device()}."
        ) from None


def crowded() -> str:
    """A sentence on what helps where other programs use this machine's cores as well; "" where none do."""
    import torch

    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if best_device() != "cpu" or torch.get_num_threads() == 1 or load < cores + 1:
        return ""
    return f" Other work uses the {cores} cores here (load {load:.1f}): OMP_NUM_THREADS=1 may be several times faster."
