"""A single node's store becomes a cluster's, and the way back until that is confirmed.

DATA_DIR/store.sqlite           the single node's; renamed to store.sqlite.migrated once its copy is verified
DATA_DIR/migrating/etcd         the new member's folder while it is filled; renamed to DATA_DIR/etcd
DATA_DIR/store.sqlite.back      the new file on the way back; renamed to store.sqlite
DATA_DIR/migration.json         written when a copy is verified, gone when all is settled and confirmed

Each step may be interrupted anywhere. Before the marker is written nothing counts and the copy is begun anew; after it
the renames are carried on, and `unsettled` says that a peer must not start before they are.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote

import msgspec
import trio

from peer.adapters.clock import SystemClock
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.stores.etcd_client import EtcdClient
from peer.adapters.stores.etcd_store import EtcdStore
from peer.adapters.stores.etcd_voting import EtcdVoting
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.adapters.stores.store_copy import CALL_S_MAX, Copied, Progress, Readable, copy, set_base
from peer.errors import ConfigError, Conflict, NotFound, StoreError, Unavailable
from peer.identity import STORE_FILE, make_folder, write_private
from peer.ports import Store
from peer.state.base import Record
from peer.state.record import prefix_end

MARKER: Final = "migration.json"
TAKEOVER: Final = "takeover.json"
FILLING: Final = "migrating"
ETCD: Final = "etcd"
KEPT: Final = "store.sqlite.migrated"
BACK: Final = "store.sqlite.back"
ABANDONED: Final = "abandoned"
MEMBER_S_MAX: Final = 60.0  # until the member answers
_POLL_S: Final = 0.1
_BESIDE: Final = ("-wal", "-shm")

MakeVoting = Callable[[Path], EtcdVoting]
"""This host's member of the store as `up` runs it, in the folder given, which ends in ETCD."""


class Marker(Record, frozen=True):
    """`unconfirmed`: the cluster's store counts. `returned`: the single node's counts again.

    `when` is in seconds since 1970.
    """

    state: Literal["unconfirmed", "returned"]
    records: int
    nbytes: int
    digest: str
    when: float


def read_marker(data_dir: Path, name: str = MARKER) -> Marker | None:
    """Raises ConfigError if it is damaged, OSError."""
    file = data_dir / name
    try:
        return msgspec.json.decode(file.read_bytes(), type=Marker)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None


def write_marker(
    data_dir: Path, state: Literal["unconfirmed", "returned"], copied: Copied, name: str
) -> Marker:
    marker = Marker(
        state=state, records=copied.records, nbytes=copied.nbytes, digest=copied.digest, when=time.time()
    )
    write_private(data_dir / name, msgspec.json.encode(marker).decode() + "\n")
    return marker


def unsettled(data_dir: Path) -> str:
    """ "" if a peer may start on this folder, else what to do first."""
    marker = read_marker(data_dir)
    belonging = ClusterFiles(data_dir).belonging()
    if read_marker(data_dir, TAKEOVER) is not None:
        return "a takeover was interrupted: run `bitinglip takeover --yes` again"
    if marker is not None and marker.state == "returned":
        return "a migration is being taken back: run `bitinglip migrate --back` again"
    single = (data_dir / STORE_FILE).exists()
    if marker is not None and (single or (data_dir / FILLING).exists()):
        return "a migration was interrupted: run `bitinglip migrate` again"
    if belonging is not None and belonging.founder and single:
        return (
            "this host has a single node's store and is the first of a cluster: `bitinglip migrate` takes its records "
            "into the cluster's store (`bitinglip migrate --back` makes it a single node again)"
        )
    return ""


# ------------------------------------------------------------------------------------------------ there


