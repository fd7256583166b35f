"""The leader's side of the link: a session with each following peer. Orders and shared state go out over it, reports,
forwarded requests and subscriptions come in. A session that ends is evidence that its peer is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import structlog
import trio
from msgspec.structs import replace

from peer import limits
from peer.errors import BitinglipError, Overloaded, TooLarge, Unauthorized, Unavailable
from peer.journal import Journal
from peer.leader import Leader
from peer.link import wire
from peer.link.session import Session
from peer.ports import Link
from peer.state.command import Request
from peer.state.enrol import GetAuthority, Renew
from peer.state.order import Order
from peer.state.voter import LinkedPeer, Seat

log = structlog.get_logger("followers")


class Followers:
    """Implements peer.ports.Link. `local` is this peer's own; `evidence(peer_id, up)` hears of sessions."""

    def __init__(self, peer_id: str, epoch: int, local: Link, evidence: Callable[[str, bool], None]) -> None:
        self._peer_id = peer_id
        self._epoch = epoch
        self._local = local
        self._evidence = evidence
        self._sessions: dict[str, Session] = {}
        self._served: dict[str, _Served] = {}  # by the same peers
        self.linked: dict[str, LinkedPeer] = {}
        """The peers with a session, with the members of the store that they run."""

    # ---------------------------------------------------------------- what the leader uses

    async def send(self, peer_id: str, order: Order) -> None:
        """ports.Link: never waits, so orders keep the order in which they were committed."""
        if peer_id == self._peer_id:
            await self._local.send(peer_id, order)
            return
        session = self._sessions.get(peer_id)
        if session is None:
            raise Unavailable(f"there is no session with peer {peer_id}", code="no_session")
        session.post(wire.Ordered(order=order))

    def share(self, shared: wire.Shared) -> None:
        """Every follower gets the keys, the catalogue and who is revoked, as they are now."""
        for session in list(self._sessions.values()):
            _post(session, shared)

    def vote(self, peer_id: str, seat: Seat) -> None:
        """The peer is to run this member of the store, if there is a session."""
        self._seat(peer_id, seat.member_id, wire.Vote(seat=seat))

    def unvote(self, peer_id: str, reason: str) -> None:
        """The peer's member of the store is none any more."""
        self._seat(peer_id, 0, wire.Unvote(reason=reason))

    def _note_store(self, session: Session, state: wire.StoreState) -> None:
        if self._sessions.get(session.peer_id) is session:
            log.info("voter_state", peer_id=session.peer_id, problem=state.problem, keyed=state.keyed)
            known = self.linked[session.peer_id]
            self.linked[session.peer_id] = replace(known, problem=state.problem, keyed=state.keyed)

    def _seat(self, peer_id: str, member_id: int, frame: wire.Frame) -> None:
        session = self._sessions.get(peer_id)
        if session is not None:
            _post(session, frame)
            self.linked[peer_id] = replace(self.linked[peer_id], seat=member_id)

    async def farewell(self, reason: str) -> None:
        """This peer leads no more: what it was asked is answered, and followers look for another leader at once."""
        with trio.move_on_after(limits.FAREWELL_S_MAX, shield=True):
            for served in list(self._served.values()):
                await served.answered()
        for peer_id, session in list(self._sessions.items()):
            _post(session, wire.Bye(reason=reason, settled=not self._served[peer_id].calls))

    @property
    def peer_ids(self) -> tuple[str, ...]:
        return tuple(self._sessions)

    # ---------------------------------------------------------------- sessions

    async def serve(
        self, session: Session, hello: wire.Hello, version: int, leader: Leader, journal: Journal
    ) -> None:
        """One follower's session, to its end. A newer session of the same peer ends an older one."""
        before = self._sessions.get(session.peer_id)
        if before is not None:
            before.end("a newer session took its place")
        async with session.serve() as frames, _serving(session, leader, journal) as served:
            _post(session, wire.Welcome(peer_id=self._peer_id, epoch=self._epoch, wire=version))
            _post(session, shared_of(leader))
            self._sessions[session.peer_id], self._served[session.peer_id] = session, served
            self.linked[session.peer_id] = LinkedPeer(
                peer_id=session.peer_id, address=hello.store, seat=hello.seat, keyed=False
            )
            self._evidence(session.peer_id, True)
            log.info("follower_joined", peer_id=session.peer_id, wire=version)
            try:
                async for frame in frames:
                    if isinstance(frame, wire.StoreState):
                        self._note_store(session, frame)
                    else:
                        await served.frame(frame)
            except Unavailable as error:
                session.end(error.message)
            finally:
                if self._sessions.get(session.peer_id) is session:
                    del self._sessions[session.peer_id], self.linked[session.peer_id]
                    del self._served[session.peer_id]
                    self._evidence(session.peer_id, False)
                log.info("follower_gone", peer_id=session.peer_id)


