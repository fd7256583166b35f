"""The leader's care for who votes: looks at the store's members and at who is linked, decides, and acts.

Errors are logged and the same is tried again: a membership that cannot be changed now ends no leadership.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, Protocol

import structlog

from peer.decide import voters
from peer.errors import BitinglipError, Conflict, NotFound
from peer.ports import Clock, StoreMembers, Voting
from peer.state.snapshot import Snapshot
from peer.state.voter import LinkedPeer, Seat

log = structlog.get_logger("voters")

LOOK_S: Final = 1.0


class Peers(Protocol):
    """peer.followers.Followers"""

    @property
    def linked(self) -> Mapping[str, LinkedPeer]: ...

    def vote(self, peer_id: str, seat: Seat) -> None: ...

    def unvote(self, peer_id: str, reason: str) -> None: ...


class VoterKeeper:
    """`snapshot` is shown the store's members and what a loss would mean.

    The store does not fence a change of its members: `settled` is entered before each, and raises Unavailable unless
    this peer certainly leads. One that slept would else act upon what was so before.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        voting: Voting,
        peers: Peers,
        clock: Clock,
        bounds: voters.Bounds,
        settled: Callable[[], AbstractAsyncContextManager[None]],
    ) -> None:
        self._snapshot = snapshot
        self._voting = voting
        self._peers = peers
        self._clock = clock
        self._bounds = bounds
        self._settled = settled
        self._memory = voters.Memory()
        self._said: tuple[str, ...] = ()

    async def run(self) -> None:
        """While this peer leads, until cancelled."""
        while True:
            members = self._voting.members
            if members is not None:
                try:
                    await self._look(members)
                except BitinglipError as error:
                    self._say((f"the store's members cannot be read: {error.message}",))
            await self._clock.sleep(LOOK_S)

    async def _look(self, members: StoreMembers) -> None:
        snapshot, me = self._snapshot, self._snapshot.peer_id
        mine = LinkedPeer(peer_id=me, address=self._voting.address, seat=self._voting.seat)
        roll = voters.Roll(
            leader=me,
            members=await members.members(),
            peers={**self._peers.linked, me: mine},
            barred=voters.barred(snapshot.registry),
        )
        verdict = voters.look(roll, self._memory, self._bounds, self._clock.now())
        self._memory = verdict.memory
        snapshot.voters = voters.views(roll)
        snapshot.outlook = voters.outlook(snapshot.voters)
        for peer_id, seat in verdict.seats.items():
            self._peers.vote(peer_id, seat)
        for peer_id in verdict.strays:
            self._peers.unvote(peer_id, "its member is not one of the store's any more")
        reasons = verdict.reasons
        if verdict.action is not None:
            reasons += (await self._act(verdict.action, members),)
        self._say(reasons)

    async def _act(self, action: voters.Action, members: StoreMembers) -> str:
        """What was done, or why not yet."""
        try:
            async with self._settled():
                pass
            match action:
                case voters.AddLearner():
                    await members.add_learner(action.address)
                case voters.Promote():
                    await members.promote(action.member_id)
                case voters.Remove():
                    with suppress(NotFound):  # then an earlier try has done it, whose answer did not come
                        await members.remove(action.member_id)
                    if action.peer_id:
                        self._peers.unvote(action.peer_id, action.reason)
        except BitinglipError as error:
            if not isinstance(error, Conflict):
                log.info("voters_not_changed_yet", action=type(action).__name__, why=error.message)
            return f"{action.reason}: not yet"
        log.info("voters_changed", action=type(action).__name__, reason=action.reason)
        return action.reason

    def _say(self, reasons: tuple[str, ...]) -> None:
        if reasons != self._said:
            self._said = reasons
            for reason in reasons:
                log.info("voters_decided", reason=reason)
