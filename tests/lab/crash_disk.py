"""Every state in which a kill or a loss of power may leave a folder, recorded in one run of a command.

`Disk` sees each file event below its root (an audit hook, and `os.fsync`) and keeps what lies there just before it. A
process that is killed at this event leaves exactly that (`kill`), or a file that was being written cut off (`torn`).
After a loss of power less survives: `unsynced` keeps all names but of every file only what was synced; `forgotten` goes
back to the names of each folder's last sync as well.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
}
_active = []  # the disk that is recorded; an audit hook stays for the life of the process

State = dict  # path below the root -> bytes, or None for a folder


@dataclass
class _Node:
    """A file or a folder as the disk's platter has it."""

    synced: bytes = b""
    names: dict = field(default_factory=dict)  # of a folder: name -> node, at its last sync
    is_folder: bool = False


class Disk:
    """Records what happens below `root`. at: called before each event with its number (to kill the process there)."""

    def __init__(self, root, at=None):
        self.root = Path(root).resolve()
        self.at = at
        self.events = []
        self.states = {}  # frozen state -> (kind, number of the event, what the event was)
        self._nodes = {}
        self._last = {}
        self._busy = False

    @contextmanager
    def recorded(self):
        self._adopt()
        real = os.fsync

        def fsync(file):
            number = file if isinstance(file, int) else file.fileno()
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
            self._event("fsync", path)
            real(file)
            self._sync(path)

        os.fsync = fsync
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked.append(True)
        _active.append(self)
        try:
            yield self
        finally:
            _active.remove(self)
            os.fsync = real
        self._event("end", self.root)

    def _event(self, what, path):
        if self._busy or not path.is_relative_to(self.root):
            return
        self._busy = True
        try:
            if self.at is not None:
                self.at(len(self.events))
            self.events.append(f"{what} {path.relative_to(self.root)}")
            if self.at is None:
                self._look()
        finally:
            self._busy = False

    def _look(self):
        now = self.state()
        self._forget_dead()
        self._keep("kill", now)
        inodes = {name: os.stat(self.root / name).st_ino for name, content in now.items() if content is not None}
        for name, number in inodes.items():
            old, new = self._last.get(number, b""), now[name]
            if new != old:
                start = len(old) if new.startswith(old) else 0
                self._keep("torn", now | {name: new[: start + (len(new) - start) // 2]})
        self._keep("unsynced", {n: c if c is None else self._node(self.root / n).synced for n, c in now.items()})
        forgotten = {}
        _walk(self._node(self.root), "", forgotten)
        self._keep("forgotten", forgotten)
        self._last = {number: now[name] for name, number in inodes.items()}

    def _keep(self, kind, state):
        self.states.setdefault(frozenset(state.items()), (kind, len(self.events), self.events[-1]))

    def state(self):
        """What lies below the root."""
        return {
            str(path.relative_to(self.root)): None if path.is_dir() else path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_dir() or path.is_file()
        }

    def restore(self, state):
        """Put a state in place of what is there."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        for name, content in sorted(dict(state).items()):
            path = self.root / name
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _node(self, path):
        number = os.stat(path).st_ino
        return self._nodes.setdefault(number, _Node(is_folder=path.is_dir()))

    def _forget_dead(self):
        alive = {os.stat(path).st_ino for path in (self.root, *self.root.rglob("*"))}
        self._nodes = {number: node for number, node in self._nodes.items() if number in alive}

    def _sync(self, path):
        if path.is_relative_to(self.root) and path.exists():
            node = self._node(path)
            if path.is_dir():
                node.names = {child.name: self._node(child) for child in path.iterdir()}
            else:
                node.synced = path.read_bytes()

    def _adopt(self):
        """What lies there before has reached the disk."""
        for path in (*self.root.rglob("*"), self.root):
            self._sync(path)
            if path.is_file():
                self._last[os.stat(path).st_ino] = path.read_bytes()


def _walk(node, prefix, found):
    for name, child in node.names.items():
        found[f"{prefix}{name}"] = None if child.is_folder else child.synced
        if child.is_folder:
            _walk(child, f"{prefix}{name}/", found)


_hooked = []


def _hook(event, arguments):
    if not _active or _active[-1]._busy:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes | os.PathLike):
            _active[-1]._event("open", Path(os.path.abspath(os.fsdecode(path))))
    elif event in _EVENTS:
        folder = next((a for a in arguments[_EVENTS[event] :] if isinstance(a, int) and a >= 0), None)
        at = "" if folder is None or event == "os.mkdir" else os.readlink(f"/proc/self/fd/{folder}")
        _active[-1]._event(event, Path(os.path.abspath(os.path.join(at, os.fsdecode(arguments[0])))))
