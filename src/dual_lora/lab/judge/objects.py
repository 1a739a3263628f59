"""A git history that may be a stranger's: its objects are read, and nothing of its configuration.

A repository's own configuration names programs that git runs (`gpg.program` where `log.showSignature` is set, a remote
from which missing objects are fetched, a monitor of files). So git works in an empty repository that is made here and
given the objects of the other one; of that one HEAD, its branch and packed-refs are read here, as texts.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import regular

SECONDS = 600  # for all that is asked of one history
LARGEST = 20_000_000  # bytes of one answer of git's, and of a file of names
Git = Callable[..., bytes]
_HASH = re.compile(r"[0-9a-f]{40}")
_BRANCH = re.compile(r"refs/(?!.*\.\.)[\w./-]+", re.ASCII)


@contextmanager
def objects_of(folder: Path) -> Iterator[tuple[Git, str]]:
    """git(words…) -> its output, over the objects of a clone or of a bare git directory; and the commit of its HEAD.

    Raises UserError for a folder without a whole history, and for answers that are too long or take too long.
    """
    inside = folder / ".git" if (folder / ".git").is_dir() else folder
    _check_objects(folder, inside / "objects")
    tip, ends = _head_commit(folder, inside), time.monotonic() + SECONDS
    with TemporaryDirectory() as empty:
        for part in ("objects", "refs"):
            (Path(empty) / part).mkdir()
        (Path(empty) / "HEAD").write_text("ref: refs/heads/none\n", encoding="utf-8")
        here = {"GIT_DIR": empty, "GIT_OBJECT_DIRECTORY": str((inside / "objects").resolve())}
        none = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_REPLACE_OBJECTS": "1"}
        none |= {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | here | none

        def git(*words: str) -> bytes:
            return _run_git(folder, ["git", *words], env, empty, ends)

        yield git, tip


def _run_git(folder: Path, command: list[str], env: dict[str, str], cwd: str, ends: float) -> bytes:
    try:
        running = subprocess.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise UserError(f"The history of {folder} needs git, which could not be started: {error}.") from None
    late = Timer(max(0.0, ends - time.monotonic()), running.kill)
    late.start()
    try:
        assert running.stdout is not None
        with running.stdout as output:
            content = output.read(LARGEST + 1)
            if len(content) > LARGEST:
                running.kill()
        code = running.wait()
    finally:
        late.cancel()
        running.kill()
    if time.monotonic() > ends:
        raise UserError(f"The history of {folder} could not be read within {SECONDS} seconds.")
    if len(content) > LARGEST:
        raise UserError(f"The history of {folder} holds more than {LARGEST:,} bytes in one place.")
    if code:
        raise UserError(
            f"{folder} does not hold the whole of its history (git {command[1]}: status {code}): give a clone that was "
            "made without --depth and without --filter."
        )
    return content


def _check_objects(folder: Path, objects: Path) -> None:
    """Raise UserError for what git would wait for, or read without an end: pipes, devices, and objects elsewhere."""
    if os.path.lexists(objects / "info/alternates"):
        raise UserError(f"{folder} has objects elsewhere: give a clone that was made without --shared and --reference.")
    for file in objects.rglob("*"):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is neither a file nor a folder, so the history was not read: remove it.")


def _head_commit(folder: Path, inside: Path) -> str:
    """The commit of HEAD."""
    nothing = UserError(f"{folder} holds no git history: give a clone, or its bare git directory.")
    try:
        head = _text(inside / "HEAD").strip()
        name = head.removeprefix("ref:").strip()
        if head.startswith("ref:") and _BRANCH.fullmatch(name):
            if (inside / name).exists():
                head = _text(inside / name).strip()
            else:
                packed = (line.split() for line in _text(inside / "packed-refs").splitlines())
                head = next((words[0] for words in packed if words[1:] == [name]), "")
        if not (inside / "objects").is_dir():
            raise nothing
    except (OSError, ValueError):
        raise nothing from None
    if not _HASH.fullmatch(head):
        raise nothing
    return head


def _text(file: Path) -> str:
    return regular(file, LARGEST).read_text(encoding="utf-8")
