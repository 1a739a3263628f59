"""Libraries that other libraries import and most runs never use: imported for real when something of them is used.

transformers, PEFT and accelerate import whatever is installed, for an `isinstance` or a subclass that a run may never
come to. In a command those modules are stand-ins at first. What is taken from one stands for the real thing: it is
called, subclassed or read as that is, and the real module is imported at that moment. An `isinstance` alone needs no
import: before a module has been imported there is no object of its classes.

`dual_lora.lab.entry` puts this in place, for the command `dual-lora` alone: a Python program imports what it says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Processor time of each import after those above it, on a processor that imports torch in 4 s.
MODULES = (
    "torch._dynamo",  # 3.0 s after sympy's 2.5: the compiler, which an optimizer asks to look away
    "torch.distributed.tensor",  # sharded tensors, which the compiler imports too
    "scipy.optimize",  # 1.2 s: a loss for finding objects in pictures
    "sklearn",  # 4.1 s, pandas among it: assisted generation
    "datasets",  # 0.7 s
    "hqq",  # 3.4 s
    "bitsandbytes",  # 0.3 s
    "torchao",  # 1.0 s
)


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _as_it_is


def _constant(function: Any) -> Any:
    function._dynamo_marked_constant = True  # all that torch does
    return function


# What needs no module: without a compiler in the process these do nothing, and optimizers call them at every step.
WITHOUT: dict[str, dict[str, Callable[..., Any]]] = {
    "torch._dynamo": {
        "graph_break": lambda *_, **__: None,
        "disable": _as_it_is,
        "assume_constant_result": _constant,
    },
}
# Returns the function that it is given, and notes it: noted when the module is imported.
NOTED = {"torch._dynamo": ("allow_in_graph",)}
# What is made while a library is imported, and lies in a table that a run with several devices reads.
MADE_LATER = {"torch.distributed.tensor": ("Shard", "Replicate", "Partial")}


def defer(modules: Sequence[str] = MODULES) -> None:
    """Have stand-ins for those of these modules that are installed and not imported yet."""
    wanted = tuple(name for name in modules if name not in sys.modules)
    if wanted:
        sys.meta_path.insert(0, _Finder(wanted))


class _Finder(MetaPathFinder):
    """Finds stand-ins for modules and for what lies in them, until the real one is asked for."""

    def __init__(self, names: tuple[str, ...]):
        self.names = set(names)
        self.noted: dict[str, list[Callable[[], Any]]] = {name: [] for name in names}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        owner = next((name for name in self.names if f"{fullname}.".startswith(f"{name}.")), None)
        if owner is None:
            return None
        real = self._real(fullname, path)
        if real is None or (fullname == owner and real.loader is None):
            return None
        if fullname != owner and not isinstance(sys.modules.get(owner), _StandIn):
            return None
        return ModuleSpec(fullname, _Loader(self, owner), origin=real.origin, is_package=True)

    def _real(self, fullname: str, path: Any) -> ModuleSpec | None:
        """The real spec; of what lies in a stand-in one that is not looked for before it is needed."""
        if fullname not in self.names:
            return ModuleSpec(fullname, None)
        return PathFinder.find_spec(fullname, path)

    def load(self, owner: str) -> None:
        """Import a module for real, instead of its stand-ins."""
        if owner not in self.names:
            return
        self.names.discard(owner)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{owner}.")]:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]
        import_module(owner)
        for note in self.noted.pop(owner):
            note()


class _Loader(Loader):
    def __init__(self, finder: _Finder, owner: str):
        self.finder, self.owner = finder, owner

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, self.finder, self.owner)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _StandIn(ModuleType):
    """A module of which nothing has been used."""

    def __init__(self, name: str, finder: _Finder, owner: str):
        super().__init__(name)
        vars(self).update(_finder=finder, _owner=owner, __path__=[])

    def _real(self) -> ModuleType:
        self._finder.load(self._owner)
        return import_module(self.__name__)

    def __getattr__(self, name: str) -> Any:
        if self._owner not in self._finder.names:
            return getattr(self._real(), name)
        if name.startswith("__") and name.endswith("__"):
            if name in ("__all__", "__version__"):
                return getattr(self._real(), name)
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if (action := WITHOUT.get(self.__name__, {}).get(name)) is not None:
            return action
        return _DeferredObject(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        mine = name.startswith("__") or isinstance(value, _StandIn)
        if mine or (self._owner in self._finder.names and isinstance(value, ModuleType)):
            super().__setattr__(name, value)
        else:
            setattr(self._real(), name, value)


class _DeferredObject:
    """A stand-in for an attribute or module; the real object is found when it is used."""

    def __init__(self, holder: Any, name: str):
        vars(self).update(_holder=holder, _name=name)

    def _real(self) -> Any:
        holder = self._holder._real()
        try:
            return getattr(holder, self._name)
        except AttributeError:
            if not isinstance(holder, ModuleType):
                raise
            return import_module(f"{holder.__name__}.{self._name}")

    def _is_there(self) -> bool:
        holder: Any = self
        while isinstance(holder, _DeferredObject):
            holder = holder._holder
        return bool(holder._owner not in holder._finder.names)

    def __getattr__(self, name: str) -> Any:
        if name in ("__typing_subst__", "__parameters__"):  # `Optional[DTensor]` asks whether it is generic
            raise AttributeError(name)
        if name.startswith("__") or self._is_there():
            return getattr(self._real(), name)
        return _DeferredObject(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real(), name, value)

    def __call__(self, *given: Any, **named: Any) -> Any:
        holder = self._holder
        if isinstance(holder, _StandIn) and not self._is_there():
            if self._name in MADE_LATER.get(holder.__name__, ()) and _while_importing():
                return _DeferredCall(self, given, named)
            if self._name in NOTED.get(holder.__name__, ()):
                holder._finder.noted[holder._owner].append(lambda: self._real()(*given, **named))
                return given[0]
        return self._real()(*given, **named)

    def __instancecheck__(self, instance: Any) -> bool:
        if not self._is_there():
            return False
        try:
            return isinstance(instance, self._real())
        except (AttributeError, ImportError):  # this version of the library has no such class
            return False

    def __subclasscheck__(self, subclass: Any) -> bool:
        return self._is_there() and issubclass(subclass, self._real())

    def __mro_entries__(self, bases: Any) -> tuple[Any, ...]:
        return (self._real(),)

    def __getitem__(self, item: Any) -> Any:
        return self._real()[item]

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __iter__(self) -> Any:
        return iter(self._real())

    def __contains__(self, item: Any) -> bool:
        return item in self._real()

    def __bool__(self) -> bool:
        return bool(self._real())

    def __eq__(self, other: object) -> bool:
        return self is other or (self._is_there() and bool(self._real() == other))

    def __hash__(self) -> int:
        return hash((id(self._holder), self._name))

    def __enter__(self) -> Any:
        return self._real().__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._real().__exit__(*error)


def _while_importing() -> bool:
    """Whether a module is being imported that asks for it, not a function that needs it now."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        if frame.f_code.co_name == "<module>" and getattr(spec, "_initializing", False):
            return True
        frame = frame.f_back
    return False


class _DeferredCall(_DeferredObject):
    """A stand-in for the object that a call would make."""

    def __init__(self, factory: _DeferredObject, given: Any, named: Any):
        super().__init__(factory, "")
        vars(self).update(_given=given, _named=named, _object=None)

    def _real(self) -> Any:
        if self._object is None:
            vars(self)["_object"] = self._holder._real()(*self._given, **self._named)
        return self._object

    def __bool__(self) -> bool:
        return True

    @property
    def __class__(self) -> Any:
        return self._real().__class__

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of what is made later cannot be set")
