"""The seeds of frozen signs: one integer a layer, which determines the matrix S₀ (`core.frozen`).

The seed is derived from the configuration's `direction_seed` and the layer's name, so that processes agree and layers
differ. It is saved with the adapter, so that S₀ stays the same under another name, in another model class or after a
hot-swap. For a file without seeds (foreign code saves parameters alone) they are derived from the layers' names.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..core.frozen import keys, seed_of
from ..core.traced import version
from .parallel import offloaded
from .shared import Shared


class Keys(NamedTuple):
    """What takes the place of C and D: int32, [1, I] and [O, 1]; and the seed, in its version, that it is derived
    from."""

    C: Tensor
    D: Tensor
    seed: Tensor
    version: int

    def are_of(self, seed: Tensor) -> bool:
        """Whether the seed is still that one."""
        return self.seed is seed and self.version == version(seed)


class Seeds:
    """The part of a layer that holds seeds and keys."""

    dual_lora_seed: BufferDict  # int64, 0-dim or, of experts, [E]
    dual_lora_keys: dict[str, Keys]
    shared: Shared
    tied: dict[str, Any]
    out_features: int
    in_features: int

    def _set_seed(self, adapter: str, number: int, name: str, experts: tuple[int, ...]) -> None:
        """Derive an adapter's seed (with experts, one for each) from a number and the layer's name."""
        names = [f"{name}.{e}" for e in range(experts[0])] if experts else [name]
        seeds = torch.tensor([seed_of(number, n) for n in names], dtype=torch.int64, device="cpu")
        self.dual_lora_seed[adapter] = seeds if experts else seeds[0].clone()

    def set_seed(self, adapter: str, seed: Tensor) -> None:
        """Overwrite the seed, and the keys derived from it, in the memory where a compiled graph reads them."""
        held = self.dual_lora_seed[adapter]
        held.copy_(seed)
        made = self.dual_lora_keys.get(adapter)
        if made is not None and not held.is_meta:
            C, D = keys(held.to(made.C.device), self.out_features, self.in_features)
            made.C.copy_(C)
            made.D.copy_(D)
            self.dual_lora_keys[adapter] = made._replace(seed=held, version=version(held))

    def _delete_seed(self, adapter: str) -> None:
        for held in (self.dual_lora_seed, self.dual_lora_keys):
            if adapter in held:
                del held[adapter]  # type: ignore[attr-defined]

    def _keys(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return C and D of a frozen direction on a device, derived again if the seed has changed."""
        owner = self.tied.get(adapter, self)
        made = owner.dual_lora_keys.get(adapter)
        if torch.compiler.is_dynamo_compiling() and made is not None:
            return made.C.to(device), made.D.to(device)
        seed = offloaded.load(owner.dual_lora_seed, adapter)
        device = torch.device("cpu") if device.type == "meta" else device
        if made is None or not made.are_of(seed) or made.C.device != device:
            with torch.inference_mode(False), torch.no_grad():
                seed_there = seed.clone() if seed.is_inference() else seed
                C, D = keys(seed_there.to(device), owner.out_features, owner.in_features)
            overwritten = made is not None and made.seed is seed and made.C.device == C.device
            if overwritten and not (torch.equal(made.C, C) and torch.equal(made.D, D)):
                owner.shared.warn_once(
                    f"The seed of adapter {adapter!r}'s frozen signs was overwritten, and its signs are others now. "
                    "An average that takes buffers in (AveragedModel(use_buffers=True), an EMA of a state_dict) does "
                    "that, as it rounds the seed: average floating-point tensors alone. load_state_dict() is safe."
                )
            made = owner.dual_lora_keys[adapter] = Keys(C, D, seed, version(seed))
        return made.C, made.D
