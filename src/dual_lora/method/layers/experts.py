"""Dual LoRA on a named nn.Parameter (`target_parameters`): expert tensors of MoE models, or any other weight.

A parameter with two dimensions is a matrix [O, I]. One with three is a matrix for each expert: [E, O, I] (Mixtral,
Qwen3-MoE), or [E, I, O] where the module says `is_transposed` (GPT-OSS, Llama 4). Every expert has factors of its own:
A [E, r1, I], B [E, O, r1], C [E, r2, I], D [E, O, r2].

The module's forward runs with the composed weight in the parameter's place. Only the experts that the router chose are
composed: all at once where the module's function takes the whole tensor, one at a time where it loops over experts.
Several parameters of one module nest their wrappers, as PEFT expects.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ...core.compose_op import Composed, dual_lora_weight, recompose_in_backward, track_composed
from ...core.reference import Adapter
from ...core.sampled import SampledProducts
from ...core.stacked import adapters_of_expert
from ...core.traced import is_exporting, is_traced
from ..config import DualLoraConfig
from ..layer import DualLoraLayer
from ..parallel import sharded
from ..plain import home
from ..replaced import original, replaced
from ..scaler import loss_scale

# How transformers calls the experts that the router chose for every token. In others' code the same name may stand for
# a mask, or for ids that are not the parameter's.
ROUTING_ARGUMENTS = ("top_k_index", "router_indices", "selected_experts", "routing_indices")


class ParamWrapper(DualLoraLayer):
    """Dual LoRA on one parameter of a module. (PEFT looks for wrappers by this class name.)"""

    samples_tokens = True

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: DualLoraConfig, **kwargs: Any
    ) -> None:
        self.parameter_name = parameter_name
        self._routed_experts: dict[str, Tensor] = {}  # by adapter: experts with tokens since its last step, int32 [E]
        for field in ("dropout", "fan_in_fan_out"):
            if getattr(config, field):
                raise ValueError(
                    f"dual_lora.ParamWrapper does not work with {field}={getattr(config, field)!r}: only "
                    f"the module knows how it uses its parameter {parameter_name!r}. Set {field} to its default for an "
                    "adapter with target_parameters, and use a second adapter for the other layers."
                )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def get_param(self) -> nn.Parameter:
        """The adapted parameter of the base layer."""
        return getattr(self.get_base_layer(), self.parameter_name)

    _parameter = get_param

    def _stored_shape(self) -> tuple[int, ...]:
        shape = super()._stored_shape()
        if len(shape) not in (2, 3):
            raise ValueError(
                f"dual_lora.ParamWrapper was initialized with {len(shape)} dimensional Parameter, but only 2d and 3d "
                f"are supported: {self.parameter_name!r} has shape {shape}."
            )
        return shape

    @property
    def num_experts(self) -> int:
        """Number of experts, 1 for a parameter that is a single matrix."""
        return self._stored_shape()[0] if len(self._stored_shape()) == 3 else 1

    @property
    def fan_in_fan_out(self) -> bool:  # type: ignore[override]
        """Whether the experts' weights are stored as [I, O]."""
        return len(self._stored_shape()) == 3 and bool(getattr(self.get_base_layer(), "is_transposed", False))

    def _matrix_shape(self) -> tuple[int, int]:
        dtype = self.get_param().dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise ValueError(
                f"Dual LoRA cannot add an update to the parameter {self.parameter_name!r} of {dtype}, which stores "
                "encoded numbers (with a scale, or packed). Load the base model in bf16 or fp32."
            )
        return super()._matrix_shape()

    def _factor_shapes(self, r1: int, r2: int) -> list[tuple[int, ...]]:
        return [(*self._stored_shape()[:-2], *shape) for shape in super()._factor_shapes(r1, r2)]

    def _compose(self, weight: Tensor | None, adapters: list[Adapter], dtype: torch.dtype) -> Tensor:
        return dual_lora_weight(weight, adapters, dtype=dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module below all nested wrappers, with the adapters merged or left out."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    # Forward.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base layer, with W + ΣΔW in the parameter's place; under torch.export, of all experts.

        Raises NotImplementedError there for a module that loops over its experts.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "dual_lora.ParamWrapper does not support mixed adapter batches yet: the module sees its whole batch "
                "with one weight. Run the samples of each adapter as a batch of their own."
            )
        if is_exporting() and _loops_over_experts(self.get_base_layer()):
            raise NotImplementedError(
                f"{type(self.get_base_layer()).__name__} loops over the experts that the router chose. Such a loop "
                "cannot be exported, with or without an adapter. Call "
                "`model.set_experts_implementation('batched_mm')` first. torch.export takes 'grouped_mm' as well, ONNX "
                "does not."
            )
        names = self._names_to_add()
        if not names:
            return self.base_layer(*args, **kwargs)

        base, name = self.get_base_layer(), self.parameter_name
        parameter = original(base, name)
        sharded.refuse_sharded(base, parameter)
        weight = self._matrix(parameter)
        adapters = [self.adapter(n) for n in names]
        scale = loss_scale(parameter.device)
        routing = self._routing(base, args, kwargs)
        self._note_routed_experts(names, routing)
        products = SampledProducts(self._token_share(names))
        if routing is not None and _loops_over_experts(base):
            experts = _Experts(weight, adapters, scale, self.fan_in_fan_out, products)
            with recompose_in_backward(), replaced(base, {name: experts}), products.context():
                return self.base_layer(*args, **kwargs)
        routed = None if routing is None else torch.unique(routing)
        if routed is not None:
            routed = routed[(routed >= 0) & (routed < self.num_experts)]
        W = dual_lora_weight(weight, adapters, scale, routed=routed)
        products.add(W)
        composed = Composed(W, weight, adapters, routed)
        with recompose_in_backward(composed), replaced(base, {name: self._from_matrix(W)}), products.context():
            return self.base_layer(*args, **kwargs)

    # The paper's warm-up, separate for each expert.

    def _note_routed_experts(self, names: list[str], routing: Tensor | None) -> None:
        """Record which experts get tokens in this pass, if an adapter has a warm-up and gradients are enabled."""
        for name in names if torch.is_grad_enabled() and not is_traced() else ():
            if self.states[name].warmup and routing is not None:
                part = self._routed_experts.get(name)
                if part is None:
                    part = self._routed_experts[name] = torch.zeros(
                        self.num_experts, dtype=torch.int32, device=routing.device
                    )
                chosen = routing.flatten()
                part.index_fill_(0, chosen[(chosen >= 0) & (chosen < self.num_experts)].long(), 1)

    def _got_gradient(self, adapter: str) -> Tensor | int:
        part = self._routed_experts.pop(adapter, None)
        return 1 if part is None else part.to(self.left(adapter).device)

    def _routing(self, base: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
        """Return the argument with the experts of every token; None if there is none, and all have to be composed."""
        if len(self._stored_shape()) == 2 or is_traced() or not home(type(base).forward).startswith("transformers."):
            return None
        arguments = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
        for name in ROUTING_ARGUMENTS:
            value = arguments.get(name)
            if isinstance(value, Tensor) and not value.is_floating_point():
                return None if is_fake(value) else value  # an estimate has no values, and counts all
        return None

    def extra_repr(self) -> str:
        """Print the parameter's name, and its shape as a matrix."""
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"


def _loops_over_experts(base: nn.Module) -> bool:
    """Whether the module takes one expert's weight at a time, as transformers' eager implementation does."""
    return getattr(getattr(base, "config", None), "_experts_implementation", None) == "eager"


class _Experts:
    """Stands in for an expert tensor: indexing composes that expert's weight."""

    def __init__(
        self,
        weight: Tensor,
        adapters: list[Adapter],
        scale: Tensor | None,
        transposed: bool,
        products: SampledProducts,
    ):
        self.weight, self.adapters, self.scale, self.transposed = weight, adapters, scale, transposed
        self.products = products
        self.shape = weight.transpose(-1, -2).shape if transposed else weight.shape
        self.dtype, self.device = weight.dtype, weight.device

    def __getitem__(self, expert: Any) -> Tensor:
        e = int(expert)
        adapters, weight = adapters_of_expert(self.adapters, e), self.weight[e]
        W = track_composed(Composed(dual_lora_weight(weight, adapters, self.scale), weight, adapters))
        self.products.add(W)
        return W.t() if self.transposed else W
