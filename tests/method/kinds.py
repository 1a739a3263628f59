"""The rows of the table in `test_table`: every kind of layer that Dual LoRA adapts, alone, with an input.

A row says how the plain layer is made and called and where ΔW [O, I] stands in its weights; the reference is the plain
layer with `core.reference`'s ΔW there. All operations of the table then hold for it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import quantized_layers
import torch
from quantized_layers import KINDS as QUANTISED
from quantized_layers import I
from tiny import mixture
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from dual_lora.method.layer import Linear

Updates = dict[str, torch.Tensor]  # ΔW by the name of the layer ("it", "out_proj") or of the parameter
HALF, WHOLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def call_plainly(layer, x):
    return layer(x)


def whole_weight(plain: nn.Module, updates: Updates) -> Updates:
    return {"weight": plain.weight + updates["it"].to(plain.weight.dtype).view_as(plain.weight)}


@dataclass(frozen=True)
class Kind:
    """One row. What it leaves out is as for nn.Linear."""

    make: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    call: Callable[[nn.Module, torch.Tensor], Any] = call_plainly
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["it"]})
    weights: Callable[[nn.Module, Updates], Updates] = whole_weight  # of the plain layer, with ΔW
    plain: Callable[[nn.Module], nn.Module] = copy.deepcopy  # the layer with floating-point weights
    custom: dict[type, type] | None = None  # for `_register_custom_module`
    rough: float = 0.0  # the relative error that the base's own arithmetic makes
    own_product: bool = False  # y is not x times the weight (8-bit inputs): what it is, the library's layer says
    merge_rough: float = 0.0  # the share of ΔW that a merge may lose
    merge_refused: str = ""  # the error of merging, where the library has not said how it quantises
    merges: bool = True
    copies: bool = True  # whether the library's own tensors can be copied
    dtypes: tuple[torch.dtype, ...] = (WHOLE, HALF, DOUBLE)
    mixes: str = ""  # the error that a mixed batch raises; "": each sample has its adapter
    dropout: str = ""  # the error or warning that dropout gets; "silent": it plays no part
    samples: bool | None = True  # whether token_sampling plays a part; None: no, in silence
    compiles: bool = False  # tried with torch.compile, which takes seconds
    recomposes: bool = False  # whether backward composes the weight again, so that the composed one is not kept
    variant: bool = False  # of another row: value, gradients and merging alone differ

    def built(self) -> nn.Module:
        torch.manual_seed(1)
        return self.make().requires_grad_(False).eval()


def rows(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids(highest: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, highest, (4, 6), generator=torch.Generator().manual_seed(3))


# Linear layers.


def transposed_weight(plain, updates):
    return {"weight": plain.weight + updates["it"].T.to(plain.weight.dtype)}


class ScaledHead(nn.Linear):
    """With a scale of each output, as language models with a learned scale of each logit have it."""

    def forward(self, x):
        return super().forward(x) * torch.arange(1, self.out_features + 1).to(x) / 4


class NormHead(nn.Linear):
    """Not linear in its weight."""

    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class Doubled(nn.Module):
    """No kind of layer that is known; `DoubledAdapter` is its user's own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 12)), None

    def forward(self, x):
        return 2 * functional.linear(x, self.weight)


class DoubledAdapter(Linear):
    def _map(self, x, names, with_base):
        return 2 * super()._map(x, names, with_base)


LINEAR = {
    "linear": Kind(lambda: nn.Linear(12, 7), rows(4, 5, 12), compiles=True),
    "linear, no bias": Kind(lambda: nn.Linear(12, 7, bias=False), rows(6, 12), variant=True),
    "linear, called twice": Kind(lambda: nn.Linear(9, 9), rows(6, 9), lambda layer, x: 0.05 * layer(layer(x).tanh())),
    "linear, own forward": Kind(lambda: ScaledHead(12, 7), rows(6, 12)),
    "linear, normed": Kind(lambda: NormHead(12, 7), rows(6, 12), samples=None),
    "Conv1D": Kind(lambda: Conv1D(7, 12), rows(4, 5, 12), weights=transposed_weight),
    "a layer of one's own": Kind(Doubled, rows(6, 12), custom={Doubled: DoubledAdapter}),
}

