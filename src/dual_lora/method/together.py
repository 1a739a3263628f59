"""Small layers composed in one launch where a whole model is: merging it, and switching its adapters in generation.

On a GPU alone (`core.composing.shares_a_launch`): everywhere else each layer composes its weight when it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.composing import Job, compose_together, shares_a_launch
from . import sharded
from .cache import composed_weights
from .layer import Linear


@contextmanager
def merging(model: nn.Module, adapter_names: list[str] | None) -> Iterator[None]:
    """While these adapters (default: the active ones) are merged, small layers find their merged weights ready."""
    jobs: dict[Linear, Job] = {}
    for layer in _linears(model):
        asked = layer._present(layer.active_adapters if adapter_names is None else adapter_names)
        if asked and not layer.tied:
            names = {*layer.merged_adapters, *asked}
            original = _weight(layer).data if layer._original is None else layer._original
            adapters = [layer.adapter(name) for name in layer.scaling if name in names]
            jobs[layer] = Job(layer._matrix(original), adapters, original.dtype)
    ready = _compose(jobs)
    try:
        for layer, weight in ready.items():
            layer._ahead = weight
        yield
    finally:
        for layer in ready:
            layer._ahead = None


def cached(model: nn.Module) -> dict[Linear, torch.dtype]:
    """The layers whose composed weights are kept, and in which dtype."""
    dtypes = {layer: composed_weights.dtype_of(layer) for layer in _linears(model)}
    return {layer: dtype for layer, dtype in dtypes.items() if dtype is not None}


def cache_again(before: Mapping[Linear, torch.dtype]) -> None:
    """Compose and keep the weights of the adapters that are active now, of the small ones among these layers."""
    jobs: dict[Linear, Job] = {}
    for layer, dtype in before.items():
        names = layer._present(layer.active_adapters)
        if names and not (layer.training or layer.merged):
            jobs[layer] = Job(layer._matrix(_weight(layer)), [layer.adapter(name) for name in names], dtype)
    for layer, weight in _compose(jobs).items():
        names = layer._present(layer.active_adapters)
        composed_weights.put(layer, layer._sources(names, jobs[layer].adapters), (tuple(names), weight.dtype), weight)


def _compose(jobs: Mapping[Linear, Job]) -> dict[Linear, Tensor]:
    """The composed weights of those that share a launch."""
    shared = {layer: job for layer, job in jobs.items() if shares_a_launch(job)}
    with torch.no_grad():
        return dict(zip(shared, compose_together(list(shared.values())), strict=True))


def _linears(model: nn.Module) -> Iterator[Linear]:
    for module in model.modules():
        if type(module) is Linear and not sharded.is_sharded(_weight(module)):
            yield module


def _weight(layer: Linear) -> Any:
    return layer.get_base_layer().weight