async def migrate(data_dir: Path, make_voting: MakeVoting, progress: Progress) -> Marker:
    """Take every record into a new cluster's store. The caller holds the folder's lock.

    Raises Conflict where this cannot be, NotFound without a store, TooLarge for a record that a cluster's store does
    not take (nothing is changed then), Unavailable if etcd does not answer.
    """
    files = ClusterFiles(data_dir)
    marker = read_marker(data_dir)
    if marker is None:
        _require_first(data_dir, files)
        shutil.rmtree(data_dir / FILLING, ignore_errors=True)
        async with opened_sqlite(data_dir / STORE_FILE) as source:
            base = (await source.range("", "", limit=1)).revision
            copied = await fill(data_dir, make_voting, source, base, progress)
        marker = write_marker(data_dir, "unconfirmed", copied, MARKER)
        progress("verified", marker.records)
    if marker.state == "returned":
        raise Conflict("the migration is being taken back: run `bitinglip migrate --back` again")
    settle(data_dir, files)
    return marker


def _require_first(data_dir: Path, files: ClusterFiles) -> None:
    belonging = files.belonging()
    if not (data_dir / STORE_FILE).exists():
        raise NotFound(f"there is no single node's store in {data_dir}: nothing to migrate")
    if belonging is None:
        raise Conflict("this host is in no cluster: `bitinglip init --cluster NAME` first")
    if (data_dir / ETCD).exists() or not belonging.founder:
        raise Conflict(
            f"the cluster {belonging.cluster!r} has a store already: "
            "only the first host of a new cluster can take its own records into it"
        )


async def fill(
    data_dir: Path, make_voting: MakeVoting, source: Readable, base: int, progress: Progress
) -> Copied:
    """A new member of a new cluster, which goes on after revision `base`, with every record of `source`."""
    make_folder(data_dir / FILLING)
    voting = make_voting(data_dir / FILLING / ETCD)
    voting.found()
    async with serving(voting) as address:
        await set_base(address, base)
        target = EtcdStore(address, call_s_max=CALL_S_MAX)
        try:
            return await copy(source, target, progress)
        finally:
            await target.aclose()


def settle(data_dir: Path, files: ClusterFiles) -> None:
    """After a verified copy: the new store takes its place, and the old one is put aside."""
    filled = data_dir / FILLING / ETCD
    if filled.exists():
        filled.rename(data_dir / ETCD)
        sync(data_dir)
    shutil.rmtree(data_dir / FILLING, ignore_errors=True)
    files.store_founded()
    if (data_dir / STORE_FILE).exists() and (data_dir / KEPT).exists():
        raise Conflict(f"{data_dir} has both {STORE_FILE} and {KEPT}: the first was made later; move it away")
    rename_sqlite(data_dir / STORE_FILE, data_dir / KEPT)


def confirm(data_dir: Path) -> Marker:
    """There is no way back from here on. May be called while the peer runs. Raises NotFound, Conflict."""
    marker = _require_marker(data_dir)
    problem = unsettled(data_dir)
    if problem:
        raise Conflict(problem)
    remove_sqlite(data_dir / KEPT)
    (data_dir / MARKER).unlink()
    return marker


def _require_marker(data_dir: Path) -> Marker:
    marker = read_marker(data_dir)
    if marker is None:
        raise NotFound(f"{data_dir} was not migrated, or that is confirmed: there is no way back")
    return marker


# ------------------------------------------------------------------------------------------------ and back


async def back(data_dir: Path, make_voting: MakeVoting, progress: Progress) -> Marker | None:
    """Make this host a single node again, with everything that the cluster's store holds by now.

    None: nothing had been migrated yet. Raises Conflict while the cluster has other hosts, and what `migrate` raises.
    """
    files = ClusterFiles(data_dir)
    marker = read_marker(data_dir)
    belonging = files.belonging()
    if marker is None:
        if belonging is None or not belonging.founder or (data_dir / ETCD).exists():
            _require_marker(data_dir)
        shutil.rmtree(data_dir / FILLING, ignore_errors=True)
        put_aside(files.folder, ABANDONED)
        return None
    if marker.state == "unconfirmed":
        settle(data_dir, files)
        copied = await _copy_back(data_dir, make_voting, progress)
        marker = write_marker(data_dir, "returned", copied, MARKER)
        progress("verified", marker.records)
    rename_sqlite(data_dir / BACK, data_dir / STORE_FILE)
    put_aside(data_dir / ETCD, ABANDONED)
    put_aside(files.folder, ABANDONED)
    remove_sqlite(data_dir / KEPT)  # the new file has all that it had, and more
    (data_dir / MARKER).unlink()
    return marker


