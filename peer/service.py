"""The cluster as this peer's API sees it while this peer leads: ports.Cluster over leader, executor and streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from peer.errors import Conflict
from peer.executor import Executor
from peer.journal import Journal
from peer.leader import Leader
from peer.state.command import GetTask, Query, Request, StreamItem, TaskView
from peer.state.event import Event
from peer.state.key import ApiKey
from peer.state.member import KeyRotation, Member
from peer.state.model import Model
from peer.state.quota import Client, Spend, Verdict
from peer.state.task import TERMINAL
from peer.streams import Stream, StreamHub, with_end


class LocalCluster:
    """Implements peer.ports.Cluster on the leading peer."""

    def __init__(self, leader: Leader, executor: Executor, streams: StreamHub, journal: Journal) -> None:
        self._leader = leader
        self._executor = executor
        self._streams = streams
        self._journal = journal
        self.not_ready = "this peer is starting"

    def ready(self) -> str:
        return self.not_ready

    async def call(self, request: Request) -> Any:
        return await self._leader.call(request)

    async def read(self, query: Query) -> tuple[Any, float | None]:
        return await self._leader.call(query), None

    def gossip(self) -> tuple[Member, ...]:
        return ()

    async def rotate_gossip_key(self, *, force: bool) -> KeyRotation:
        raise Conflict("this host is in no cluster: it gossips with nobody", code="no_cluster")

    async def spend(self, ask: Spend) -> Verdict | None:
        verdict: Verdict | None = await self._leader.call(ask)
        return verdict

    def key(self, key_id: str) -> ApiKey | None:
        return self._leader.key(key_id)

    def models(self) -> Mapping[str, Model]:
        return self._leader.models()

    async def count_tokens(self, model_name: str, parameters: Mapping[str, Any]) -> tuple[int, int] | None:
        model = self._leader.models().get(model_name)
        return None if model is None else await self._executor.count_tokens(model, parameters)

    @asynccontextmanager
    async def events(
        self, since: int | None, client: Client | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        with self._leader.quota.socket(client):
            async with self._journal.subscribe(since) as events:
                yield events

    @asynccontextmanager
    async def stream(self, task_id: str) -> AsyncIterator[AsyncIterator[StreamItem]]:
        # Subscribed before the task is read, so that an end in between is not missed.
        async with self._streams.subscribe(task_id) as items:
            view: TaskView = await self._leader.call(GetTask(task_id=task_id))
            over = view.task.status in TERMINAL
            if over:
                whole = Stream()
                whole.finish(view)
                items = whole.items()

            async def end() -> TaskView:
                ended: TaskView = view if over else await self._leader.call(GetTask(task_id=task_id))
                return ended

            async with aclosing(with_end(items, end)) as all_items:
                yield all_items
