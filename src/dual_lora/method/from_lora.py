"""A LoRA adapter as the start of a Dual LoRA adapter, with what each layer keeps.

LoRA's update U = s B A becomes ΔW = α/√(r1 r2) · ReLU(B' A') ⊙ Sign(D C) as follows:

    direction   D = B, C = A up to positive scales, so that Sign(D C) = Sign(U): all signs, with r2 = LoRA's rank
    magnitude   B' A' = the best approximation of |U| of rank r1, which keeps a part

|U| is of high rank even though U is not (only at LoRA's rank 1 is it of rank 1, and the conversion exact), so this is a
start for training. To keep all of U, merge the LoRA into its base and begin Dual LoRA there.
"""

import os
import re
from collections.abc import Callable
from statistics import median_high
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..core.reference import Factors, Form, delta_weight, scaling
from .config import EARLIER_STD, DualLoraConfig
from .conversion import refuse_biases, table, truncated, what_else_is_saved, what_stays, write_adapter
from .parallel.fast_paths import is_read
from .saved import PEFT_PREFIX, named_as_saved


class LayerKept(NamedTuple):
    """What of a layer's LoRA update U the Dual LoRA update ΔW keeps."""

    layer: str
    r1: int
    r2: int
    cosine: float  # of ΔW and U; the relative error ‖ΔW - U‖ / ‖U‖ is √(1 - cosine²)
    signs: float  # share of the entries of Sign(D C) that are Sign(U)


class Start(NamedTuple):
    """A Dual LoRA adapter and what it keeps of the LoRA adapter, layer by layer."""

    config: DualLoraConfig
    state_dict: dict[str, Tensor]
    kept: list[LayerKept]

    def __str__(self) -> str:
        lines = {k.layer: f"r1 {k.r1:>3}  r2 {k.r2:>3}  cosine {k.cosine:.3f}  signs {k.signs:7.2%}" for k in self.kept}
        return table(lines | {"median": f"{'':14}  cosine {self.median:.3f}"})

    @property
    def median(self) -> float:
        """The middle layer's cosine."""
        return median_high(kept.cosine for kept in self.kept)


def convert_to_dual_lora(
    model: nn.Module,
    r1: int | None = None,
    adapter_name: str = "default",
    advance: Callable[[int], object] = lambda layers: None,
) -> Start:
    """A Dual LoRA adapter near a LoRA adapter, at full strength (no warm-up): the signs are kept, |U| is fitted.

    model: a PEFT model with a LoRA adapter on linear layers.
    r1: rank of the magnitude; left out: each layer's LoRA rank, so that the adapter has twice LoRA's size.
    advance: called with 1 after every layer, for a progress bar.

    Raises TypeError for layers that are not linear and for variants of LoRA (DoRA) whose update is more than B A, and
    ValueError for a layer without any update, which has no signs to keep, for trained biases, and for a start that has
    changed the base (PiSSA).
    """
    if r1 is not None and r1 < 1:
        raise ValueError(f"r1 is {r1}: give a whole number of at least 1, or leave it out for LoRA's rank.")
    model = getattr(model, "_orig_mod", model)  # compiled, it has other names
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    layers = _lora_layers(model, adapter_name)
    refuse_biases(config)
    if not keeps_base(config):
        raise ValueError(
            f"This LoRA began by changing its base (init_lora_weights={config.init_lora_weights!r}), so B A is no "
            "update of the base that the converted adapter would be put on. Save it first as a plain LoRA (PEFT: "
            "`save_pretrained(path_initial_model_for_weight_conversion=...)`), or merge it (`merge_and_unload()`), and "
            "begin Dual LoRA there."
        )
    state: dict[str, Tensor] = {}
    kept, patterns = [], {}
    std = EARLIER_STD
    for name, layer in layers.items():
        A: Tensor = layer.lora_A[adapter_name].weight  # type: ignore[assignment]
        B: Tensor = layer.lora_B[adapter_name].weight  # type: ignore[assignment]
        r2 = A.shape[0]
        ranks = min(r1 or r2, A.shape[1], B.shape[0]), r2
        factors, cosine, signs = near(layer.scaling[adapter_name] * B.float(), A.float(), ranks[0], std, name)
        for letter, factor in zip("ABCD", factors, strict=True):
            state[f"{name}.dual_lora_{letter}"] = factor
        kept.append(LayerKept(name.removeprefix(PEFT_PREFIX), *ranks, cosine, signs))
        patterns[name.removeprefix(PEFT_PREFIX)] = list(ranks)
        advance(1)
    usual = max(patterns.values(), key=list(patterns.values()).count)
    dual = DualLoraConfig.paper(
        r1=usual[0],
        r2=usual[1],
        rank_pattern={f"^{re.escape(name)}": ranks for name, ranks in patterns.items() if ranks != usual},
        warmup_steps=0,
        **what_stays(model, config, layers),
    )
    return Start(dual, named_as_saved(state | what_else_is_saved(model, adapter_name)), kept)


