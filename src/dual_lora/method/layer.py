"""Dual LoRA on one layer: y = x (W + λ · α/√(r1 r2) · ReLU(B A) ⊙ Sign(D C))ᵀ + bias.

Xu et al., arXiv 2512.03402. The mathematics is in `core`; here live the factors of every adapter, the warm-up's count,
the choice between the fused product and base + adapter (dropout, hooks), and the exact merge.

Factor shapes, by adapter name: A [r1, I], B [O, r1], C [r2, I], D [O, r2], always fp32 (fp64 after `.double()`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ..core import composing
from ..core.blocked import Adapter
from ..core.op import autocast_dtype, dual_lora_linear
from ..core.reference import Factors, Form, scaling
from . import offloaded, sharded, warmup
from .cache import composed_weights, version_of
from .config import DualLoraConfig
from .emptied import leave_out_counts, put_counts_in
from .precision import FACTOR_DTYPES, Told, claim, in_fp32
from .scaler import check_clip_is_safe, loss_scale

# Up to so many rows of x, composing the weight costs more than using it, and inference keeps the composed weight.
CACHED_ROWS = 256


class DualLoraLayer(nn.Module, BaseTunerLayer):
    """What every adapted layer has: factors, warm-up, merge. Subclasses say how the weight is a matrix [O, I]."""

    adapter_layer_names: tuple[str, ...] = ("dual_lora_A", "dual_lora_B", "dual_lora_C", "dual_lora_D")
    other_param_names: tuple[str, ...] = (
        "r",
        "r1",
        "r2",
        "alpha",
        "scaling",
        "forms",
        "warmup_steps",
        "tied",
        "dual_lora_dropout",
        "dual_lora_left",
        "dual_lora_scale",
    )

    # A module first of all: were `nn.Module` named by the subclasses instead, its `train` and `_apply` would come
    # before the ones below.
    def __init__(self, base_layer: nn.Module, told: Told | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}  # r1 + r2
        self.r1: dict[str, int] = {}
        self.r2: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.forms: dict[str, Form] = {}
        self.warmup_steps: dict[str, int] = {}
        self.dual_lora_dropout = nn.ModuleDict()
        self.dual_lora_A = nn.ParameterDict()
        self.dual_lora_B = nn.ParameterDict()
        self.dual_lora_C = nn.ParameterDict()
        self.dual_lora_D = nn.ParameterDict()
        self.dual_lora_left = BufferDict(persistent=True)  # optimizer steps before full strength: λ, kept here alone
        self._read: dict[str, _Read] = {}  # what was read there last, so that a device is not waited for
        self.dual_lora_scale: dict[str, Tensor] = {}  # λ α/√(r1 r2), made from it, as the operator takes it
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.tied: dict[str, int | None] = {}  # adapters of the embedding whose weight this is: its row without update
        self._tied_to: dict[str, DualLoraLayer] = {}
        self._original: Tensor | None = None  # the base weight's data while something is merged
        self.told = Told() if told is None else told  # the model's own, of all its layers
        self.kwargs = kwargs
        self.out_features, self.in_features = self._matrix_shape()
        self.register_state_dict_post_hook(leave_out_counts)
        self.register_load_state_dict_pre_hook(put_counts_in)
        self.register_load_state_dict_post_hook(_after_load)

    # The weight as a matrix. Override these three for other layouts.

    def _matrix_shape(self) -> tuple[int, int]:
        """(O, I) of the weight as a matrix."""
        raise NotImplementedError

    def _matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as a view [O, I]."""
        raise NotImplementedError

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix [O, I] in the layout of the stored weight."""
        raise NotImplementedError

    def _factor_shapes(self, r1: int, r2: int) -> list[tuple[int, ...]]:
        """Shapes of A, B, C and D."""
        O, I = self.out_features, self.in_features
        return [(r1, I), (O, r1), (r2, I), (O, r2)]

    def extra_repr(self) -> str:
        """The matrix's shape, which not every base layer prints."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    # Factors.

    @torch.inference_mode(False)  # who makes or loads a model in inference mode may move or train it afterwards
    def update_layer(
        self, adapter_name: str, r1: int, r2: int, alpha: float | None, config: DualLoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, or make one of that name anew."""
        sharded.refuse_bare_parts(self.get_base_layer())
        self.tied.pop(adapter_name, None)
        alpha = 2.0 * (r1 + r2) if alpha is None else float(alpha)
        self.r[adapter_name], self.r1[adapter_name], self.r2[adapter_name] = r1 + r2, r1, r2
        self.alpha[adapter_name] = alpha
        self.scaling[adapter_name] = scaling(alpha, r1, r2)
        self.forms[adapter_name] = config.form
        self.warmup_steps[adapter_name] = config.warmup_steps
        self.dual_lora_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for name, shape in zip("ABCD", self._factor_shapes(r1, r2), strict=True):
            getattr(self, f"dual_lora_{name}")[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.reset_dual_lora_parameters(adapter_name, config)
        # With low_cpu_mem_usage everything that is saved waits on the meta device to be loaded.
        device = "meta" if self.dual_lora_A[adapter_name].device.type == "meta" else None
        self.dual_lora_left[adapter_name] = torch.tensor(config.steps_at_start, dtype=torch.int32, device=device)
        self._set_steps_left(adapter_name, config.steps_at_start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        claim(self._stored(adapter_name))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tie(self, adapter_name: str, other: DualLoraLayer) -> None:
        """Use the factors of another layer, whose weight this layer's base shares."""
        self._tied_to[adapter_name] = other
        self._tie_again(adapter_name)
        self.tied[adapter_name] = getattr(other.get_base_layer(), "padding_idx", None)

    def _tie_again(self, adapter_name: str) -> None:
        other = self._tied_to[adapter_name]
        for name in self.adapter_layer_names:
            # Not registered, as PEFT's loading with low memory would make another parameter of it.
            getattr(self, name)._parameters[adapter_name] = getattr(other, name)[adapter_name]
        self.dual_lora_left[adapter_name] = other.dual_lora_left[adapter_name]
        self._set_steps_left(adapter_name, other.steps_left(adapter_name))

    def reset_dual_lora_parameters(self, adapter_name: str, config: DualLoraConfig) -> None:
        """Draw the factors from N(0, σ²); with init_weights="zero" B = 0; with False at a visible strength."""
        # For tests: the update should show in a model of any width.
        std = config.init_std if config.init_weights else 0.3
        for factor in self._stored(adapter_name):
            if factor.device.type != "meta":
                nn.init.normal_(factor, std=std)
        if config.init_weights == "zero":
            nn.init.zeros_(self.dual_lora_B[adapter_name])

    def _stored(self, adapter: str) -> Factors:
        return Factors(
            self.dual_lora_A[adapter], self.dual_lora_B[adapter], self.dual_lora_C[adapter], self.dual_lora_D[adapter]
        )

    def factors(self, adapter: str) -> Factors:
        """The four factors of an adapter, restored to fp32 if foreign code has cast them down."""
        stored = Factors(*(offloaded.present(getattr(self, name), adapter) for name in self.adapter_layer_names))
        return in_fp32(stored, self.told)

    def adapter(self, name: str) -> Adapter:
        """Factors, scale λα/√(r1 r2) and form of an adapter, as the operator takes them."""
        factors = self.factors(name)
        scale, alone = self._scale(name, factors.A), self.tied.get(name)
        if alone is not None:
            B = factors.B
            padding = torch.arange(B.shape[0], device=B.device) == alone
            factors = factors._replace(B=B.masked_fill(padding.unsqueeze(1), 0.0))
        return Adapter(factors, scale, self.forms[name])

    def adapter_names(self) -> list[str]:
        """All adapters of this layer."""
        return list(self.scaling)

    def trainable_factors(self, adapter: str) -> list[Tensor]:
        """The trainable factors in the order B, A, D, C; the first one's optimizer is the adapter's clock."""
        A, B, C, D = self._stored(adapter)
        return [f for f in (B, A, D, C) if f.requires_grad]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter at its present λ, fp32, in the layout of the stored weight."""
        with torch.no_grad():
            return self._from_matrix(composing.compose(None, [self.adapter(adapter)], torch.float32))

    # Warm-up.

    def steps_left(self, adapter: str) -> int:
        """Optimizer steps before the adapter acts at full strength."""
        stored, read = self.dual_lora_left[adapter], self._read[adapter]
        if not (stored.is_meta or read.is_of(stored)):  # a loader that runs no hook of ours (transformers' own)
            self._set_steps_left(adapter, int(stored))
            # It has put other factors in place as well; those of a low precision may be FSDP2's working copies.
            claim(f for f in self._stored(adapter) if f.dtype in FACTOR_DTYPES)
        return self._read[adapter].left

    def warmup_factor(self, adapter: str) -> float:
        """λ: 0 at the start of the warm-up, 1 at its end."""
        left = self.steps_left(adapter)
        return 1.0 - left / self.warmup_steps[adapter] if left else 1.0

    def step(self, adapter: str) -> None:
        """Count one optimizer step."""
        left, scale = self.steps_left(adapter), self.dual_lora_scale[adapter]
        if left > 0:
            self._set_steps_left(adapter, left - 1)
            if not scale.is_inference():  # in the same memory, for CUDA graphs that were captured before
                self.dual_lora_scale[adapter] = scale.copy_(self.dual_lora_scale[adapter])

    def _set_steps_left(self, adapter: str, left: int) -> None:
        left = min(left, self.warmup_steps[adapter])
        # Another tensor, as the present one may be an inference tensor, which cannot be written to.
        stored = self.dual_lora_left[adapter] = torch.full_like(self.dual_lora_left[adapter], left)
        self._read[adapter] = _Read.of(stored, left)
        self._make_scale(adapter)
        if left or self.training:
            warmup.watch(self)

    def _scale(self, adapter: str, A: Tensor) -> Tensor:
        """λ α/√(r1 r2) as a 0-dim tensor where the factors are."""
        if not torch.compiler.is_compiling():
            self.steps_left(adapter)
            if self.dual_lora_scale[adapter].device != A.device:
                self._make_scale(adapter)
        return self.dual_lora_scale[adapter].to(A.device)

    def _make_scale(self, adapter: str) -> None:
        """Anew, and not in place: a graph that waits for its backward has saved the one that was."""
        A = self.dual_lora_A[adapter]
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        value = self.scaling[adapter] * self.warmup_factor(adapter)
        self.dual_lora_scale[adapter] = torch.full((), value, dtype=dtype, device=A.device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength to `scale` times its configured α/√(r1 r2).

        A graph that waits for its backward keeps the strength that it had, and so does a captured CUDA graph.
        """
        if adapter not in self.scaling:
            return
        self.scaling[adapter] = scale * scaling(self.alpha[adapter], self.r1[adapter], self.r2[adapter])
        self._make_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters by `scale`."""
        for adapter in self.active_adapters:
            if scale != 1 and adapter in self.scaling:
                self.scaling[adapter] *= scale
                self._make_scale(adapter)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by `scale`, or set it back to the configured one."""
        for adapter in self.active_adapters:
            if adapter not in self.scaling:
                continue
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale
                self._make_scale(adapter)

    # Life cycle: what drops the cached weight, what restores derived state.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; they train unless `inference_mode`."""
        chosen = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if chosen != list(self.active_adapters):  # switching the same ones off and on again keeps what was composed
            composed_weights.drop(self)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        warmup.watch(self)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. What FSDP2 has sharded stays trainable while it is off.

        A factor that is frozen as a shard and thawed as the whole that the forward pass has left in its place would
        stay frozen as a shard, which is what the optimizer holds: a reference pass would end the training.
        """
        stored = (factor for name in self.adapter_names() for factor in self._stored(name))
        if not enabled and any(map(sharded.is_sharded, stored)):
            self._disable_adapters = True
        else:
            super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        composed_weights.drop(self)
        self._read.pop(adapter_name, None)
        self._tied_to.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> DualLoraLayer:
        """As nn.Module; training drops the cached weight."""
        if mode:
            composed_weights.drop(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        composed_weights.drop(self)  # first, as a tensor subclass that is looked at cannot be moved
        before = {a: (self.steps_left(a), [f.data for f in self._stored(a)]) for a in self.adapter_names()}
        result = super()._apply(fn, recurse)
        for adapter, (left, old_factors) in before.items():
            for factor, old in zip(self._stored(adapter), old_factors, strict=True):
                # `.to(bfloat16)` and the like move the factors and leave their bits alone.
                if factor.dtype not in FACTOR_DTYPES and old.dtype in FACTOR_DTYPES:
                    factor.data = old.to(factor.device)
            self.factors(adapter)
            if not self.dual_lora_left[adapter].is_meta:
                self._set_steps_left(adapter, left)  # `to_empty` has emptied it
            self._make_scale(adapter)
        if self._original is not None:
            self._original = tree_map(fn, self._original)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for adapter in self.adapter_names():
            claim(self._stored(adapter))  # a copied parameter has lost what was written on it
        if any(read.left for read in self._read.values()):
            warmup.watch(self)  # a deep copy or an unpickled layer has to be counted as well

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the base layer's device and stay fp32: rounding fresh factors to the base's dtype flips signs."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            factor = factors[adapter_name]
            moved = factor if factor.device.type == "meta" else factor.detach().to(device)
            if moved.device != factor.device:
                factors[adapter_name] = nn.Parameter(moved, factor.requires_grad)
        if not self.dual_lora_left[adapter_name].is_meta:
            self.dual_lora_left[adapter_name] = self.dual_lora_left[adapter_name].to(device)
        self._make_scale(adapter_name)
        claim(self._stored(adapter_name))

    # Merge: the merged weight is the rounding of W + ΣΔW of the kept original; unmerge puts the original back.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight.

        Batch and sequential merges give the same bits, in any order: the sum is always taken anew, in fp32, from the
        original weight, which is kept until `unmerge` (so a merged model holds two copies of the adapted weights).

        safe_merge: check the result for NaN and infinity first, and raise ValueError with the base untouched.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or () if name in self.scaling]
        if names:
            self._write_merged([*self.merged_adapters, *names], safe_merge)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters out of the base weight (default: all), bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        gone = self.merged_adapters if adapter_names is None else adapter_names
        self._write_merged([name for name in self.merged_adapters if name not in gone], safe_merge=False)

    def _write_merged(self, names: list[str], safe_merge: bool) -> None:
        composed_weights.drop(self)
        if all(name in self.tied for name in (*names, *self.merged_adapters)):  # the embedding merges into the weight
            self.merged_adapters = names
            return
        parameter = self._merge_parameter()
        self._refuse_computed(parameter)
        in_parts = sharded.is_sharded(parameter)
        original = self._original
        if original is None:
            original = parameter.to_local().clone() if in_parts else parameter.data  # type: ignore[attr-defined]
        if not names:
            self._put(parameter, original)
            self._original = None
        else:
            merged = self._merged_part(parameter, original, names) if in_parts else self._merged_weight(original, names)
            if safe_merge:
                self._refuse_broken([merged], names)
            self._put(parameter, merged)
            self._original = original
        self._merge_bias(names)
        self.merged_adapters = names

    def _refuse_computed(self, weight: Tensor) -> None:
        """Raise ValueError for a weight that is made anew at every call, into which a merge would vanish."""
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"Cannot merge Dual LoRA into this {type(self.get_base_layer()).__name__}: its weight is no parameter "
                "but computed from others (weight_norm, spectral_norm or another parametrisation). Remove that first: "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or remove_weight_norm(layer)."
            )

    def _refuse_broken(self, merged: Sequence[Tensor], names: list[str]) -> None:
        """Raise ValueError for NaN or infinity in merged weights or in the factors of these adapters."""
        # Sign makes a number of everything, so that a NaN in C or D does not show in the weight.
        factors = [f for name in names for f in self._stored(name)]
        if not all(bool(torch.isfinite(t).all()) for t in (*merged, *factors)):
            added = ", ".join(name for name in names if name not in self.merged_adapters)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {added} seems to be broken")

    def _put(self, parameter: nn.Parameter, data: Tensor) -> None:
        """Let the parameter hold this data; of a sharded one, let this process's part hold it."""
        if sharded.is_sharded(parameter):
            with torch.no_grad():
                parameter.to_local().copy_(data)  # type: ignore[attr-defined]
        else:
            parameter.data = data

    def _merge_parameter(self) -> nn.Parameter:
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _merge_bias(self, names: list[str]) -> None:
        """For layers whose merge changes more than the weight."""

    def _merged_weight(self, original: Tensor, names: list[str]) -> Tensor:
        """The rounding of W + ΣΔW, summed in the order in which the adapters were added."""
        adapters = [self.adapter(name) for name in self.scaling if name in names]
        with torch.no_grad():
            merged = composing.compose(self._matrix(original), adapters, original.dtype)
            return self._from_matrix(merged).contiguous()

    def _merged_part(self, parameter: Any, original: Tensor, names: list[str]) -> Tensor:
        """The same of a sharded weight, for the part of it that is here."""
        raise ValueError(
            f"Cannot merge Dual LoRA into a sharded {type(self.get_base_layer()).__name__}. Save the adapter, load it "
            "on the base model in one process, and merge there."
        )

    # Forward.

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.scaling]

    def _may_keep(self) -> bool:
        """Whether a composed weight may be kept: in inference, and not in a graph."""
        return not (self.training or torch.is_grad_enabled() or is_traced())

    def _loss_scale(self, names: list[str], operand: Tensor) -> Tensor | None:
        """The gradient scaler's factor, where one of the adapters is trained with `clip`."""
        clips = any(
            self.forms[n].ste == "clip" and self.forms[n].direction == "sign" and self.trainable_factors(n)
            for n in names
        )
        if not (clips and torch.is_grad_enabled()):
            return None
        check_clip_is_safe(operand, self.training, self.told)
        return loss_scale(operand.device)


