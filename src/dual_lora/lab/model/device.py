"""The device that a process computes on, and how many processes were launched together."""

import os
import re

from dual_lora.lab.errors import UserError, described

ASKED = "DUAL_LORA_DEVICE"  # what --device says; the processes that a command starts read it too
VISIBLE = "CUDA_VISIBLE_DEVICES"


def is_sharded_launch() -> bool:
    """Whether accelerate has started this process to share out the weights (FSDP, ZeRO-3).

    Such a model may be larger than a card: it waits in the host's memory and comes onto the cards in parts.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return fsdp or (zero and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


def process_count() -> int:
    """Return how many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def best_device() -> str:
    """The device that --device named; else the accelerator of this process (its own one under ``accelerate launch``),
    else the CPU."""
    if (asked := os.environ.get(ASKED, "")) in ("cpu", "mps"):
        return asked
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device_name(device: str | None) -> None:
    """Raise UserError for what --device does not take. Needs no library."""
    if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device):
        raise UserError(f"Expected the device cpu, cuda, cuda:1 (the second card) or mps, not {device!r}.")


def use_device(device: str | None) -> None:
    """Compute on ``device`` from here on, in this process and in those that it starts. None: on the best one.

    Of several cards the others are hidden, so that no library takes them too. Raises UserError where it is not there.
    """
    if device is None:
        return
    check_device_name(device)
    if process_count() > 1:
        raise UserError("--device is for one process, and `accelerate launch` gives each one a device: leave it out.")
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda":
        cards, wanted = torch.cuda.device_count(), int(number or 0)
        if wanted >= cards:
            there = {0: "no CUDA card", 1: "one CUDA card, cuda:0"}.get(cards, f"{cards} CUDA cards, from cuda:0 on")
            raise UserError(f"There is no device {device!r}: found: {there}. {_other_device_hint()}")
        given = [name for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
        os.environ[VISIBLE] = given[wanted] if wanted < len(given) else str(wanted)
    elif kind == "cpu":
        os.environ[VISIBLE] = ""
    elif not torch.backends.mps.is_available():
        raise UserError(f"There is no device 'mps' (Apple's) here. {_other_device_hint()}")
    os.environ[ASKED] = kind
    check_device(best_device())


def _other_device_hint() -> str:
    return f"Give --device {best_device().removesuffix(':0')}, or leave it out."


def check_device(device: str) -> None:
    """Raise UserError unless torch can compute on ``device`` ("cpu", "cuda", "cuda:1", ...) here."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = described(error, Exception, lines=1).rstrip(".")
        raise UserError(f"The device {device!r} cannot be used here ({reason}). Use {best_device()}.") from None


def crowded_hint() -> str:
    """A sentence on what helps where other programs use this machine's cores as well; "" where none do."""
    import torch

    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if best_device() != "cpu" or torch.get_num_threads() == 1 or load < cores + 1:
        return ""
    return f" Other work uses the {cores} cores here (load {load:.1f}): OMP_NUM_THREADS=1 may be several times faster."
