"""How strong the adapters of a layer act: λ of the warm-up times α/√(r1 r2), or what a user has set in its place.

λ is derived from one number an adapter, the optimizer steps that are left of its warm-up.
"""

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..core.reference import Factors, Form, scaling
from . import warmup
from .cache import version_of
from .precision import FACTOR_DTYPES, mark_as_stored


class Strength:
    """Ranks, λ and scale by adapter name: the part of a layer that knows nothing of its weight."""

    r: dict[str, int]
    r1: dict[str, int]
    r2: dict[str, int]
    alpha: dict[str, float]
    scaling: dict[str, float]
    forms: dict[str, Form]
    warmup_steps: dict[str, int]
    dual_lora_A: nn.ParameterDict
    dual_lora_left: BufferDict
    dual_lora_scale: dict[str, Tensor]
    dual_lora_ramp: dict[str, Tensor]
    active_adapters: list[str]
    training: bool
    _read: dict[str, tuple[Tensor, int | None, int]]
    _scaled: dict[str, tuple[float, int, torch.dtype, torch.device]]

    def _stored(self, adapter: str) -> Factors:
        raise NotImplementedError

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if name in self.scaling]

    def set_ranks(self, adapter_name: str, r1: int, r2: int, alpha: float | None) -> None:
        """Ranks, α and the scale that they make."""
        alpha = 2.0 * (r1 + r2) if alpha is None else float(alpha)
        self.r[adapter_name], self.r1[adapter_name], self.r2[adapter_name] = r1 + r2, r1, r2
        self.alpha[adapter_name], self.scaling[adapter_name] = alpha, scaling(alpha, r1, r2)

    def adapter_names(self) -> list[str]:
        """All adapters of this layer."""
        return list(self.scaling)

    def trainable_factors(self, adapter: str) -> list[Tensor]:
        """The trainable factors in the order B, A, D, C; the first one's optimizer counts the adapter's steps."""
        A, B, C, D = self._stored(adapter)
        return [f for f in (B, A, D, C) if f.requires_grad]

    def moved_factors(self, adapter: str) -> list[Tensor]:
        """Those that an optimizer's step moves, in that order: also what does not train any more and has a gradient."""
        A, B, C, D = self._stored(adapter)
        return [f for f in (B, A, D, C) if f.requires_grad or f.grad is not None]

    def clips(self, adapter: str) -> bool:
        """Whether the adapter trains by the clip, which looks at the values of gradients."""
        form = self.forms[adapter]
        return form.ste == "clip" and form.direction == "sign" and bool(self.trainable_factors(adapter))

    def steps_left(self, adapter: str) -> int:
        """Optimizer steps before the adapter acts at full strength."""
        stored = self.dual_lora_left[adapter]
        if stored.is_meta or self.is_as_read(adapter):
            return self._read[adapter][2]
        # A loader that runs no hook of ours (transformers' own) has put other factors in place as well; those of a low
        # precision may be FSDP2's working copies.
        self._set_steps_left(adapter, int(stored))
        mark_as_stored(f for f in self._stored(adapter) if f.dtype in FACTOR_DTYPES)
        return self._read[adapter][2]

    def is_as_read(self, adapter: str) -> bool:
        """Whether nobody has written to the count since it was read."""
        stored, (read, version, _) = self.dual_lora_left[adapter], self._read[adapter]
        return stored is read and version_of(stored) == version

    def steps_left_without(self, adapter: str) -> int:
        """The same after factors were put in place that say nothing of it: 0, but in the middle of a warm-up."""
        left = self.steps_left(adapter)
        return left if left < self.warmup_steps[adapter] else 0

    def is_at_start(self, adapter: str) -> bool:
        """Whether λ is 0."""
        return self._read[adapter][2] > 0 and self.steps_left(adapter) == self.warmup_steps[adapter]

    def warmup_factor(self, adapter: str) -> float:
        """λ: 0 at the start of the warm-up, 1 at its end."""
        return warmup.factor(self.steps_left(adapter), self.warmup_steps[adapter])

    def step(self, adapter: str) -> None:
        """Count one optimizer step."""
        left, memory = self.steps_left(adapter), self._scale_memory(adapter)
        if left > 0:
            self._set_steps_left(adapter, left - 1)
            self._move_scale(adapter, memory)

    def _scale_memory(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors by which forward knows how strong an adapter is."""
        return self.dual_lora_scale[adapter], self.dual_lora_ramp[adapter], self.dual_lora_left[adapter]

    def _move_scale(self, adapter: str, memory: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the strength where an earlier one was, for CUDA graphs that were captured before."""
        scale, ramp, left = memory
        if any(tensor.is_inference() for tensor in memory):
            return
        self.dual_lora_scale[adapter] = scale.copy_(self.dual_lora_scale[adapter])
        if self.dual_lora_ramp[adapter] is not ramp:
            self.dual_lora_ramp[adapter] = ramp.copy_(self.dual_lora_ramp[adapter])
        if not left.is_meta:
            stored = self.dual_lora_left[adapter] = left.copy_(self.dual_lora_left[adapter])
            self._read[adapter] = stored, version_of(stored), self._read[adapter][2]

    @torch.inference_mode(False)  # who loads or scales in inference mode may train afterwards
    def _set_steps_left(self, adapter: str, left: int) -> None:
        left = max(0, min(left, self.warmup_steps[adapter]))
        # Another tensor, as the present one may be an inference tensor, which cannot be written to.
        stored = self.dual_lora_left[adapter] = torch.full_like(self.dual_lora_left[adapter], left)
        self._read[adapter] = stored, version_of(stored), left
        self._make_scale(adapter)
        if left or self.training:
            warmup.watch(self)

    def _scale(self, adapter: str, A: Tensor) -> Tensor:
        """λ α/√(r1 r2) as a 0-dim tensor where the factors are."""
        left = self.dual_lora_left[adapter]
        if torch.compiler.is_compiling():
            if left.is_meta:  # offloaded, and a graph cannot look at it
                return self.dual_lora_scale[adapter].to(A.device)
            # A graph computes λ from the count: it has to see who writes there without a hook of ours (DDP's broadcast,
            # distributed checkpoints, averages of models, transformers' loader).
            strength, steps = self.dual_lora_ramp[adapter].to(A.device).unbind()
            return strength * (1 - left.to(A.device) / steps)
        self.steps_left(adapter)
        if self.dual_lora_scale[adapter].device != A.device or self._scaled[adapter][0] != self.scaling[adapter]:
            self._make_scale(adapter)
        return self.dual_lora_scale[adapter].to(A.device)

    @torch.inference_mode(False)
    def _make_scale(self, adapter: str) -> None:
        """Anew, and not in place: a graph that waits for its backward has saved the one that was."""
        A = self.dual_lora_A[adapter]
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        value = self.scaling[adapter] * self.warmup_factor(adapter)
        self.dual_lora_scale[adapter] = torch.full((), value, dtype=dtype, device=A.device)
        made_of = self.scaling[adapter], max(1, self.warmup_steps[adapter]), dtype, A.device
        if adapter not in self.dual_lora_ramp or self._scaled[adapter] != made_of:  # to a card it is copied
            self._scaled[adapter] = made_of
            self.dual_lora_ramp[adapter] = torch.tensor(made_of[:2], dtype=dtype, device=A.device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength to `scale` times its configured α/√(r1 r2).

        A graph that waits for its backward keeps the strength that it had, and so does a captured CUDA graph.
        """
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self.usual_scaling(adapter))

    def usual_scaling(self, adapter: str) -> float:
        """α/√(r1 r2), whatever has been set in its place."""
        return scaling(self.alpha[adapter], self.r1[adapter], self.r2[adapter])

    def _set_scaling(self, adapter: str, value: float) -> None:
        self.scaling[adapter] = value
        self._make_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for adapter in self._present(self.active_adapters):
            self._set_scaling(adapter, self.scaling[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self._present(self.active_adapters):
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self._set_scaling(adapter, self.scaling[adapter] / scale)
