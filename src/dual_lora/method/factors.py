"""The factors of every adapter on one layer: how they are drawn, kept in fp32, tied, moved, loaded and removed.

Shapes, by adapter name: A [r1, I], B [O, r1], C [r2, I], D [O, r2], always fp32 (fp64 after `.double()`). With frozen
signs there is no factor C and D: a seed stands for them (`seeds`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.reference import Adapter, Factors
from ..core.tokens import EXACT
from .cache import composed_weights
from .config import DualLoraConfig
from .lora_names import LoraNames
from .parallel import offloaded, sharded
from .precision import FACTOR_DTYPES, in_fp32, mark_as_stored
from .replaced import compute_attributes
from .seeds import Keys, Seeds
from .shared import Shared
from .start import GAIN, STD, gain_of, give_signs_of_rank_one, std_of
from .state import AdapterState
from .strength import Scaling, Strength
from .warmup import Warmup, warming_layers

Adapters = dict[str, Adapter]  # by name, in the order in which they are added


class FactorsLayer(Warmup, Strength, LoraNames, Seeds, nn.Module, BaseTunerLayer):
    """Factors and life cycle of adapters. Subclasses say how the weight is a matrix [O, I]."""

    samples_tokens = False  # whether gradients can be estimated from a share of the tokens
    takes_dropout = True  # whether the adapter may have dropout, and so another input than the base
    fan_in_fan_out = False  # whether the weight is stored as [I, O]
    start_std, start_gain = STD, GAIN  # of C and D, and of A, with the default start
    cast_input_dtype_enabled = True  # which PEFT's `disable_input_dtype_casting` switches; inputs fit the weight anyhow

    adapter_layer_names: tuple[str, ...] = ("dual_lora_A", "dual_lora_B", "dual_lora_C", "dual_lora_D")
    other_param_names: tuple[str, ...] = (
        *("states", "scaling", "tied", "dual_lora_dropout", "dual_lora_left", "dual_lora_scale"),
        *("dual_lora_seed", "dual_lora_keys"),
    )

    # nn.Module is a base class here, not of the subclasses: else its `train` and `_apply` would precede those below.
    def __init__(self, base_layer: nn.Module, shared: Shared | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.states: dict[str, AdapterState] = {}
        self.dual_lora_dropout = nn.ModuleDict()
        self.dual_lora_A = nn.ParameterDict()
        self.dual_lora_B = nn.ParameterDict()
        self.dual_lora_C = nn.ParameterDict()
        self.dual_lora_D = nn.ParameterDict()
        self.dual_lora_left = BufferDict(persistent=True)
        self.dual_lora_seed = BufferDict(persistent=True)
        self.dual_lora_keys: dict[str, Keys] = {}
        self.dual_lora_scale: dict[str, Tensor] = {}
        self._scaling = Scaling({}, self.dual_lora_scale, self.states)
        self._disable_adapters = False
        self.tied: dict[str, FactorsLayer] = {}  # by adapter, the embedding whose weight and factors this layer shares
        self.shared = Shared() if shared is None else shared  # shared by all layers of a model
        self.out_features, self.in_features = self._matrix_shape()
        self.register_state_dict_post_hook(sharded.remove_counts)
        self.register_load_state_dict_pre_hook(sharded.restore_counts)
        self.register_load_state_dict_post_hook(_after_load)

    # The weight as a matrix. Override these three for other layouts.

    def _matrix_shape(self) -> tuple[int, int]:
        """Return (O, I) of the weight as a matrix."""
        O, I = self._stored_shape()[-2:]
        return (I, O) if self.fan_in_fan_out else (O, I)

    def _matrix(self, weight: Tensor) -> Tensor:
        """View the stored weight as [O, I]; or (`_from_matrix`) a matrix [O, I] in the layout of the stored weight."""
        return weight.mT if self.fan_in_fan_out else weight

    _from_matrix = _matrix

    def get_base_layer(self) -> nn.Module:
        """Return the innermost base layer, as PEFT's method does, with a fast path for a single wrapper."""
        base: Any = self._modules["base_layer"]
        return super().get_base_layer() if "base_layer" in base._modules else base

    def _parameter(self) -> nn.Parameter:
        """Return the adapted parameter of the base layer."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _stored_shape(self) -> tuple[int, ...]:
        parameter: Any = self._parameter()
        return tuple(getattr(parameter, "ds_shape", None) or parameter.shape)  # ZeRO-3 keeps an empty tensor here

    def _factor_shapes(self, r1: int, r2: int) -> list[tuple[int, ...]]:
        """Return the shapes of A, B, C and D."""
        O, I = self.out_features, self.in_features
        return [(r1, I), (O, r1), (r2, I), (O, r2)]

    def extra_repr(self) -> str:
        """Print the matrix's shape, which not every base layer does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    # Factors.

    @torch.inference_mode(False)  # a model that is made or loaded in inference mode may be moved or trained later
    def update_layer(
        self,
        adapter_name: str,
        r1: int,
        r2: int = 0,
        alpha: float | None = None,
        *,
        config: DualLoraConfig,
        share: float = EXACT,
        key: str = "",
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or replace the one of that name.

        share: the share of the tokens that gradients are estimated from, as the operator takes it.
        key: the layer's name, which the seed of a frozen direction depends on.

        Raises ValueError for a complex weight, a weight cut by a foreign plan, and a `plain_rank` that is not below r1;
        TypeError for a LoRA, which PEFT adds to what it takes for a LoRA's layer.
        """
        if not isinstance(config, DualLoraConfig):
            raise TypeError(
                f"A Dual LoRA layer cannot hold an adapter of {type(config).__name__} next to its own: merge the Dual "
                "LoRA adapter first (`merge_and_unload()`), or put the other one on the base before it."
            )
        base: Any = self.get_base_layer()
        sharded.refuse_bare_parts(base)
        if isinstance(getattr(base, "weight", None), Tensor) and base.weight.is_complex():
            raise ValueError(f"Dual LoRA updates real weights; that of {base} is {base.weight.dtype}: leave it out.")
        self.tied.pop(adapter_name, None)
        self._delete_seed(adapter_name)
        if config.plain_rank >= r1:
            raise ValueError(
                f"plain_rank={config.plain_rank} leaves nothing of this layer's rank {r1} for its masked part: it must "
                "be below the rank of every layer (rank_pattern). For all of it plain, use LoRA."
            )
        alpha = config.default_alpha(r1, r2) if alpha is None else float(alpha)
        if share != EXACT and not self.samples_tokens:
            self.shared.warn_once(f"token_sampling has no effect on {type(base).__name__}: its gradients are exact.")
        self.states[adapter_name] = state = AdapterState(r1, r2, alpha, config.form, share=share)
        self._scaling[adapter_name] = state.scaling
        dropout = config.dropout if self.takes_dropout else 0.0
        self.dual_lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        shapes = self._factor_shapes(r1, r2)
        for name, shape in zip("ABCD", shapes, strict=True):
            factors = getattr(self, f"dual_lora_{name}")
            if r2 or name in "AB":
                factors[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
            elif adapter_name in factors:
                del factors[adapter_name]
        if not r2:
            self._set_seed(adapter_name, config.direction_seed, key, shapes[0][:-2])
        self.reset_dual_lora_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.strength_tensor(adapter_name)
        self.begin_warmup(adapter_name, config.warmup_steps or 0)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factor_dicts(self, adapter: str) -> list[nn.ParameterDict]:
        """Return the parameter dicts that have a factor of this adapter: only A's and B's if its signs are frozen."""
        return [factors for name in self.adapter_layer_names if adapter in (factors := getattr(self, name))]

    def tie(self, adapter_name: str, other: FactorsLayer) -> None:
        """Use the factors of another layer, whose weight this layer's base shares, at their ranks and strength."""
        self.tied[adapter_name] = other
        self.states[adapter_name], self.scaling[adapter_name] = other.states[adapter_name], other.scaling[adapter_name]
        if adapter_name in self.dual_lora_left:
            del self.dual_lora_left[adapter_name]
        self._delete_seed(adapter_name)
        self._use_factors_of_tied(adapter_name)

    def _use_factors_of_tied(self, adapter_name: str) -> None:
        other = self.tied[adapter_name]
        for own, theirs in zip(self.factor_dicts(adapter_name), other.factor_dicts(adapter_name), strict=True):
            # Written past `__setitem__`, because PEFT's low-memory loading would replace a registered parameter.
            own._parameters[adapter_name] = theirs[adapter_name]

    def reset_dual_lora_parameters(self, adapter_name: str, config: DualLoraConfig) -> None:
        """Initialise the factors: A as LoRA's A, but wider, B = 0, C and D from N(0, σ²).

        init_weights="aligned": the same with signs of rank one. "paper": all factors from N(0, σ²). "zero": all but B.
        False: all from N(0, 0.3²), an update large enough for tests.
        """
        std = std_of(config, self.start_std) if config.init_weights else 0.3
        for letter, factors in zip("ABCD", self.factor_dicts(adapter_name), strict=False):
            factor = factors[adapter_name]
            if factor.device.type == "meta":
                continue
            if letter == "A" and config.starts_like_lora:
                self._draw_A(factor, gain_of(config, self.start_gain))
            elif letter == "B" and config.init_weights and config.form.live_zero:  # B = 0 trains by live_zero alone
                nn.init.zeros_(factor)
            else:
                nn.init.normal_(factor, std=std)
                if letter in "CD" and config.init_weights == "aligned" and config.direction_activation == "sign":
                    give_signs_of_rank_one(factor, rank_dimension=-2 if letter == "C" else -1)
        mark_as_stored(self.stored_factors(adapter_name))

    def _draw_A(self, A: Tensor, gain: float) -> None:
        """Initialise A as LoRA does for a linear layer, `gain` times as wide: uniformly, within gain/√I."""
        nn.init.uniform_(A, -gain * self.in_features**-0.5, gain * self.in_features**-0.5)

    def stored_factors(self, adapter: str) -> Factors:
        held: Any = self._modules
        A, B, C, D = (held["dual_lora_A"], held["dual_lora_B"], held["dual_lora_C"], held["dual_lora_D"])
        a, b, c, d = A._parameters, B._parameters, C._parameters, D._parameters
        if adapter in a and adapter in b and (self.states[adapter].frozen or (adapter in c and adapter in d)):
            A, B, C, D = a, b, c, d
        else:  # they are no parameters but attributes: FSDP1's views, or what a pruning or a norm computes
            for factors in (A, B, C, D):
                compute_attributes(factors)
        if self.states[adapter].frozen:
            return Factors(A[adapter], B[adapter], *self._keys(adapter, A[adapter].device))
        return Factors(A[adapter], B[adapter], C[adapter], D[adapter])

    def trainable_factors(self, adapter: str) -> list[Tensor]:
        """Return the factors that require a gradient, in the order B, A, D, C."""
        A, B, C, D = self.stored_factors(adapter)
        return [f for f in (B, A, D, C) if f.requires_grad]

    def factors(self, adapter: str) -> Factors:
        """Return the four factors of an adapter, restored to fp32 if foreign code has cast them."""
        four = self.stored_factors(adapter)
        A, B, C, D = four
        frozen = self.states[adapter].frozen
        right = A.dtype == B.dtype == torch.float32 and (frozen or C.dtype == D.dtype == torch.float32)
        if right and not (A.is_meta or B.is_meta or C.is_meta or D.is_meta):
            return four
        A, B, *trained = (offloaded.load(factors, adapter) for factors in self.factor_dicts(adapter))
        return in_fp32(Factors(A, B, *(trained or self._keys(adapter, A.device))), self.shared)

    def adapter(self, name: str) -> Adapter:
        """Return factors, scale λα/√(r1 r2) and form of an adapter, as the operator takes them."""
        factors, state = self.factors(name), self.states[name]
        scale = self.strength_tensor(name, factors.A)
        if state.warmup:
            factor = self.warmup_factor(name).to(scale)
            if factor.ndim:  # of each expert; ReLU(λ B A) = λ ReLU(B A)
                factors = factors._replace(B=factors.B * factor[:, None, None])
            else:
                scale = scale * factor
        adapter = Adapter(factors, scale, state.form)
        if name not in self.tied:
            return adapter
        return adapter.without_row(getattr(self.tied[name].get_base_layer(), "padding_idx", None))

    def _adapters(self, names: Iterable[str]) -> Adapters:
        return {name: self.adapter(name) for name in names}

    # Life cycle: what drops the cached weight, what restores derived state.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; they train unless `inference_mode`."""
        chosen = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if chosen != list(self.active_adapters):  # setting the same ones again keeps the cached weight
            composed_weights.drop(self)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. Factors that FSDP2 has sharded stay trainable while they are off.

        After a forward pass FSDP2 has put the whole factor in the shard's place. Freezing the shard and then thawing
        the whole would leave the shard frozen, which is what the optimizer holds: a reference pass would end training.
        """
        stored = (factor for name in self.states for factor in self.stored_factors(name))
        if not enabled and any(map(sharded.is_sharded, stored)):
            self._disable_adapters = True
        else:
            super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        composed_weights.drop(self)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> FactorsLayer:
        """As nn.Module; training drops the cached weight."""
        if mode:
            composed_weights.drop(self)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        composed_weights.drop(self)  # first, because a tensor subclass that the cache refers to cannot be moved
        factors = {a: [f.data for f in self.stored_factors(a)] for a in self.states}
        numbers = [(held, a, n.clone()) for held in (self.dual_lora_left, self.dual_lora_seed) for a, n in held.items()]
        result = super()._apply(fn, recurse)
        for held, adapter, number in numbers:  # `to_empty` has overwritten it; it must not stay on the meta device
            made = held[adapter]
            if made.is_meta or made.is_inference():
                held[adapter] = number.to("cpu" if made.is_meta else made.device)
            else:
                made.copy_(number)  # in place: after `share_memory` other processes read it there
        for adapter, olds in factors.items():
            for factor, old in zip(self.stored_factors(adapter), olds, strict=True):
                # `.to(bfloat16)` and the like move the factors but do not cast them.
                if factor.dtype not in FACTOR_DTYPES and old.dtype in FACTOR_DTYPES:
                    factor.data = old.to(factor.device)
            self.factors(adapter)
            self.strength_tensor(adapter)
        return result

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for adapter in self.states:
            mark_as_stored(self.stored_factors(adapter))  # a copied parameter has lost this attribute
        warming_layers.add(self)  # the steps of a deep copy or an unpickled layer are counted too

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. It stays fp32: rounding to the base's dtype flips signs."""
        base = self.get_base_layer()
        held = next(chain(base.parameters(), base.buffers()), None)  # HQQ's and attention's are not called `weight`
        device = held.device if device is None and held is not None else device
        if device is None or device.type == "meta" or adapter_name not in self.states:  # PEFT asks every layer
            return
        for factors in self.factor_dicts(adapter_name):
            factor = factors[adapter_name]
            moved = factor if factor.device.type == "meta" else factor.detach().to(device)
            if moved.device != factor.device:
                factors[adapter_name] = nn.Parameter(moved, factor.requires_grad)
        for numbers in (self.dual_lora_left, self.dual_lora_seed):
            if adapter_name in numbers:
                numbers[adapter_name] = numbers[adapter_name].to(device)
        self.strength_tensor(adapter_name)
        mark_as_stored(self.stored_factors(adapter_name))


# Scripts find the layers whose strength they set by `isinstance(module, LoraLayer)`. Without this they would find none.
LoraLayer.register(FactorsLayer)


def _after_load(layer: FactorsLayer, incompatible_keys: Any) -> None:
    """After load_state_dict: update what is derived from the factors."""
    composed_weights.drop(layer)
    for adapter in layer.states:
        mark_as_stored(layer.stored_factors(adapter))
        if adapter in layer.tied:  # `assign=True` has made two parameters of one
            layer._use_factors_of_tied(adapter)
        layer.strength_tensor(adapter)
