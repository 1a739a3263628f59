"""Mutation testing: small errors are put into a module one at a time; a test has to notice each.

    python -m scripts.mutate dual_lora.lab.study.statistics tests/lab/test_stats.py -k "not level"

What follows the module is given to pytest. Prints the mutants that survive, with their line. Libraries are imported
once; every mutant runs in a process that is forked from there and imports the package anew. A mutant that runs for too
long counts as noticed.
"""

from __future__ import annotations

import ast
import copy
import gc
import importlib
import importlib.machinery
import itertools
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

SECONDS = 120  # of processor time for all tests of a mutant
SOURCE = Path(__file__).parent.parent / "src"
TEXT = Path(tempfile.gettempdir()) / f"mutant-{os.getpid()}.py"  # of the one that runs
# The first is none: it says what has to be said before Triton is imported.
LIBRARIES = (
    "tests.conftest",
    "torch",
    "torch._dynamo",
    "transformers",
    "peft",
    "scipy.stats",
    "pydantic",
    "rich.table",
)
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
CALLED = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "sf": "cdf",
    "cdf": "sf",
    "isf": "ppf",
}


def mutants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand instead of a node; its own children are not changed."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[i] = COMPARED[type(operator)]()
            yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.125)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.If | ast.While):
        changed = copy.deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    elif isinstance(node, ast.Attribute) and node.attr in CALLED:
        yield ast.Attribute(node.value, CALLED[node.attr], node.ctx)
    elif isinstance(node, ast.Name) and node.id in CALLED:
        yield ast.Name(CALLED[node.id], node.ctx)


def mutations(tree: ast.Module) -> Iterator[tuple[ast.Module, int, str]]:
    """Every changed module, with the line and both texts. Annotations and the words of errors stay as they are."""
    hidden: set[int] = set()
    for node in ast.walk(tree):
        kept = [node] if isinstance(node, ast.Raise | ast.FormattedValue) else []
        kept += [part for name in ("annotation", "returns") if (part := getattr(node, name, None)) is not None]
        hidden |= {id(inner) for part in kept for inner in ast.walk(part)}
    for number, node in enumerate(ast.walk(tree)):
        for new in mutants(node) if id(node) not in hidden else ():
            changed = copy.deepcopy(tree)
            old = next(itertools.islice(ast.walk(changed), number, None))
            changed = ast.fix_missing_locations(_Replaced(old, new).visit(changed))
            texts = [ast.unparse(n).splitlines()[0] for n in (node, new)]
            yield changed, getattr(node, "lineno", 0), f"{texts[0]}  →  {texts[1]}"


class _Replaced(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


class Changed(importlib.machinery.PathFinder):
    """Finds this one module, with the changed text."""

    def __init__(self, module: str, tree: ast.Module):
        self.module, self.tree = module, tree

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # type: ignore[override]
        if name != self.module:
            return None
        spec: Any = super().find_spec(name, path, target)
        spec.loader = _Loader(name, spec.origin)
        spec.loader.tree = self.tree
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    tree: ast.Module

    def get_code(self, fullname: str) -> CodeType:
        """From a file of its own: Triton takes a kernel's text from there."""
        text = ast.unparse(self.tree)
        TEXT.write_text(text, encoding="utf-8")
        return compile(text, TEXT, "exec")


def passes(module: str, tree: ast.Module, tests: list[str]) -> bool:
    """Whether the tests pass with this text of the module, in a process of its own."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            assert module not in sys.modules
            sys.meta_path.insert(0, Changed(module, tree))
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        finally:
            os._exit(int(status != 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(module: str, *tests: str) -> int:
    """Print what survives; the number of survivors, 0 for none."""
    sys.dont_write_bytecode = True
    tree = ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # or every mutant's collection of garbage would copy the memory that it shares
    if not passes(module, tree, [*tests]):
        raise SystemExit("The tests fail without a mutant.")
    survived = count = 0
    for changed, line, text in mutations(tree):
        count += 1
        if passes(module, changed, [*tests]):
            survived += 1
            print(f"{module}:{line}: {text}", flush=True)
    TEXT.unlink()
    print(f"{count} mutants, {survived} survived", flush=True)
    return survived


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
