"""Which bytes are held at every moment: a dispatch mode that sees each storage come and go.

It runs over tensors without data (torch's FakeTensorMode) and over real ones alike. What stood before it began is not
counted. A storage belongs to the phase in which it was made (activations in forward, workspace after it), or to the
gradients once it has become some parameter's.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dual_lora.lab.cost.operators import flops_of, inner_bytes

ACTIVATIONS, WORKSPACE, GRADIENTS = "activations", "workspace", "gradients"


class Bytes(NamedTuple):
    """What is held in memory at one moment, without the model."""

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
        """What is held at this moment."""
        return Bytes(**self._bytes)

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on this tensor's storage is a gradient."""
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
