"""Every public name has a docstring and stands in the documentation."""

from pathlib import Path

import pytest

import dual_lora
from dual_lora import DualLoraLayer

ROOT = Path(__file__).parents[2]
NAMES = [name for name in dual_lora.__all__ if name != "__version__"]
METHODS = ["steps_left", "warmup_factor", "set_scale"]


def text():
    return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("name", [*NAMES, *METHODS, "DUAL_LORA_KERNELS"])
def test_is_documented(name):
    assert f"`{name}" in text() or f"{name}(" in text() or f".{name}`" in text() or f"{name}=" in text()


@pytest.mark.parametrize("name", NAMES)
def test_has_a_docstring(name):
    assert getattr(dual_lora, name).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_docstrings(name):
    assert getattr(DualLoraLayer, name).__doc__
