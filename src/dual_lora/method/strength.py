"""The strength of a layer's adapters: α/√(r1 r2), or what a user sets instead, times λ (`warmup`).

Code for LoRA reads and writes `layer.scaling`, which is `lora_alpha`/r there. So it is here: a script that writes
`config.lora_alpha / config.r` leaves the adapter as it is, and 0.5 of that halves it.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.reference import Form, refuse_trained, scaling
from ..core.tokens import EXACT
from .lora_fields import LORA_ALPHA
from .precision import Warned


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

    @property
    def r(self) -> int:
        """LoRA's rank with as many parameters."""
        return self.r1 + self.r2

    @property
    def lora_alpha(self) -> float:
        """LoRA's `lora_alpha` at equal strength."""
        return self.alpha / LORA_ALPHA

    @property
    def scaling(self) -> float:
        """LoRA's `lora_alpha`/r at equal strength."""
        return self.lora_alpha / self.r


class _View(Mapping[str, Any]):
    """A view of one number of the adapters' states, by adapter."""

    def __init__(self, states: Mapping[str, AdapterState], read: Callable[[AdapterState], Any]):
        self._states, self._read = states, read

    def __getitem__(self, adapter: str) -> Any:
        return self._read(self._states[adapter])

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


class Scaling(dict[str, float]):
    """LoRA's `lora_alpha`/r by adapter. Every way of writing one also replaces the tensor that holds the strength. A
    strength that trains is refused.

    The tensor is replaced and not overwritten, because a graph that waits for its backward has saved the old one.
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


class _FactorOfLora:
    """LoRA's name of a factor, which a layer of this method does not have. Asking for it warns, `hasattr` too.

    Scripts ask `hasattr(module, "lora_A")` to find the layers whose update they merge, penalise, scale or reset. The
    answer False would pass all of that by, and nothing would say so.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None:
            return self
        layer.warned.once(
            f"A script asks a Dual LoRA layer for {self.name!r}, which it does not have: ΔW is made of four factors, "
            "`dual_lora_A` to `dual_lora_D`, and is no product of two. What the script does with LoRA's factors, such "
            "as a merge, a penalty or a strength, it does not do here. `isinstance(module, "
            "peft.tuners.lora.LoraLayer)` finds these layers, `get_delta_weight(adapter)` returns ΔW with its "
            "gradient, `set_scale(adapter, factor)` sets the strength, and `merge()` merges."
        )
        raise AttributeError(self.name)


class Strength:
    """The part of a layer that has its adapters' states and strengths, and LoRA's names."""

    states: dict[str, AdapterState]
    warned: Warned
    _scaling: Scaling
    dual_lora_A: nn.ParameterDict
    dual_lora_dropout: nn.ModuleDict
    dual_lora_scale: dict[str, Tensor]  # the strength as operators take it: 0-dim, where the factors are
    active_adapters: list[str]

    lora_A, lora_B = _FactorOfLora(), _FactorOfLora()
    lora_embedding_A, lora_embedding_B = _FactorOfLora(), _FactorOfLora()

    def __dir__(self) -> list[str]:
        """Leave LoRA's factors out: whoever looks through all names (`torch.jit`, `inspect`) does not ask for one."""
        return [name for name in super().__dir__() if not isinstance(getattr(Strength, name, None), _FactorOfLora)]

    def _known_names(self, names: list[str]) -> list[str]:
        return [*dict.fromkeys(filter(self.states.__contains__, names))]

    @property
    def r(self) -> Mapping[str, int]:
        """r1 + r2 by adapter, for code that knows LoRA."""
        return _View(self.states, lambda state: state.r)

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """LoRA's `lora_alpha` by adapter, at equal strength."""
        return _View(self.states, lambda state: state.lora_alpha)

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        """The dropouts by adapter, under LoRA's name."""
        return self.dual_lora_dropout

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

    def _scale(self, adapter: str, A: Tensor | None = None) -> Tensor:
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
        for adapter in self._known_names(self.active_adapters):
            self._scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self._known_names(self.active_adapters):
            self._scaling[adapter] = self.states[adapter].scaling if scale is None else self._scaling[adapter] / scale
