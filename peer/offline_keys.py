"""API keys straight in the store's file, for the host's owner while no peer runs on it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from peer.adapters.clock import SystemClock
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.decide import keys
from peer.decide.decision import Decision
from peer.errors import Conflict
from peer.establish import load_keys
from peer.identity import STORE_FILE, exclusive, make_folder
from peer.ports import Delete, Put, Write
from peer.state.command import CreateKey, RevokeKey
from peer.state.key import ApiKey
from peer.state.snapshot import Policy, Snapshot, StoreWrites

_NO_POLICY = Policy(
    queue_tasks_max=0,
    queue_bytes_max=0,
    priority_step_s=0.0,
    retention_age_s=0.0,
    retention_count=0,
    events_kept=0,
    memory_reserve_bytes=0,
)


@asynccontextmanager
async def _opened(data_dir: Path) -> AsyncIterator[tuple[SqliteStore, Snapshot]]:
    """The store and a snapshot of its keys alone. Raises Conflict while a peer runs on the folder, and in a cluster."""
    make_folder(data_dir)
    with exclusive(data_dir):
        belonging = ClusterFiles(data_dir).belonging()
        if belonging is not None and not (belonging.founder and (data_dir / STORE_FILE).exists()):
            raise Conflict("the keys of a cluster are in its store: start this host's peer, or ask another with --url")
        async with trio.open_nursery() as nursery:
            store = await SqliteStore.open(data_dir / STORE_FILE, nursery, clock=SystemClock())
            try:
                snapshot = Snapshot("", "", 0, time.time(), _NO_POLICY, {})
                await load_keys(store, snapshot)
                yield store, snapshot
            finally:
                await store.aclose()
                nursery.cancel_scope.cancel()


async def _write(store: SqliteStore, snapshot: Snapshot, decision: Decision) -> None:
    writes: StoreWrites = {}
    for change in decision.changes:
        writes.update(snapshot.apply(change))
    changes: list[Write] = [Put(k, v) if v is not None else Delete(k) for k, v in writes.items()]
    if changes:
        await store.txn([], changes)


async def create_key(data_dir: Path, key: ApiKey) -> ApiKey:
    async with _opened(data_dir) as (store, snapshot):
        await _write(store, snapshot, keys.create(snapshot, CreateKey(key=key)))
    return key


async def list_keys(data_dir: Path) -> tuple[ApiKey, ...]:
    async with _opened(data_dir) as (_, snapshot):
        return tuple(snapshot.keys.values())


async def revoke_key(data_dir: Path, key_id: str) -> ApiKey:
    """By id or owner, as over the API. Raises NotFound, Conflict."""
    async with _opened(data_dir) as (store, snapshot):
        decision = keys.revoke(snapshot, time.time(), RevokeKey(key_id=key_id))
        await _write(store, snapshot, decision)
        revoked: ApiKey = decision.reply
        return revoked
