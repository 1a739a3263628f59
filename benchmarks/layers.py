"""One adapted linear layer for each method: PEFT's LoRA, DoRA and HiRA, full fine-tuning, naive autograd, ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dual_lora.core import reference
from dual_lora.core.reference import Factors, Form, scaling

RANK = 32  # r of LoRA and its relatives; r1 = r2 = RANK / 2 here

METHODS = ("dual", "lora", "dora", "hira", "full", "naive")
FUSED = {"hira fused": "hira", "loha fused": "loha"}  # PEFT's layers by our product
SAMPLED = {"quarter": 0.25, "auto": "auto"}  # ours with gradients from some of the tokens


def config(method: str, targets: Any, rank: int = RANK) -> Any:
    """The PEFT configuration of a method, everything but rank and targets at its defaults."""
    from peft import HiraConfig, LoHaConfig, LoraConfig

    from dual_lora import DualLoraConfig

    if method == "lora":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    if method == "dora":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=True)
    if method == "hira":
        return HiraConfig(r=rank, target_modules=targets)
    if method == "loha":  # two products, each of half the rank
        return LoHaConfig(r=rank // 2, alpha=rank, target_modules=targets)
    if method == "dual":
        return DualLoraConfig.paper(r=rank, target_modules=targets, warmup_steps=0)
    if method in SAMPLED:
        return DualLoraConfig.paper(r=rank, target_modules=targets, warmup_steps=0, token_sampling=SAMPLED[method])
    raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")


def pairs(variants: Iterable[str]) -> list[tuple[str, str]]:
    """Whose costs are compared: ours with everybody's, ours from some of the tokens with LoRA's, fused with PEFT's."""
    of = dict.fromkeys(SAMPLED, "lora") | FUSED
    others = [m for m in variants if m != "dual" and m not in of] if "dual" in variants else []
    return [("dual", m) for m in others] + [(m, of[m]) for m in variants if m in of]


def adapt(model: nn.Module, method: str, targets: Any, rank: int = RANK) -> Any:
    """The model with adapters on `targets` (a list of names), or with all (full) or plain factors (naive) trainable."""
    from peft import get_peft_model

    if method == "full":
        return model.requires_grad_(True)
    if method == "naive":
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Naive(module, rank))
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config(FUSED.get(method, method), targets, rank))
    if method in FUSED:
        from dual_lora import fuse

        assert not fuse(made).left
    return made


def linear(method: str, weight: Tensor, rank: int = RANK) -> Any:
    """One layer around a shared base weight [O, I] (full fine-tuning gets its own copy)."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight.clone() if method == "full" else weight, requires_grad=method == "full")
    if method == "base":
        return base
    holder = adapt(nn.ModuleDict({"linear": base}), method, ["linear"], rank)
    layer = holder["linear"] if isinstance(holder, nn.ModuleDict) else holder.base_model.model["linear"]
    return layer.train()


class Naive(nn.Module):
    """`reference.linear` under autograd: what one writes first."""

    A: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter

    def __init__(self, base: nn.Linear, rank: int = RANK):
        super().__init__()
        self.base_layer = base
        O, I = base.weight.shape
        r = rank // 2
        for name, shape in {"A": (r, I), "B": (O, r), "C": (r, I), "D": (O, r)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.02))
        self.scale = torch.tensor(scaling(2 * rank, rank // 2, rank // 2))

    def forward(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.base_layer.weight, self.base_layer.bias, factors_of(self), self.scale, Form())


def factors_of(layer: Any, name: str = "default") -> Factors:
    """The four parameters of an adapter of one of our layers, or of a naive one."""
    if isinstance(layer, Naive):
        return Factors(layer.A, layer.B, layer.C, layer.D)
    return layer.factors(name)


def fill(layer: Any, factors: Factors, name: str = "default") -> None:
    """Write factors into a layer."""
    with torch.no_grad():
        for stored, value in zip(factors_of(layer, name), factors, strict=True):
            stored.copy_(value)
