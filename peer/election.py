"""A voter's part in electing the leader: looks at the leader key, takes it, beats, and lets go.

What to do is decided in `peer.decide.elect`; this asks the store, and calls `lead` while this peer holds the key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from peer import limits
from peer.decide import elect
from peer.errors import BitinglipError, NotFound, StoreBroken, StoreError, Unavailable
from peer.ports import BEAT_KEY, LEADER_KEY, Clock, Compare, Delete, Entropy, Put, Store

log = structlog.get_logger("election")

_JITTER_S: Final = 0.2  # voters that see the key go do not all write at once
_RETRY_S: Final = 0.3  # after a call that the store did not answer
_KEEPALIVE_S: Final = limits.LEASE_TTL_S / 4


class Leadership:
    """One epoch of this peer: vouches for its memory as long as its beats and keepalives are acknowledged."""

    def __init__(self, epoch: int, clock: Clock, begun: float) -> None:
        self.epoch = epoch
        self._clock = clock
        self._begun = begun  # of the last acknowledged beat; of the campaign, before the first one
        self._kept = begun  # of the last acknowledged keepalive
        self._renewed = trio.Event()
        self.lost = ""

    def fresh(self) -> bool:
        """Whether no other peer can have led until now."""
        return not self.lost and elect.vouched(self._begun, self._kept, self._clock.now())

    async def renewed(self) -> None:
        """Until the next acknowledged beat or keepalive, or the end of this leadership."""
        await self._renewed.wait()

    def overdue(self) -> bool:
        return elect.must_step_down(self._begun, self._clock.now())

    def beaten(self, begun: float) -> None:
        """A beat that was begun then is acknowledged."""
        self._begun = begun
        self._wake()

    def kept(self, begun: float) -> None:
        """The lease was kept alive by a call that was begun then."""
        self._kept = begun
        self._wake()

    def end(self, why: str) -> None:
        if not self.lost:
            self.lost = why
        self._wake()

    def _wake(self) -> None:
        self._renewed.set()
        self._renewed = trio.Event()


Lead = Callable[[Leadership], Awaitable[None]]


class Election:
    """`lead` serves until it is cancelled, which happens when the leadership is lost; its errors end the epoch.

    `address` is that of this peer's link. `seen(peer_id, address)` hears who holds the leader key, whenever that was
    read: so a voter finds the leader also when gossip knows nothing.
    """

    def __init__(
        self,
        peer_id: str,
        address: str,
        store: Store,
        clock: Clock,
        entropy: Entropy,
        *,
        lead: Lead,
        seen: Callable[[str, str], None],
    ) -> None:
        self._peer_id = peer_id
        self._address = address
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._lead = lead
        self._seen = seen
        self._evidence: dict[str, str] = {}  # by peer: why it is believed gone
        self._wake = trio.Event()
        self._resigning = False
        self._aside_until = 0.0
        self._scope: trio.CancelScope | None = None
        self.leadership: Leadership | None = None

    # ---------------------------------------------------------------- evidence

    def suspect(self, peer_id: str, why: str) -> None:
        """This peer seems gone; if it leads, that hurries an election up."""
        if peer_id not in self._evidence:
            self._evidence[peer_id] = why
            self._wake.set()

    def trust(self, peer_id: str) -> None:
        """It was heard of: what spoke against it is void."""
        self._evidence.pop(peer_id, None)

    def resign(self) -> None:
        """Let go of the key, and take it no more: this peer is about to stop. `run` returns."""
        self._resigning = True
        self._wake.set()
        if self._scope is not None:
            self._scope.cancel()

    def step_aside(self) -> None:
        """Let go of the key, if this peer has it, and leave it to others for limits.ASIDE_S."""
        self._aside_until = self._clock.now() + limits.ASIDE_S
        if self._scope is not None:
            self._scope.cancel()

    # ---------------------------------------------------------------- a voter

    async def run(self) -> None:
        """Until `resign`. Raises StoreBroken when this voter's store is."""
        guard: elect.Guard | None = None
        while not self._resigning:
            self._wake = trio.Event()
            try:
                seen = await self._look()
                self._seen(seen.holder, seen.address)
                evidence = self._evidence.get(seen.holder, "")
                if seen.holder not in ("", self._peer_id):
                    self._aside_until = 0.0  # another has led since: if that one goes, this peer may again
                guard, action = elect.candidate(
                    self._peer_id, seen, guard, evidence, self._clock.now(), self._aside_until
                )
                await self._act(action)
            except StoreBroken:
                raise
            except BitinglipError as error:  # whatever the store answers, it is asked again
                log.debug("store_not_answering", why=error.message)
                await self._pause(_RETRY_S)

    async def _look(self) -> elect.Seen:
        """It may show what is old: the store may have no quorum just then. Writes compare."""
        found = await self._store.peek([LEADER_KEY, BEAT_KEY])
        key, beat = found.get(LEADER_KEY), found.get(BEAT_KEY)
        holder, address = elect.holder_of(key.value) if key is not None else ("", "")
        return elect.Seen(
            epoch=key.create_revision if key is not None else 0,
            holder=holder,
            address=address,
            beat_revision=beat.mod_revision if beat is not None else 0,
            ended=self._clock.now(),
        )

    async def _act(self, action: elect.Action) -> None:
        match action:
            case elect.Wait():
                await self._pause(action.seconds)
            case elect.Campaign():
                await self._clock.sleep(self._entropy.uniform(0.0, _JITTER_S))
                await self._campaign()
            case elect.Depose():
                log.info("deposing", epoch=action.epoch, reason=action.reason)
                holds = [Compare(LEADER_KEY, "create_revision", action.epoch)]
                if action.beat_revision is not None:
                    holds.append(Compare(BEAT_KEY, "mod_revision", action.beat_revision))
                await self._store.txn(holds, [Delete(LEADER_KEY)])

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._wake.wait()

    async def _campaign(self) -> None:
        """One try. What was ambiguous is cleared up by reading the key: its value is this try's alone."""
        begun = self._clock.now()
        lease = await self._store.grant(limits.LEASE_TTL_S)
        name = elect.key_value(self._peer_id, self._address, self._entropy.token(8))
        try:
            try:
                await self._store.txn(
                    [Compare(LEADER_KEY, "create_revision", 0)],
                    [Put(LEADER_KEY, name, lease.lease_id)],
                )
            except (StoreError, NotFound) as error:  # NotFound: this peer slept until its lease was over
                log.info("campaign_unclear", why=error.message)
            key = (await self._store.get([LEADER_KEY])).get(LEADER_KEY)
            if key is not None and key.value == name and not self._resigning:
                await self._hold(Leadership(key.create_revision, self._clock, begun), lease.lease_id)
        finally:
            await self._let_go(lease.lease_id)

    async def _let_go(self, lease_id: int) -> None:
        """Give the key back at once if the store can be reached; else the lease ends by itself."""
        with trio.move_on_after(limits.STORE_CALL_S_MAX, shield=True):
            try:
                await self._store.revoke(lease_id)
            except (StoreError, Unavailable) as error:
                log.info("lease_not_revoked", why=error.message)

    # ---------------------------------------------------------------- a leader

    async def _hold(self, leadership: Leadership, lease_id: int) -> None:
        """Beat, keep the lease, and lead, until one of the three ends."""
        self.leadership = leadership
        log.info("elected", peer_id=self._peer_id, epoch=leadership.epoch)
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._beat, leadership)
                nursery.start_soon(self._keep, leadership, lease_id)
                nursery.start_soon(self._watch_over, leadership)
                try:
                    await self._lead(leadership)
                    leadership.end("this peer has stopped leading")
                except StoreBroken:
                    raise
                except BitinglipError as error:
                    leadership.end(error.message)
                nursery.cancel_scope.cancel()
        finally:
            leadership.end("another peer may lead")
            self.leadership, self._scope = None, None
            log.info("leadership_over", epoch=leadership.epoch, why=leadership.lost)

    async def _beat(self, leadership: Leadership) -> None:
        holds = [Compare(LEADER_KEY, "create_revision", leadership.epoch)]
        count = 0
        while True:
            begun, count = self._clock.now(), count + 1
            try:
                done = await self._store.txn(holds, [Put(BEAT_KEY, f"{leadership.epoch}/{count}".encode())])
            except (StoreError, Unavailable) as error:
                log.debug("beat_unanswered", why=error.message)
            else:
                if not done.succeeded:
                    self._lose(leadership, "another peer leads")
                    return
                leadership.beaten(begun)
            await self._clock.sleep(max(0.0, begun + limits.BEAT_S - self._clock.now()))

    async def _keep(self, leadership: Leadership, lease_id: int) -> None:
        while True:
            await self._clock.sleep(_KEEPALIVE_S)
            begun = self._clock.now()
            try:
                await self._store.keepalive(lease_id)
            except NotFound:
                return  # the key has gone with it: the next beat says so
            except (StoreError, Unavailable) as error:
                log.debug("lease_not_kept", why=error.message)
            else:
                leadership.kept(begun)

    async def _watch_over(self, leadership: Leadership) -> None:
        while not leadership.overdue():
            await self._clock.sleep(limits.BEAT_S / 2)
        self._lose(leadership, f"no acknowledged beat for {limits.STEP_DOWN_S:g} s")

    def _lose(self, leadership: Leadership, why: str) -> None:
        leadership.end(why)
        if self._scope is not None:
            self._scope.cancel()


class Candidacy:
    """An election as a task."""

    def __init__(self, election: Election) -> None:
        self.election = election
        self.scope = trio.CancelScope()
        self.over = trio.Event()
