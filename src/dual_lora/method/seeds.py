"""The seeds of frozen signs: one whole number a layer, from which the matrix S₀ follows (`core.frozen`).

It is made of the configuration's `direction_seed` and the layer's name, so that processes agree on it and layers
differ, and it is saved with the adapter: under another name, in another model class or after a hot-swap S₀ is the same.
A file without it (foreign code saves parameters alone) is read by the names that its layers have then.
"""

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..core.frozen import keys, seed_of
from .parallel import offloaded


class Seeds:
    """The part of a layer that keeps them. Keys are what C and D stand for: int32, [1, I] and [O, 1]."""

    dual_lora_seed: BufferDict  # int64, 0-dim or, of experts, [E]
    dual_lora_keys: dict[str, tuple[Tensor, Tensor]]
    _made_of: dict[str, tuple[Tensor, int]]  # the seed and its version, which the keys are of
    tied: dict[str, Any]
    out_features: int
    in_features: int

    def _set_seed(self, adapter: str, number: int, name: str, experts: tuple[int, ...]) -> None:
        """Give an adapter the seed of the layer of that name."""
        names = [f"{name}.{e}" for e in range(experts[0])] if experts else [name]
        seeds = torch.tensor([seed_of(number, n) for n in names], dtype=torch.int64, device="cpu")
        self.dual_lora_seed[adapter] = seeds if experts else seeds[0].clone()

    def set_seed(self, adapter: str, seed: Tensor) -> None:
        """Put another seed in place; what is made of it in the same memory, where a compiled graph reads it."""
        held = self.dual_lora_seed[adapter]
        held.copy_(seed)
        made = self.dual_lora_keys.get(adapter)
        if made is not None and not held.is_meta:
            for old, new in zip(made, keys(held.to(made[0].device), self.out_features, self.in_features), strict=True):
                old.copy_(new)
            self._made_of[adapter] = held, version(held)

    def _forget_seed(self, adapter: str) -> None:
        for held in (self.dual_lora_seed, self.dual_lora_keys, self._made_of):
            if adapter in held:
                del held[adapter]  # type: ignore[attr-defined]

    def _keys(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """C and D of a frozen direction on a device, made again where the seed has changed."""
        owner = self.tied.get(adapter, self)
        made = owner.dual_lora_keys.get(adapter)
        if torch.compiler.is_dynamo_compiling() and made is not None:
            return made[0].to(device), made[1].to(device)
        seed = offloaded.present(owner.dual_lora_seed, adapter)
        device = torch.device("cpu") if device.type == "meta" else device
        known = owner._made_of.get(adapter, (None, 0))
        if made is None or known[0] is not seed or known[1] != version(seed) or made[0].device != device:
            with torch.inference_mode(False), torch.no_grad():
                seed_there = seed.clone() if seed.is_inference() else seed
                made = keys(seed_there.to(device), owner.out_features, owner.in_features)
            owner.dual_lora_keys[adapter], owner._made_of[adapter] = made, (seed, version(seed))
        return made


def version(seed: Tensor) -> int:
    """How often a seed was written to; of one that was made in inference mode, nobody knows."""
    return 0 if seed.is_inference() else seed._version
