"""A store in memory, as much of `peer.ports.Store` as a leader uses, with faults on request."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import trio

from peer.errors import Fenced, StoreError
from peer.ports import LEADER_KEY, Compare, KeyValue, Page, Put, TxnResult, Write


class MemoryStore:
    """`fail` is raised by the next commit instead of writing, `delay_s` is how long each one takes.

    `calls` names every read in order; `commits` is the size of each commit.
    """

    def __init__(self) -> None:
        self.data: dict[str, KeyValue] = {}
        self.revision = 0
        self.fail: StoreError | None = None
        self.delay_s = 0.0
        self.calls: list[tuple[str, int]] = []
        self.commits: list[int] = []

    async def range(
        self, start: str, end: str, *, limit: int = 0, offset: int = 0, keys_only: bool = False
    ) -> Page:
        await trio.lowlevel.checkpoint()
        keys = self._between(start, end)[offset:]
        more = bool(limit) and len(keys) > limit
        keys = keys[:limit] if limit else keys
        self.calls.append(("range", len(keys)))
        found = (self.data[key] for key in keys)
        items = tuple(
            KeyValue(kv.key, b"" if keys_only else kv.value, kv.create_revision, kv.mod_revision)
            for kv in found
        )
        return Page(items, self.revision, more)

    async def count(self, start: str, end: str) -> int:
        await trio.lowlevel.checkpoint()
        return len(self._between(start, end))

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        await trio.lowlevel.checkpoint()
        self.calls.append(("get", len(keys)))
        return {key: self.data[key] for key in keys if key in self.data}

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        await trio.lowlevel.checkpoint()
        self._write(then)
        return TxnResult(True, self.revision)

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        await trio.sleep(self.delay_s)
        if self.fail is not None:
            raise self.fail
        leader = self.data.get(LEADER_KEY)
        if leader is None or leader.create_revision != epoch:
            raise Fenced("another epoch leads")
        self.commits.append(len(writes))
        return self._write(writes)

    def _between(self, start: str, end: str) -> list[str]:
        keys = sorted(self.data)
        return keys[bisect_left(keys, start) : bisect_left(keys, end)]

    def _write(self, writes: Sequence[Write]) -> int:
        self.revision += 1
        for write in writes:
            if isinstance(write, Put):
                old = self.data.get(write.key)
                created = old.create_revision if old is not None else self.revision
                self.data[write.key] = KeyValue(write.key, write.value, created, self.revision)
            else:
                self.data.pop(write.key, None)
        return self.revision
