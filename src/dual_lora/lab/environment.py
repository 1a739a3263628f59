"""What is installed here and what Dual LoRA does with it: versions against the supported ranges, devices, kernels."""

import os
import platform
from importlib import metadata
from typing import NamedTuple

from dual_lora.lab.run.record import device_name, version_of

# Besides what the package needs: what it works with where it is there.
INTEGRATIONS = ("accelerate", "trl", "deepspeed", "triton", "bitsandbytes", "torchao", "hqq", "gptqmodel")


class Installed(NamedTuple):
    """A package: the version here (None: not installed), the supported range, and whether the one is in the other."""

    name: str
    version: str | None
    range: str
    fits: bool


def packages() -> list[Installed]:
    """The packages that the method needs and those that it works with, with the ranges that pyproject.toml states."""
    from packaging.requirements import Requirement

    needed: dict[str, Requirement] = {}
    for line in metadata.requires("dual-lora") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            needed[requirement.name] = requirement
        else:
            needed.setdefault(requirement.name, requirement)
    own = [name for name, requirement in needed.items() if requirement.marker is None]
    return [_installed(name, needed.get(name)) for name in (*own, *INTEGRATIONS)]


def _installed(name: str, requirement: object) -> Installed:
    specifier, version = getattr(requirement, "specifier", None), version_of(name)
    fits = version is None or specifier is None or specifier.contains(version, prereleases=True)
    return Installed(name, version, str(specifier or ""), fits)


def devices() -> dict[str, str]:
    """{device: its name, and which implementation computes there}."""
    import torch

    name = platform.machine() if torch.cuda.is_available() else device_name()
    found = {"cpu": f"{name}: {_plain()}"}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}: {_on_gpu(device)}"
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and kind.type != "cuda":
        found[kind.type] = _plain()
    return found


def _plain() -> str:
    return "blocks of the weight, PyTorch's own operations"


def _on_gpu(device: object) -> str:
    import torch

    from dual_lora.core import dispatch

    if os.environ.get(dispatch.SWITCH) == "plain":
        return f"{_plain()} ({dispatch.SWITCH}=plain)"
    kernels = dispatch.triton(torch.device(str(device)))
    if kernels is None:
        return f"{_plain()} (no Triton that this card's kernels can be made with; the warning says why)"
    return f"Triton kernels where they prove right (`dual-lora gpu-check` tries them all), {_plain()} elsewhere"
