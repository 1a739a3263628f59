"""Composed weights kept for inference.

Without them every decoding step would compose every weight anew: 2 (r1 + r2) flops an entry for one multiply-add.

The one rule: an entry is used only while the factors, λ, the base weight and the active adapters are those that it was
made from, told by the tensors' version counters and storages; and it lives only without gradients, in eval mode or
(linear layers) while a model in training mode writes token after token, as RL trainers let it. Fused optimizers raise
no version counter: every optimizer step clears the cache. Entries are also dropped on backward into their factors,
`train()`, loading, merging and adapter changes, and (linear layers) where a training pass follows a generation.

Writes to the same memory past autograd are not seen: `param.data.mul_()`, as averages of weights are put in place,
through `param.detach().numpy()`, or to a vector whose parts are the parameters (`vector_to_parameters`, evolution
strategies). `param.data = other`, of other memory, is. A linear layer composes anew for a prompt or an evaluation of
sequences (`DECODED_TOKENS`); in other layers, or without sequences, call `composed_weights.clear()` after such writes.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from .precision import Warned


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Tells a tensor that was replaced, written to or thawed, as long as its storage's address cannot be another's."""
    storage = tensor.untyped_storage()._cdata
    return id(tensor), tensor._version, storage, tensor.data_ptr(), tensor.requires_grad


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None if it was made in inference mode, where nobody counts."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def _is_unwatched(tensor: Tensor) -> bool:
    """Whether writes to a tensor are not seen here: made in inference mode, offloaded, or shared with processes."""
    try:
        return version_of(tensor) is None or tensor.is_meta or (tensor.device.type == "cpu" and tensor.is_shared())
    except RuntimeError:  # of several values at once, as under torch.func
        return True


class _Entry(NamedTuple):
    states: list[tuple[Any, ...]]
    storages: list[StorageWeakRef]  # weakly held, a freed storage's address does not come back
    extra: tuple[Any, ...]
    weight: Tensor
    hooks: list[RemovableHandle]


class ComposedWeights:
    """W + ΔW of layers in inference, at most `limit_bytes` of them. `dual_lora.composed_weights` is the only one."""

    def __init__(self, limit_bytes: int = 4 << 30):
        self.limit_bytes = limit_bytes
        self._entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
        self._warned = Warned()
        self._lock = threading.RLock()  # several threads may generate at once

    @property
    def bytes_held(self) -> int:
        """Size of all entries, in bytes."""
        with self._lock:
            return sum(entry.weight.nbytes for entry in self._entries.values())

    def get(
        self, layer: nn.Module, sources: list[Tensor], extra: tuple[Any, ...], make: Callable[[], Tensor]
    ) -> Tensor:
        """The layer's composed weight, made now if the kept one has other sources. [O, I]"""
        if any(_is_unwatched(t) for t in sources):
            return make()
        kept = self._entries.get(layer)
        if kept is not None and kept.extra == extra and kept.states == [_state(t) for t in sources]:
            return kept.weight
        self.drop(layer)
        weight = make()
        with self._lock:
            self.drop(layer)
            if self.bytes_held + weight.nbytes <= self.limit_bytes:
                forget = partial(self._forget, weakref.ref(layer))
                self._entries[layer] = _Entry(
                    [_state(t) for t in sources],
                    [StorageWeakRef(t.untyped_storage()) for t in sources],
                    extra,
                    weight,
                    [t.register_post_accumulate_grad_hook(forget) for t in sources if t.requires_grad and t.is_leaf],
                )
                return weight
        self._warned.once(
            f"The cache of composed weights is full ({self.limit_bytes / 2**30:.1f} GiB): further layers compose their "
            "weight at every step, which makes generation slow. Raise `dual_lora.composed_weights.limit_bytes`, or "
            "merge the adapter (`merge_adapter()`)."
        )
        return weight

    def _forget(self, layer: weakref.ref[nn.Module], factor: Tensor) -> None:
        """After a backward into a factor: what comes next will write to it."""
        alive = layer()
        if alive is not None:
            self.drop(alive)

    def drop(self, layer: nn.Module) -> None:
        """Forget the composed weight of one layer."""
        if not self._entries.data:  # type: ignore[attr-defined] # asked in every pass, and faster than its length
            return
        with self._lock:
            entry = self._entries.pop(layer, None)
            for hook in () if entry is None else entry.hooks:
                hook.remove()

    def clear(self) -> None:
        """Forget all composed weights, e.g. after writing to parameters through `.data`."""
        with self._lock:
            for layer in list(self._entries):
                self.drop(layer)


composed_weights = ComposedWeights()
