"""The checks of a card before it is trusted: `dual-lora gpu-check`.

On a card: which path is chosen and why, every way of launching the kernels against fp64, signs, determinism, a CUDA
graph, a second card, memory and times. Without one: what would be chosen on named cards, the kernels compiled for them
ahead of time, and the same launches in Triton's interpreter. Triton is an interpreter or a compiler from its import on,
so those two run in processes of their own: `python -m dual_lora.lab.gpu_trials interpret | compile TARGET`.
Nothing here needs Triton, so that this can be asked where there is none.
"""

import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from dual_lora.core import dispatch
from dual_lora.lab.run.record import version_of

CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
COMPILED = ("sm_80", "sm_90")  # ahead of time, unless others are named


def check(targets: tuple[str, ...] = COMPILED, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Return everything that can be found out here, as JSON takes it.

    `right` is False if a kernel is wrong or breaks, and None where none could be tried.
    """
    result: dict[str, Any] = {"versions": versions(), "chosen": {card: chosen(card) for card in CARDS}}
    if torch.cuda.is_available():
        cards = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        result["cards"] = [on_card(card, tell) for card in cards]
        tried = [launch for card in result["cards"] for launch in [*card["launches"], *_other_checks(card)]]
    elif (missing := no_triton()) is not None:
        result |= {"interpreter": missing, "compiled": {}}
        tried = []
    else:
        tell("every launch in Triton's interpreter …")
        result["interpreter"] = _process("interpret", TRITON_INTERPRET="1")
        result["compiled"] = {}
        for target in targets:
            tell(f"the kernels compiled for {target} …")
            result["compiled"][target] = _process("compile", target)
        tried = [line for found in (result["interpreter"], *result["compiled"].values()) for line in _findings(found)]
    result["right"] = all(launch["right"] for launch in tried) if tried else None
    return result


def _findings(found: Any) -> list[dict[str, Any]]:
    """Return a process's findings; a process that broke counts as a launch that is not right."""
    return found if isinstance(found, list) else [{"right": False}]


def _other_checks(card: dict[str, Any]) -> list[dict[str, Any]]:
    """List what has to hold on a card besides the launches."""
    if not card["launches"]:
        return []
    from dual_lora.lab.gpu_trials import AS_EAGER

    bits = card["same bits twice"]
    return [
        {"right": isinstance(bits, dict) and bits["deterministic"]},
        {"right": card["CUDA graph"] == AS_EAGER},
    ]


def versions() -> dict[str, str | None]:
    """Return the versions of everything that takes part."""
    return {
        **{name: version_of(name) for name in ("dual-lora", "torch", "triton", "peft")},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def no_triton() -> str | None:
    """Say why the kernels cannot run with the installed Triton, if they cannot."""
    try:
        dispatch.triton_modules()
    except (ImportError, NotImplementedError) as reason:
        return str(reason)
    return None


def chosen(card: str) -> str:
    """Return what would compute on a card of that architecture, and why."""
    if os.environ.get(dispatch.SWITCH) == "plain":
        return f"PyTorch's own operations: {dispatch.SWITCH}=plain"
    try:
        return f"kernels, with the tiles of {dispatch.triton_modules()[1].table_row(card)}"
    except (ImportError, NotImplementedError) as reason:
        return f"PyTorch's own operations: {reason}"


def on_card(device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    """Find out all about one card. What breaks is said in its place, and the rest goes on."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        kernels = dispatch.triton_kernels(device)
    properties = torch.cuda.get_device_properties(device)
    without = "; ".join(str(w.message) for w in given) or "PyTorch's operations"
    found: dict[str, Any] = {
        "device": str(device),
        "name": properties.name,
        "memory": properties.total_memory,
        "path": without if kernels is None else "kernels",
        "launches": [],
    }
    if kernels is None:
        return found
    from dual_lora.lab import gpu_trials

    for dtype in dispatch.DTYPES:
        tell(f"{device}, {dtype}: every launch against fp64 …")
        found["launches"] += gpu_trials.launches(device, dtype)
    tell(f"{device}: signs, determinism, graph, memory, times …")
    with torch.cuda.device(device):
        found |= gpu_trials.measured(device)
    return found


def _process(*arguments: str, **environment: str) -> list[dict[str, Any]] | str:
    """Return what `gpu_trials` prints in a process of its own, or the last line of its error."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-P", "-W", "ignore", "-m", "dual_lora.lab.gpu_trials", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
