"""Libraries that a run does not use are not imported, and are themselves as soon as they are used."""

import os
import subprocess
import sys

import pytest

import dual_lora.lab.deferred as deferred

PACKAGE = {
    "far/__init__.py": (
        "import sys\nsys.far = 'imported'\nclass Thing:\n    size = 3\ndef noted(f):\n    sys.noted = f\n    return f\n"
    ),
    "far/inner.py": "VALUE = 5\ndef double(x): return 2 * x\n",
    "near.py": (
        "import far\nimport far.inner\nfrom far import Thing, inner, noted\nfrom far.inner import VALUE, double\n"
        "def is_thing(x): return isinstance(x, (Thing, far.Thing, int))\n"
        "@noted\ndef plain(): return 1\n"
    ),
}


@pytest.fixture
def near(tmp_path, monkeypatch):
    """A library that imports another one, of which nothing has been used."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(deferred, "NOTED", {"far": ("noted",)})
    deferred.defer(("far", "no_such_library"))
    import near

    yield near
    for name in ("far", "far.inner", "near"):
        sys.modules.pop(name, None)
    for name in ("far", "noted"):
        if hasattr(sys, name):
            delattr(sys, name)


def imported():
    return hasattr(sys, "far")


def test_importing_and_comparing_imports_nothing(near):
    assert not near.is_thing("x")
    assert near.is_thing(1)
    assert near.plain() == 1
    assert not imported()
    with pytest.raises(ModuleNotFoundError):
        import no_such_library  # noqa: F401


@pytest.mark.parametrize(
    "use",
    [
        lambda near: near.double(4) == 8,
        lambda near: near.Thing().size == 3,
        lambda near: near.far.Thing.__name__ == "Thing",
        lambda near: near.inner.double(1) == 2,
        lambda near: near.VALUE == 5,
    ],
)
def test_what_is_used_is_real(near, use):
    near.double(1)
    assert imported()
    assert use(near)
    import far

    assert not isinstance(far, deferred._StandIn)
    assert near.is_thing(far.Thing())
    assert sys.noted is near.plain  # what was noted before the import is so now


def test_a_subclass_is_one_of_the_real_class(near):
    class More(near.Thing):
        pass

    import far

    assert More.size == 3
    assert issubclass(More, far.Thing)
    assert near.is_thing(More())


def test_an_import_by_name_is_real_when_it_is_used(near):
    import far.inner

    assert not imported()
    assert far.inner.double(3) == 6
    assert imported()
    far.Thing.size = 4
    assert near.Thing.size == 4


CHECK = """
import sys
from dual_lora.lab.deferred import MODULES, _StandIn, defer
defer()
import dual_lora.lab.run.train
real = [name for name in MODULES if name in sys.modules and not isinstance(sys.modules[name], _StandIn)]
if "scipy.stats" in sys.modules:  # older versions of transformers import it for their metrics
    real.remove("scipy.optimize")
import torch
assert not real and "pandas" not in sys.modules, real
assert "sympy" not in sys.modules or torch.__version__ < (2, 7)  # whose checkpointing imports it
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
assert isinstance(sys.modules["torch._dynamo"], _StandIn)
from transformers.distributed.tensor_parallel import DTensor
assert not isinstance(parameter, DTensor)
import torch.distributed.tensor.placement_types
from torch.distributed.tensor import Shard
assert type(Shard(0)).__name__ == "Shard" and isinstance(Shard(0), torch.distributed.tensor.placement_types.Placement)
assert torch.compile(lambda x: x + 1, backend="eager")(parameter).tolist() == (parameter + 1).tolist()
assert not isinstance(sys.modules["torch._dynamo"], _StandIn)
optimizer.step()
"""


def test_a_training_step_imports_none_of_them_and_a_compiler_does():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_launched_process_imports_what_it_says(monkeypatch):
    from dual_lora.lab import entry

    assert "RANK" in entry.LAUNCHED
    called = []
    monkeypatch.setattr(deferred, "defer", lambda: called.append(1))
    monkeypatch.setattr("dual_lora.lab.cli.main", lambda: None)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("RANK", "1")
    entry.main()
    assert not called
    for name in entry.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    entry.main()
    assert called
