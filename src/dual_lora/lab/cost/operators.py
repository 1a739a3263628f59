"""Memory that operators hold and use inside themselves, and their flops: `MemoryTracker`, a dispatch mode that sees
every call.

Held bytes: each storage is seen to come and go, over tensors without data (torch's FakeTensorMode) and over real ones
alike. What stood before it began is not counted. A storage belongs to the phase in which it was made (activations in
forward, workspace after it), or to the gradients once it has become some parameter's.

Arithmetic: the formulas in torch's table, in which this package has entered its own (`core/flops.py`), and those that
it lacks.

Memory that a dispatch mode does not see: Dual LoRA's operator on a CPU works in blocks and tiles of the weight
(`core/blocked.py`), on a GPU it composes one whole weight at a time (`core/kernels/linear.py`). Where fp32 products go
to oneDNN (`core/product.py`) each of them comes in memory of its own, besides the buffer that waits for it. A batched
product of half-precision matrices on a CPU copies an operand that is one matrix for the whole batch. That is how an
output head meets the last positions of every row (transformers' `logits_to_keep`): 450 MB for eight rows of
SmolLM2-135M, measured.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dual_lora.core.blocked import CPU
from dual_lora.core.flops import sizes
from dual_lora.core.product import SMALL, onednn_is_faster

ACTIVATIONS, WORKSPACE, GRADIENTS = "activations", "workspace", "gradients"


class Bytes(NamedTuple):
    """The bytes held in memory at one moment, without the model."""

    activations: float = 0.0
    workspace: float = 0.0
    gradients: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class MemoryTracker(TorchDispatchMode):
    """Counts held bytes and flops. Set `kind` and `segment` as the step proceeds; read `peaks` and `flops` then.

    peaks: segment → what was held at its fullest moment. on: "cpu" or "gpu", for what operators use inside themselves.
    """

    def __init__(self, standing: Iterable[Tensor], on: str = "cpu"):
        super().__init__()  # type: ignore[no-untyped-call]
        self.on = on
        self.kind = ACTIVATIONS
        self.segment = "forward"
        self.peaks: dict[str, Bytes] = {}
        self.flops = 0
        self._bytes = dict.fromkeys(Bytes._fields, 0)
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        for tensor in standing:
            self._see(tensor, count=False)

    def now(self) -> Bytes:
        """Return the bytes held at this moment."""
        return Bytes(**self._bytes)

    def is_gradient(self, tensor: Tensor) -> None:
        """Count this tensor's storage as a gradient from now on."""
        key = id(tensor.untyped_storage())
        if key in self._known:
            ref, size, kind = self._known[key]
            self._bytes[kind] -= size
            self._bytes[GRADIENTS] += size
            self._known[key] = ref, size, GRADIENTS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self._note(inner_bytes(func, args, out, self.on))
        self.flops += flops_of(func, args, kwargs, out)
        return out

    def _note(self, inner: int) -> None:
        now = Bytes(self._bytes[ACTIVATIONS], self._bytes[WORKSPACE] + inner, self._bytes[GRADIENTS])
        before = self.peaks.get(self.segment)
        if before is None or now.total > before.total:
            self.peaks[self.segment] = now

    def _see(self, tensor: Tensor, count: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size, kind = storage.nbytes() if count else 0, self.kind
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), size, kind
        self._bytes[kind] += size

    def _forget(self, key: int) -> None:
        _, size, kind = self._known.pop(key)
        self._bytes[kind] -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating point operations of one call, 0 for what is not a product."""
    packet = func._overloadpacket
    own = _LACKING.get(packet)
    if own is not None:
        return own(*args)
    formula: Any = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _attention(query: Any, key: Any, value: Any, *rest: Any) -> int:
    B, heads, T, width = query.shape
    return int(2 * B * heads * T * key.shape[2] * (width + value.shape[-1]))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any) -> int:
    """Count the flops of the scores, made again, and of the gradients of scores, query, key and value."""
    B, heads, T, width = query.shape
    return int(2 * B * heads * T * key.shape[2] * (3 * width + 2 * value.shape[-1]))


_LACKING: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def inner_bytes(func: Any, args: Any, out: Any, on: str) -> int:
    """Bytes that one call has had beyond its inputs and outputs."""
    if func is torch.ops.aten.bmm.default and on == "cpu":
        return sum(m.numel() * m.element_size() for m in args if m.stride(0) == 0 and m.element_size() == 2)
    if func.namespace != "dual_lora":
        return 0
    name = func._schema.name
    if name == "dual_lora::linear":
        x, weight, factors = args[0], args[1], args[3]
        return forward_bytes(*_dimensions(x, factors), x.dtype.itemsize, on) * _copies(weight, on)
    if name == "dual_lora::linear_backward":
        x, weight, factors, need_x, need_factors = args[1], args[2], args[3], args[10], args[12]
        scaled: int = sum(f.numel() for f in factors) * 4 * need_factors
        inside = backward_bytes(*_dimensions(x, factors), x.dtype.itemsize, on, need_x, need_factors)
        return inside * _copies(weight, on) + scaled
    return 0


def _dimensions(x: Any, factors: Any) -> tuple[int, int, int, int]:
    """Return T, O, I and the sum of all ranks of a linear layer."""
    return sizes(x.shape, [f.shape for f in factors])


def _copies(weight: Any, on: str) -> int:
    """Return how many weights are held while one is composed: the kernels have a quantised one (its number stands for
    it) dequantised."""
    return 2 if on == "gpu" and weight is not None and weight.ndim == 0 else 1


def forward_bytes(T: int, O: int, I: int, ranks: int, itemsize: int, on: str) -> int:
    """The composed block, the tiles, and y of the block where it comes in memory of its own."""
    if on == "gpu":
        return O * I * itemsize
    rows = _part(O, CPU.block // itemsize // I)
    y = T * rows * itemsize if _own_memory(itemsize, T * rows * I) else 0
    return rows * I * itemsize + _tiles(rows, I, ranks, itemsize) + y


def backward_bytes(
    T: int, O: int, I: int, ranks: int, itemsize: int, on: str, need_x: bool = True, need_factors: bool = True
) -> int:
    """The composed block and that of the gradient, the tiles, and the copies that oneDNN takes and gives."""
    if on == "gpu":
        return O * I * itemsize * need_x
    cols = _part(I, CPU.block // itemsize // O)
    own = _own_memory(itemsize, T * O * cols)
    blocks = need_x + need_factors
    if own and need_factors:
        blocks += 1 + (cols < I)  # the product, and that of the block before, which is still there
    copies = (T * O * _own_memory(itemsize) + T * cols * need_x * own) * itemsize  # that of dy is made for all products
    return blocks * O * cols * itemsize + _tiles(O, cols, ranks, itemsize, need_x and need_factors) + copies


def _tiles(rows: int, cols: int, ranks: int, itemsize: int, both: bool = False) -> int:
    """P and Q of one tile, where both dx and the factors' gradients want P the update, and where the block is not
    fp32 itself its sum; all fp32."""
    size = _part(rows, CPU.tile // cols) * cols
    kept = 2 + both + (itemsize != 4) + 2 * _own_memory(4, size * ranks // 2)
    return kept * 4 * size


def _part(length: int, step: int) -> int:
    """The length of the equal parts of about `step`, as the operator cuts."""
    return -(-length // -(-length // max(step, 16)))


def _own_memory(itemsize: int, multiplications: int = SMALL) -> bool:
    """Whether a product of so many multiplications comes in memory of its own, as oneDNN's do."""
    return itemsize == 4 and multiplications >= SMALL and onednn_is_faster()
