"""The store of a simulated cluster: one `EtcdModel`, and for each life of a voter a `SimStore`, its client.

A client talks to the member on its own host, as the product does. A member answers while it runs and reaches a
leader that reaches a majority; otherwise calls hang until limits.STORE_CALL_S_MAX. Then reads raise Unavailable and
writes Ambiguous, as the request may have been on its way: it is applied later, even seconds later and after others, or
never. A request that its caller abandons (cancelled, killed) may arrive, too. A member that is down refuses: what was
not sent is Unavailable, what was is Ambiguous.

Leases are kept by the leader. Without one they do not expire, and a new one gives each its whole time again: expiry is
late, never early.

A write that waits for a store leader whose process ends is lost with it. A store without space may have applied what it
refuses: then that is Ambiguous, with code `store_full`.

Not modelled: the raft log itself (entries that are lost with a leader are requests that are never applied), members
that differ other than by lagging behind. Membership is fixed, and a member's data is never lost, where
`simulations.world.voting` is not used.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, Protocol, TypeVar

import trio

from peer import limits
from peer.adapters.stores.fenced_commits import FencedCommits
from peer.errors import Ambiguous, NotFound, Unavailable
from peer.ports import Batch, Compare, KeyValue, Lease, Page, TxnResult, Write
from simulations.errors import SimulatorError
from simulations.world.etcd import REVISION_EMPTY, require_sendable
from simulations.world.etcd_cluster import EtcdModel

__all__ = ["EtcdModel", "SimStore"]

LATENCY_S = (0.001, 0.010)  # of a call, there and back
LATE_S = 5.0  # a request may arrive so much later than its time-out

T = TypeVar("T")


class Process(Protocol):
    """As much of `simulations.world.kernel.Incarnation` as a client needs."""

    @property
    def peer_id(self) -> str: ...

    @property
    def alive(self) -> bool: ...


class _Request:
    """A write on its way: `settled` once it is applied, refused, lost, or left to the model."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.settled = False

    def apply(self) -> Any:
        self.settled = True
        return self._work()


