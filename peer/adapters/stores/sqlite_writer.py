"""The writing half of the embedded store: the file, its schema, and the one thread that commits.

All of it runs on worker threads, except where it says otherwise. `peer.adapters.stores.sqlite_store` says what is
promised to callers.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import trio

from peer.errors import BitinglipError, Fenced, NotFound, StoreError, Unavailable
from peer.ports import LEADER_KEY, Batch, Change, Compare, Put, Write

GROUP_REQUESTS_MAX: Final = 1_024  # requests in one SQLite transaction
GROUP_BYTES_MAX: Final = 16 * 1024 * 1024  # a group that has so much takes no further request
CHECKPOINT_PAGES: Final = 1_000  # estimated pages in the WAL after which it is copied into the file
CHECKPOINT_PAGES_URGENT: Final = 16_000  # so many wait for the readers, so that the WAL can begin anew
REVISION_EMPTY: Final = 1  # as in etcd: the first write makes revision 2, and 0 always means "none"

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        # `key` has an index of its own, of keys and ids only: counts and offsets walk that one and never
        # touch the values.
        """CREATE TABLE kv (
             id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, create_revision INTEGER NOT NULL,
             mod_revision INTEGER NOT NULL, lease INTEGER NOT NULL, value BLOB NOT NULL)""",
        "CREATE INDEX kv_lease ON kv (lease) WHERE lease != 0",
        # AUTOINCREMENT: an id never comes back, so that a late keepalive cannot meet another's lease
        "CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL)",
        "CREATE TABLE state (revision INTEGER NOT NULL)",
        f"INSERT INTO state VALUES ({REVISION_EMPTY})",
    ),
)

UPSERT = """INSERT INTO kv (key, create_revision, mod_revision, lease, value) VALUES (?, ?, ?, ?, ?)
  ON CONFLICT (key) DO UPDATE SET mod_revision = excluded.mod_revision, lease = excluded.lease,
  value = excluded.value"""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------ the file


def is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _create_private(path: Path) -> None:
    """Make the file 0600 before SQLite sees it; SQLite gives the WAL the same mode.

    A file that exists is never opened here: to close it would drop the locks of this process's connections.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        for existing in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            if existing.exists() and existing.stat().st_mode & 0o077:
                existing.chmod(0o600)
        return
    os.close(descriptor)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    # Connections move between threads but are never used by two at once. Transactions are begun by hand.
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        timeout=busy_timeout_s,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA cache_size = -16384")  # KiB
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        connection.execute("ROLLBACK")
        raise StoreError(
            f"{path} was written by a newer version (schema {version}, this one knows {len(MIGRATIONS)}): "
            "upgrade this host"
        )
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    if version < len(MIGRATIONS):
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")


