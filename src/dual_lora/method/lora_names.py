"""The names of LoRA's layers: what scripts read of them is here too, and who asks for what is not is told so."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .shared import Shared
from .state import AdapterState


class _View(Mapping[str, Any]):
    """A view of one number of the adapters' states, by adapter."""

    def __init__(self, states: Mapping[str, AdapterState], read: Callable[[AdapterState], Any]):
        self._states, self._read = states, read

    def __getitem__(self, adapter: str) -> Any:
        return self._read(self._states[adapter])

    def __setitem__(self, adapter: str, value: Any) -> None:
        raise TypeError(
            "This number of a Dual LoRA layer tells how its adapter was made, and writing it changes nothing (nor does "
            "it in LoRA). To change the strength: layer.set_scale(adapter, factor), or layer.scaling[adapter] = "
            "lora_alpha / r."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


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
        layer.shared.warn_once(
            f"A script asks a Dual LoRA layer for {self.name!r}, which it does not have: ΔW is made of four factors, "
            "`dual_lora_A` to `dual_lora_D`, and is no product of two. What the script does with LoRA's factors, such "
            "as a merge, a penalty or a strength, it does not do here. `isinstance(module, "
            "peft.tuners.lora.LoraLayer)` finds these layers, `get_delta_weight(adapter)` returns ΔW with its "
            "gradient, `set_scale(adapter, factor)` sets the strength, and `merge()` merges."
        )
        raise AttributeError(self.name)


class LoraNames:
    """The part of a layer that has LoRA's names."""

    states: dict[str, AdapterState]
    shared: Shared
    dual_lora_dropout: nn.ModuleDict

    lora_A, lora_B = _FactorOfLora(), _FactorOfLora()
    lora_embedding_A, lora_embedding_B = _FactorOfLora(), _FactorOfLora()

    def __dir__(self) -> list[str]:
        """Leave LoRA's factors out: whoever looks through all names (`torch.jit`, `inspect`) does not ask for one."""
        return [name for name in super().__dir__() if not isinstance(getattr(LoraNames, name, None), _FactorOfLora)]

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
