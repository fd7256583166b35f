"""The cluster as any peer's API sees it: requests go to whoever leads, here or over the link, and are held for a while
when nobody does."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import trio

from peer import limits
from peer.decide.quota import RateLimiter
from peer.errors import BitinglipError, Unavailable
from peer.executor import Executor
from peer.follower import Follower, is_leaderless, is_unsent, no_session
from peer.gossip_keys import GossipKeys
from peer.journal import Journal
from peer.leader import Leader
from peer.membership import Membership
from peer.ports import Clock
from peer.relay import TokenRelay
from peer.remembered import Remembered
from peer.state.command import (
    GetTask,
    Query,
    Request,
    StreamItem,
    SubmitTask,
    TransferLeadership,
)
from peer.state.enrol import Enrol, ListHosts, Renew, RevokeHost
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.member import KeyRotation, Member
from peer.state.model import Model
from peer.state.quota import Client, KeepTicket, Spend, Verdict
from peer.task_stream import task_stream

_PAUSE_S: Final = 0.1  # between two tries


class Leading(Protocol):
    """What this peer is at the moment; both None while another leads."""

    leader: Leader | None
    journal: Journal | None


class RoutedCluster:
    """Implements peer.ports.Cluster on every peer of a cluster."""

    def __init__(
        self,
        leading: Leading,
        follower: Follower,
        executor: Executor,
        relay: TokenRelay,
        catalogue: Mapping[str, Model],
        clock: Clock,
        gossip_keys: GossipKeys,
        membership: Membership,
    ) -> None:
        self._leading = leading
        self._follower = follower
        self._executor = executor
        self._relay = relay
        self._catalogue = catalogue  # this peer's own, until a leader has told it of the cluster's
        self._clock = clock
        self._gossip_keys = gossip_keys
        self._membership = membership
        self._remembered = Remembered()
        self.windows = RateLimiter()  # of what came to this peer, and of all while it leads
        self._full = ""
        self.not_ready = ""
        """Why requests are not to come here, "" if they are."""

    def tell_full(self, why: str) -> None:
        """Why this host's store takes no writes, so that nobody can lead; "" if it does."""
        self._full = why

    def ready(self) -> str:
        if self.not_ready:
            return self.not_ready
        if self._leading.leader is not None or self._follower.leader:
            return ""
        return self._full or "no leader is known to this peer at the moment"

    def key(self, key_id: str) -> ApiKey | None:
        leader = self._leading.leader
        if leader is not None:
            return leader.key(key_id)
        if not self._follower.leader and not self._follower.keys:
            raise no_session()  # it has not heard of any key yet, so none can be said to be wrong
        return self._follower.keys.get(key_id)

    def models(self) -> Mapping[str, Model]:
        leader = self._leading.leader
        if leader is not None:
            return leader.models()
        return self._follower.catalogue or self._catalogue

    async def count_tokens(self, model_name: str, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        model = self.models().get(model_name)
        return None if model is None else await self._executor.count_tokens(model, parameters)

    # ---------------------------------------------------------------- requests

    async def call(self, request: Request) -> Any:
        """Carried out by the leader, once. What was certainly not carried out, and what may safely be repeated, is
        tried again until limits.HOLD_S_MAX have passed."""
        began = trio.current_time()

        async def once() -> Any:
            return await self._once(_without(request, trio.current_time() - began))

        return await self._held(once, repeatable=_is_repeatable(request))

    async def read(self, query: Query) -> tuple[Any, float | None]:
        """As the port says: not held where this peer has an answer."""
        try:
            return await self._once(query), None
        except Unavailable as error:
            if not is_leaderless(error):
                raise
        found = self._remembered.find(query, self._clock.now())
        return (await self.call(query), None) if found is None else found

    async def _once(self, request: Request) -> Any:
        leader = self._leading.leader
        answer = await (leader.call(request) if leader is not None else self._follower.call(request))
        self._remembered.keep(request, answer, self._clock.now())
        return answer

    def gossip(self) -> tuple[Member, ...]:
        return tuple(self._membership.members.values())

    async def rotate_gossip_key(self, *, force: bool) -> KeyRotation:
        return await self._gossip_keys.rotate(await self.call(ListHosts()), force=force)

    async def spend(self, ask: Spend) -> Verdict | None:
        """Counted by the leader. Where none answers soon, this peer's own count of what came to it decides: so limits
        hold on the minority side of a partition too, each peer for itself, and what needs no leader is served."""
        leader = self._leading.leader
        verdict: Verdict | None
        if leader is not None:
            verdict = await leader.call(ask)
            return verdict
        own = self.windows.check(ask.key_id, self._clock.now(), ask.per_hour, ask.per_minute)
        with trio.move_on_after(limits.COUNT_S_MAX), suppress(BitinglipError):
            verdict = await self._follower.call(ask)
            return verdict
        return own

    async def _held(self, attempt: Callable[[], Awaitable[Any]], *, repeatable: bool) -> Any:
        """The time counts from the first failure: what waits long for its answer is held as long as anything else."""
        give_up_at = math.inf
        while True:
            try:
                return await attempt()
            except Unavailable as error:
                if not (is_leaderless(error) if repeatable else is_unsent(error)):
                    raise
                give_up_at = min(give_up_at, trio.current_time() + limits.HOLD_S_MAX)
                if trio.current_time() >= give_up_at:
                    raise _no_leader(self._full) from None
            with trio.move_on_after(_PAUSE_S):
                await self._follower.wait_for_change()

    # ---------------------------------------------------------------- events

    @asynccontextmanager
    async def events(
        self, since: int | None, client: Client | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Goes on with the next leader where the last one stopped. Errors of the beginning come on entry."""
        first, source = await self._held(partial(self._source, since, client), repeatable=True)
        admitted = client and Client(key_id=client.key_id, sockets_max=None)
        # The source is closed here too: a generator that was never begun closes nothing.
        async with aclosing(source), aclosing(self._all_events(first, source, admitted)) as events:
            yield events

    async def _source(
        self, since: int | None, client: Client | None
    ) -> tuple[int, AsyncGenerator[int | Event, None]]:
        """The number after which events follow, and those."""
        leader, journal = self._leading.leader, self._leading.journal
        if leader is not None and journal is not None:
            events = _local_events(leader, journal, since, client)
        else:
            events = self._follower.events(since, client)
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        assert isinstance(first, int)
        return first, events

    async def _all_events(
        self, last: int, events: AsyncGenerator[int | Event, None], client: Client | None
    ) -> AsyncGenerator[Event, None]:
        while True:
            try:
                async with aclosing(events):
                    async for event in events:
                        assert isinstance(event, Event)
                        last = event.id
                        yield event
            except Unavailable:
                pass
            _, events = await self._held(partial(self._source, last, client), repeatable=True)

    # ---------------------------------------------------------------- streams

    def stream(self, task_id: str) -> AbstractAsyncContextManager[AsyncIterator[StreamItem]]:
        return task_stream(task_id, self.call, self._relay)


def _without(request: Request, waited_s: float) -> Request:
    """What is left of a long poll that has to be asked again."""
    if isinstance(request, GetTask) and request.wait_s > 0.0:
        return msgspec.structs.replace(request, wait_s=max(0.0, request.wait_s - waited_s))
    return request


def _is_repeatable(request: Request) -> bool:
    """Whether doing it twice is as doing it once."""
    if isinstance(request, SubmitTask):
        return request.idempotency_key != ""
    return isinstance(request, Query | KeepTicket | Enrol | Renew | RevokeHost | TransferLeadership)


def _no_leader(store_full: str) -> Unavailable:
    why = store_full or "it, or every peer, is cut off from the majority of the voters"
    return Unavailable(
        f"this peer has found no leader for {limits.HOLD_S_MAX:g} s: {why}",
        code="no_leader",
        retry_after_s=5.0,
    )


async def _local_events(
    leader: Leader, journal: Journal, since: int | None, client: Client | None
) -> AsyncGenerator[int | Event, None]:
    start = journal.last if since is None else since
    with leader.quota.socket(client):
        async with journal.subscribe(start) as events:
            yield start
            async for event in events:
                yield event
