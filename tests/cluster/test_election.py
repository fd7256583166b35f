"""A voter's election over a store that answers what stores answer seldom."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from peer import limits
from peer.adapters.clock import SystemEntropy
from peer.election import Election, Leadership
from peer.errors import BitinglipError, NotFound, TooLarge
from peer.ports import LEADER_KEY, Compare, Delete, Lease, Put, TxnResult, Write
from tests.leader.memory_store import MemoryStore


class TrioClock:
    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return 1_700_000_000.0 + trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class LeasingStore(MemoryStore):
    """`refusals` are raised by the next transactions that put the leader key, in order."""

    def __init__(self, refusals: list[BitinglipError]) -> None:
        super().__init__()
        self.refusals = refusals
        self._leases = 0

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        if self.refusals and any(isinstance(each, Put) and each.key == LEADER_KEY for each in then):
            await trio.lowlevel.checkpoint()
            raise self.refusals.pop(0)
        return await super().txn(compare, then, orelse)

    async def grant(self, ttl_s: float) -> Lease:
        await trio.lowlevel.checkpoint()
        self._leases += 1
        return Lease(self._leases, ttl_s)

    async def keepalive(self, lease_id: int) -> Lease:
        await trio.lowlevel.checkpoint()
        return Lease(lease_id, limits.LEASE_TTL_S)

    async def revoke(self, lease_id: int) -> None:
        await self.txn([], [Delete(LEADER_KEY)])


@pytest.mark.parametrize(
    "refusal", [NotFound("requested lease not found"), TooLarge("an answer that nobody foresaw")]
)
def test_an_answer_that_is_no_outage_ends_no_peer(refusal: BitinglipError) -> None:
    """A process that was stopped between the grant of its lease and its campaign finds that the lease is over."""
    store = LeasingStore([refusal])
    led: list[int] = []

    async def main() -> None:
        async def lead(leadership: Leadership) -> None:
            led.append(leadership.epoch)
            election.resign()
            await trio.sleep_forever()

        election = Election(
            "p1",
            "p1:1",
            store,  # type: ignore[arg-type]  # it watches nothing
            TrioClock(),
            SystemEntropy(),
            lead=lead,
            seen=lambda peer_id, address: None,
        )
        with trio.fail_after(60.0):
            await election.run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(led) == 1
    assert not store.refusals