# Convolutions.


class PaddedConv(nn.Conv1d):
    """Causal: pads its input to the left. Unpadded, fewer positions are left of it."""

    def forward(self, x):
        return super().forward(functional.pad(x, (2, 0)))


class StandardConv(nn.Conv2d):
    def forward(self, x):
        W = self.weight
        return self._conv_forward(x, (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True), self.bias)


CONVOLUTIONS = {
    "conv 1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), rows(2, 4, 7), recomposes=True),
    "conv 1d, circular": Kind(
        lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", dilation=2), rows(2, 4, 7), variant=True
    ),
    "conv 1d, own forward": Kind(lambda: PaddedConv(4, 6, 3), rows(2, 4, 5), samples=None),
    "conv 2d": Kind(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1)), rows(2, 4, 7, 7), recomposes=True, compiles=True),
    "conv 2d, same": Kind(
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), rows(2, 4, 7, 7), variant=True
    ),
    "conv 2d, groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), rows(2, 4, 7, 7)),
    "conv 2d, depthwise": Kind(lambda: nn.Conv2d(4, 4, 3, groups=4), rows(2, 4, 7, 7), variant=True),
    "conv 2d, standardised": Kind(lambda: StandardConv(4, 6, 3, groups=2), rows(2, 4, 5, 5), samples=None),
    "conv 3d": Kind(lambda: nn.Conv3d(4, 6, 2, padding=1), rows(2, 4, 5, 5, 5), variant=True),
}

# Embeddings: the row of the padding has no update.


class Positions(nn.Embedding):
    """As OPT's: it is called with a mask, and looks up positions."""

    def forward(self, mask):
        return super().forward((mask.cumsum(1) * mask).long() + 2)


class NormedEmbedding(nn.Embedding):
    def forward(self, indices):
        return functional.normalize(super().forward(indices), dim=-1)


def all_but_the_padding(plain, updates):
    row = torch.arange(plain.num_embeddings)[:, None]
    padding = -1 if plain.padding_idx is None else plain.padding_idx
    return {"weight": plain.weight + torch.where(row == padding, 0, updates["it"]).to(plain.weight.dtype)}


def embedding(kind=nn.Embedding, x=None, compiles=False, variant=False, **options):
    return Kind(
        lambda: kind(30, 6, **options),
        x or ids(30),
        weights=all_but_the_padding,
        dropout="silent",
        samples=False,
        compiles=compiles,
        variant=variant,
    )


def gemma(size, width, **options):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(size, width, padding_idx=None, embed_scale=3.0, **options)


EMBEDDINGS = {
    "embedding": embedding(compiles=True),
    "embedding, padding": embedding(x=ids(3), padding_idx=1),
    "embedding, by frequency": embedding(x=ids(5), scale_grad_by_freq=True, variant=True),
    "embedding, scaled": embedding(gemma, variant=True),
    "embedding, own forward": embedding(Positions, lambda: torch.ones(4, 6)),
    "embedding, normed": embedding(NormedEmbedding, ids(5), padding_idx=1),
}

# Attention: the stacked input projections, and the output projection below it.


def attend(layer, x):
    """Self-attention, or with keys and values of other widths."""
    return layer(x, x[..., : layer.kdim], torch.cat([x, -x], -1)[..., : layer.vdim])[0]


def projections(plain, updates):
    weights = {"out_proj.weight": plain.out_proj.weight + updates["out_proj"].to(plain.out_proj.weight.dtype)}
    start = 0
    for name in (
        ["in_proj_weight"] if plain._qkv_same_embed_dim else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    ):
        W = getattr(plain, name)
        weights[name] = W + updates["it"][start : start + len(W), : W.shape[1]].to(W.dtype)
        start += len(W)
    return weights


