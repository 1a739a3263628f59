"""The strength of a layer's adapters: α/√(r1 r2), or what a user sets instead, times λ (`warmup`).

Code for LoRA reads and writes `layer.scaling`, which is `lora_alpha`/r there. So it is here: a script that writes
`config.lora_alpha / config.r` leaves the adapter as it is, and 0.5 of that halves it.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.reference import refuse_trained
from .state import AdapterState


class Scaling(dict[str, float]):
    """LoRA's `lora_alpha`/r by adapter. A strength that trains is refused.

    Every way of writing one replaces the tensor of the strength: graphs that wait for backward keep the old one.
    """

    def __init__(self, values: dict[str, float], tensors: dict[str, Tensor], states: Mapping[str, AdapterState]):
        super().__init__()
        self.tensors, self.states = tensors, states
        self.update(values)

    def strength(self, name: str) -> float:
        """Return the factor of ReLU(B A) ⊙ Sign(D C) that belongs to this number: α/√(r1 r2) if nobody wrote it."""
        state = self.states[name]
        return self[name] / state.scaling * state.strength

    def __setitem__(self, name: str, value: float) -> None:
        if isinstance(value, Tensor):
            with torch.enable_grad():  # one that is put in place for training later
                refuse_trained(value)
            value = value.item()
        super().__setitem__(name, value)
        if name in self.tensors:
            self.tensors[name] = _scale_tensor(self.strength(name), self.tensors[name].dtype, self.tensors[name].device)

    def __ior__(self, values: Any) -> "Scaling":  # type: ignore[misc,override]
        self.update(values)
        return self

    def __reduce__(self) -> Any:
        return Scaling, (dict(self), self.tensors, self.states)

    update, setdefault = MutableMapping.update, MutableMapping.setdefault  # type: ignore[assignment]


@torch.inference_mode(False)  # training may follow
def _scale_tensor(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


class Strength:
    """The part of a layer that has its adapters' strengths."""

    states: dict[str, AdapterState]
    _scaling: Scaling
    dual_lora_A: nn.ParameterDict
    dual_lora_scale: dict[str, Tensor]  # the strength as operators take it: 0-dim, where the factors are
    active_adapters: list[str]

    def known_names(self, names: list[str]) -> list[str]:
        return [*dict.fromkeys(filter(self.states.__contains__, names))]

    @property
    def scaling(self) -> Scaling:
        """LoRA's `lora_alpha`/r of each adapter, at equal strength. Numbers written here take effect."""
        return self._scaling

    @scaling.setter
    def scaling(self, values: dict[str, float]) -> None:
        self._scaling = Scaling(values, self.dual_lora_scale, self.states)

    def strength(self, adapter: str) -> float:
        """Return the factor of ReLU(B A) ⊙ Sign(D C) without λ: α/√(r1 r2), or what was set instead."""
        return self._scaling.strength(adapter)

    def strength_tensor(self, adapter: str, A: Tensor | None = None) -> Tensor:
        """Return the strength as a 0-dim tensor with the device and precision of A (default: the stored factor)."""
        A = self.dual_lora_A[adapter] if A is None else A
        scale = self.dual_lora_scale[adapter] if adapter in self.dual_lora_scale else None  # noqa: SIM401 - no call
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        if scale is None or scale.device != A.device or scale.dtype != dtype:
            scale = self.dual_lora_scale[adapter] = _scale_tensor(self.strength(adapter), dtype, A.device)
        return scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength to `scale` times its configured α/√(r1 r2).

        A graph that waits for its backward keeps the strength that it had, and so does a captured CUDA graph.
        """
        if adapter in self._scaling:
            self._scaling[adapter] = scale * self.states[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for adapter in self.known_names(self.active_adapters):
            self._scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self.known_names(self.active_adapters):
            self._scaling[adapter] = self.states[adapter].scaling if scale is None else self._scaling[adapter] / scale