def keeps_base(config: Any) -> bool:
    """Whether the base of this LoRA is what it was before: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA change it."""
    start = getattr(config, "init_lora_weights", True)
    beside = isinstance(start, bool) or str(start).lower() in ("gaussian", "eva", "orthogonal", "mica")
    return beside and getattr(config, "kasa_config", None) is None


def save_as_dual_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    r1: int | None = None,
    adapter_name: str = "default",
    advance: Callable[[int], object] = lambda layers: None,
) -> Start:
    """Convert (see `convert_to_dual_lora`), and write the Dual LoRA adapter's folder.

    Train on with `PeftModel.from_pretrained(base, path, is_trainable=True)`.
    """
    start = convert_to_dual_lora(model, r1, adapter_name, advance)
    write_adapter(path, start.config, start.state_dict)
    return start


def near(B: Tensor, A: Tensor, r1: int, std: float, layer: str) -> tuple[Factors, float, float]:
    """Factors whose ΔW (α at its default) is near U = B A; the cosine of the two, and the share of equal signs.

    B [O, r2], A [r2, I]. C and D get the deviation `std` of a Gaussian start: the straight-through gradients of
    training expect it, and Sign does not see it.
    """
    r2 = A.shape[0]
    scale = scaling(2.0 * (r1 + r2), r1, r2)
    with torch.no_grad():
        update = B @ A
        if not update.any():
            raise ValueError(
                f"The LoRA update of the layer {layer!r} is zero (an adapter before its first step?), so that it has "
                "no signs to keep. Train the LoRA first, or begin with a new Dual LoRA adapter."
            )
        D, C = _balanced(B, A)
        D, C = D * (std / D.square().mean().sqrt()), C * (std / C.square().mean().sqrt())
        factors = Factors(*truncated(update.abs(), r1)[:2], C, D)
        found = delta_weight(factors, scale, Form())
        # The length that comes closest, once ReLU has cut what the approximation has below zero.
        length = float((found * update).sum() / found.square().sum())
        factors = factors._replace(B=factors.B * length)
        cosine = float(nn.functional.cosine_similarity(found.flatten(), update.flatten(), dim=0))
        signs = float(((D @ C > 0) == (update > 0)).float().mean())
    return factors, cosine, signs


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of B and rows of A of equal deviation."""
    b, a = B.square().mean(0).sqrt(), A.square().mean(1).sqrt()
    ratio = (a / b.clamp(min=torch.finfo(b.dtype).tiny)).sqrt()
    ratio = torch.where((a > 0) & (b > 0), ratio, 1.0)
    return B * ratio, A / ratio.unsqueeze(1)


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLinear]:
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer) and (adapter_name in m.lora_A or adapter_name in m.lora_embedding_A)
    }
    if not found:
        raise ValueError(f"The model has no LoRA adapter {adapter_name!r}: there is nothing to convert.")
    for name, layer in found.items():
        way_out = "Merge the LoRA into its base (`merge_and_unload()`), and begin Dual LoRA there."
        if not isinstance(layer, LoraLinear):
            raise TypeError(
                f"The LoRA layer {name!r} ({type(layer).__name__}) is not linear; only linear layers can be converted. "
                f"{way_out}"
            )
        parent, _, last = name.rpartition(".")
        if is_read(model.get_submodule(parent), last, layer.get_base_layer()):
            raise TypeError(
                f"The LoRA layer {name!r} is read by the module above it and not called: this LoRA does nothing there, "
                "and a Dual LoRA would. Leave it out."
            )
        if adapter_name in layer.lora_variant or layer.lora_bias[adapter_name]:
            what = type(layer.lora_variant.get(adapter_name)).__name__ if layer.lora_variant else "a bias"
            raise TypeError(
                f"The LoRA of the layer {name!r} has more than its two factors ({what}), which Dual LoRA has no place "
                f"for. {way_out}"
            )
    return found  # type: ignore[return-value]
