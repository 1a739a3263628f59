"""A LoRA adapter as the start of a Dual LoRA adapter: `python examples/from_lora.py my-lora start`.

LoRA's update U = s B A becomes ΔW = α/√(r1 r2) · ReLU(B' A') ⊙ Sign(D C) as follows:

    direction   D = B, C = A up to positive scales, so that Sign(D C) = Sign(U): all signs, with r2 = LoRA's rank
    magnitude   B' A' = the best approximation of |U| of rank r1, which keeps a part

|U| is of high rank even though U is not (only at LoRA's rank 1 is it of rank 1, and the conversion exact), so this is a
start for training: `PeftModel.from_pretrained(base, "start", is_trainable=True)`. Whether it is a better start than a
fresh adapter has not been shown. To keep all of U, merge the LoRA into its base and begin Dual LoRA there.
"""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import cyclopts
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dual_lora import DualLoraConfig, DualLoraLayer
from dual_lora.core.reference import Factors, Form, delta_weight, scaling

PAPER_STD = 0.02  # of C and D at the paper's start: Sign does not see their scale, the straight-through gradients do


class LayerKept(NamedTuple):
    """What of a layer's LoRA update the Dual LoRA update keeps."""

    layer: str
    cosine: float  # of ΔW and U; the relative error ‖ΔW - U‖ / ‖U‖ is √(1 - cosine²)
    signs: float  # share of the entries of Sign(D C) that are Sign(U)


def main(lora: Path, out: Path, r1: int | None = None) -> list[LayerKept]:
    """Convert the adapter in the folder `lora`, whose configuration names its base, and write `out`.

    r1: rank of the magnitude; left out: LoRA's rank, so that the adapter has twice LoRA's size.
    """
    start, kept = near_lora(AutoPeftModelForCausalLM.from_pretrained(lora), r1)
    start.save_pretrained(str(out))
    for layer in kept:
        print(f"{layer.layer}  cosine {layer.cosine:.3f}  signs {layer.signs:.2%}")
    return kept


def near_lora(model: PeftModel, r1: int | None = None) -> tuple[PeftModel, list[LayerKept]]:
    """A copy of the base with a Dual LoRA adapter near the model's LoRA adapter, at full strength.

    Raises TypeError for layers that are not linear and for variants of LoRA, ValueError for a start that has changed
    the base (PiSSA) and for a layer without any update.
    """
    lora: Any = model.peft_config["default"]
    if lora.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"This LoRA began by changing its base (init_lora_weights={lora.init_lora_weights!r}): merge it "
            "(`merge_and_unload()`) and begin Dual LoRA there."
        )
    found = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    factors = {name: _near(name, layer, r1) for name, layer in found.items()}
    ranks = {name: [f.A.shape[0], f.C.shape[0]] for name, (f, *_) in factors.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    config = DualLoraConfig.paper(
        r1=usual[0],
        r2=usual[1],
        rank_pattern={f"^{re.escape(name)}$": own for name, own in ranks.items() if own != usual},
        target_modules=sorted(factors),
        modules_to_save=lora.modules_to_save,
        task_type=lora.task_type,
        warmup_steps=0,
    )
    dual = get_peft_model(copy.deepcopy(model).unload(), config)
    for name, (own, *_) in factors.items():
        layer = dual.get_base_model().get_submodule(name)
        assert isinstance(layer, DualLoraLayer)
        with torch.no_grad():
            for letter, factor in zip("ABCD", own, strict=True):
                getattr(layer, f"dual_lora_{letter}")["default"].copy_(factor)
    return dual, [LayerKept(name, cosine, signs) for name, (_, cosine, signs) in factors.items()]


def _near(name: str, layer: Any, r1: int | None) -> tuple[Factors, float, float]:
    """Factors whose ΔW (α at its default) is near U = B A; the cosine of the two, and the share of equal signs."""
    if not isinstance(layer, LoraLinear) or "default" in layer.lora_variant or layer.lora_bias["default"]:
        raise TypeError(f"The layer {name!r} is no plain LoRA of a linear layer, which alone can be converted.")
    B = layer.scaling["default"] * layer.lora_B["default"].weight.detach().float()
    A = layer.lora_A["default"].weight.detach().float()
    update, r2 = B @ A, len(A)
    if not update.any():
        raise ValueError(f"The LoRA update of the layer {name!r} is zero, so that it has no signs to keep.")
    U, S, V = torch.linalg.svd(update.abs(), full_matrices=False)
    root = S[: min(r1 or r2, len(S))].sqrt()
    D, C = _balanced(B, A)
    found = Factors(root[:, None] * V[: len(root)], U[:, : len(root)] * root, _scaled(C), _scaled(D))
    delta = delta_weight(found, scaling(2.0 * (len(root) + r2), len(root), r2), Form())
    # The length that comes closest, once ReLU has cut what the approximation has below zero.
    found = found._replace(B=found.B * float((delta * update).sum() / delta.square().sum()))
    cosine = float(torch.nn.functional.cosine_similarity(delta.flatten(), update.flatten(), dim=0))
    return found, cosine, float(((D @ C > 0) == (update > 0)).float().mean())


def _scaled(factor: Tensor) -> Tensor:
    return factor * (PAPER_STD / factor.square().mean().sqrt())


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of B and rows of A of equal deviation."""
    b, a = B.square().mean(0).sqrt(), A.square().mean(1).sqrt()
    ratio = (a / b.clamp(min=torch.finfo(b.dtype).tiny)).sqrt()
    ratio = torch.where((a > 0) & (b > 0), ratio, 1.0)
    return B * ratio, A / ratio.unsqueeze(1)


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
