"""dual-lora info"""

from __future__ import annotations

import platform
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from dual_lora.lab.commands.card import facts_card, figures_table, finish


def info(
    *,
    why: Annotated[bool, Parameter(help="Print why something is not there.", negative="")] = False,
    json: Annotated[bool, Parameter(help="One line of JSON on standard output.", negative="")] = False,
) -> None:
    """Print versions and supported ranges, devices and kernels, and try what LoRA, DoRA, HiRA and Dual LoRA can do.

    Example: `dual-lora info --why`
    """
    from dual_lora import __version__, capabilities
    from dual_lora.lab.environment import devices, packages

    installed, computing = packages(), devices()
    facts = {"dual-lora": __version__, "python": platform.python_version(), **computing}
    if not json:
        Console().print(facts_card("here", facts))
        rows = [[p.name, p.version or "–", p.range, _remark(p.version, p.fits)] for p in installed]
        Console().print(figures_table("", ["package", "installed", "supported", ""], rows))
    found = capabilities.table()
    names = [method.name for method in capabilities.methods()]
    rows = [[row, *(answers[name].mark for name in names)] for row, answers in found.items()]
    result = {
        "facts": facts,
        "packages": [p._asdict() for p in installed],
        "capabilities": {row: {name: answers[name]._asdict() for name in names} for row, answers in found.items()},
    }
    finish(result, figures_table("tried on tiny models", ["capability", *names], rows), json)
    if why and not json:
        for row, answers in found.items():
            for name in names:
                if answers[name].reason:
                    print(f"{row}, {name}: {answers[name].reason}")


def _remark(version: str | None, fits: bool) -> str:
    if version is None:
        return "not installed"
    return "" if fits else "outside the supported range"
