"""What this package changes in other libraries is what its list says."""

import subprocess
import sys
from importlib import import_module

import pytest

from dual_lora._patches import PATCHES

CHANGES = [(patch.after, change) for patch in PATCHES for change in patch.changes]


def found(change):
    module, _, path = change.partition(":")
    value = import_module(module)
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("after", "change"), CHANGES, ids=[change for _, change in CHANGES])
def test_the_list_names_what_is_changed(after, change):
    pytest.importorskip(after.partition(".")[0])
    import_module(after)
    value = found(change)
    code = getattr(value, "__code__", None)
    ours = code is not None and ("dual_lora" in code.co_filename or "_with_dual_lora" in "".join(code.co_names))
    assert ours or getattr(value, "value", None) == "DUAL_LORA" or (isinstance(value, dict) and "DUAL_LORA" in value)


def test_every_change_has_a_reason_and_an_end():
    assert all(patch.why.endswith(".") and ":" in patch.until for patch in PATCHES)


def test_importing_the_package_imports_none_of_them():
    heavy = sorted({patch.after.partition(".")[0] for patch in PATCHES})
    code = f"import sys, dual_lora; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
