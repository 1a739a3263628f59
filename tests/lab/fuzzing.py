"""A command on a stranger's file: it succeeds or says one sentence, writes where it was told to, and ends."""

import contextlib
import copy
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import yaml
from hypothesis import strategies as st

from dual_lora.lab import cli

SECONDS = 40.0  # of the processor, for one command; the slowest harmless one takes two
WAITS = 600  # seconds on the clock: a busy machine is slow, a pipe without a writer waits for ever
MEMORY = 6 * 2**30  # bytes that a command may take beside what is loaded
RAW = re.compile(r"Traceback|\(--debug shows where\)|<class |object at 0x")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.symlink": (1,)}
_ALLOWED = ("/dev/null", "/proc/self/clear_refs")

counts = Counter()
_watching = []  # [root, violations] of the command that runs; an audit hook stays for the life of the process


class Hang(BaseException):
    """The command did not end."""


def attempt(target, arguments, root):
    """Give the command in this process. AssertionError for a traceback, a hang, or a write outside `root`.

    Temporary files have a place below `root`, which has to be empty again at the end.
    """
    out, err = io.StringIO(), io.StringIO()
    violations = []
    code, raised = 0, None
    _hook_once()
    with _scratch(root) as scratch, _limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        _watching.append((Path(root).resolve(), violations))
        compiling, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of modules imported for the first time
        try:
            cli.main([*map(str, arguments)])
        except SystemExit as error:
            code = error.code or 0
        except BaseException as error:
            raised = "".join(traceback.format_exception(error))
        finally:
            _watching.clear()
            sys.dont_write_bytecode = compiling
        left = os.listdir(scratch)
    said = err.getvalue()
    shown = f"{' '.join(map(str, arguments))}\nexit {code}\n{said[-3000:]}\n{raised or ''}"
    assert raised is None, shown
    assert not violations, f"{violations[:3]}\n{shown}"
    assert not left, f"temporary files are left: {left}\n{shown}"
    assert not RAW.search(said), shown
    if code:
        assert "error: " in said, shown
        assert said.rpartition("error: ")[2].strip().count("\n") < 12, shown
    if "--json" in arguments:
        for line in out.getvalue().splitlines()[-1:]:
            json.loads(line, parse_constant=lambda name: _not_json(name))
    counts[f"{target}: {'one sentence' if code else 'success'}"] += 1


def _not_json(name):
    raise AssertionError(f"{name} is no JSON")


@contextlib.contextmanager
def _scratch(root):
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=root) as tempfile.tempdir:
        try:
            yield tempfile.tempdir
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def _limits():
    def ring(*_):
        raise Hang

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGPROF)}
    old = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, old[1]))
    signal.alarm(WAITS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def _hook_once():
    if not hasattr(_hook_once, "done"):
        _hook_once.done = True
        sys.addaudithook(_hook)


def _hook(event, arguments):
    if not _watching:
        return
    root, violations = _watching[0]
    if event in ("socket.connect", "os.system", "os.exec"):
        violations.append((event, str(arguments)))
    elif event == "subprocess.Popen":
        if arguments[0] not in (sys.executable, "uname"):  # Python's own platform.platform()
            violations.append((event, str(arguments)))
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes | os.PathLike):
            _judge(event, path, root, violations)
    elif event in _PATHS:
        inside = event != "os.mkdir" and any(isinstance(a, int) and a >= 0 for a in arguments[len(_PATHS[event]) :])
        for place in () if inside else _PATHS[event]:  # a name in an open folder
            _judge(event, arguments[place], root, violations)


def _judge(event, path, root, violations):
    whole = Path(os.path.realpath(os.fsdecode(path)))
    if not whole.is_relative_to(root) and str(path) not in _ALLOWED and not str(whole).startswith("/proc/self/fd"):
        violations.append((event, str(whole)))


_NUMBERS = [None, True, False, -1, 0, 1, 2, 3, 0.5, -0.5, 2**31, 2**32, 2**63, 10**30, 1e308, 5e-324]
_NUMBERS += [float("inf"), float("-inf"), float("nan")]
_TEXTS = ["", " ", "a", "lora", "full", "auto", ".", "..", "../../up", "/etc/passwd", "/dev/zero", "~", "\0", "-1"]
_TEXTS += ["x" * 5000, "é" * 300, "(a|a)*$", "(.|.)*x", "[", "(" * 200, "*", "a{99999999999}", "true", "1e3", "2r"]
_TEXTS += ["hub:no/such", "package:no-such", ".x:lora", "os:lora", "a b", "a/b/c", "%s{}", "٣", "Ａ", "2020-01-01"]
_TEXTS += ["\x1b[31m", "r/0", "null", "<script>", "\ud800"]
_NESTS = [[], {}, [[]], [1], ["a"], {"a": 1}, {"": None}, [None], [1, [2]], {"name": "lora"}, [[0, 20000]] * 3]
hostile = st.one_of(*map(st.sampled_from, (_NUMBERS, _TEXTS, _NESTS)), st.integers(-3, 12), st.text(max_size=20))
_HOW = ["set", "set", "set", "set", "drop", "wrap", "rename"]


def _places(value, here=()):
    yield here
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _places(each, (*here, key))
    elif isinstance(value, list):
        for i, each in enumerate(value[:4]):
            yield from _places(each, (*here, i))


@st.composite
def mutated(draw, value, extra=()):
    """The value with one to three changes. extra: [(place, value)], changes that are worth trying for this file."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        if extra and draw(st.integers(0, 2)) == 0:
            place, new = draw(st.sampled_from(list(extra)))
        else:
            place = draw(st.sampled_from(list(_places(value))))
            new = draw(hostile)
        new = copy.deepcopy(new)  # later changes may go into it
        value = _changed(value, place, new, draw(st.sampled_from(_HOW)))
    return value


def _changed(value, place, new, how):
    if not place:
        return new if how == "set" else [value] if how == "wrap" else value
    holder = value
    for part in place[:-1]:
        try:
            holder = holder[part]
        except (KeyError, IndexError, TypeError):
            return value
    last = place[-1]
    try:
        if how == "drop":
            del holder[last]
        elif how == "wrap":
            holder[last] = [holder[last]]
        elif how == "rename" and isinstance(holder, dict):
            holder[str(new)[:50]] = holder.pop(last)
        else:
            holder[last] = new
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    return value


@st.composite
def written(draw, value, form, extra=()):
    """Bytes of a file with a mutated value; some are cut off, deeply nested or no text at all."""
    kind = draw(st.sampled_from(["value"] * 9 + ["cut", "deep", "bytes", "text"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "text":
        return draw(st.text(max_size=200)).encode("utf-8", "surrogatepass")
    if kind == "deep":
        return b"[" * 100_000 if draw(st.booleans()) else b'{"a": ' * 50_000
    changed = draw(mutated(value, extra))
    text = yaml.safe_dump(changed, sort_keys=False) if form == "yaml" else json.dumps(changed)
    data = text.encode("utf-8", "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if kind == "cut" else data
