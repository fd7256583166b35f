"""What an etcd cluster has agreed upon: keys, revisions, leases, history. No faults here, and nothing waits.

Time is an argument, in virtual seconds. Bounded: `HISTORY_MAX` revisions are kept for watchers, as if etcd compacted
by itself.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence

from peer.errors import Compacted, NotFound, TooLarge
from peer.ports import (
    LEADER_KEY,
    Batch,
    Change,
    Compare,
    Delete,
    KeyValue,
    Lease,
    Page,
    Put,
    TxnResult,
    Write,
)

REVISION_EMPTY = 1  # the first write makes revision 2
HISTORY_MAX = 10_000
EPOCHS_MAX = 10_000
REQUEST_BYTES_MAX = 12 * 1024 * 1024  # as the members' --max-request-bytes
LEASE_S_MIN = 2
EXPIRY_LAG_S = 0.5  # etcd looks for expired leases that often

Applied = Callable[[int, tuple[Write, ...], int | None, str], None]


class LeaseState:
    __slots__ = ("deadline", "keys", "lag_s", "ttl_s")

    def __init__(self, ttl_s: float, deadline: float, lag_s: float) -> None:
        self.ttl_s = ttl_s
        self.deadline = deadline
        self.lag_s = lag_s
        self.keys: dict[str, None] = {}


class EtcdData:
    """`on_applied` are told of every revision: (revision, writes that changed something, epoch, peer).

    The epoch is that of the comparison with the leader key which held, or None; the peer is "" for an expired lease.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.data: dict[str, KeyValue] = {}
        self.revision = REVISION_EMPTY
        self.compacted = 0  # revisions up to this one are gone
        self.epochs: dict[int, str] = {}  # every epoch that was granted, and to whom
        self.leases: dict[int, LeaseState] = {}
        self.on_applied: list[Applied] = []
        self._keys: list[str] = []
        self._history: dict[int, tuple[Batch, float]] = {}
        self._before: dict[int, dict[str, KeyValue | None]] = {}  # what each revision of the history replaced
        self._lease_ids = 0

    # ------------------------------------------------------------------------------------------ reading

    def range(self, start: str, end: str, limit: int, offset: int, keys_only: bool) -> Page:
        first, last = bisect_left(self._keys, start), bisect_left(self._keys, end)
        found = self._keys[first + offset : max(first, last)]
        taken = found[:limit] if limit else found
        items = [self.data[key] for key in taken]
        if keys_only:
            items = [KeyValue(i.key, b"", i.create_revision, i.mod_revision, i.lease) for i in items]
        return Page(tuple(items), self.revision, more=len(taken) < len(found))

    def count(self, start: str, end: str) -> int:
        return max(0, bisect_left(self._keys, end) - bisect_left(self._keys, start))

    def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        return {key: self.data[key] for key in keys if key in self.data}

    def get_at(self, keys: Sequence[str], revision: int) -> dict[str, KeyValue]:
        """As of that revision, or the oldest that is kept."""
        found: dict[str, KeyValue | None] = {key: self.data.get(key) for key in keys}
        for later in range(self.revision, max(revision, self.compacted, REVISION_EMPTY), -1):
            replaced = self._before[later]
            found |= {key: replaced[key] for key in found if key in replaced}
        return {key: item for key, item in found.items() if item is not None}

    def require_history(self, revision: int) -> None:
        if revision <= self.compacted:
            raise Compacted(f"revision {revision} is gone: the oldest kept is {self.compacted + 1}")

    def batch(self, revision: int) -> tuple[Batch, float]:
        """What that revision changed, and when."""
        return self._history[revision]

    # ------------------------------------------------------------------------------------------ writing

    def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Write],
        orelse: Sequence[Write],
        peer_id: str,
        now: float,
    ) -> TxnResult:
        """Raises NotFound for an unknown lease; then nothing is written."""
        succeeded = all(self._holds(each) for each in compare)
        epoch = None
        for each in compare:
            if succeeded and (each.key, each.field) == (LEADER_KEY, "create_revision") and each.value:
                epoch = int(each.value)
        self._write(then if succeeded else orelse, epoch, peer_id, now)
        return TxnResult(succeeded, self.revision)

    def _holds(self, compare: Compare) -> bool:
        found = self.data.get(compare.key)
        if found is None:
            return compare.field != "value" and compare.value == 0
        return bool(getattr(found, compare.field) == compare.value)

    def _write(self, writes: Iterable[Write], epoch: int | None, peer_id: str, now: float) -> None:
        changing = tuple(write for write in writes if isinstance(write, Put) or write.key in self.data)
        for write in changing:
            if isinstance(write, Put) and write.lease and write.lease not in self.leases:
                raise _no_lease(write.lease)
        if not changing:
            return
        self.revision += 1
        before = {write.key: self.data.get(write.key) for write in changing}
        for write in changing:
            old = self.data.pop(write.key, None)
            if old is not None and old.lease in self.leases:
                del self.leases[old.lease].keys[write.key]
            if isinstance(write, Put):
                self._put(write, old)
            else:
                del self._keys[bisect_left(self._keys, write.key)]
        changes = tuple(Change(w.key, w.value if isinstance(w, Put) else None) for w in changing)
        self._history[self.revision] = Batch(self.revision, changes), now
        self._before[self.revision] = before
        if len(self._history) > HISTORY_MAX:
            self.compact(self.revision - HISTORY_MAX)
        for applied in self.on_applied:
            applied(self.revision, changing, epoch, peer_id)

    def _put(self, write: Put, old: KeyValue | None) -> None:
        if old is None:
            insort(self._keys, write.key)
            if write.key == LEADER_KEY:
                self.epochs[self.revision] = write.value.decode(errors="replace")
                if len(self.epochs) > EPOCHS_MAX:
                    del self.epochs[next(iter(self.epochs))]
        created = self.revision if old is None else old.create_revision
        self.data[write.key] = KeyValue(write.key, write.value, created, self.revision, write.lease)
        if write.lease:
            self.leases[write.lease].keys[write.key] = None

    def compact(self, revision: int) -> None:
        """Forget the history up to this revision."""
        revision = min(revision, self.revision)
        for gone in range(self.compacted + 1, revision + 1):
            self._history.pop(gone, None)
            self._before.pop(gone, None)
        self.compacted = max(self.compacted, revision)

    # ------------------------------------------------------------------------------------------ leases

    def grant(self, ttl_s: float, now: float) -> Lease:
        self._lease_ids += 1
        ttl_s = float(max(LEASE_S_MIN, -int(-ttl_s // 1)))
        self.leases[self._lease_ids] = LeaseState(ttl_s, now + ttl_s, self._rng.uniform(0.0, EXPIRY_LAG_S))
        return Lease(self._lease_ids, ttl_s)

    def keepalive(self, lease_id: int, now: float) -> Lease:
        state = self.leases.get(lease_id)
        if state is None or state.deadline <= now:  # one that is about to be revoked is not kept either
            raise _no_lease(lease_id)
        state.deadline = now + state.ttl_s
        return Lease(lease_id, state.ttl_s)

    def revoke(self, lease_id: int, peer_id: str, now: float) -> None:
        state = self.leases.get(lease_id)
        if state is None:
            return
        self._write([Delete(key) for key in sorted(state.keys)], None, peer_id, now)
        del self.leases[lease_id]

    def expire(self, now: float) -> None:
        for lease_id in [each for each, s in self.leases.items() if s.deadline + s.lag_s <= now]:
            self.revoke(lease_id, "", now)

    def next_expiry(self) -> float:
        return min((s.deadline + s.lag_s for s in self.leases.values()), default=float("inf"))

    def renew_leases(self, now: float) -> None:
        """A new leader does not know how old they are."""
        for state in self.leases.values():
            state.deadline = now + state.ttl_s


def require_sendable(compare: Sequence[Compare], *branches: Sequence[Write]) -> None:
    """Raises ValueError for a request that no store takes, TooLarge for one that etcd refuses."""
    for writes in branches:
        if len({write.key for write in writes}) != len(writes):
            raise ValueError("a transaction writes a key at most once")
        if not all(write.key for write in writes):
            raise ValueError("a key must not be empty")
        nbytes = sum(len(w.key) + (len(w.value) if isinstance(w, Put) else 0) for w in writes)
        if nbytes > REQUEST_BYTES_MAX:
            raise TooLarge(f"a request of {nbytes} bytes: at most {REQUEST_BYTES_MAX} are taken")
    for each in compare:
        if each.field not in ("create_revision", "mod_revision", "value"):
            raise ValueError(f"no field {each.field}")


def _no_lease(lease_id: int) -> NotFound:
    return NotFound(f"lease {lease_id} has expired or never was")
