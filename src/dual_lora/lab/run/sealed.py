"""Checkpoints of DeepSpeed: read only if this user's own run wrote them.

DeepSpeed reads its files by Python's pickle, which runs whatever code a file holds. So a run seals such a checkpoint:
the hash of all its files is signed with a key that lies in the user's cache folder and never in a run. Nobody else can
make that seal, and a file that was changed breaks it.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from dual_lora._warning import warn
from dual_lora.lab.cache import cached
from dual_lora.lab.errors import UserError, described, is_disk_full
from dual_lora.lab.files.write import WHOLE, hold, write_atomically, write_json
from dual_lora.lab.read import read_object, regular

SEAL = "seal.json"


def key_file() -> Path:
    """Return the path of the key."""
    return cached("checkpoint.key")


def seal(checkpoint: Path) -> None:
    """Sign a checkpoint that was just written. Warns where the key cannot be kept: training goes on without a seal."""
    try:
        _make_key()
        write_json(checkpoint / SEAL, {"seal": _signature(checkpoint, _key())})
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        warn(f"{checkpoint} cannot be sealed, so it cannot be resumed ({described(error)}).", stacklevel=2)


def check_seal(checkpoint: Path) -> None:
    """Raise UserError unless this user's own run wrote the checkpoint, and nobody changed it since."""
    try:
        signature = read_object(checkpoint / SEAL).get("seal")
        if isinstance(signature, str) and hmac.compare_digest(
            signature.encode(), _signature(checkpoint, _key()).encode()
        ):
            return
    except (OSError, ValueError):
        pass
    raise UserError(
        f"The checkpoint {checkpoint} is DeepSpeed's, whose files can run code when they are read, and it has no valid "
        f"seal of your own runs ({SEAL}, signed with {key_file()}). Nothing was read. Start again with --overwrite or "
        "in another --out. If you wrote it on another machine, copy that machine's key here first."
    )


def _make_key() -> None:
    file = key_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = hold(file.with_suffix(".lock"), f"{file} is being written for longer than expected.", seconds=10)
    try:
        if not file.is_file():
            write_atomically(file, secrets.token_hex(32) + "\n", 0o600)
    finally:
        lock.release()


def _key() -> bytes:
    key = regular(key_file()).read_text("ascii").strip()
    if len(key) < 64:
        raise ValueError(f"the key {key_file()} is damaged: remove it")
    return key.encode()


def _signature(checkpoint: Path, key: bytes) -> str:
    whole = hmac.new(key, digestmod="sha256")
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = file.relative_to(checkpoint).as_posix()
        if name in (SEAL, WHOLE):
            continue
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{len(os.fsencode(name))} ".encode() + os.fsencode(name) + content.encode())
    return whole.hexdigest()