def open_writer(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    _create_private(path)
    connection = connect(path, "rw", busy_timeout_s)
    try:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(f"{path}: this file system does not support SQLite's WAL (journal mode {mode})")
        connection.execute("PRAGMA synchronous = FULL")
        # SQLite's own checkpoints swallow their errors; a failed fsync must not go unseen.
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


# ------------------------------------------------------------------------------------------------ writing


class Transaction:
    """The SQLite transaction of a group, which the requests pass through one after another.

    A request raises, if at all, before its first write: what is in the transaction is always whole requests.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self.revision_before: int = self._execute("SELECT revision FROM state").fetchone()[0]
        self.revision: int = self.revision_before
        self.batches: list[Batch] = []
        self.leases_changed = False

    def holds(self, compare: Compare) -> bool:
        row = self._execute(f"SELECT {compare.field} FROM kv WHERE key = ?", (compare.key,)).fetchone()
        missing = None if compare.field == "value" else 0
        return bool((missing if row is None else row[0]) == compare.value)

    def require_epoch(self, epoch: int) -> None:
        if epoch <= 0 or not self.holds(Compare(LEADER_KEY, "create_revision", epoch)):
            raise Fenced(f"epoch {epoch} no longer leads")

    def write(self, writes: Iterable[Write]) -> int:
        """Of each key at most one."""
        self._require_leases(writes)
        changes = []
        revision = self.revision + 1
        for write in writes:
            key = write.key
            if isinstance(write, Put):
                self._execute(UPSERT, (key, revision, revision, write.lease, write.value))
                changes.append(Change(key, write.value))
            elif self._execute("DELETE FROM kv WHERE key = ?", (key,)).rowcount:
                changes.append(Change(key, None))
        if changes:
            self.revision = revision
            self.batches.append(Batch(revision, tuple(changes)))
        return self.revision

    def _require_leases(self, writes: Iterable[Write]) -> None:
        for lease_id in {write.lease for write in writes if isinstance(write, Put) and write.lease}:
            if self._execute("SELECT 1 FROM lease WHERE id = ?", (lease_id,)).fetchone() is None:
                raise NotFound(f"lease {lease_id} has expired or never was")

    def grant(self, ttl_s: float) -> int:
        self.leases_changed = True
        lease_id = self._execute("INSERT INTO lease (ttl_s) VALUES (?)", (ttl_s,)).lastrowid
        assert lease_id is not None
        return lease_id

    def revoke(self, lease_id: int) -> None:
        keys = self._execute("SELECT key FROM kv WHERE lease = ? ORDER BY key", (lease_id,)).fetchall()
        revision = self.revision + 1
        if keys:
            self._execute("DELETE FROM kv WHERE lease = ?", (lease_id,))
            self.revision = revision
            self.batches.append(Batch(revision, tuple(Change(key, None) for (key,) in keys)))
        self.leases_changed = True
        self._execute("DELETE FROM lease WHERE id = ?", (lease_id,))

    def finish(self) -> None:
        if self.revision != self.revision_before:
            self._execute("UPDATE state SET revision = ?", (self.revision,))
        changed = bool(self.batches) or self.leases_changed
        self._execute("COMMIT" if changed else "ROLLBACK")  # no fsync for nothing


class Job(Generic[T]):
    """A request on its way through the writer's thread, and its outcome."""

    __slots__ = ("done", "error", "nbytes", "result", "work")

    result: T

    def __init__(self, work: Callable[[Transaction], T], nbytes: int = 0) -> None:
        self.work = work
        self.nbytes = nbytes
        self.done = trio.Event()
        self.error: BitinglipError | None = None


class Outcome:
    """What a group did, told to the event loop in one call."""

    __slots__ = ("batches", "broken", "jobs", "revision_before")

    def __init__(self, jobs: Sequence[Job[Any]], broken: str = "") -> None:
        self.jobs = jobs
        self.broken = broken
        self.batches: Sequence[Batch] = ()
        self.revision_before = 0


class Writer:
    """The one thread that writes. An own one: a hop to trio's pool and back costs 95 us, to this one 38.

    Made, and told to `put`, in the event loop, where it also calls `deliver`.
    """

    def __init__(self, connection: sqlite3.Connection, deliver: Callable[[Outcome], None]) -> None:
        self.connection = connection
        self._deliver = deliver
        self._token = trio.lowlevel.current_trio_token()
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._stopping = False
        self._broken = ""
        self._pages_estimate = 0.0
        self._thread = threading.Thread(target=self._run, name="sqlite-writer", daemon=True)
        self._thread.start()

    def put(self, job: Job[Any]) -> None:
        self._queue.put(job)

    def finish(self) -> None:
        """Wait until everything handed over is done; then the thread ends."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        # A trio run that has ended without aclose takes no outcomes: nobody waits for them.
        with contextlib.suppress(trio.RunFinishedError):
            while not self._stopping:
                group = self._next_group()
                self._token.run_sync_soon(self._deliver, self._guarded(self._commit, group))
                if self._pages_estimate >= CHECKPOINT_PAGES and not self._broken:
                    outcome = self._guarded(self._checkpoint, [])
                    self._token.run_sync_soon(self._deliver, outcome)

    def _next_group(self) -> list[Job[Any]]:
        group: list[Job[Any]] = []
        nbytes = 0
        job = self._queue.get()
        while job is not None:
            group.append(job)
            nbytes += job.nbytes
            if len(group) >= GROUP_REQUESTS_MAX or nbytes >= GROUP_BYTES_MAX:
                return group
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return group
        self._stopping = True
        return group

    def _guarded(self, step: Callable[[list[Job[Any]]], Outcome], group: list[Job[Any]]) -> Outcome:
        """The thread's supervisor: whatever happens, everyone who waits is told."""
        if self._broken:
            return Outcome(group, self._broken)
        try:
            return step(group)
        except sqlite3.Error as error:
            if not is_busy(error):
                return self._break(group, f"{getattr(error, 'sqlite_errorname', '')} {error}".strip())
            self._rollback()
            for job in group:
                job.error = Unavailable("another process holds the store's lock", retry_after_s=1.0)
            return Outcome(group)
        except Exception as error:
            return self._break(group, repr(error))

    def _break(self, group: list[Job[Any]], reason: str) -> Outcome:
        self._broken = reason
        self._rollback()
        return Outcome(group, reason)

    def _rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def _commit(self, group: list[Job[Any]]) -> Outcome:
        outcome = Outcome(group)
        if not group:
            return outcome
        self.connection.execute("BEGIN IMMEDIATE")
        transaction = Transaction(self.connection)
        for job in group:
            try:
                job.result = job.work(transaction)
            except (Fenced, NotFound) as refusal:
                job.error = refusal
        transaction.finish()
        outcome.batches = transaction.batches
        outcome.revision_before = transaction.revision_before
        changes = sum(len(batch.changes) for batch in outcome.batches)
        self._pages_estimate += 4 + changes / 4 + sum(job.nbytes for job in group) / 4096
        return outcome

    def _checkpoint(self, group: list[Job[Any]]) -> Outcome:
        _, log_pages, _ = self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if log_pages >= CHECKPOINT_PAGES_URGENT:
            self.connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        self._pages_estimate = 0.0
        return Outcome(group)