def shared_of(leader: Leader) -> wire.Shared:
    return wire.Shared(
        keys=leader.keys(), catalogue=tuple(leader.models().values()), revoked=leader.revoked()
    )


def _check_own(request: Request, proven: str) -> None:
    """Raises Unauthorized for what a peer may ask for itself only, and asks for another."""
    if isinstance(request, Renew | GetAuthority) and request.peer_id != proven:
        raise Unauthorized(f"{proven} asks in the name of {request.peer_id}", code="not_this_peer")


def _post(session: Session, frame: wire.Frame) -> None:
    try:
        session.post(frame)
    except Unavailable as error:
        log.info("frame_not_sent", peer_id=session.peer_id, why=error.message)


@asynccontextmanager
async def _serving(session: Session, leader: Leader, journal: Journal) -> AsyncIterator[_Served]:
    async with trio.open_nursery() as nursery:
        yield _Served(session, leader, journal, nursery)
        nursery.cancel_scope.cancel()


class _Served:
    """What one follower asks for: each call and subscription is a task of its own."""

    def __init__(self, session: Session, leader: Leader, journal: Journal, nursery: trio.Nursery) -> None:
        self._session = session
        self._leader = leader
        self._journal = journal
        self._nursery = nursery
        self.calls: dict[int, trio.CancelScope] = {}  # not yet answered
        self._none_left = trio.Event()

    async def answered(self) -> None:
        """Until nothing is left that is not answered."""
        while self.calls:
            self._none_left = trio.Event()
            await self._none_left.wait()

    async def frame(self, frame: wire.Frame) -> None:
        match frame:
            case wire.Reported():
                await self._leader.report(frame.report)
            case wire.Call():
                self._begin(frame.call_id, partial(self._call, frame))
            case wire.Subscribe():
                self._begin(frame.call_id, partial(self._subscribe, frame))
            case wire.GiveUp():
                scope = self.calls.get(frame.call_id)
                if scope is not None:
                    scope.cancel()
            case wire.Superseded():
                log.warning("superseded", peer_id=self._session.peer_id, epoch=frame.epoch)
            case wire.Bye():
                self._session.end(frame.reason)
            case _:
                pass  # of a newer version, or nothing for a leader

    def _begin(self, call_id: int, serve: Callable[[], Awaitable[wire.Answer]]) -> None:
        if len(self.calls) >= limits.ASKED_MAX:
            refusal = Overloaded("this peer has too many requests open", retry_after_s=1.0)
            _post(self._session, wire.Answer(call_id=call_id, failure=wire.failure_of(refusal)))
            return
        self.calls[call_id] = trio.CancelScope()
        self._nursery.start_soon(self._run, call_id, serve)

    async def _run(self, call_id: int, serve: Callable[[], Awaitable[wire.Answer]]) -> None:
        try:
            with self.calls[call_id]:
                try:
                    answer = await serve()
                except BitinglipError as error:
                    answer = wire.Answer(call_id=call_id, failure=wire.failure_of(error))
                try:
                    await self._session.put(answer)
                except Unavailable as error:
                    if error.code != "too_large":
                        raise
                    refusal = TooLarge("the answer is too large for one frame: ask for less at once")
                    await self._session.put(wire.Answer(call_id=call_id, failure=wire.failure_of(refusal)))
        except Unavailable as error:
            self._session.end(error.message)
        finally:
            del self.calls[call_id]
            if not self.calls:
                self._none_left.set()

    async def _call(self, call: wire.Call) -> wire.Answer:
        _check_own(call.request, self._session.peer_id)
        value = await self._leader.call(call.request)
        return wire.Answer(call_id=call.call_id, value=wire.encode(value))

    async def _subscribe(self, ask: wire.Subscribe) -> wire.Answer:
        since = self._journal.last if ask.since is None else ask.since
        with self._leader.quota.socket(ask.client):
            async with self._journal.subscribe(since) as events:
                await self._session.put(wire.Subscribed(call_id=ask.call_id, since=since))
                async for event in events:
                    await self._session.put(wire.Events(call_id=ask.call_id, events=(event,)))
        raise Unavailable("the journal has ended", code="not_leading")
