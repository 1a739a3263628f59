"""The one way to write a file or a folder: whole or not at all, and never through somebody else's file.

The new content goes to a name of its own next to the target: drawn at random, made exclusively (mode x), so that it
follows no link and meets no other writer. It reaches the disk and takes the target's place in one step. After a
crash at any moment the old content is there or the new one. Nothing that was not made here is removed, but for a
file that is written anew. What an output is to be is held by a lock, so that no two commands write it at once.
"""

import glob
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from dual_lora.lab.errors import UserError, is_disk_full
from dual_lora.lab.read import read_object

WHOLE = "complete.json"  # written last into a folder: the names and sizes of its files
OLD = 3600.0  # seconds: nobody writes a single file for so long
REMAINS = tuple(f"**/.*.{'?' * 16}.part{inside}" for inside in ("", "/**/*"))  # globs of what a killed writer leaves


def _next_to(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


@contextmanager
def _in_place_of(target: Path, anew: bool = False) -> Iterator[Path]:
    """A name next to the target for what is to take its place, and does so at the end. anew: see `_make_way`."""
    part = _next_to(target)
    try:
        yield part
        if part.is_dir() and target.is_dir():
            _make_way(target, anew)
        part.replace(target)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        raise
    sync(target.parent)


def _make_way(target: Path, anew: bool) -> None:
    """Empty the folder that another is to replace. Raises UserError, and removes nothing, if it holds files that may
    not go: all files, or with `anew` all but those that it lists as ours."""
    listed = {file for file, same in listed_in(target).items() if same} | {target / WHOLE} if anew else set()
    files = [path for path in target.rglob("*") if path.is_symlink() or not path.is_dir()]
    others = [path for path in files if path not in listed]
    if others:
        raise UserError(
            f"{others[0]} was put into the output folder meanwhile, or changed. Nothing was removed or written: move "
            "it away and give the same command again, or give another output."
        )
    for file in sorted(files, key=lambda file: (file.name == WHOLE, file)):
        file.unlink(missing_ok=True)
    for folder in sorted(target.rglob("*"), reverse=True):
        folder.rmdir()
    if os.name == "nt":  # where no folder takes the place of another, not even of an empty one
        target.rmdir()


def write_atomically(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """The file has its old content or the new one at every moment. A link at `path` is replaced, not followed.

    mode: who may read and write it, before the umask.
    """
    opener = partial(os.open, mode=mode)
    data = content.encode() if isinstance(content, str) else content
    with _in_place_of(path) as part, open(part, "xb", opener=opener) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_output(path: Path, content: str | bytes) -> None:
    """A file that no lock holds. What killed commands have left of it is removed, once nobody can be writing it."""
    if not path.parent.exists():
        raise UserError(
            f"There is no folder {path.parent} to write {path.name} into: make it (mkdir -p), or name another."
        )
    remove_remains(path.parent, path.name, after=OLD)
    write_atomically(path, content)


def write_folder_atomically(
    target: Path, write: Callable[[Path], object], listed: bool = False, anew: bool = False
) -> None:
    """``write(folder)`` fills a folder next to ``target``, which then takes its place. listed: see `mark_whole`. anew:
    it may take the place of one that was written in the same way; else of an empty one alone.

    Every file in it may be read by whoever may read the folder.
    """
    with _in_place_of(target, anew) as part:
        part.mkdir()
        write(part)
        _share_as_the_folder(part)
        if listed:
            mark_whole(part)
        sync(*part.rglob("*"), part)


def _share_as_the_folder(folder: Path) -> None:
    """Give files to those who have the folder. safetensors writes files for their owner alone: a server that another
    user runs could read a merged model's configuration, and not its weights."""
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o666  # as the umask made it
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.is_file() and (mode := stat.S_IMODE(path.stat().st_mode)) | allowed != mode:
            path.chmod(mode | allowed)


def finite(value: Any) -> Any:
    """A value of JSON, in which NaN and infinity, which JSON does not have and other programs refuse, become null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text of the finite value."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False)


def text_of_json(value: Any) -> str:
    """A whole file of JSON."""
    return json_text(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_atomically(path, text_of_json(value))


def mark_whole(folder: Path) -> None:
    """List a folder's files with their sizes in it, once all of them have reached the disk."""
    inside = sorted(path for path in folder.rglob("*") if path.name != WHOLE)
    sync(*inside, folder.parent, folder.parent.parent)
    write_json(folder / WHOLE, {p.relative_to(folder).as_posix(): p.stat().st_size for p in inside if p.is_file()})


def write_listed(file: Path, content: str) -> None:
    """Write a file anew into a folder that has a list: ours before, or not there, it is ours in its new size too."""
    ours = listed_in(file.parent).get(file, not file.exists())
    write_output(file, content)
    if ours and (file.parent / WHOLE).is_file():
        known = read_object(file.parent / WHOLE)
        write_output(file.parent / WHOLE, text_of_json(known | {file.name: file.stat().st_size}))


def listed_in(folder: Path) -> dict[Path, bool]:
    """The files that were written into a folder, by its list: whether each is there in its full size. One that the list
    places outside of the folder is not: the list may be a stranger's."""
    try:
        return {folder / name: _has_size(folder, name, size) for name, size in read_object(folder / WHOLE).items()}
    except (OSError, ValueError):
        return {}


def _has_size(folder: Path, name: str, size: Any) -> bool:
    inside = not PurePath(name).anchor and ".." not in PurePath(name).parts
    return inside and (file := folder / name).is_file() and file.stat().st_size == size


@contextmanager
def free_folder(out: str | Path) -> Iterator[Path]:
    """Return a folder that may be written: one that is not there or empty; of a link, what it names. UserError
    otherwise.

    Held inside: no other command writes to it meanwhile.
    """
    target = Path(out)
    if target.is_symlink():
        target = target.resolve()
    _check_empty(target, out)
    with held(target):
        _check_empty(target, out)  # another command may have ended meanwhile
        yield target


def _check_empty(target: Path, out: str | Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"The output folder {out} is not empty: give another one.")


@contextmanager
def free_file(out: str | Path) -> Iterator[tuple[Path, Path]]:
    """A file that is not there yet, and a folder next to it to make it in: what has its name there at the end becomes
    the file. UserError for a file that is there. Held inside, as a folder is."""
    target = Path(out)
    taken = UserError(f"The file {target} exists already: give another one.")
    if os.path.lexists(target):
        raise taken
    with held(target), space_next_to(target) as space:
        yield target, space
        sync(space / target.name)
        if os.path.lexists(target):
            raise taken
        (space / target.name).replace(target)
        sync(target.parent)


@contextmanager
def space_next_to(target: Path) -> Iterator[Path]:
    """A folder for what leads to the target, on the same disk, and removed at the end."""
    space = _next_to(target)
    try:
        space.mkdir()
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)


@contextmanager
def held(target: Path) -> Iterator[None]:
    """Hold the target: no other command writes to it meanwhile. What killed ones have left next to it is removed."""
    made = [folder for folder in target.absolute().parents if not folder.exists()]
    make_folder(target.parent)
    file = target.with_name(f".{target.name}.lock")
    lock = hold(file, f"{target} is being written by another command: wait for it, or give another output.")
    try:
        remove_remains(target.parent, target.name)
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            file.unlink()
        lock.release()
        for folder in made:  # those that nothing came into
            with suppress(OSError):
                folder.rmdir()


def make_folder(folder: Path) -> None:
    """Make a folder for an output, with those above it. Raises UserError where the system does not let us."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"The folder {folder} for the output cannot be made ({error.strerror or error}): give another one, in a "
            "folder that you may write."
        ) from error


def remove_remains(folder: Path, name: str | None = None, after: float = 0) -> None:
    """Remove what killed writers have left, folders of which may have a model's size. name: of one target alone.
    after: seconds that they must be old, where another command may be writing."""
    for left in folder.glob(f".{glob.escape(name) if name else '*'}.{'[0-9a-f]' * 16}.part"):
        with suppress(OSError):
            state = left.lstat()
            if abs(time.time() - state.st_mtime) < after:  # the time of day may have been set back since
                continue
            if stat.S_ISDIR(state.st_mode):
                shutil.rmtree(left, ignore_errors=True)
            elif stat.S_ISREG(state.st_mode):
                left.unlink()


def hold(file: Path, busy: str, seconds: float = 0) -> Any:
    """A lock, which the operating system frees when its holder dies. Raises UserError, `busy` if another has it."""
    from filelock import FileLock, Timeout

    if os.path.lexists(file) and not _is_no_link(file):
        # Some versions empty the file that they lock.
        raise UserError(f"{file} is a link or no file, expected a lock of this program: move it away.")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:  # a link in its place, a folder that may not be written
        raise UserError(f"{file} cannot be held: {error}. Give another --out.") from None
    return lock


def is_held(file: Path) -> bool:
    """Whether a process that lives holds this lock (see `hold`). Nothing is made where there is none."""
    from filelock import FileLock, Timeout

    if not (os.path.lexists(file) and _is_no_link(file)):
        return False
    try:
        with FileLock(file).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that may not be written
        return False


def _is_no_link(file: Path) -> bool:
    """Whether it is a regular file without a second name."""
    state = file.lstat()
    return stat.S_ISREG(state.st_mode) and state.st_nlink == 1


def sync(*paths: Path) -> None:
    """Have files and folders reach the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue
        at = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what may be written
        try:
            os.fsync(at)
        finally:
            os.close(at)
