"""How a leadership begins: take the leader key, which gives the epoch, and load what the store holds."""

from __future__ import annotations

from collections.abc import Mapping

from peer.decide import rewind
from peer.errors import Ambiguous
from peer.ports import LEADER_KEY, Clock, Delete, Put, Store
from peer.state.base import Record
from peer.state.enrol import Host, JoinToken, Revocation
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.metric import Bucket
from peer.state.model import Assignment, Draining, LoadProfile, Model
from peer.state.plan import Leaving, Plan
from peer.state.record import bytes_of, decode, idempotency_key, prefix_end
from peer.state.snapshot import Policy, Snapshot
from peer.state.task import Idempotency, Task, TaskInput
from peer.state.worker import Worker

_PAGE = 1_000
_PAGE_OF_ENDS = 20_000  # each is a few bytes
_KINDS: Mapping[str, type[Record]] = {
    "worker/": Worker,
    "assignment/": Assignment,
    "draining/": Draining,
    "leaving/": Leaving,
    "profile/": LoadProfile,
    "key/": ApiKey,
    "plan/": Plan,
    "metric/": Bucket,
    "join/": JoinToken,
    "host/": Host,
    "revoked/": Revocation,
}


async def take_leadership(store: Store, peer_id: str) -> int:
    """Become the leader of a store that no other peer can reach; returns the epoch.

    The key is deleted first, so that its create-revision, the epoch, is new: whoever held an older one is fenced.
    """
    await store.txn([], [Delete(LEADER_KEY)])
    await store.txn([], [Put(LEADER_KEY, peer_id.encode())])
    key = (await store.get([LEADER_KEY])).get(LEADER_KEY)
    if key is None or key.value != peer_id.encode():
        raise Ambiguous("the leader key was taken by another peer")
    return key.create_revision


async def load_snapshot(
    store: Store,
    epoch: int,
    *,
    peer_id: str,
    cluster_id: str,
    policy: Policy,
    catalogue: Mapping[str, Model],
    clock: Clock,
) -> Snapshot:
    """Everything that a leader keeps in memory; finished tasks stay in the store."""
    snapshot = Snapshot(
        cluster_id=cluster_id,
        peer_id=peer_id,
        epoch=epoch,
        started_at=clock.wall(),
        policy=policy,
        catalogue=catalogue,
    )
    for prefix, kind in _KINDS.items():
        await _load_all(store, snapshot, prefix, kind)
    for status in ("queued", "running"):
        await _load_tasks(store, snapshot, f"by/status/{status}/")
    await _count_finished(store, snapshot)
    first = await store.range("event/", prefix_end("event/"), limit=1)
    if first.items:
        snapshot.events_from = decode(Event, first.items[0].value).id
        kept = await store.count("event/", prefix_end("event/"))
        snapshot.events_next = snapshot.events_from + kept  # they are numbered without gaps
    return snapshot


async def _load_all(store: Store, snapshot: Snapshot, prefix: str, kind: type[Record]) -> None:
    start, end = prefix, prefix_end(prefix)
    while True:
        page = await store.range(start, end, limit=_PAGE)
        for item in page.items:
            snapshot.load(rewind.record(decode(kind, item.value), snapshot.started_at))
        if not page.more:
            return
        start = page.items[-1].key + "\0"


async def _count_finished(store: Store, snapshot: Snapshot) -> None:
    """How many tasks are finished, and what is kept of them."""
    start, end = "ended/", prefix_end("ended/")
    while True:
        page = await store.range(start, end, limit=_PAGE_OF_ENDS)
        snapshot.finished += len(page.items)
        snapshot.finished_bytes += sum(bytes_of(item.value) for item in page.items)
        if not page.more:
            return
        start = page.items[-1].key + "\0"


async def _load_tasks(store: Store, snapshot: Snapshot, index: str) -> None:
    """Live tasks with their inputs and idempotency records."""
    page = await store.range(index, prefix_end(index), keys_only=True)
    ids = [item.key.rpartition("/")[2] for item in page.items]
    for some in (ids[at : at + _PAGE] for at in range(0, len(ids), _PAGE)):
        found = await store.get([f"{kind}/{task_id}" for task_id in some for kind in ("task", "input")])
        tasks = [decode(Task, found[f"task/{task_id}"].value) for task_id in some]
        for task in tasks:
            snapshot.load(rewind.task(task, snapshot.started_at))
            snapshot.load(decode(TaskInput, found[f"input/{task.task_id}"].value))
        keys = [idempotency_key(t.owner, t.idempotency_key) for t in tasks if t.idempotency_key]
        for item in (await store.get(keys)).values() if keys else ():
            snapshot.load(decode(Idempotency, item.value))


async def load_keys(store: Store, snapshot: Snapshot) -> None:
    """The API keys alone."""
    await _load_all(store, snapshot, "key/", ApiKey)
