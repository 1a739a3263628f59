"""Base weights that are DTensors: tensor parallelism, and merging into what FSDP2 has sharded.

    column-wise  W_k = W[rows k]     ΔW_k of A, B[rows k], C, D[rows k]          y_k = x (W_k + ΔW_k)ᵀ
    row-wise     W_k = W[:, cols k]  ΔW_k of A[:, cols k], B, C[:, cols k], D    y = Σ_k x_k (W_k + ΔW_k)ᵀ

Every process holds the whole factors, r (O + I) numbers, and composes its own part of the weight alone; the gradients
of the factors are summed over the processes. So the adapter is saved, loaded and resumed on any number of them.

The library that sharded the base (torch's `parallelize_module`, sequence parallelism included, or transformers'
`tp_plan`) redistributes inputs and outputs by hooks. The hooks stay: only the product between them is replaced.
"""

import sys
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from ...core import dispatch
from ...core.dispatch import in_dtype_of
from ...core.frozen import check_seed
from ...core.reference import Adapter, Factors, with_factors
from ..replaced import replaced

_SHARDED: tuple[type, ...] = ()
if dist.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    _SHARDED = (DTensor,)


def is_sharded(weight: Any) -> bool:
    """Whether a weight is a DTensor, of which this process holds a part."""
    return isinstance(weight, _SHARDED)


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds: all of it, unless it is a DTensor."""
    held: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return held


def all_processes(here: bool, tensors: Iterable[Any]) -> bool:
    """Whether `here` is true in every process that shares one of the tensors. A collective: all have to call it."""
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t)):  # in the same order everywhere
        for group in mesh.get_all_groups():
            holds = torch.tensor(int(here), device=mesh.device_type)
            dist.all_reduce(holds, dist.ReduceOp.MIN, group)
            here = bool(holds)
    return here


_gathered: tuple[list[int], weakref.WeakSet[nn.Module]] = ([], weakref.WeakSet())


def is_gathered(layer: nn.Module) -> bool:
    """Whether FSDP2 shards the layer and gathers it for each forward; gathered tensors do not show writes to shards.

    A gathered tensor has no mark, so FSDP2's internal state is read for the modules that it manages.
    """
    global _gathered
    known = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    if not known:
        return False
    states = [state() for state in known.values()]
    if _gathered[0] != [id(state) for state in states]:
        groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", [getattr(s, "_fsdp_param_group", None)])]
        parts = [part for group in groups if group is not None for part in group.fsdp_params]
        owners = (module for part in parts for module in (part._module_info.module, *part._module_info.shared_modules))
        _gathered = [id(state) for state in states], weakref.WeakSet(owners)
    return any(module in _gathered[1] for module in layer.modules())


def takes_product(base: nn.Module) -> bool:
    """Whether the base is a sharded nn.Linear, whose product can be replaced between its hooks."""
    return is_sharded(getattr(base, "weight", None)) and type(base).forward is nn.Linear.forward


def refuse_sharded(base: nn.Module, weight: Any) -> None:
    """Raise ValueError if the weight is sharded; called by layers that need the whole weight."""
    if is_sharded(weight):
        raise ValueError(
            f"Dual LoRA cannot work on this {type(base).__name__}, whose weight is sharded "
            f"({tuple(weight.placements)}, tensor parallelism): it takes nn.Linear. Leave this layer out of the "
            "adapter's targets, or out of the tensor parallel plan."
        )


def refuse_bare_parts(base: nn.Module) -> None:
    """Raise ValueError for a plain tensor that is a part of the weight (transformers before 5.17, or quantised)."""
    if getattr(base, "_hf_quantized_needs_local_tp", False) and getattr(base, "_is_hooked", False):
        raise ValueError(
            f"Dual LoRA cannot work on a quantised {type(base).__name__} under tensor parallelism: shard the "
            "base in bf16, or use the quantised one without a tensor parallel plan (DDP, FSDP2)."
        )
    if getattr(base, "_hf_tp_plan", None) and not is_sharded(getattr(base, "weight", None)):
        raise ValueError(
            f"This {type(base).__name__} holds a bare part of its weight (tensor parallel plan {base._hf_tp_plan!r} of "
            "transformers before 5.17): it does not say what the whole weight is. Use transformers 5.17 or "
            "later, or load the base without `tp_plan`."
        )


class LocalPart(NamedTuple):
    """This process's part of a weight [O, I]: rows (dim 0) or columns (dim 1) `start` to `stop`."""

    dim: int
    start: int
    stop: int
    mesh_dim: int

    def of(self, adapter: Adapter) -> Adapter:
        """Cut an adapter with whole factors to this part."""
        adapter, mine = adapter.with_mean_square(), slice(self.start, self.stop)
        A, B, C, D = adapter.factors
        factors = (A, B[mine], C, D[mine]) if self.dim == 0 else (A[:, mine], B, C[:, mine], D)
        return adapter._replace(factors=Factors(*factors))


