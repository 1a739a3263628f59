"""Find the modules whose weights a class's code reads instead of calling them: Mamba's `dt_proj`, LFM2's convolutions.

The source is parsed for `self.proj.weight` and `self.block.proj.weight`, also under local names (`proj = self.proj`, a
loop over `self.layers` or over `(self.a, self.b)`, a conditional, an item, `getattr`), in methods and properties, and
of a module that a property returns. A function that gets the module itself (`product(self.proj, x)`) is not followed.
"""

import ast
import functools
import inspect
import textwrap
from types import CodeType
from typing import Any

from torch import nn

Path = tuple[str, ...]  # names of modules from `self` on; ANY is one of a list
ANY = "*"

# Methods that read weights to initialise or to tie them, not to compute with.
_INIT_METHODS = {"__init__", "tie_weights"} | {
    *("_init_weights", "init_weights", "initialize_weights", "reset_parameters", "_reset_parameters")
}
_METADATA = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "data", "is_meta", "requires_grad", "SCB"}


def matches(path: Path, read: Path) -> bool:
    """Whether the path of a module matches the pattern `read`."""
    return len(path) == len(read) and all(r in (ANY, p) for p, r in zip(path, read, strict=True))


@functools.cache
def weights_read_by(kind: type[nn.Module]) -> frozenset[Path]:
    """Return the paths of submodules whose `weight` the class's code computes with."""
    if kind.__module__.startswith("torch.nn"):
        return frozenset()
    paths: set[Path] = set()
    returned: dict[str, set[Path]] = {}
    for base in (base for base in kind.__mro__ if base.__module__.split(".")[0] != "torch"):
        read, by_properties = _read_in_class(base)
        paths |= read
        returned = by_properties | returned
    return frozenset(first + path[1:] for path in paths for first in returned.get(path[0], {path[:1]}))


@functools.cache
def _read_in_class(base: type) -> tuple[frozenset[Path], dict[str, set[Path]]]:
    """Return the paths that a class's own methods read, and the modules that its properties return."""
    paths: set[Path] = set()
    returned: dict[str, set[Path]] = {}
    for name, found in vars(base).items():
        function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "func", found))
        if not inspect.isfunction(function) or name in _INIT_METHODS:
            continue
        if _mentions_weight(function.__code__) and (tree := _parse(function)) is not None:
            paths |= _weight_paths(tree)
        elif not inspect.isfunction(found) and (tree := _parse(function)) is not None:
            names = _Names(tree)
            returns = (names.paths(node.value) for node in ast.walk(tree) if isinstance(node, ast.Return))
            if modules := set().union(*returns) - {()}:
                returned[name] = modules
    return frozenset(paths), returned


def _mentions_weight(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "weight" in code.co_names or "weight" in code.co_consts or any(map(_mentions_weight, inner))


def _parse(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # no source: made at run time, or compiled
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.args.args else None


def _weight_paths(tree: ast.FunctionDef) -> set[Path]:
    names, looked_at = _Names(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            node.attr in _METADATA or node.attr[-1] == "_"
        ):  # which writes in place
            looked_at.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr", "id"):
            looked_at |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            looked_at |= {id(node.left), *map(id, node.comparators)}
    written = {id(n) for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Store | ast.Del)}
    paths = (path for n in ast.walk(tree) if id(n) not in looked_at | written for path in names.paths(n))
    return {path[:-1] for path in paths if len(path) > 1 and path[-1] == "weight"}


class _Names:
    """The modules below `self` that the local names of a function stand for."""

    def __init__(self, tree: ast.FunctionDef):
        self.known: dict[str, set[Path]] = {tree.args.args[0].arg: {()}}
        for _ in range(2):  # in a loop, a name may be assigned after its use
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    self._assign(node.targets[0], node.value)
                elif isinstance(node, ast.NamedExpr | ast.AnnAssign):
                    self._assign(node.target, node.value)
                elif isinstance(node, ast.For | ast.comprehension):
                    self._assign_items(node.target, node.iter)

    def _assign(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its)
        elif isinstance(target, ast.Name):
            self._add(target.id, self.paths(value))

    def _assign_items(self, target: ast.expr, items: ast.expr) -> None:
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name):
            if items.func.id == "zip" and isinstance(target, ast.Tuple):
                for one, its in zip(target.elts, items.args, strict=False):
                    self._assign_items(one, its)
            elif items.func.id == "enumerate" and isinstance(target, ast.Tuple):
                self._assign_items(target.elts[-1], items.args[0])
            elif items.func.id in ("reversed", "list"):
                self._assign_items(target, items.args[0])
        elif isinstance(items, ast.Call) and isinstance(items.func, ast.Attribute):
            if items.func.attr in ("values", "items", "children"):
                last = target.elts[-1] if isinstance(target, ast.Tuple) else target
                self._assign_items(last, items.func.value)
        elif isinstance(target, ast.Name) and isinstance(items, ast.Tuple | ast.List):
            self._add(target.id, set().union(*map(self.paths, items.elts)))
        elif isinstance(target, ast.Name):
            self._add(target.id, {(*path, ANY) for path in self.paths(items)})

    def _add(self, name: str, paths: set[Path]) -> None:
        """Add paths to those of a name: it may stand for several modules, one after the other."""
        if paths := paths - {()}:
            self.known[name] = self.known.get(name, set()) | paths

    def paths(self, node: ast.AST | None) -> set[Path]:
        """Return the paths that an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, set())
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            return self._child_paths(node.args[0], _constant_name(node.args[1]))
        if isinstance(node, ast.Attribute):
            return self._child_paths(node.value, node.attr)
        return self._child_paths(node.value, _constant_name(node.slice)) if isinstance(node, ast.Subscript) else set()

    def _child_paths(self, node: ast.AST, name: str) -> set[Path]:
        return {(*path, name) for path in self.paths(node)}


def _constant_name(name: ast.expr) -> str:
    return str(name.value) if isinstance(name, ast.Constant) else ANY
