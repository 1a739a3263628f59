"""How strong the adapters of a layer act: α/√(r1 r2), or what a user has set in its place, times λ.

λ is 1, but for adapters with the paper's start. Of those a layer keeps one count, the optimizer steps that are left of
the warm-up (of experts one each), which is saved with the adapter. λ is read off it in every forward pass.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..core.reference import Factors, Form, scaling
from ..core.tokens import EXACT
from . import warmup
from .parallel import offloaded


@dataclass
class AdapterState:
    """What a layer knows of one adapter besides its factors.

    r2: 0 where the direction is frozen, for which there are no factors.
    warmup: optimizer steps of the paper's warm-up; below 1, a share of a run whose length is not known yet; 0 for none.
    share: of the tokens, from which gradients are estimated.
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


def most_left(warmup: float) -> int:
    """The most steps that can be left of a warm-up; any number, while nobody knows how long the run is."""
    return int(warmup) if warmup >= 1 else 2**31 - 1


def until_full(left: int, warmup: float) -> str:
    """What is left of a warm-up, as a part of a sentence; `left` is -1 before a run of unknown length."""
    if left < 0:
        return f"a warm-up over {warmup:.0%} of a run that has not begun"
    return f"up to {left} of {warmup} optimizer steps before full strength"


class _Ranks(Mapping[str, int]):
    """r1 + r2 by adapter, as the states have them when it is asked."""

    def __init__(self, states: Mapping[str, AdapterState]):
        self._states = states

    def __getitem__(self, adapter: str) -> int:
        return self._states[adapter].r1 + self._states[adapter].r2

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


