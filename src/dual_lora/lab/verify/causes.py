"""What may lie behind a verdict: it explains, and never makes one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.read import read_object
from dual_lora.lab.verify.diagnose import Finding
from dual_lora.lab.verify.fingerprint import Fingerprint, hash_of_base
from dual_lora.lab.verify.guesses import adapted_layers


def strength_notes(tuned: Tuned | None) -> list[str]:
    """What an adapter says of its own strength."""
    layers = adapted_layers(tuned.model).values() if tuned is not None else []
    factors = [layer.warmup_factor("default") for layer in layers if hasattr(layer, "warmup_factor")]
    if factors and min(factors) < 1:
        return [f"it was saved during its warm-up: λ is {min(factors):.2f}"]
    return []


def causes_in(saved: Fingerprint, tuned: Tuned) -> list[str]:
    """What differs between a fingerprint and a model that was loaded; it explains a verdict and never makes one."""
    causes = []
    if hash_of_base(tuned.model) != saved.base_sample:
        causes.append(f"the base's weights are not those that it was trained on ({saved.base or 'unnamed'})")
    return causes


def config_differences(one: Path, other: Path | None) -> list[str]:
    """Fields of two adapters' configurations that differ."""
    if other is None:
        return []
    try:
        pair = [read_object(folder / "adapter_config.json") for folder in (one, other)]
    except (OSError, ValueError):
        return []
    names = [n for n in sorted({*pair[0], *pair[1]}) if pair[0].get(n) != pair[1].get(n) and n != "peft_version"]
    lines = [f"{n} is {_short(pair[1].get(n))} there and {_short(pair[0].get(n))} here" for n in names]
    return lines[:6]


def _short(value: Any) -> str:
    text = json.dumps(sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value)
    return text if len(text) <= 60 else text[:60] + "…"


def explained(finding: Finding, causes: list[str]) -> Finding:
    return replace(finding, cause="; ".join([finding.cause, *causes])) if causes else finding
