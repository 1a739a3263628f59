"""dual-lora info"""

import json as json_module
import platform
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, figures_table, finish
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.terminal import Console

# Written by `python conformance/capabilities.py --write`, which tries everything on tiny models.
CAPABILITIES = Path(__file__).parents[1] / "capabilities.json"


def info(
    *,
    why: Annotated[bool, Parameter(help="Print why something is not there.")] = False,
    json: Json = False,
) -> None:
    """Print versions and supported ranges, devices and kernels, and what LoRA, DoRA, HiRA and Dual LoRA can do.

    Example: `dual-lora info --why`
    """
    from dual_lora import __version__
    from dual_lora.lab.environment import devices, packages

    installed, computing = packages(), devices()
    facts = {"dual-lora": __version__, "python": platform.python_version(), **computing}
    if not json:
        Console().print(facts_card("here", facts))
        rows = [[p.name, p.version or "–", p.range, _remark(p.version, p.fits)] for p in installed]
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


def _remark(version: str | None, fits: bool) -> str:
    if version is None:
        return "not installed"
    return "" if fits else "outside the supported range"