class Scaling(dict[str, float]):
    """Strengths by adapter. Who writes one, by whatever method of a dict, also exchanges the tensor made of it.

    It is made anew, and not written to: a graph that waits for its backward has saved the one that was.
    """

    def __init__(self, values: dict[str, float], tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = tensors
        self.update(values)

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        if name in self.tensors:
            self.tensors[name] = _number(value, self.tensors[name].dtype, self.tensors[name].device)

    def __ior__(self, values: Any) -> "Scaling":  # type: ignore[misc,override]
        self.update(values)
        return self

    def __reduce__(self) -> Any:
        return Scaling, (dict(self), self.tensors)

    update, setdefault = MutableMapping.update, MutableMapping.setdefault  # type: ignore[assignment]


@torch.inference_mode(False)  # who sets it in inference mode may train afterwards
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


class Strength:
    """The part of a layer that knows nothing of its weight."""

    states: dict[str, AdapterState]
    _scaling: "Scaling"
    dual_lora_A: nn.ParameterDict
    dual_lora_scale: dict[str, Tensor]  # `scaling` as operators take it: 0-dim, where the factors are
    dual_lora_left: BufferDict  # int32, 0-dim or [E]; -1: not begun, in a run of unknown length
    active_adapters: list[str]
    tied: dict[str, Any]  # whose adapter it is, count and all, where it is not the layer's own

    def _stored(self, adapter: str) -> Factors:
        raise NotImplementedError

    def _present(self, names: list[str]) -> list[str]:
        present = [name for name in names if name in self.states]
        return present if len(present) < 2 else [*dict.fromkeys(present)]

    @property
    def r(self) -> Mapping[str, int]:
        """r1 + r2 by adapter, for code that knows LoRA."""
        return _Ranks(self.states)

    def adapter_names(self) -> list[str]:
        """All adapters of this layer."""
        return list(self.states)

    def trainable_factors(self, adapter: str) -> list[Tensor]:
        """The trainable factors in the order B, A, D, C."""
        A, B, C, D = self._stored(adapter)
        return [f for f in (B, A, D, C) if f.requires_grad]

    def counting_factor(self, adapter: str) -> Tensor | None:
        """The factor whose optimizer counts the adapter's steps: the first that trains, or has before a switch."""
        A, B, C, D = self._stored(adapter)
        return next((f for f in (B, A, D, C) if f.requires_grad or f.grad is not None), None)

    def clips(self, adapter: str) -> bool:
        """Whether the adapter trains by the clip, which looks at the values of gradients."""
        form = self.states[adapter].form
        return form.ste == "clip" and form.direction == "sign" and bool(self.trainable_factors(adapter))

    def set_state(self, adapter: str, state: AdapterState) -> None:
        """Ranks, α and form of an adapter, at the strength that they make."""
        self.states[adapter], self._scaling[adapter] = state, state.strength

    @property
    def scaling(self) -> "Scaling":
        """The strength of each adapter, by LoRA's name; a number that is written there acts."""
        return self._scaling

    @scaling.setter
    def scaling(self, values: dict[str, float]) -> None:
        self._scaling = Scaling(values, self.dual_lora_scale)

    def _scale(self, adapter: str, A: Tensor | None = None) -> Tensor:
        """`scaling` as a 0-dim tensor where the factor A is (by default the stored one), in its precision."""
        A = self.dual_lora_A[adapter] if A is None else A
        scale = self.dual_lora_scale[adapter] if adapter in self.dual_lora_scale else None  # noqa: SIM401 - no call
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        if scale is None or scale.device != A.device or scale.dtype != dtype:
            scale = self.dual_lora_scale[adapter] = _number(self._scaling[adapter], dtype, A.device)
        return scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength to `scale` times its configured α/√(r1 r2).

        A graph that waits for its backward keeps the strength that it had, and so does a captured CUDA graph.
        """
        if adapter in self._scaling:
            self._scaling[adapter] = scale * self.states[adapter].strength

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for adapter in self._present(self.active_adapters):
            self._scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self._present(self.active_adapters):
            self._scaling[adapter] = self.states[adapter].strength if scale is None else self._scaling[adapter] / scale

    # The paper's warm-up.

    def left(self, adapter: str) -> Tensor:
        """Optimizer steps that are left, int32, 0-dim or [E]."""
        owner = self.tied.get(adapter, self)
        return offloaded.present(owner.dual_lora_left, adapter) if self.states[adapter].warmup else torch.tensor(0)

    def warmup_factor(self, adapter: str) -> Tensor:
        """λ, from 0 at the start to 1 at the end, fp32, 0-dim or [E]."""
        steps, left = self.states[adapter].warmup, self.left(adapter)
        return 1 - (left.clamp(0, int(steps)) / steps if steps >= 1 else left.abs().clamp(max=1).float())

    def steps_left(self, adapter: str) -> int:
        """Optimizer steps before all of the adapter acts at full strength; -1 before a run of unknown length."""
        left = self.left(adapter)
        return -1 if bool((left < 0).any()) else int(left.max())

    @torch.inference_mode(False)  # who loads in inference mode may train afterwards
    def set_left(self, adapter: str, left: Tensor | int) -> None:
        """Put a count in place, cut to the warm-up's steps. For an adapter without a warm-up it says nothing."""
        steps = self.states[adapter].warmup
        if steps and adapter not in self.tied:
            stored = self.dual_lora_left[adapter]
            given = torch.as_tensor(left, dtype=torch.int32, device=stored.device).clamp(-1, most_left(steps))
            self.dual_lora_left[adapter] = given.expand(stored.shape).clone()
            warmup.watch(self)

    def begin_warmup(self, adapter: str, steps: int) -> None:
        """Give a warm-up that is a share of the run its length in steps, unless it has one."""
        if 0 < self.states[adapter].warmup < 1:
            left = self.left(adapter)
            self.states[adapter].warmup = steps
            self.set_left(adapter, torch.where(left < 0, steps, left))  # which cuts it

    def end_warmup(self, adapter: str) -> None:
        """Forget the count of an adapter that acts at full strength."""
        self.states[adapter].warmup = 0
        if adapter in self.dual_lora_left:
            del self.dual_lora_left[adapter]

    def count_step(self, adapter: str) -> None:
        """Count one optimizer step; in place, for CUDA graphs that were captured before."""
        left = self.left(adapter)
        left = left.clone() if left.is_inference() else left
        self.dual_lora_left[adapter] = left.sub_(self._taking_part(adapter)).clamp_(min=0)

    def _taking_part(self, adapter: str) -> Tensor | int:
        """1 for what has got a gradient since the last step, 0 for the rest (experts that no token was sent to)."""
        return 1
