"""The members of a simulated etcd cluster: who leads, who reaches whom, and what goes wrong."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import trio

from peer.errors import Ambiguous, BitinglipError, Unavailable
from peer.ports import Compare, Lease, Put, TxnResult, Write
from simulations.errors import InvariantViolated, SimulatorError
from simulations.world.etcd import EtcdData

ELECTION_S = (0.5, 3.0)  # without answers while the leader moves
LEADER_LOST_S = 1.0  # a leader without a majority for so long steps down
GIVEN_UP_S = 8.0  # a late request is dropped if the store cannot take it for so long
TICK_S = 0.25  # how often it is looked whether members still reach each other
FATES = ("done", "lost", "late")  # of a write that times out


class Member:
    """A host's own etcd."""

    def __init__(self) -> None:
        self.up = True
        self.frozen = False
        self.busy = False  # it is defragmented
        self.life = 0  # clients' connections end with it
        self.seen = 0  # the newest revision that it has
        self.fates: deque[str] = deque()  # of the next writes


class EtcdModel(EtcdData):
    """Faults are switched by plain calls. `run` must run in the world's own nursery.

    `members` are the hosts that may have one, `voters` those that begin, all if it is None. `reachable(a, b)`: do
    messages get from host a to host b now? `violated` ends the world, as `World.violated` does.
    """

    def __init__(
        self,
        members: Sequence[str],
        rng: random.Random,
        *,
        reachable: Callable[[str, str], bool] = lambda a, b: True,
        violated: Callable[[str, str], NoReturn] | None = None,
        voters: Sequence[str] | None = None,
    ) -> None:
        super().__init__(rng)
        if not members:
            raise SimulatorError("a store without members")
        self.members = {name: Member() for name in members}
        self.voting = dict.fromkeys(members if voters is None else voters)
        self.slowness = 1.0
        self.time_out_chance = 0.0  # of a write
        self.time_out_fates: Sequence[str] = FATES
        self.keepalive_loss = 0.0
        self.full = False
        self.done_though_full = 0.0  # the chance
        self.alarmed = False  # `simulations.world.room` says when
        self.on_put: Callable[[], None] = lambda: None  # likewise: members look at their quota
        self.changed = trio.lowlevel.ParkingLot()
        self.published = trio.lowlevel.ParkingLot()
        self._reachable = reachable
        self._violated = violated or _violated
        self._leader = next(iter(self.voting))
        self._cut_since: float | None = None  # the leader has no majority
        self._deposed = ""
        self._candidate = ""
        self._elected_at = 0.0
        self._no_quorum = False
        self._requests: list[tuple[float, int, float, Callable[[], object]]] = []
        self._sent = 0
        self._nap = trio.CancelScope()

    @property
    def leader(self) -> str:
        """The member that leads, "" for none."""
        return self._leader

    # ------------------------------------------------------------------------------------------ faults

    def member_down(self, name: str) -> None:
        """Its process has ended: with its host, or alone. What it had synced is there when it is up again."""
        member = self.members[name]
        if member.up:
            member.up = False
            member.life += 1
            if self._leader == name:
                self._depose()
        self._look_again()
        self.published.unpark_all()  # watchers learn that their connection has ended

    def member_up(self, name: str) -> None:
        self.members[name].up = True
        self._look_again()

    def fsync_error(self, name: str) -> None:
        """etcd panics, and does not come back before somebody mends the disk: `member_up` or `mend`."""
        self.member_down(name)

    def member_frozen(self, name: str, frozen: bool) -> None:
        """With its host, or stopped alone: nothing is refused, nothing is answered."""
        self.members[name].frozen = frozen
        self._look_again()

    def quorum_lost(self, lost: bool) -> None:
        """No member reaches any majority, whatever the hosts' own links do."""
        self._no_quorum = lost
        self._look_again()

    def move_leader(self) -> None:
        """To another member if there is one: no answers for 0.5-3 s, and every lease begins anew."""
        self._depose()

    def slow(self, factor: float) -> None:
        """Every call takes so many times as long; beyond some hundred times they time out."""
        self.slowness = factor

    def time_outs(self, chance: float, fates: Sequence[str] = FATES) -> None:
        """Each write times out by this chance. done: it was applied; lost: it never is; late: it is, seconds later."""
        self.time_out_chance = chance
        self.time_out_fates = fates

    def next_writes(self, name: str, *fates: str) -> None:
        """What becomes of the next writes through this member; "" goes well."""
        self.members[name].fates.extend(fates)

    def lose_keepalives(self, chance: float) -> None:
        """Each keepalive times out, and nothing was kept alive."""
        self.keepalive_loss = chance

    def no_space(self, full: bool, done: float = 0.0) -> None:
        """The quota is used up: what puts or grants is refused; deletions, keepalives and reads go on.

        `done`: the chance of a transaction to be applied before it is refused, as by a member that crosses its quota;
        whoever is refused by such a store cannot know.
        """
        self.full, self.done_though_full = full, done

    def compact_all(self) -> None:
        """All history up to now is gone: watchers that are behind get Compacted."""
        self.compact(self.revision)
        self.published.unpark_all()

    def mend(self) -> None:
        """End all faults. What is on its way may still arrive for some seconds."""
        for name, member in self.members.items():
            member.fates.clear()
            self.member_frozen(name, False)
            self.member_up(name)
        self.slow(1.0)
        self.time_outs(0.0)
        self.lose_keepalives(0.0)
        self.no_space(False)
        self.quorum_lost(False)

    def member_busy(self, name: str, busy: bool) -> None:
        """It is defragmented: it answers nothing."""
        self.members[name].busy = busy
        self._look_again()

    # ------------------------------------------------------------------------------------------ who votes

    def set_voters(self, names: Sequence[str]) -> None:
        """The membership has changed: `SimRoster` says when it may."""
        self.voting = dict.fromkeys(names)
        if self._leader not in self.voting:
            self._depose()
        self._look_again()

    def reaches(self, name: str, other: str) -> bool:
        """Whether both members run and hear each other."""
        return self._runs(name) and self._runs(other) and self._linked(name, other)

    # ------------------------------------------------------------------------------------------ who serves

    def serves(self, name: str) -> bool:
        """Does this member answer now? A learner does not."""
        self._settle()
        leader = self._leader
        if name not in self.voting or not leader or self._cut_since is not None:
            return False
        return self._runs(name) and self._linked(name, leader)

    def known_to(self, name: str) -> int:
        """The newest revision that this member has."""
        self._settle()
        return self.members[name].seen

    async def serving(self, name: str, life: int) -> None:
        """Wait for it. Raises Unavailable if that member's process ends before."""
        while not self.serves(name):
            if self.members[name].life != life:
                raise Unavailable("the store's member has ended")
            await self.changed.park()
        if self.members[name].life != life:
            raise Unavailable("the store's member has ended")

    def _runs(self, name: str) -> bool:
        member = self.members[name]
        return member.up and not member.frozen and not member.busy

    def _linked(self, a: str, b: str) -> bool:
        return a == b or (self._reachable(a, b) and self._reachable(b, a))

    def lost_with(self, name: str, life: int) -> bool:
        """Whether that member led, in that life of its process, and has ended: what others had sent to it is lost."""
        return bool(name) and self.members[name].life != life

    def _has_majority(self, name: str) -> bool:
        if self._no_quorum or name not in self.voting or not self._runs(name):
            return False
        with_it = sum(self._runs(other) and self._linked(name, other) for other in self.voting)
        return 2 * with_it > len(self.voting)

    def _depose(self) -> None:
        self._deposed = self._leader or self._deposed
        self._leader, self._candidate, self._cut_since = "", "", None
        self._look_again()

    def _settle(self) -> None:
        """Bring who leads up to date with who reaches whom."""
        now = trio.current_time()
        if self._leader:
            if self._has_majority(self._leader):
                self._cut_since = None
            elif self._cut_since is None:
                self._cut_since = now
            elif now - self._cut_since >= LEADER_LOST_S:
                self._leader, self._cut_since = "", None
        if not self._leader:
            self._elect(now)
        if self._leader and self._cut_since is None:
            for name, member in self.members.items():
                if self._runs(name) and self._linked(name, self._leader):
                    member.seen = self.revision

    def _elect(self, now: float) -> None:
        if not (self._candidate and self._has_majority(self._candidate)):
            able = [name for name in self.voting if self._has_majority(name)]
            others = [name for name in able if name != self._deposed] or able
            self._candidate = self._rng.choice(others) if others else ""
            self._elected_at = now + self._rng.uniform(*ELECTION_S)
        elif now >= self._elected_at:
            self._leader, self._candidate = self._candidate, ""
            self.renew_leases(now)

    # ------------------------------------------------------------------------------------------ what comes by itself

    async def run(self) -> None:
        """Leases that expire, requests that arrive late, elections. Ends when cancelled."""
        while True:
            self._settle()
            now = trio.current_time()
            deadline = now + TICK_S
            if self._leader and self._cut_since is None:
                before = self.revision
                self.expire(now)
                self._publish(before)
                deadline = min(deadline, self.next_expiry())
            while self._requests and self._requests[0][0] <= now:
                self._arrive(*heapq.heappop(self._requests)[2:], now)
            self.changed.unpark_all()
            self.published.unpark_all()
            if self._requests:
                deadline = min(deadline, self._requests[0][0])
            if self._candidate:
                deadline = min(deadline, self._elected_at)
            with trio.CancelScope(deadline=deadline) as self._nap:
                await trio.sleep_forever()

    def _look_again(self) -> None:
        self._nap.cancel()

    def later(self, delay_s: float, request: Callable[[], object]) -> None:
        """Apply it after so long, or when the store takes requests again, or never."""
        at = trio.current_time() + delay_s
        self._push(at, at + GIVEN_UP_S, request)
        self._look_again()

    def _push(self, at: float, given_up_at: float, request: Callable[[], object]) -> None:
        self._sent += 1
        heapq.heappush(self._requests, (at, self._sent, given_up_at, request))

    def _arrive(self, given_up_at: float, request: Callable[[], object], now: float) -> None:
        if self._leader and self._cut_since is None:
            with suppress(BitinglipError):  # it was refused, and nobody waits for the answer
                request()
        elif now < given_up_at:
            self._push(now + TICK_S, given_up_at, request)

    def apply_txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write], peer_id: str
    ) -> TxnResult:
        puts = any(isinstance(write, Put) for write in (*then, *orelse))
        if puts:
            self.on_put()
        refused = puts and (self.full or self.alarmed)
        if refused and not (self.done_though_full and self._rng.random() < self.done_though_full):
            raise self._no_space()
        before = self.revision
        done = self.txn(compare, then, orelse, peer_id, trio.current_time())
        self._publish(before)
        if refused:
            raise self._no_space()
        return done

    def apply_grant(self, ttl_s: float) -> Lease:
        if self.full or self.alarmed:
            raise self._no_space()
        lease = self.grant(ttl_s, trio.current_time())
        self._look_again()
        return lease

    def apply_revoke(self, lease_id: int, peer_id: str) -> None:
        before = self.revision
        self.revoke(lease_id, peer_id, trio.current_time())
        self._publish(before)

    def _publish(self, revision_before: int) -> None:
        if self.revision != revision_before:
            self._settle()
            self.published.unpark_all()

    def _no_space(self) -> BitinglipError:
        text = "etcd: database space exceeded"
        if self.done_though_full:
            return Ambiguous(text, code="store_full", retry_after_s=5.0)
        return Unavailable(text, code="store_full", retry_after_s=5.0)

    def violated(self, message: str, check: str = "port_contract") -> NoReturn:
        self._violated(check, message)


def _violated(check: str, message: str) -> NoReturn:
    raise InvariantViolated(check, message, trio.current_time())
