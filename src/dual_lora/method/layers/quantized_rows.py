"""Weights of quantised layers, dequantised some rows at a time, so that the whole one never stands in memory."""

from typing import Any

import torch
from peft.utils.quantization_utils import Bnb4bitBackend, HqqBackend, QuantizationBackend, TorchaoBackend
from torch import Tensor, nn

from ...core.blocked import RowSource


def row_source(base: Any, backend: QuantizationBackend) -> RowSource:
    """Return a reader of the base's weight that dequantises some rows at a time."""
    if isinstance(backend, Bnb4bitBackend):
        return _FourBitRows(base)
    if isinstance(backend, HqqBackend) and _HqqRows.can_read(base):
        return _HqqRows(base)
    if isinstance(backend, TorchaoBackend) and _SlicedRows.can_read(base.weight):
        return _SlicedRows(base.weight)
    return _WholeRows(base, backend)


class _FourBitRows:
    """bitsandbytes NF4 and FP4: blocks of consecutive entries share a scale, which may be quantised itself."""

    def __init__(self, base: Any):
        undo_packing_for_cpu(base)
        stored, meant = base.weight.dtype, getattr(base.weight, "quant_storage", torch.uint8)
        if stored not in (torch.uint8, meant):
            raise ValueError(
                f"A 4-bit weight that is stored as {meant} was converted to {stored}, for example by model.float() or "
                ".half(), which destroys its bits. Load the base model again, and convert other layers only."
            )
        # As bytes: with `bnb_4bit_quant_storage` they lie in wider elements.
        self.packed, self.state = base.weight.data.view(-1).view(torch.uint8), base.weight.quant_state
        self.shape = (base.out_features, base.in_features)

    def rows(self, start: int, stop: int) -> Tensor:
        import bitsandbytes.functional as F

        O, I = self.shape
        state, size = self.state, self.state.blocksize
        first, last = start * I // size, -(-stop * I // size)
        low, high = first * size, min(last * size, O * I)
        part = F.QuantState(
            absmax=_scales(state, first, last),
            shape=torch.Size((high - low,)),
            code=state.code,
            blocksize=size,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        packed = self.packed[low // 2 : -(-high // 2)].view(-1, 1)
        entries = F.dequantize_4bit(packed, part).view(-1)
        return entries[start * I - low : stop * I - low].view(stop - start, I)


def _scales(state: Any, first: int, last: int) -> Tensor:
    """Return the scales of the blocks first…last, fp32."""
    import bitsandbytes.functional as F

    if not state.nested:
        return state.absmax[first:last].float()
    outer = state.state2
    size = outer.blocksize
    low, high = first // size, -(-last // size)
    part = F.QuantState(absmax=outer.absmax[low:high], code=outer.code, blocksize=size, dtype=outer.dtype)
    scales = F.dequantize_blockwise(state.absmax[low * size : high * size], part)
    return (scales[first - low * size : last - low * size] + state.offset).float()


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights of the model for inference, as it does on CPUs with bf16 units.

    A repacked layer, adapted or not, passes no gradient to its input in later training, without an error. Undoing it
    rounds the scales each time.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(layer.weight, "quant_state", None) is not None:
                undo_packing_for_cpu(layer)


def undo_packing_for_cpu(base: Any) -> None:
    """Bring a 4-bit weight that bitsandbytes has repacked in place back to its own layout."""
    if getattr(base.weight, "quant_state", None) is None:  # a copy may have it on the layer alone
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base)
    state = base.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

        base.weight.data, state = inverse(base.weight.data, state)
        base.weight.quant_state = state
    if not state.nested and state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves plain scales transposed, saving as well
        state.absmax = state.absmax.T.reshape(-1).float()


class _HqqRows:
    """HQQ with groups along the rows, in 8 or 4 bits: a row is a whole number of groups."""

    def __init__(self, base: Any):
        self.base = base
        self.shape = (base.out_features, base.in_features)

    @staticmethod
    def can_read(base: Any) -> bool:
        meta = base.meta
        return (
            meta["axis"] == 1
            and meta["packing"] in ("8bit_u8", "4bit_u8")
            and meta["group_size"] is not None
            and base.in_features % meta["group_size"] == 0
            and meta["scale"].dim()  # not one for the whole matrix
            and not (meta["quant_scale"] or meta["quant_zero"] or meta["view_as_float"])
        )

    def rows(self, start: int, stop: int) -> Tensor:
        I = self.shape[1]
        meta, stored = self.base.meta, self.base.W_q
        per_row = I // meta["group_size"]
        first, last = start * per_row, stop * per_row
        if meta["packing"] == "8bit_u8":
            whole = stored[first:last]
        else:  # the high halves hold the first half of the groups, the low halves the second
            half = stored.shape[0]
            high, low = stored[min(first, half) : min(last, half)], stored[max(first - half, 0) : max(last - half, 0)]
            whole = torch.cat([high >> 4, low & 15])
        scale, zero = meta["scale"][first:last], meta["zero"][first:last]
        return ((whole.to(scale.dtype) - zero) * scale).view(stop - start, I).to(self.base.compute_dtype)


class _SlicedRows:
    """torchao: a quantised tensor that can be cut by rows before it is dequantised."""

    def __init__(self, weight: Any):
        self.weight = weight
        self.shape = tuple(weight.shape)

    @staticmethod
    def can_read(weight: Any) -> bool:
        try:
            weight[:1].dequantize()
        except (NotImplementedError, RuntimeError, AttributeError, AssertionError):
            return False
        return True

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].dequantize()


class _WholeRows:
    """A layout that cannot be read by rows: dequantised once for a pass over its rows, and dropped at its end."""

    def __init__(self, base: Any, backend: QuantizationBackend):
        self.base, self.backend = base, backend
        self.shape = (base.out_features, base.in_features)
        self._whole: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        if self._whole is None:
            with torch.no_grad():
                self._whole = self.backend.get_base_weight(self.base)
        part = self._whole[start:stop]
        if stop == self.shape[0]:
            self._whole = None
        return part
