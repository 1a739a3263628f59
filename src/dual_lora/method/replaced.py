"""Replace parameters of a module by other tensors while it is called."""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_locks: weakref.WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = weakref.WeakKeyDictionary()
_registry_lock = threading.Lock()


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Let `module.<name>` be the given value (a composed tensor, or what indexes like one) inside the block.

    The parameters themselves, their order and other references to them do not change. Threads take turns: a thread that
    enters while another is inside would find the other's value, and later restore that instead of the parameter.

    Raises RuntimeError if something else writes the attribute inside the block: the value would have had no effect.
    """
    with turn(module):
        slots = [_slot(module, name, value) for name, value in values.items()]
        before = [home.get(key, _ABSENT) for home, key, _ in slots]
        for home, key, value in slots:
            home[key] = value
        try:
            yield
            if not torch.compiler.is_compiling():
                _refuse_overwritten(module, slots)
        finally:
            for (home, key, _), old in zip(slots, before, strict=True):
                if old is _ABSENT:
                    del home[key]
                else:
                    home[key] = old


_ABSENT = object()


def _refuse_overwritten(module: nn.Module, slots: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Raise RuntimeError for a value that is not in its place any more."""
    for home, key, value in slots:
        if home.get(key, _ABSENT) is not value:
            raise RuntimeError(
                f"A hook of {type(module).__name__} writes its {key!r} in every call (weight_norm, spectral_norm or "
                "pruning of the kind that works by hooks) over W + ΔW: the adapter would have no effect. "
                "Apply such a norm by torch.nn.utils.parametrizations, make a pruning permanent "
                "(torch.nn.utils.prune.remove), or take the hook away."
            )


def original(module: nn.Module, name: str) -> Any:
    """Return `module.<name>`, and not what another thread has put in its place for a call."""
    with turn(module):
        return getattr(module, name)


def turn(module: nn.Module) -> AbstractContextManager[Any]:
    """Return the module's lock, which is re-entrant: one thread may nest blocks (several parameters of a module).

    A thread that reads or calls a module of which another one may replace a parameter holds it as well.
    """
    if torch.compiler.is_compiling():  # a graph has no locks
        return nullcontext()
    with _registry_lock:
        return _locks.setdefault(module, threading.RLock())


def compute_attributes(holder: nn.Module) -> None:
    """Compute what prunings and norms of torch.nn.utils compute before each call of a module that nobody calls."""
    for hook in holder._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(holder, ())


def _slot(module: nn.Module, name: str, value: Any) -> tuple[dict[str, Any], str, Any]:
    """Return the dictionary in which Python finds `module.<name>`, the key in it, and the value to put there."""
    parametrizations = getattr(module, "parametrizations", {})
    if name in parametrizations:  # a property that calls this module
        return parametrizations[name].__dict__, "forward", lambda: value
    if name in module.__dict__:  # FSDP puts plain tensors there
        return module.__dict__, name, value
    return module._parameters, name, value
