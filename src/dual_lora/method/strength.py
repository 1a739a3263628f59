"""The strength of a layer's adapters: α/√(r1 r2), or the number that a user sets instead, times λ (`warmup`)."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.reference import Form, refuse_trained, scaling
from ..core.tokens import EXACT


@dataclass
class AdapterState:
    """A layer's settings of one adapter.

    r2: 0 for a frozen direction, which has no factors C and D.
    warmup: optimizer steps of the paper's warm-up; below 1, a share of a run whose length is not known yet; 0 for none.
    share: the share of the tokens that gradients are estimated from.
    """

    r1: int
    r2: int
    alpha: float
    form: Form
    warmup: float = 0
    share: float = EXACT

    @property
    def strength(self) -> float:
        """α/√(r1 r2)."""
        return scaling(self.alpha, self.r1, self.r2)


class _Ranks(Mapping[str, int]):
    """A view of r1 + r2 by adapter."""

    def __init__(self, states: Mapping[str, AdapterState]):
        self._states = states

    def __getitem__(self, adapter: str) -> int:
        return self._states[adapter].r1 + self._states[adapter].r2

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


class Scaling(dict[str, float]):
    """Strengths by adapter. Every way of writing one also replaces the tensor that holds it. A strength that trains is
    refused.

    The tensor is replaced and not overwritten, because a graph that waits for its backward has saved the old one.
    """

    def __init__(self, values: dict[str, float], tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = tensors
        self.update(values)

    def __setitem__(self, name: str, value: float) -> None:
        if isinstance(value, Tensor):
            with torch.enable_grad():  # one that is put in place for training later
                refuse_trained(value)
            value = value.item()
        super().__setitem__(name, value)
        if name in self.tensors:
            self.tensors[name] = _scale_tensor(value, self.tensors[name].dtype, self.tensors[name].device)

    def __ior__(self, values: Any) -> "Scaling":  # type: ignore[misc,override]
        self.update(values)
        return self

    def __reduce__(self) -> Any:
        return Scaling, (dict(self), self.tensors)

    update, setdefault = MutableMapping.update, MutableMapping.setdefault  # type: ignore[assignment]


@torch.inference_mode(False)  # training may follow
def _scale_tensor(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


class Strength:
    """The part of a layer that has its adapters' states and strengths."""

    states: dict[str, AdapterState]
    _scaling: Scaling
    dual_lora_A: nn.ParameterDict
    dual_lora_scale: dict[str, Tensor]  # `scaling` as operators take it: 0-dim, where the factors are
    active_adapters: list[str]

    def _known_names(self, names: list[str]) -> list[str]:
        return [*dict.fromkeys(filter(self.states.__contains__, names))]

    @property
    def r(self) -> Mapping[str, int]:
        """r1 + r2 by adapter, for code that knows LoRA."""
        return _Ranks(self.states)

    @property
    def scaling(self) -> Scaling:
        """The strength of each adapter, under LoRA's name for it. Numbers written here take effect."""
        return self._scaling

    @scaling.setter
    def scaling(self, values: dict[str, float]) -> None:
        self._scaling = Scaling(values, self.dual_lora_scale)

    def _scale(self, adapter: str, A: Tensor | None = None) -> Tensor:
        """Return `scaling` as a 0-dim tensor with the device and precision of A (default: the stored factor)."""
        A = self.dual_lora_A[adapter] if A is None else A
        scale = self.dual_lora_scale[adapter] if adapter in self.dual_lora_scale else None  # noqa: SIM401 - no call
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        if scale is None or scale.device != A.device or scale.dtype != dtype:
            scale = self.dual_lora_scale[adapter] = _scale_tensor(self._scaling[adapter], dtype, A.device)
        return scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength to `scale` times its configured α/√(r1 r2).

        A graph that waits for its backward keeps the strength that it had, and so does a captured CUDA graph.
        """
        if adapter in self._scaling:
            self._scaling[adapter] = scale * self.states[adapter].strength

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for adapter in self._known_names(self.active_adapters):
            self._scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self._known_names(self.active_adapters):
            self._scaling[adapter] = self.states[adapter].strength if scale is None else self._scaling[adapter] / scale
