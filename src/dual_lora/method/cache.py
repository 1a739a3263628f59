"""Composed weights kept while a model decodes.

Without them every decoding step would compose every weight anew: 2 (r1 + r2) flops an entry for one multiply-add.

The rule: an entry is valid only while the factors, λ, the base weight and the active adapters are those that it was
composed from, which the tensors' version counters and storages show. It is used only without gradients, in eval mode
or (linear layers) while a model in training mode generates token by token, as in RL trainers. Fused optimizers do not
raise version counters, so every optimizer step clears the cache. Entries are also dropped on backward into their
factors, `train()`, loading, merging and adapter changes, and (linear layers) when a training pass follows a generation.

Writes to the same memory past autograd raise no version counter: `param.data.mul_()` (as weight averages do), a write
through `param.detach().numpy()` or to a vector whose parts are the parameters, `torch.distributed.broadcast(param)`. On
a CPU the first `COMPARED` bytes of each tensor show them, and with several tokens at once a number of all bytes: who
sets one attention head after the other to zero writes elsewhere. On a GPU that would wait for it, so nothing is kept
where such writes are usual: where the inputs of a layer are no sequences, or have more than one token, or some
layer of the model has had such an input since. Only between two steps of decoding call `composed_weights.clear()`.
"""

import threading
import weakref
from collections.abc import Callable
from ctypes import string_at
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from .._warning import warn
from .checksum import checksum

COMPARED = 1024  # bytes of each tensor that are compared in every pass, in some 0.3 µs a tensor


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Return a value that changes when the tensor is replaced, written to or thawed.

    It is unique only while a weak reference keeps the storage's address from being reused.
    """
    storage = tensor.untyped_storage()._cdata
    return id(tensor), tensor._version, storage, tensor.data_ptr(), tensor.requires_grad


def _address(tensor: Tensor) -> int:
    """Return where this process can read a tensor's bytes; 0 for one on a device, or for a kind of its own."""
    return tensor.data_ptr() if tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter) else 0


def _begin(tensor: Tensor) -> tuple[int, bytes]:
    """Return the address of a tensor and its first bytes; none where they cannot be read."""
    address, storage = _address(tensor), tensor.untyped_storage()
    return address, string_at(address, min(COMPARED, storage.nbytes() + storage.data_ptr() - address) if address else 0)


def _whole(tensor: Tensor) -> int:
    """Return a number of all bytes of a tensor; 0 where `_begin` says enough, or cannot say anything."""
    return checksum(tensor) if tensor.nbytes > COMPARED and _address(tensor) else 0


def _is_unwatched(tensor: Tensor) -> bool:
    """Whether writes to a tensor may go unnoticed: made in inference mode, offloaded, or shared between processes."""
    try:
        return tensor.is_inference() or tensor.is_meta or (tensor.device.type == "cpu" and tensor.is_shared())
    except RuntimeError:  # of several values at once, as under torch.func
        return True


class _Entry(NamedTuple):
    states: list[tuple[Any, ...]]
    storages: list[StorageWeakRef]  # weakly held, a freed storage's address does not come back
    begins: list[tuple[int, bytes]]  # which show writes that no version counter does
    wholes: list[int]  # which show them wherever they are
    extra: tuple[Any, ...]
    weight: Tensor
    hooks: list[RemovableHandle]

    def is_of(self, sources: list[Tensor], extra: tuple[Any, ...], wholly: bool) -> bool:
        """Whether the tensors are those of this entry, with the values that it was composed from."""
        if self.extra != extra or self.states != [_state(t) for t in sources]:
            return False
        if wholly and self.wholes != [_whole(t) for t in sources]:
            return False
        return all([string_at(address, len(begin)) == begin for address, begin in self.begins])  # a list is faster


class ComposedWeights:
    """The cache of composed weights, of at most `limit_bytes`. `dual_lora.composed_weights` is the only instance."""

    def __init__(self, limit_bytes: int = 4 << 30):
        self.limit_bytes = limit_bytes
        self._entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
        self._warned_limit = 0  # the limit of the last warning
        self._lock = threading.RLock()  # several threads may generate at once

    @property
    def bytes_held(self) -> int:
        """Size of all entries, in bytes."""
        with self._lock:
            return sum(entry.weight.nbytes for entry in self._entries.values())

    def get(
        self,
        layer: nn.Module,
        sources: list[Tensor],
        extra: tuple[Any, ...],
        make: Callable[[], Tensor],
        wholly: bool = True,
    ) -> Tensor:
        """Return the layer's composed weight [O, I]; calls `make` unless the cached one has the same sources.

        wholly: whether all bytes of the sources are looked at, and not their first ones alone.
        """
        if any(_is_unwatched(t) for t in sources):
            return make()
        kept = self._entries.get(layer)
        if kept is not None and kept.is_of(sources, extra, wholly):
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
                    [_begin(t) for t in sources],
                    [_whole(t) for t in sources],
                    extra,
                    weight,
                    [t.register_post_accumulate_grad_hook(forget) for t in sources if t.requires_grad and t.is_leaf],
                )
                return weight
        if self._warned_limit != self.limit_bytes:
            self._warned_limit = self.limit_bytes
            warn(
                f"The cache of composed weights is full ({self.limit_bytes / 2**30:.1f} GiB): further layers compose "
                "their weight at every step, which makes generation slow. Raise "
                "`dual_lora.composed_weights.limit_bytes`, or merge the adapter (`merge_adapter()`).",
                stacklevel=2,
            )
        return weight

    def _forget(self, layer: weakref.ref[nn.Module], factor: Tensor) -> None:
        """Drop the entry after a backward into a factor: an optimizer will write to the factor next."""
        alive = layer()
        if alive is not None:
            self.drop(alive)

    def drop(self, layer: nn.Module) -> None:
        """Drop the composed weight of one layer."""
        if not self._entries.data:  # type: ignore[attr-defined] # asked in every pass, and faster than its length
            return
        with self._lock:
            entry = self._entries.pop(layer, None)
            for hook in () if entry is None else entry.hooks:
                hook.remove()

    def clear(self) -> None:
        """Drop all composed weights, e.g. after writing to parameters through `.data`."""
        with self._lock:
            for layer in list(self._entries):
                self.drop(layer)


composed_weights = ComposedWeights()
