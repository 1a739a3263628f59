"""Every test runs offline, on one thread, from one seed. Tiny models are built, never downloaded."""

import difflib
import functools
import gc
import inspect
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jinja2
import pytest
import torch

LONG = frozenset((Path(__file__).parent / "long.txt").read_text(encoding="utf-8").splitlines())

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be said before anybody imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
if hasattr(os, "register_at_fork"):  # OpenMP's threads stay behind in a fork: a team of several would wait for ever
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# A build for CUDA without a GPU starts a thread for one if the first backward comes after a FakeTensorMode, and no fork
# can train from then on.
torch.ones(1, requires_grad=True).sum().backward()
# Every save writes PEFT's model card, whose template is compiled each time: a tenth of a tiny training.
jinja2.Environment.compile = functools.lru_cache(64)(jinja2.Environment.compile)
os.fsync = lambda _: None  # nobody cuts the power in here, and each waits for a disk (`crash_disk` sees the calls)


def pytest_addoption(parser):
    parser.addoption("--layer-kinds", metavar="FILE", help="rows of your own for tests/method/test_table.py")
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew, to be looked at")


@pytest.fixture
def golden(request):
    """Compares a text with the file of that name in tests/golden, or writes it anew with --update-golden."""

    def compare(name, text):
        file = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            file.write_text(text, encoding="utf-8")
        there = file.read_text(encoding="utf-8") if file.is_file() else ""
        changed = difflib.unified_diff(there.splitlines(), text.splitlines(), str(file.name), "now", n=1, lineterm="")
        if difference := list(changed):
            pytest.fail(
                "\n".join([*difference, "Meant? Write it with --update-golden, and read the difference."]), False
            )

    return compare


@pytest.fixture(autouse=True)
def _seed():
    """One seed, and as many threads after the test as before: every later test of the process would have others."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == threads, f"the test leaves {left} threads, and found {threads}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What the tests before left is collected, and what lives on (modules above all) is not looked through again.

    Every training collects garbage twice, at a third of a second each with all of transformers loaded.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Tests and rows of tests/long.txt are long: other rows ask the same. Files with many slow tests come first: a file
    goes to one worker, and a long one at the end leaves the others idle."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.long)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def _lean_interpreter():
    """Triton's interpreter looks through all of `triton.language` at every call of every function, for a fifth of its
    time. What is no builtin there never becomes one.
    """
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return

    names = functools.cache(lambda of: [n for n, member in inspect.getmembers(of) if language.core.is_builtin(member)])
    kept = {name: getattr(inspect, name) for name in dir(inspect)}
    interpreter.inspect = SimpleNamespace(
        **kept | {"getmembers": lambda of: [(name, getattr(of, name)) for name in names(of)]}
    )


if os.environ.get("TRITON_INTERPRET") == "1":
    _lean_interpreter()
