"""The contribution of each group: the loss when one group is set back to its start, or drawn anew.

Set back: what the other group has learned is left. Drawn anew (a Gaussian of the same spread): what the group's own
structure is worth, at the same size. Both are taken from a finished adapter; freezing a group during training is an
ablation, that is, another run.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dual_lora.lab.analysis.updates import GROUPS, adapted_layers

Tensors = dict[str, Tensor]  # by layer and name: "layers.0.q_proj dual_lora_A.default"


def factor_state(model: Any) -> Tensors:
    """Copies of all adapter parameters, by layer and name."""
    return {key: parameter.detach().clone() for key, parameter in _parameters(model)}


def contributions(
    model: Any, start: Tensors, loss_of: Callable[[Any], float], draws: int = 1, keeps_base: bool = True
) -> list[dict[str, Any]]:
    """One row a variant: loss with the whole adapter, without it, and with each group set back or drawn anew.

    start: `factor_state` at the start of training. loss_of: the loss of the model on held-out records. draws: how often
    a group is drawn anew (the mean and the spread are given). keeps_base: whether the model without its adapter is the
    base; else (PiSSA) that row is left out. The model is put back as it was.
    """
    groups = _groups_of(model)
    rows = [_row("as trained", "", loss_of(model))]
    if keeps_base:
        with model.disable_adapter():
            rows.append(_row("without the adapter", "all", loss_of(model)))
    for group, kinds in groups.items():
        with _with_values(model, kinds, lambda key, _: start[key]):
            rows.append(_row("set back to the start", group, loss_of(model)))
    for group, kinds in groups.items():
        losses = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            with _with_values(model, kinds, partial(_random_like, generator)):
                losses.append(loss_of(model))
        rows.append(_row("drawn anew", group, *losses))
    return rows


def _groups_of(model: Any) -> dict[str, tuple[str, ...]]:
    """Dual LoRA's two groups; of any other method, each kind of tensor."""
    kinds = sorted({_kind(key) for key, _ in _parameters(model)})
    if "dual_lora_A" in kinds:
        return dict(GROUPS)
    return {kind: (kind,) for kind in kinds}


def _row(what: str, group: str, *losses: float) -> dict[str, Any]:
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    return {"what": what, "group": group, "loss": statistics.fmean(losses), "spread": spread, "draws": len(losses)}


def _random_like(generator: torch.Generator, key: str, p: Tensor) -> Tensor:
    """Gaussian numbers with the mean and the spread of `p`."""
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
    return p.mean() + p.std() * noise if p.numel() > 1 else p.clone()


def _kind(key: str) -> str:
    return key.rpartition(" ")[2].partition(".")[0]


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    for layer, module in adapted_layers(model).items():
        for name, parameter in module.named_parameters():
            if not name.startswith("base_layer."):
                yield f"{layer} {name}", parameter


@contextmanager
def _with_values(model: Any, kinds: tuple[str, ...], new: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """The model with other values in the tensors of the given kinds."""
    chosen = [(key, p) for key, p in _parameters(model) if _kind(key) in kinds]
    kept = [p.detach().clone() for _, p in chosen]
    try:
        with torch.no_grad():
            for key, parameter in chosen:
                parameter.copy_(new(key, parameter))
        yield
    finally:
        with torch.no_grad():
            for (_, parameter), old in zip(chosen, kept, strict=True):
                parameter.copy_(old)