def part_of(weight: DTensor) -> LocalPart:
    """Return which rows or columns of the weight this process holds. Raises ValueError for other layouts."""
    cuts = [(k, p) for k, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if len(cuts) != 1 or type(cuts[0][1]) is not Shard or weight.ndim != 2:
        raise ValueError(
            f"Dual LoRA cannot compose a weight of shape {tuple(weight.shape)} that is distributed as "
            f"{tuple(weight.placements)}: it takes matrices cut by rows (column-wise parallel) or by columns (row-wise "
            "parallel) along one dimension of the mesh. Leave this layer out of `target_modules`, or out of the tensor "
            "parallel plan."
        )
    mesh_dim, dim = cuts[0][0], cuts[0][1].dim % 2
    size, whole = weight.device_mesh.size(mesh_dim), weight.shape[dim]
    each = -(-whole // size)
    start = min(weight.device_mesh.get_local_rank(mesh_dim) * each, whole)
    return LocalPart(dim, start, min(start + each, whole), mesh_dim)


def product(layer: Any, x: Tensor, names: list[str], with_base: bool = True) -> Tensor:
    """Compute f(x; W + ΣΔW) of a sharded linear layer, or f(x; ΣΔW), through the hooks of its base."""
    base = layer.get_base_layer()
    if not takes_product(base):
        refuse_sharded(base, base.weight)
    for name in names:
        broadcast_factors(base.weight, layer.stored_factors(name))
    values = {"weight": _StandIn(layer, names, with_base)} | ({} if with_base else {"bias": None})
    with replaced(base, values):
        return layer.base_layer(x)


def broadcast_factors(weight: DTensor, factors: Iterable[Tensor]) -> None:
    """Broadcast the first process's factors to all that share the weight, once: each process drew its own start."""
    for factor in factors:
        if not getattr(factor, "_dual_lora_agreed", False):
            group = weight.device_mesh.get_group(part_of(weight).mesh_dim)
            dist.broadcast(factor.data, src=dist.get_global_rank(group, 0), group=group)
            factor._dual_lora_agreed = True  # type: ignore[attr-defined]


class _StandIn:
    """Stands in for a sharded weight: `linear(x, it, bias)` is the product with this process's part of W + ΣΔW."""

    def __init__(self, layer: Any, names: list[str], with_base: bool):
        self.layer, self.names, self.with_base = layer, names, with_base
        self.base = layer.get_base_layer()
        self.weight = self.base.weight
        self.part = part_of(self.weight)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is linear, f"a sharded weight was used in {func}"
        x, it, *bias = args
        return it._linear(x, *bias, **(kwargs or {}))

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        part_of_bias = local(bias)
        if not isinstance(x, DTensor):
            if "forward" not in vars(self.base) or torch.is_grad_enabled():
                raise ValueError(
                    "A Dual LoRA layer whose weight is sharded (a DTensor) got a plain tensor, as if the weight were "
                    "whole. Call the model as a whole, so that the hooks of FSDP2 or of the tensor parallel plan run."
                )
            return self._local(x, part_of_bias)  # transformers' path for inference: parts come, parts go
        by_rows, mesh_dim = self.part.dim == 0, self.part.mesh_dim
        layout = list(x.placements)
        layout[mesh_dim] = Replicate() if by_rows else Shard(x.ndim - 1)
        x = x.redistribute(placements=layout)
        gradient = list(layout)
        if by_rows:
            gradient[mesh_dim] = Partial()
        y = self._local(x.to_local(grad_placements=gradient), part_of_bias if by_rows else None)
        layout[mesh_dim] = Shard(y.ndim - 1) if by_rows else Partial()
        shape = torch.Size((*x.shape[:-1], self.weight.shape[0]))
        strides = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(y, x.device_mesh, layout, run_check=False, shape=shape, stride=strides)
        return whole if by_rows or bias is None else whole + bias

    def _local(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I or this part's columns] -> [..., this part's rows or O]."""
        weight = whole = None
        if self.with_base:
            weight, whole = self.weight.to_local(), self.weight
            x = in_dtype_of(weight, x)
        adapters = [self.layer.adapter(name) for name in self.names]
        if torch.is_grad_enabled():
            group = self.weight.device_mesh.get_group(self.part.mesh_dim)
            adapters = with_factors(adapters, _SumGradients.apply(group, *(f for a in adapters for f in a.factors)))
        mine = {name: self.part.of(a) for name, a in zip(self.names, adapters, strict=True)}
        return self.layer.product(x, weight, bias, mine, whole)


class _SumGradients(torch.autograd.Function):
    """The identity on factors, whose backward sums their gradients over the processes in one all-reduce."""

    @staticmethod
    def forward(ctx, group, *factors):
        ctx.group = group
        return tuple(f.view_as(f) for f in factors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        given = list(zip(gradients, ctx.needs_input_grad[1:], strict=True))
        wanted = [g for g, needed in given if needed]
        flat = torch.cat([g.reshape(-1) for g in wanted])
        dist.all_reduce(flat, group=ctx.group)
        sums = iter(flat.split([g.numel() for g in wanted]))
        return None, *(next(sums).view_as(g) if needed else None for g, needed in given)


# Merging into a part. FSDP2 gathers from its own memory, so the merge writes there in place.


def merged_part(weight: DTensor, original: Tensor, adapters: list[Adapter]) -> Tensor:
    """Compose this process's part of W + ΣΔW, from its part `original` of W.

    Factors that FSDP2 has sharded are gathered for it.
    """
    part, factors = part_of(weight), [f for a in adapters for f in a.factors]
    if not any(map(is_sharded, factors)):
        broadcast_factors(weight, factors)
    whole = (f.full_tensor() if isinstance(f, DTensor) else f for f in factors)
    return dispatch.compose(original, [part.of(a) for a in with_factors(adapters, whole)], original.dtype)


# A model that FSDP2's preparation empties: its parameters go to the meta device, are sharded there and filled.
# accelerate (`fsdp_cpu_ram_efficient_loading`) takes everything in the state for a shard. The count of the paper's
# warm-up is a whole number that every process has: it stays out of that state, and where it was.


def remove_counts(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After state_dict() of a layer that was emptied and sharded: remove its counts and seeds."""
    for adapter, A in layer.dual_lora_A.items():
        if A.is_meta and is_sharded(A):
            state.pop(f"{prefix}dual_lora_left.{adapter}", None)
            state.pop(f"{prefix}dual_lora_seed.{adapter}", None)


def restore_counts(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict() of factors without a count: add one. A missing seed is the layer's own.

    Of sharded factors `remove_counts` took it out. Raises ValueError for a seed that is no whole number any more.
    """
    layer.dual_lora_keys.clear()  # which are derived again from the seeds that are loaded
    for adapter, seed in layer.dual_lora_seed.items():
        name = f"{prefix}dual_lora_seed.{adapter}"
        if f"{prefix}dual_lora_B.{adapter}" in state:  # a file without the seed has it by the layer's name
            state.setdefault(name, seed.clone())
        if name in state:
            check_seed(state[name], name)
    for adapter in layer.dual_lora_left:
        B = state.get(f"{prefix}dual_lora_B.{adapter}")
        if B is not None:
            state.setdefault(f"{prefix}dual_lora_left.{adapter}", layer.fitted_count(adapter, None, is_sharded(B)))
