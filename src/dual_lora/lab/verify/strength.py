"""An adapter at another strength, or without some of its layers: for any method of PEFT that changes layers.

y = y_base + s (y_adapter − y_base). For a linear layer that is the update ΔW times s, exactly.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers that the adapter changes, by name; none for prompt learning and full fine-tuning."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextlib.contextmanager
def strengths(model: Any, of: Callable[[str], float]) -> Iterator[None]:
    """The adapter at the strength `of(name)` in every layer: 0 is off, 1 as it is, 2 what merging twice gives."""
    changed = []
    try:
        for name, layer in adapted_layers(model).items():
            if (strength := of(name)) != 1:
                layer.forward = functools.partial(_scaled, layer, layer.forward, strength)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _scaled(layer: Any, forward: Callable[..., Any], strength: float, *args: Any, **kwargs: Any) -> Any:
    base = layer.base_layer(*args, **kwargs)
    if strength == 0 or not isinstance(base, Tensor):
        return base
    return base + strength * (forward(*args, **kwargs) - base)


def parts(model: Any) -> dict[str, set[str]]:
    """Parts of the adapter that servers lose: {what is missing: names of its layers}. Each is some, never all."""
    names = list(adapted_layers(model))
    blocks = {name: int(at[1]) for name in names if (at := re.search(r"\.(\d+)\.", name))}
    numbers = sorted(set(blocks.values()))
    middle = len(numbers) // 2
    found: dict[str, set[str]] = {
        "the first half of the blocks": {n for n, i in blocks.items() if i in numbers[:middle]},
        "the second half of the blocks": {n for n, i in blocks.items() if i in numbers[middle:]},
        "every other block, from the first": {n for n, i in blocks.items() if numbers.index(i) % 2 == 0},
        "every other block, from the second": {n for n, i in blocks.items() if numbers.index(i) % 2 == 1},
    }
    for depth in (-2, -1):  # self_attn, mlp; then q_proj, k_proj, …
        for kind in dict.fromkeys(name.split(".")[depth] for name in names if name.count(".") >= 2):
            if not kind.isdigit():
                found[f"every {kind}"] = {name for name in names if name.split(".")[depth] == kind}
    kept: dict[str, set[str]] = {}
    for what, missing in found.items():
        if 0 < len(missing) < len(names) and missing not in kept.values():
            kept[what] = missing
    return kept