class _Read(NamedTuple):
    """A count, and the tensor and version that it was read from."""

    stored: Tensor
    version: int | None
    left: int

    @classmethod
    def of(cls, stored: Tensor, left: int) -> _Read:
        return cls(stored, version_of(stored), left)

    def is_of(self, stored: Tensor) -> bool:
        """Whether this is still what the tensor says."""
        return stored is self.stored and version_of(stored) == self.version


def _after_load(layer: DualLoraLayer, incompatible_keys: Any) -> None:
    """After load_state_dict: the count on the device is the truth; the rest is derived from it."""
    composed_weights.drop(layer)
    for adapter in layer.adapter_names():
        claim(layer._stored(adapter))
        layer.steps_left(adapter)
        if adapter in layer._tied_to:  # `assign=True` has put two parameters in the place of one
            layer._tie_again(adapter)
        layer._make_scale(adapter)


class MapLayer(DualLoraLayer):
    """A layer whose output is linear in its weight, f(x; W + ΣΔW) = f(x; W) + Σ f(x; ΔW): how forward chooses.

    Subclasses give `_is_plain`, `_fused` (one call with the composed weight) and `_adapter_branch` (one with ΔW alone).
    """

    takes_parts = False  # whether the weight may be sharded by tensor parallelism

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: DualLoraConfig,
        r1: int,
        r2: int,
        alpha: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r1, r2, alpha, config=config)

    def _is_plain(self) -> bool:
        """Whether calling the base layer is its function and nothing else, so that the fused one may replace it."""
        raise NotImplementedError

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        """f(x; W + ΣΔW)."""
        raise NotImplementedError

    def _adapter_branch(self, x: Tensor, name: str) -> Tensor:
        """f(dropout(x); ΔW)."""
        raise NotImplementedError

    def _base_call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; W), to which adapters' outputs are added."""
        return self.base_layer(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; W + ΣΔW) over the active adapters; for a linear layer, x [..., I] -> y [..., O]."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = self._present(self.active_adapters)
        if adapter_names is None and (self.merged or not active):
            return self.base_layer(x, *args, **kwargs)
        if not self.takes_parts:
            sharded.refuse(self.get_base_layer(), getattr(self.get_base_layer(), "weight", None))
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

        # An adapter with dropout sees another input than the base, so that it needs a product of its own.
        dropped = [n for n in active if self.training and isinstance(self.dual_lora_dropout[n], nn.Dropout)]
        fused = [n for n in active if n not in dropped] if not (args or kwargs) and self._is_plain() else []
        y = self._fused(x, fused) if fused else self._base_call(x, *args, **kwargs)
        for name in active:
            if name not in fused:
                y = y + self._adapter_branch(x, name).to(y.dtype)
        return y

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Every sample with its own adapter ("__base__": none)."""
        y = self._base_call(x, *args, **kwargs)
        for name in self._present(sorted(set(adapter_names))):
            index = [k for k, item in enumerate(adapter_names) if item == name]
            y[index] = y[index] + self._adapter_branch(x[index], name).to(y.dtype)
        return y

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()


class Linear(MapLayer):
    """Dual LoRA on nn.Linear (weight [O, I]) and transformers' Conv1D (weight [I, O])."""

    takes_parts = True

    def __init__(self, base_layer: nn.Module, *args: Any, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        super().__init__(base_layer, *args, **kwargs)

    def _matrix_shape(self) -> tuple[int, int]:
        weight: Any = self.get_base_layer().weight
        shape = getattr(weight, "ds_shape", None) or weight.shape
        return (shape[1], shape[0]) if self.fan_in_fan_out else (shape[0], shape[1])

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    _from_matrix = _matrix  # type: ignore[assignment]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may use ΔW; it is then an approximation, as ΔW is of high rank."""
        return True

    def _merged_part(self, parameter: Any, original: Tensor, names: list[str]) -> Tensor:
        if self.fan_in_fan_out:
            return super()._merged_part(parameter, original, names)
        with torch.no_grad():
            return sharded.merged_part(parameter, original, [self.adapter(n) for n in self.scaling if n in names])

    def _is_plain(self) -> bool:
        return is_plain(self.base_layer, nn.Linear.forward, Conv1D.forward) or sharded.takes_product(self.base_layer)

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        """One product with the composed weight."""
        base: Any = self.base_layer
        if sharded.is_sharded(base.weight):
            return sharded.product(self, x, names)
        weight = self._matrix(base.weight)
        if autocast_dtype(x.device, x.dtype) is None:
            x = x.to(weight.dtype)
        if self._may_cache(x):
            return self._cached_product(x, names)
        scale = self._loss_scale(names, x)
        return dual_lora_linear(x, weight, base.bias, [self.adapter(n) for n in names], scale)

    def _may_cache(self, x: Tensor) -> bool:
        return self._may_keep() and x.numel() <= CACHED_ROWS * self.in_features

    def _cached_product(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self.base_layer
        adapters = [self.adapter(n) for n in names]
        dtype = autocast_dtype(x.device, x.dtype) or x.dtype
        weight = composed_weights.get(
            self,
            self._sources(names, adapters),
            (tuple(names), dtype),
            lambda: composing.compose(self._matrix(base.weight), adapters, dtype),
        )
        bias = None if base.bias is None else base.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight, bias)

    def _sources(self, names: Sequence[str], adapters: Sequence[Adapter]) -> list[Tensor]:
        """What a kept weight is made from: what is stored, where an adapter's factors are made from it anew."""
        base: Any = self.base_layer
        factors = [
            a.factors if self.tied.get(n) is None else self._stored(n) for n, a in zip(names, adapters, strict=True)
        ]
        return [base.weight, *(t for four in factors for t in four), *(a.scale for a in adapters)]

    def _adapter_branch(self, x: Tensor, name: str) -> Tensor:
        """dropout(x) ΔWᵀ, [..., O]."""
        x = self.dual_lora_dropout[name](x)
        if sharded.is_sharded(getattr(self.get_base_layer(), "weight", None)):
            return sharded.product(self, x, [name], with_base=False)
        if autocast_dtype(x.device, x.dtype) is None:
            # In the base's precision; a quantised base has none, and takes that of x.
            weight: Any = self.get_base_layer().weight
            dtype = weight.dtype
            x = x.to(dtype) if dtype.is_floating_point else x
        return dual_lora_linear(x, None, None, [self.adapter(name)], self._loss_scale([name], x))


def is_traced() -> bool:
    """Whether what runs becomes a graph, of torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether torch.export traces, for itself or for ONNX: without Dynamo, other than torch.compile."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_plain(layer: nn.Module, *forwards: Any) -> bool:
    """Whether calling the layer is one of these forwards and nothing else (a subclass, hooks)."""
    return (
        type(layer).forward in forwards
        and "forward" not in vars(layer)  # accelerate's hooks sit there
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


def dispatch_default(target: nn.Module, adapter_name: str, config: DualLoraConfig, **kwargs: Any) -> nn.Module | None:
    """The adapted layer for nn.Linear and Conv1D, or None."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    fan_in_fan_out = config.fan_in_fan_out
    if isinstance(base, Conv1D):
        if not fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.",
                stacklevel=2,
            )
        fan_in_fan_out = True
    elif isinstance(base, nn.Linear):
        if fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to "
                "False.",
                stacklevel=2,
            )
        fan_in_fan_out = False
    else:
        return None
    return Linear(target, adapter_name, config=config, fan_in_fan_out=fan_in_fan_out, **kwargs)
