"""The package that `scripts/kernels_package.py` writes, loaded as `kernels` loads it, against the core."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

import kernels_package
from dual_lora.core import blocked, reference
from dual_lora.core.blocked import Needs
from forked import before_peft

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    kernels_package.write(folder)
    return folder


@pytest.fixture(scope="module")
def package(folder):
    """By a name of its own, from a file: nothing of `dual_lora` may be asked for by name."""
    variant = folder / "build" / "torch-cuda"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for loaded in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[loaded]


def test_it_computes_what_the_core_computes(package):
    """P and Q are integers, so that no sign depends on a rounding."""
    T, O, I, r = 33, 50, 40, 4
    factors = [torch.randint(-2, 3, s, device=DEVICE).float() for s in ((r, I), (O, r), (r, I), (O, r))]
    scale = torch.tensor(0.01, device=DEVICE)
    x, dy, W = (torch.randn(s, device=DEVICE) for s in ((T, I), (T, O), (O, I)))
    theirs = [reference.Adapter(reference.Factors(*factors), scale, reference.Form())]
    ours = [package.Adapter(package.Factors(*factors), scale, package.Form())]

    delta = reference.delta_weight(theirs[0].factors, scale)
    torch.testing.assert_close(package.compose(W, ours, torch.float32), W + delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(package.forward(x, W, ours), x @ (W + delta).T, rtol=1e-5, atol=1e-4)
    want = blocked.backward(dy, x, W, theirs, None, Needs(True, False, True))
    got = package.backward(dy, x, W, ours, None, package.Needs(True, False, True))
    alone = package.factor_gradients(dy.T @ x, ours, None)
    for pair in zip([got.x, *got.factors[0], *alone[0]], [want.x, *want.factors[0], *want.factors[0]], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_it_imports_what_the_format_allows(folder):
    """The standard library, torch, Triton, and itself by relative imports."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 9))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in allowed, file


def test_it_registers_no_operator(folder):
    """Two versions at once: the names of torch.ops are those of the process."""
    file = folder / "torch-ext" / kernels_package.MODULE / "__init__.py"
    before_peft(
        "import importlib.util, sys, torch\n"
        "before = set(torch._C._dispatch_get_all_op_names())\n"
        f"spec = importlib.util.spec_from_file_location('other', {str(file)!r})\n"
        "module = sys.modules['other'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not [n for n in set(torch._C._dispatch_get_all_op_names()) - before if 'dual' in n or 'other' in n]\n"
        "assert not [n for n in sys.modules if n.partition('.')[0] == 'dual_lora']\n"
    )


def test_both_places_hold_the_same_files_and_the_digests_are_theirs(folder):
    import base64
    import hashlib

    built, source = folder / "build" / "torch-cuda", folder / "torch-ext" / kernels_package.MODULE
    names = {file.relative_to(built).as_posix() for file in built.rglob("*.py")}
    assert names == {file.relative_to(source).as_posix() for file in source.rglob("*.py")}
    digests = json.loads((built / "metadata.json").read_text())["digest"]["files"]
    assert digests == {
        name: base64.b64encode(hashlib.sha256((source / name).read_bytes()).digest()).decode() for name in names
    }


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    Path(tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        kernels_package.write(tmp_path)
