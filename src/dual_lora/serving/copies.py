"""Composed weights of several adapters, kept within a memory limit: a switch then costs a copy, no composition."""

from collections.abc import Callable, Hashable, Iterator

from torch import Tensor

from .compose import ComposedWeights, Stream
from .files import AdapterError


class ComposedCopies:
    """The changed weights of each adapter; the least recently used leaves for another.

    Attributes:
        limit_bytes: of all that is kept, in bytes. An adapter that is larger is composed anew each time.
    """

    def __init__(self, limit_bytes: int = 0):
        self.limit_bytes = limit_bytes
        self._kept: dict[Hashable, dict[str, Tensor]] = {}  # the most recently used is the last

    @property
    def bytes_held(self) -> int:
        """Size of all that is kept, in bytes."""
        return sum(tensor.nbytes for one in self._kept.values() for tensor in one.values())

    def stream(
        self, key: Hashable, weights: Stream, opened: Callable[[], ComposedWeights]
    ) -> Iterator[tuple[str, Tensor]]:
        """As `ComposedWeights.stream`. key: tells adapter and base from all others. opened: the adapter, if needed.

        What comes out is the receiver's own: nothing that it does to a tensor reaches what is kept.
        """
        self._make_room(0, {})
        kept = self._kept.pop(key, None)
        if kept is None:
            yield from self._composed(key, weights, opened())
            return
        self._kept[key] = kept
        left = set(kept)
        for name, tensor in weights:
            left.discard(name)
            yield name, kept[name].clone() if name in kept else tensor
        if left:
            raise AdapterError(f"{sorted(left)[0]} is no longer in the base model's checkpoint.")

    def _composed(self, key: Hashable, weights: Stream, composed: ComposedWeights) -> Iterator[tuple[str, Tensor]]:
        fresh: dict[str, Tensor] | None = {}
        for name, tensor in composed.stream(weights):
            if fresh is not None and composed.changes(name):
                if self._make_room(tensor.nbytes, fresh):
                    fresh[name] = tensor.clone()
                else:
                    fresh = None
            yield name, tensor
        if fresh is not None:
            self._kept[key] = fresh

    def _make_room(self, wanted: int, fresh: dict[str, Tensor]) -> bool:
        """Let the least recently used go until there is room for so many bytes more; False: there is not that much."""
        held = sum(tensor.nbytes for tensor in fresh.values()) + wanted
        while self._kept and self.bytes_held + held > self.limit_bytes:
            del self._kept[next(iter(self._kept))]
        return held <= self.limit_bytes
