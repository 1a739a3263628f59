"""vLLM's loader `dual_lora`: the base model's weights with an adapter composed in.

`vllm serve BASE --load-format dual_lora --model-loader-extra-config '{"adapter": "runs/mine/adapter"}'`. vLLM finds
`register` through its entry point `vllm.general_plugins`, in each of its processes. With several devices each process
composes whole weights and keeps its part. Those of several adapters are kept within a memory limit: a switch then costs
a copy, no composition.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .compose import ComposedWeights, Stream
from .files import AdapterError, version_of

LOAD_FORMAT = "dual_lora"
KEY, NAMED, LIMIT = "adapter", "adapters", "limit_bytes"


class Settings(NamedTuple):
    """The settings of `--model-loader-extra-config`: those of adapters, and those of vLLM's own loader.

    adapter: the folder of the one that the served names have. named: further ones, name → folder. limit_bytes: of the
    composed weights that each process keeps in its main memory.
    """

    adapter: str | None
    named: Mapping[str, str]
    limit_bytes: int
    own: dict[str, Any]

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> Settings:
        """Read the settings. Raises ValueError, in one sentence."""
        own = dict(extra)
        adapter, named, limit = own.pop(KEY, None), own.pop(NAMED, {}), own.pop(LIMIT, 0)
        if not isinstance(adapter, str | None):
            raise ValueError(f"{KEY} is {adapter!r}, expected an adapter's folder.")
        if not isinstance(named, dict) or not all(isinstance(folder, str) for folder in named.values()):
            raise ValueError(f'{NAMED} is {named!r}, expected {{"NAME": "FOLDER", …}}.')
        return cls(adapter, named, check_limit(limit), own)


def check_limit(value: Any) -> int:
    """A number of bytes, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{LIMIT} is {value!r}, expected a whole number of bytes, 0 or more.")
    return value


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
        """Return the size of all that is kept, in bytes."""
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


def register() -> None:
    """Tell vLLM of the loader. Called in each process; several times do no harm."""
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    copies = ComposedCopies()  # of this process

    class ComposingModelLoader(DefaultModelLoader):
        """vLLM's own loader, which composes on the way from the file to the model."""

        def __init__(self, load_config: Any):
            self.settings = Settings.read(load_config.model_loader_extra_config)
            own = {"load_format": "auto", "model_loader_extra_config": self.settings.own}
            super().__init__(dataclasses.replace(load_config, **own))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Any]:
            weights, adapter = super().get_all_weights(model_config, model), self.settings.adapter
            copies.limit_bytes = self.settings.limit_bytes
            if adapter is None:
                return weights
            device = next((p.device for p in model.parameters()), "cpu")
            base = copy.deepcopy(model_config.hf_config)
            key = (model_config.model, model_config.revision, str(Path(adapter).absolute()), version_of(adapter))
            return copies.stream(key, weights, lambda: ComposedWeights(base, adapter, device))

    try:
        from vllm.config.load import LoadConfig

        get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    except ValueError:
        register_model_loader(LOAD_FORMAT)(ComposingModelLoader)
