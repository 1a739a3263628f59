"""dual-lora info"""

import json as json_module
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, figures_table, finish
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.run.record import device_name, version_of
from dual_lora.lab.terminal import Console

# Written by `python conformance/capabilities.py --write`, which tries everything on tiny models.
CAPABILITIES = Path(__file__).parents[1] / "capabilities.json"
# Besides what the package needs: what it works with where it is there.
INTEGRATIONS = ("accelerate", "trl", "deepspeed", "triton", "bitsandbytes", "torchao", "hqq", "gptqmodel")
PLAIN = "blocks of the weight, PyTorch's own operations"


class Installed(NamedTuple):
    """A package: the version here (None: not installed), the supported range, and whether the one is in the other."""

    name: str
    version: str | None
    range: str
    fits: bool

    @property
    def remark(self) -> str:
        if self.version is None:
            return "not installed"
        return "" if self.fits else "outside the supported range"


def info(
    *,
    why: Annotated[bool, Parameter(help="Print why something is not available.")] = False,
    json: Json = False,
) -> None:
    """Print versions and supported ranges, devices and kernels, and what LoRA, DoRA, HiRA and Dual LoRA can do.

    Example: `dual-lora info --why`
    """
    from dual_lora import __version__

    installed, computing = packages(), devices()
    facts = {"dual-lora": __version__, "python": platform.python_version(), **computing}
    if not json:
        Console().print(facts_card("here", facts))
        rows = [[p.name, p.version or "–", p.range, p.remark] for p in installed]
        Console().print(figures_table("", ["package", "installed", "supported", ""], rows))
    tried = json_module.loads(CAPABILITIES.read_text(encoding="utf-8"))
    found = tried["table"]
    names = list(next(iter(found.values())))
    rows = [[row, *(answers[name][0] for name in names)] for row, answers in found.items()]
    with_versions = ", ".join(f"{name} {version}" for name, version in tried["versions"].items())
    result = {"facts": facts, "packages": [p._asdict() for p in installed], "capabilities": tried}
    finish(result, figures_table(f"tried with {with_versions}", ["capability", *names], rows), json)
    if why and not json:
        for row, answers in found.items():
            for name, (_, reason) in answers.items():
                if reason:
                    print(f"{row}, {name}: {reason}")


def packages() -> list[Installed]:
    """The packages that the method needs and those that it works with, with the ranges that pyproject.toml states."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in metadata.requires("dual-lora") or []]
    own = {requirement.name: requirement for requirement in requirements if requirement.marker is None}
    known = {requirement.name: requirement for requirement in requirements} | own
    found = []
    for name in (*own, *INTEGRATIONS):
        version, allowed = version_of(name), known[name].specifier if name in known else None
        fits = version is None or allowed is None or allowed.contains(version, prereleases=True)
        found.append(Installed(name, version, str(allowed or ""), fits))
    return found


def devices() -> dict[str, str]:
    """{device: its name, and which implementation computes there}."""
    import torch

    name = platform.machine() if torch.cuda.is_available() else device_name()
    found = {"cpu": f"{name}: {PLAIN}"}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}: {_on_gpu(index)}"
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and kind.type != "cuda":
        found[kind.type] = PLAIN
    return found


def _on_gpu(index: int) -> str:
    import torch

    from dual_lora.core import dispatch

    if os.environ.get(dispatch.SWITCH) == "plain":
        return f"{PLAIN} ({dispatch.SWITCH}=plain)"
    if dispatch.triton_kernels(torch.device("cuda", index)) is None:
        return f"{PLAIN} (no Triton that this card's kernels can be made with; the warning says why)"
    return f"Triton kernels where they prove right (`dual-lora gpu-check` tries them all), {PLAIN} elsewhere"