def attention(compiles=False, **widths):
    return Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, **widths),
        rows(3, 5, 8),
        attend,
        weights=projections,
        mixes="does not support mixed adapter batches",
        dropout="no effect on nn.MultiheadAttention",
        samples=False,
        compiles=compiles,
        recomposes=True,
    )


ATTENTION = {"attention": attention(compiles=True), "attention, separate": attention(kdim=5, vdim=12)}

# Named parameters.

CHOSEN = torch.tensor([[0, 3], [3, 5], [1, 0], [5, 3], [1, 5], [0, 1], [3, 1], [5, 0]])  # two of six; 2 and 4 never


def route(layer, x):
    chosen = CHOSEN.repeat(len(x) // len(CHOSEN), 1)
    return layer(x, chosen, torch.linspace(0.2, 0.8, chosen.numel()).view_as(chosen).to(x))


def by_parameter(plain, updates):
    out = {}
    for name, update in updates.items():
        W = plain.get_parameter(name)
        out[name] = W + (update.mT if getattr(plain, "is_transposed", False) else update).to(W.dtype)
    return out


def named(make, x, parameters, call=call_plainly, **options):
    return Kind(
        make,
        x,
        call,
        {"target_modules": [], "target_parameters": [f"it.{name}" for name in parameters]},
        by_parameter,
        mixes="does not support mixed adapter batches",
        dropout="ParamWrapper does not work with dropout",
        **{"recomposes": True} | options,
    )


def experts(layout, implementation, **options):
    make = lambda: mixture(layout, implementation).model.layers[0].mlp.experts  # noqa: E731
    return named(make, rows(8, 32), ["gate_up_proj", "down_proj"], route, **options)


EXPERTS = {
    "a named matrix": named(lambda: nn.Linear(12, 7), rows(6, 12), ["weight"]),
    "experts, one by one": experts("mixtral", "eager"),
    "experts, batched": experts("qwen3", "batched_mm", samples=None, compiles=True, recomposes=False),
    "experts, transposed": experts("gpt-oss", "eager"),
    "experts, transposed and batched": experts("gpt-oss", "batched_mm", samples=None, recomposes=False, variant=True),
}
if torch.__version__ >= "2.9":  # which transformers wants for it
    EXPERTS["experts, grouped"] = experts("mixtral", "grouped_mm", dtypes=(WHOLE, HALF), variant=True)

# Quantised linear layers, whose plain form is the dequantised one.


def dequantised(layer):
    from dual_lora.method.layers.quantized import find_backend
    from dual_lora.method.layers.quantized_rows import undo_packing_for_cpu

    backend = find_backend(layer, quantized_layers.int4_config)
    if backend.backend_name == "bnb 4bit":
        undo_packing_for_cpu(layer)
    W = backend.get_base_weight(layer).detach().float()
    plain = nn.Linear(W.shape[1], W.shape[0])
    plain.weight.data, plain.bias.data = W.clone(), layer.bias.detach().float().clone()
    return plain.requires_grad_(False).eval()


def quantised(name):
    return Kind(
        QUANTISED[name],
        rows(4, I),
        plain=dequantised,
        own_product=name in ("int8", "torchao int8 dynamic"),
        merge_rough=0.5,
        merges=name != "torchao int8 dynamic",
        copies=not name.startswith("hqq"),
        variant=name in ("nf4", "fp4", "hqq 8", "hqq 3", "hqq 4 columns", "torchao int4"),
        merge_refused="Cannot merge Dual LoRA into a torchao layer" if name.startswith("torchao") else "",
        dtypes=(WHOLE,),
    )


KINDS = LINEAR | CONVOLUTIONS | EMBEDDINGS | ATTENTION | EXPERTS | {name: quantised(name) for name in QUANTISED}


def of_file(path: str) -> dict[str, Kind]:
    """The rows that a file of the user's own names, in a dictionary KINDS."""
    import runpy

    found = runpy.run_path(path).get("KINDS")
    if not found:
        raise pytest.UsageError(f"--layer-kinds {path} has no dictionary KINDS of rows: see tests/method/kinds.py.")
    return found