async def _copy_back(data_dir: Path, make_voting: MakeVoting, progress: Progress) -> Copied:
    async with serving(make_voting(data_dir / ETCD)) as address:
        source = EtcdStore(address, call_s_max=CALL_S_MAX)
        try:
            await _require_alone(data_dir, address, source)
            revision = (await source.range("", "")).revision
            remove_sqlite(data_dir / BACK)
            async with opened_sqlite(data_dir / BACK, revision) as target:
                return await copy(source, target, progress)
        finally:
            await source.aclose()


async def _require_alone(data_dir: Path, address: str, store: EtcdStore) -> None:
    belonging = ClusterFiles(data_dir).belonging()
    me = belonging.peer_id if belonging is not None else ""
    client = EtcdClient(address)
    try:
        others = {member.name or ", ".join(member.peer_urls) for member in await client.members()} - {me}
    finally:
        client.close()
    others |= await _names(store, "host/") - await _names(store, "revoked/") - {me}
    if others:
        raise Conflict(
            f"the cluster has other hosts: {', '.join(sorted(others))}. Start this one again, stop the peers of the "
            "others and revoke each (`bitinglip host revoke PEER_ID`); then stop this one and take it back"
        )


async def _names(store: EtcdStore, prefix: str) -> set[str]:
    page = await store.range(prefix, prefix_end(prefix), keys_only=True)
    return {unquote(item.key.removeprefix(prefix)) for item in page.items}


# ------------------------------------------------------------------------------------------------ stores


@asynccontextmanager
async def opened_sqlite(path: Path, revision_min: int = 1) -> AsyncIterator[SqliteStore]:
    async with trio.open_nursery() as nursery:
        store = await SqliteStore.open(path, nursery, clock=SystemClock(), revision_min=revision_min)
        try:
            yield store
        finally:
            await store.aclose()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(voting: EtcdVoting) -> AsyncIterator[str]:
    """The member runs within the block; its address for clients. Raises Unavailable if it does not answer in time."""
    address, answers = "", trio.Event()

    def begin(store: Store) -> None:
        nonlocal address
        assert isinstance(store, EtcdStore)
        address = store.client.address
        answers.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(voting.run, begin, trio.lowlevel.checkpoint)
        with trio.move_on_after(MEMBER_S_MAX) as waiting:
            await answers.wait()
            await _until_it_reads(address)
        if waiting.cancelled_caught:
            raise Unavailable(
                f"this host's etcd does not answer within {MEMBER_S_MAX:g} s: is its port taken by another program, or "
                "are other members that it needs gone?"
            )
        yield address
        nursery.cancel_scope.cancel()


async def _until_it_reads(address: str) -> None:
    store = EtcdStore(address)
    try:
        while True:
            try:
                await store.revision_base()
                return
            except Unavailable:
                await trio.sleep(_POLL_S)
    finally:
        await store.aclose()


# ------------------------------------------------------------------------------------------------ files


def rename_sqlite(path: Path, target: Path) -> None:
    """A closed store's file, if it is there: all of it is in one file then. Raises StoreError if it is not."""
    if not path.exists():
        return
    for suffix in _BESIDE:
        beside = Path(f"{path}{suffix}")
        if beside.exists() and beside.stat().st_size:
            raise StoreError(f"{beside} is not empty: another program has the store open")
    remove_sqlite(target)
    path.rename(target)
    sync(path.parent)


def remove_sqlite(path: Path) -> None:
    for suffix in ("", *_BESIDE):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def put_aside(folder: Path, how: str) -> None:
    """Rename FOLDER, if it is there, to FOLDER.HOW-N with the first N that is free."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}.{how}-{number}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Make renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
