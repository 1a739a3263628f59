"""What a study has done so far, in one SQLite file that survives SIGKILL at any moment.

Only the process that leads the study writes here (a lock sees to it); the runs themselves write an outcome file
into their own folders. A run finished while the leader died is adopted from its folder, and so is everything when
this file is broken: the folders are the truth, the database is the index.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dual_lora.lab.errors import UserError

Status = Literal["planned", "running", "done", "diverged", "failed"]
FINISHED = ("done", "diverged")
FILE = "state.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, status TEXT NOT NULL, job TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, started REAL, finished REAL, outcome TEXT, error TEXT
);
"""


@dataclass(frozen=True)
class Entry:
    """One run as the state knows it: its job (what to do) and its outcome (what came of it)."""

    key: str
    status: Status
    job: dict[str, Any]
    attempts: int
    seconds: float | None
    outcome: dict[str, Any] | None
    error: str | None


def remembered(folder: Path, name: str) -> str | None:
    """A fact about the study in `folder`, read without its lock; None where there is none or it cannot be read."""
    file = folder / FILE
    if not file.is_file():
        return None
    db = sqlite3.connect(file.resolve().as_uri() + "?mode=ro", uri=True)
    try:
        row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    except sqlite3.DatabaseError:
        return None
    finally:
        db.close()
    return row[0] if row else None


class State:
    """The state file of one study folder. Use as a context manager: it holds the folder's lock.

    Raises UserError if another process leads a study in this folder. `notice` says what had to be repaired.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock, Timeout

        self.folder = folder
        self.file = folder / FILE
        self.notice = ""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "state.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process is working on the study in {folder}. Wait for it, or give another --out."
            ) from None
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as problem:
            self._set_aside(problem)
            self._db = self._open()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        self._db.close()
        self._lock.release()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            check = db.execute("PRAGMA integrity_check").fetchone()[0]
            if check != "ok":
                raise sqlite3.DatabaseError(check.splitlines()[0])
            db.executescript(_SCHEMA)
            db.execute("SELECT key, status, job, attempts, started, finished, outcome, error FROM runs LIMIT 1")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def _set_aside(self, problem: Exception) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        moved = self.file.with_name(f"state.broken-{stamp}-{os.getpid()}.sqlite")
        os.replace(self.file, moved)
        for suffix in ("-wal", "-shm"):
            part = self.file.with_name(self.file.name + suffix)
            if part.exists():
                os.replace(part, moved.with_name(moved.name + suffix))
        self.notice = (
            f"The state file {self.file} is broken ({problem}); it was kept as {moved.name}. "
            "Finished runs are taken from their folders, none is repeated."
        )

    def get(self, name: str) -> str | None:
        """A remembered fact about the study, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def put(self, name: str, value: str) -> None:
        """Remember a fact about the study."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def plan(self, jobs: Iterable[dict[str, Any]]) -> None:
        """Make the jobs known (each has a "key"); what is known already keeps its status.

        A run that was "running" when the leader died is planned again; its folder says how far it came.
        """
        self._db.execute("BEGIN IMMEDIATE")
        for job in jobs:
            self._db.execute(
                "INSERT INTO runs (key, status, job) VALUES (?, 'planned', ?) "
                "ON CONFLICT (key) DO UPDATE SET job = excluded.job, "
                "status = CASE WHEN status IN ('done', 'diverged') THEN status ELSE 'planned' END",
                (job["key"], json.dumps(job)),
            )
        self._db.execute("COMMIT")

    def start(self, key: str) -> None:
        """The run begins (or begins again)."""
        self._db.execute(
            "UPDATE runs SET status = 'running', attempts = attempts + 1, started = ? WHERE key = ?",
            (time.time(), key),
        )

    def finish(self, key: str, outcome: dict[str, Any]) -> None:
        """The run has an outcome, good or diverged."""
        self._db.execute(
            "UPDATE runs SET status = ?, outcome = ?, error = NULL, finished = ? WHERE key = ?",
            (outcome["status"], json.dumps(outcome), time.time(), key),
        )

    def fail(self, key: str, error: str) -> None:
        """The run stopped with an error; it is tried again when the study is started again."""
        self._db.execute(
            "UPDATE runs SET status = 'failed', error = ?, finished = ? WHERE key = ?", (error, time.time(), key)
        )

    def entries(self) -> dict[str, Entry]:
        """All runs known, by key."""
        rows = self._db.execute(
            "SELECT key, status, job, attempts, started, finished, outcome, error FROM runs ORDER BY rowid"
        )
        return {
            key: Entry(
                key,
                status,
                json.loads(job),
                attempts,
                finished - started if finished and started else None,
                json.loads(outcome) if outcome else None,
                error,
            )
            for key, status, job, attempts, started, finished, outcome, error in rows
        }
