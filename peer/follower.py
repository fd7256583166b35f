"""A following peer's side of the link: finds who leads, keeps a session with it, obeys its orders, hands it reports,
and forwards what clients ask for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Protocol

import structlog
import trio

from peer import limits
from peer.errors import BitinglipError, Fenced, Overloaded, Unavailable
from peer.link import wire
from peer.link.session import Session, receive
from peer.ports import TURNED_AWAY, Connection, Entropy, Network, Voting
from peer.state.command import Request
from peer.state.enrol import Revocation
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.quota import Client

log = structlog.get_logger("follower")

_REDIAL_S: Final = (0.05, 0.15)  # between two tries, drawn
_STORE_LOOK_S: Final = 1.0
_IDLE_S: Final = (0.2, 0.4)  # after all were asked
_HINTS_MAX: Final = 3  # followed one after another; then all are asked: hints may be old, or go in circles
_DOUBLED_MAX: Final = 5  # how often that pause doubles while all turn this host away, or its disk is full


class _Outcome(Enum):
    """Of asking one peer whether it leads."""

    IN_VAIN = "in vain"
    TURNED_AWAY = "turned away"
    NOT_KEPT = "not kept"  # it leads, and this host's disk does not take its epoch
    FOLLOWED = "followed"


class TakesOrders(Protocol):
    """peer.executor.Executor"""

    @property
    def epoch(self) -> int: ...

    def accept(self, epoch: int) -> None: ...

    async def order(self, order: Order) -> None: ...

    def report_all(self) -> None: ...


class Directory(Protocol):
    """peer.membership.Membership"""

    def candidates(self) -> tuple[str, ...]:
        """Peers that may lead or know who does, the likeliest first."""

    def address(self, peer_id: str) -> str | None:
        """Of its link."""


class _Forwarded:
    """A call or subscription that waits for the leader."""

    def __init__(self, items_max: int = 1) -> None:
        self.send, self.receive = trio.open_memory_channel[wire.Answer | wire.Subscribed | wire.Events](
            items_max
        )


class Follower:
    """`suspect(peer_id, why)` hears of a peer that cannot be reached, `trust(peer_id)` of one that answers, `revoke` of
    all that are revoked. `keyed` says whether this host has the CA's key, as far as it needs one to lead."""

    def __init__(
        self,
        peer_id: str,
        network: Network,
        executor: TakesOrders,
        directory: Directory,
        entropy: Entropy,
        *,
        suspect: Callable[[str, str], None],
        trust: Callable[[str], None],
        revoke: Callable[[tuple[Revocation, ...]], None],
        wire_versions: tuple[int, int] = (wire.WIRE, wire.WIRE_MIN),
        voting: Voting | None = None,
        keyed: Callable[[], bool] = lambda: True,
    ) -> None:
        self._peer_id = peer_id
        self._voting = voting
        self._keyed = keyed
        self._network = network
        self._executor = executor
        self._directory = directory
        self._entropy = entropy
        self._suspect = suspect
        self._trust = trust
        self._revoke = revoke
        self._wire = wire_versions
        self._session: Session | None = None
        self._changed = trio.Event()
        self._calls: dict[int, _Forwarded] = {}
        self._calls_made = 0
        self._hint = ""  # whom to ask next
        self._hinted = ("", "")  # who was hinted at last, and its address
        self._unreached = ""
        self._redial: trio.CancelScope | None = None  # of the one who did not answer
        self._settled = False  # the leader had answered all that it ever will when it said farewell
        self.leader = ""  # of the session; "" while there is none
        self.epoch = 0  # the newest that was followed
        self.keys: Mapping[str, ApiKey] = MappingProxyType({})
        self.catalogue: Mapping[str, Model] = MappingProxyType({})

    # ---------------------------------------------------------------- what this peer uses

    async def wait_for_change(self) -> None:
        """Until a session has begun or ended."""
        await self._changed.wait()

    async def report(self, report: Report) -> None:
        """Hand it to the leader. Raises Unavailable when there is none."""
        if self._session is None:
            raise no_session()
        await self._session.put(wire.Reported(report=report))

    async def call(self, request: Request) -> Any:
        """The leader's answer. Raises its error; Unavailable `no_leader` if this was certainly not carried out,
        `ambiguous` if the session ended before the answer came."""
        forwarded = _Forwarded()
        call_id = self._open(forwarded)
        try:
            self._post(wire.Call(call_id=call_id, request=request))
            answer = await forwarded.receive.receive()
        except trio.EndOfChannel:
            raise (no_session() if self._settled else _cut_off()) from None
        finally:
            self._close(call_id)
        assert isinstance(answer, wire.Answer)
        if answer.failure is not None:
            raise wire.error_of(answer.failure)
        return wire.decode_answer(request, answer.value)

    async def events(
        self, since: int | None, client: Client | None = None
    ) -> AsyncGenerator[int | Event, None]:
        """First the number after which events follow, then those. Raises what Journal.subscribe does, and Unavailable
        when the session ends."""
        forwarded = _Forwarded(limits.EVENTS_BEHIND_MAX)
        call_id = self._open(forwarded)
        try:
            self._post(wire.Subscribe(call_id=call_id, since=since, client=client))
            async for item in forwarded.receive:
                match item:
                    case wire.Subscribed():
                        yield item.since
                    case wire.Events():
                        for event in item.events:
                            yield event
                    case wire.Answer(failure=failure) if failure is not None:
                        raise wire.error_of(failure)
            raise _cut_off()
        finally:
            self._close(call_id)

    def _open(self, forwarded: _Forwarded) -> int:
        if self._session is None:
            raise no_session()
        if len(self._calls) >= limits.ASKED_MAX:
            raise Overloaded("this peer has too many requests open", retry_after_s=1.0)
        self._calls_made += 1
        self._calls[self._calls_made] = forwarded
        return self._calls_made

    def _close(self, call_id: int) -> None:
        if self._calls.pop(call_id, None) is not None and self._session is not None:
            with suppress(Unavailable):  # the session ends, and the call with it
                self._session.post(wire.GiveUp(call_id=call_id))

    def _post(self, frame: wire.Frame) -> None:
        if self._session is None:
            raise no_session()
        self._session.post(frame)

    def take(self, shared: wire.Shared) -> None:
        """Keep this copy: the leader's word, or while this peer leads its own, for when it follows nobody."""
        self.keys = MappingProxyType({key.key_id: key for key in shared.keys})
        self.catalogue = MappingProxyType({model.name: model for model in shared.catalogue})
        self._revoke(shared.revoked)

    def leave(self, reason: str) -> None:
        """End the session, if there is one: this peer leads now, or stops."""
        if self._session is not None:
            self._session.end(reason)

    async def watch_store(self, voting: Voting) -> None:
        """Until cancelled: tell the leader when this host's member of the store ceases to answer, and answers again,
        and when this host has got the CA's key."""
        told_to, told = self._session, (False, False)
        while True:
            session, state = self._session, wire.StoreState(problem=voting.problem, keyed=self._keyed())
            if session is not told_to:
                told_to, told = session, (False, False)
            if session is not None and (bool(state.problem), state.keyed) != told:
                told = bool(state.problem), state.keyed
                with suppress(Unavailable):  # the next session is told anew
                    session.post(state)
            await trio.sleep(_STORE_LOOK_S)

    # ---------------------------------------------------------------- the session

    async def run(self, may_follow: Callable[[], bool]) -> None:
        """Until cancelled: keep a session with whoever leads, while `may_follow`."""
        hints, turned_away = 0, 0
        while True:
            asked, refusals, not_kept = 0, 0, False
            for peer_id in self._order() if may_follow() else ():
                outcome = await self._try(peer_id)
                asked, refusals = asked + 1, refusals + (outcome is _Outcome.TURNED_AWAY)
                not_kept = not_kept or outcome is _Outcome.NOT_KEPT
                if outcome is _Outcome.FOLLOWED:
                    hints = 0
                await trio.sleep(self._entropy.uniform(*_REDIAL_S))
                if not may_follow():
                    break
                if self._hint and hints < _HINTS_MAX and not not_kept:
                    hints += 1
                    break
            else:
                hints = 0
                in_vain = not_kept or (refusals and refusals == asked)
                turned_away = turned_away + 1 if in_vain else 0
                pause_s = self._entropy.uniform(*_IDLE_S) * 2.0 ** min(turned_away, _DOUBLED_MAX)
                await trio.sleep(pause_s)

    def hint(self, peer_id: str, address: str = "") -> None:
        """This one leads, somebody says, and is to be found there: ask it first."""
        if peer_id != self._peer_id:
            self._hint, self._hinted = peer_id, (peer_id, address)
            if self._redial is not None and peer_id != self._unreached:
                self._redial.cancel()  # a host that is cut off would be waited for, while another one leads

    def _order(self) -> list[str]:
        """Whom to ask: first whom another peer has named, last who did not answer."""
        known = [peer_id for peer_id in self._directory.candidates() if peer_id != self._peer_id]
        known.sort(key=lambda peer_id: peer_id == self._unreached)
        hint, self._hint = self._hint, ""
        return [hint, *(each for each in known if each != hint)] if hint else known

    async def _try(self, peer_id: str) -> _Outcome:
        """Ask one peer whether it leads, and follow it to the end of the session if so."""
        address = self._directory.address(peer_id)
        if self._hinted[0] == peer_id:
            address = self._hinted[1] or address
        if address is None:
            return _Outcome.IN_VAIN
        connection = None
        with trio.CancelScope() as dialling:
            self._redial = dialling if peer_id == self._unreached else None
            try:
                connection = await self._network.dial(peer_id, address)
            except Unavailable as error:
                self._is_gone(peer_id, error.message)
                return _Outcome.TURNED_AWAY if error.code == TURNED_AWAY else _Outcome.IN_VAIN
            finally:
                self._redial = None
        if connection is None:
            return _Outcome.IN_VAIN
        try:
            answer = await self._greet(connection)
        except Unavailable as error:
            await connection.aclose()
            self._is_gone(peer_id, error.message)
            return _Outcome.IN_VAIN
        self._trust(peer_id)
        outcome = _Outcome.IN_VAIN
        if isinstance(answer, wire.Welcome):
            outcome = self._accept(answer)
            if outcome is _Outcome.FOLLOWED:
                await self._follow(Session(connection), answer)
                return outcome
        await connection.aclose()
        if isinstance(answer, wire.Refused) and answer.leader:
            self.hint(answer.leader, answer.address)
        return outcome

    def _accept(self, welcome: wire.Welcome) -> _Outcome:
        """Not if this peer has followed or obeyed a newer leader: that one does not know yet that it is none."""
        try:
            if welcome.epoch < self.epoch:
                raise Fenced(f"this peer has followed epoch {self.epoch}")
            self._executor.accept(welcome.epoch)
        except (Fenced, Unavailable) as error:
            log.warning("leader_refused", leader=welcome.peer_id, epoch=welcome.epoch, why=error.message)
            return _Outcome.IN_VAIN if isinstance(error, Fenced) else _Outcome.NOT_KEPT
        return _Outcome.FOLLOWED

    def _is_gone(self, peer_id: str, why: str) -> None:
        self._unreached = peer_id
        self._suspect(peer_id, why)

    async def _greet(self, connection: Connection) -> wire.Frame:
        newest, oldest = self._wire
        hello = wire.Hello(
            peer_id=self._peer_id,
            wire=newest,
            wire_min=oldest,
            epoch=self._executor.epoch,
            store=self._voting.address if self._voting is not None else "",
            seat=self._voting.seat if self._voting is not None else 0,
        )
        await connection.send(wire.encode(hello))
        return wire.decode(await receive(connection))

    async def _follow(self, session: Session, welcome: wire.Welcome) -> None:
        async with session.serve() as frames:
            self._begin(session, welcome)
            try:
                async for frame in frames:
                    await self._frame(session, frame)
            except Unavailable as error:
                session.end(error.message)
            finally:
                self._end(session)

    def _begin(self, session: Session, welcome: wire.Welcome) -> None:
        self._session, self.leader, self.epoch = session, welcome.peer_id, welcome.epoch
        self._settled = False
        log.info("following", leader=welcome.peer_id, epoch=welcome.epoch, wire=welcome.wire)
        self._executor.report_all()
        self._change()

    def _end(self, session: Session) -> None:
        log.info("leader_lost", leader=session.peer_id, why=session.why)
        self._is_gone(session.peer_id, session.why)
        self._session, self.leader = None, ""
        for forwarded in self._calls.values():
            forwarded.send.close()
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _frame(self, session: Session, frame: wire.Frame) -> None:
        match frame:
            case wire.Ordered():
                try:
                    await self._executor.order(frame.order)
                except Fenced as error:
                    log.warning("order_refused", why=error.message)
                    session.post(wire.Superseded(epoch=self._executor.epoch))
                    session.end(error.message)
            case wire.Answer() | wire.Subscribed() | wire.Events():
                self._hand_over(frame)
            case wire.Shared():
                self.take(frame)
            case wire.Vote() if self._voting is not None:
                self._voting.join(frame.seat)
            case wire.Unvote() if self._voting is not None:
                self._voting.leave(frame.reason)
            case wire.Bye():
                self._settled = frame.settled
                session.end(f"{session.peer_id} said: {frame.reason}")
            case _:
                pass  # of a newer version, or nothing for a follower

    def _hand_over(self, frame: wire.Answer | wire.Subscribed | wire.Events) -> None:
        forwarded = self._calls.get(frame.call_id)
        if forwarded is None:
            return
        try:
            forwarded.send.send_nowait(frame)
        except trio.WouldBlock:
            # The reader is behind by the bound: it gets what is there, then its end.
            forwarded.send.close()
            self._close(frame.call_id)


def no_session() -> Unavailable:
    return Unavailable(
        "no leader is known to this peer at the moment: it may be cut off from the majority of the voters",
        code="no_leader",
        retry_after_s=1.0,
    )


def _cut_off() -> Unavailable:
    return Unavailable(
        "the leader was lost before it answered; it is not known whether this was done",
        code="ambiguous",
        retry_after_s=1.0,
    )


def is_leaderless(error: BitinglipError) -> bool:
    """Whether it is for want of a leader that there is no answer, whatever became of the request."""
    return is_unsent(error) or (isinstance(error, Unavailable) and error.code == "ambiguous")


def is_unsent(error: BitinglipError) -> bool:
    """Whether the request this error answers was certainly not carried out, for want of a leader."""
    return isinstance(error, Unavailable) and error.code in (
        "no_leader",
        "not_leading",
        "link_broken",
        "store_silent",
    )