class SimStore:
    """peer.ports.Store of one process, through the member on its host.

    `strict`: breaking the port's contract is the product's fault and ends the world; otherwise it is ValueError.
    """

    def __init__(
        self, model: EtcdModel, incarnation: Process, rng: random.Random, *, strict: bool = True
    ) -> None:
        if incarnation.peer_id not in model.members:
            raise SimulatorError(f"{incarnation.peer_id} has no member of the store")
        self.model = model
        self.member = model.members[incarnation.peer_id]
        self.peer_id = incarnation.peer_id
        self._incarnation = incarnation
        self._rng = rng
        self._strict = strict
        self._closed = False
        self._commits = FencedCommits(self)

    # ------------------------------------------------------------------------------------------ the port

    async def range(
        self, start: str, end: str, *, limit: int = 0, offset: int = 0, keys_only: bool = False
    ) -> Page:
        return await self._read(lambda: self.model.range(start, end, limit, offset, keys_only))

    async def count(self, start: str, end: str) -> int:
        return await self._read(lambda: self.model.count(start, end))

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        return await self._read(lambda: self.model.get(keys))

    async def peek(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        """Of this member alone, as it is now; it answers unless its process stands still."""
        self.require_usable()
        await self._require_up_after_a_checkpoint()
        life, give_up_at = self.member.life, trio.current_time() + limits.STORE_CALL_S_MAX
        if await _travelled(self.latency_s(), give_up_at) and not (self.member.frozen or self.member.busy):
            self.require_usable()
            self._require_up()
            if self.member.life == life:
                return self.model.get_at(keys, self.model.known_to(self.peer_id))
        await trio.sleep_until(give_up_at)
        raise Unavailable("the store has not answered in time", retry_after_s=1.0)

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        compare, then, orelse = tuple(compare), tuple(then), tuple(orelse)
        try:
            require_sendable(compare, then, orelse)
        except ValueError as error:
            self._misused(error)
        if not then and not orelse:
            return await self._read(lambda: self.model.apply_txn(compare, (), (), self.peer_id))
        return await self._write(lambda: self.model.apply_txn(compare, then, orelse, self.peer_id))

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        self.require_usable()
        if self._strict and epoch not in self.model.epochs:
            self.model.violated(f"{self.peer_id} commits under epoch {epoch}, which nobody was granted")
        try:
            return await self._commits.commit(epoch, writes)
        except ValueError as error:
            self._misused(error)

    @asynccontextmanager
    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Batch]]:
        self.require_usable()
        self._require_up()
        life = self.member.life
        await trio.sleep(self.latency_s())
        self.model.require_history(from_revision)
        yield _Watcher(self, life, prefix, from_revision)

    async def grant(self, ttl_s: float) -> Lease:
        return await self._write(lambda: self.model.apply_grant(ttl_s))

    async def keepalive(self, lease_id: int) -> Lease:
        lost = self.model.keepalive_loss > 0 and self._rng.random() < self.model.keepalive_loss
        return await self._write(
            lambda: self.model.keepalive(lease_id, trio.current_time()), "lost" if lost else ""
        )

    async def revoke(self, lease_id: int) -> None:
        await self._write(lambda: self.model.apply_revoke(lease_id, self.peer_id))

    async def aclose(self) -> None:
        self._closed = True
        self.model.published.unpark_all()
        await trio.lowlevel.checkpoint()

    # ------------------------------------------------------------------------------------------ calls

    def latency_s(self) -> float:
        return self._rng.uniform(*LATENCY_S) * self.model.slowness

    def require_usable(self) -> None:
        if not self._incarnation.alive:
            raise Unavailable("this process has ended")
        if self._closed:
            raise Unavailable("the store is closed")

    def _require_up(self) -> None:
        if not self.member.up:
            raise Unavailable("the store's member refuses connections", retry_after_s=1.0)

    async def _require_up_after_a_checkpoint(self) -> None:
        if self.member.up:  # then it sleeps next
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
        self._require_up()

    def _misused(self, error: ValueError) -> NoReturn:
        if self._strict:
            self.model.violated(f"{self.peer_id}: {error}")
        raise error

    async def _read(self, work: Callable[[], T]) -> T:
        """A linearizable read: of the moment at which the leader has confirmed that it leads."""
        self.require_usable()
        await self._require_up_after_a_checkpoint()
        life, half_s = self.member.life, self.latency_s() / 2
        give_up_at = trio.current_time() + limits.STORE_CALL_S_MAX
        if await _travelled(half_s, give_up_at) and await self._served(life, give_up_at):
            result = work()
            if await _travelled(half_s, give_up_at):
                self.require_usable()
                return result
        raise Unavailable("the store has not answered in time", retry_after_s=1.0)

    async def _served(self, life: int, give_up_at: float) -> bool:
        """Wait until the member can answer; False: not in time. Raises Unavailable."""
        if self.member.life == life and self.model.serves(self.peer_id):
            return True
        with trio.move_on_at(give_up_at):
            await self.model.serving(self.peer_id, life)
            return True
        return False

    async def _write(self, work: Callable[[], T], fate: str = "") -> T:
        self.require_usable()
        await self._require_up_after_a_checkpoint()
        request = _Request(work)
        leader = self.model.leader
        led = self.model.members[leader].life if leader else 0
        life, half_s = self.member.life, self.latency_s() / 2
        give_up_at = trio.current_time() + limits.STORE_CALL_S_MAX
        fate = fate or self._fate()
        try:
            if await _travelled(half_s, give_up_at):
                if fate:
                    self._never_answered(request, fate)
                    await trio.sleep_until(give_up_at)
                elif await self._served_or_ambiguous(life, give_up_at):
                    result: T = request.apply()
                    if await _travelled(half_s, give_up_at):
                        if self.member.life != life:
                            raise Ambiguous("the store's member has ended before it answered")
                        self.require_usable()
                        return result
        finally:
            if self.model.lost_with(leader, led):
                request.settled = True  # what one member forwards to another ends with that
            if not request.settled and self._rng.random() < 0.5:
                # Its caller gave up or was killed, but what was sent is on its way.
                self.model.later(self._rng.uniform(0.0, LATE_S), request.apply)
        raise Ambiguous("the store has not answered in time")

    async def _served_or_ambiguous(self, life: int, give_up_at: float) -> bool:
        try:
            return await self._served(life, give_up_at)
        except Unavailable as error:
            raise Ambiguous(error.message) from error

    def _fate(self) -> str:
        if self.member.fates:
            return self.member.fates.popleft()
        if self.model.time_out_chance > 0 and self._rng.random() < self.model.time_out_chance:
            return self._rng.choice(self.model.time_out_fates)
        return ""

    def _never_answered(self, request: _Request, fate: str) -> None:
        if fate == "done" and self.model.serves(self.peer_id):
            with suppress(NotFound, Unavailable):  # refused, but the caller does not learn of it
                request.apply()
        elif fate == "late":
            self.model.later(limits.STORE_CALL_S_MAX + self._rng.uniform(0.0, LATE_S), request.apply)
        request.settled = True


async def _travelled(seconds: float, give_up_at: float) -> bool:
    """A request or an answer is on its way for so long; False: that is too long."""
    at = trio.current_time() + seconds
    await trio.sleep_until(min(at, give_up_at))
    return at < give_up_at


class _Watcher(AsyncIterator[Batch]):
    def __init__(self, store: SimStore, life: int, prefix: str, from_revision: int) -> None:
        self._store = store
        self._life = life
        self._prefix = prefix
        self._next = max(REVISION_EMPTY + 1, from_revision)
        self._lag_s = store.latency_s()

    async def __anext__(self) -> Batch:
        await trio.lowlevel.checkpoint()
        while True:
            batch, at = self._find()
            if batch is None:
                await self._store.model.published.park()
            elif at + self._lag_s > trio.current_time():  # it is on its way; the position does not move yet
                await trio.sleep_until(at + self._lag_s)
            else:
                self._next = batch.revision + 1
                self._lag_s = self._store.latency_s()
                return batch

    def _find(self) -> tuple[Batch | None, float]:
        """The next batch that this member can tell of, and when it was applied."""
        store = self._store
        store.require_usable()
        if store.member.life != self._life:
            raise Unavailable("the store's member has ended")
        store.model.require_history(self._next)
        while self._next <= store.member.seen and not store.member.frozen:
            batch, at = store.model.batch(self._next)
            changes = tuple(each for each in batch.changes if each.key.startswith(self._prefix))
            if changes:
                return Batch(batch.revision, changes), at
            self._next += 1
        return None, 0.0
