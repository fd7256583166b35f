"""A store in memory, as much of `peer.ports.Store` as a leader uses, with faults on request."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import trio

from peer.errors import Ambiguous, Fenced, StoreError, Unavailable
from peer.ports import LEADER_KEY, Compare, KeyValue, Page, Put, TxnResult, Write


class MemoryStore:
    """`fail` is raised by commits instead of writing, `delay_s` is how long each one takes.

    `fates` of the next commits, in order: "" (well), "unsent" (Unavailable), "lost" and "done" (Ambiguous, and the
    latter was written). `calls` names every read in order; `commits` is the size of each commit.
    """

    def __init__(self) -> None:
        self.data: dict[str, KeyValue] = {}
        self.revision = 0
        self.fail: StoreError | None = None
        self.fates: list[str] = []
        self.delay_s = 0.0
        self.calls: list[tuple[str, int]] = []
        self.commits: list[int] = []
        self._busy = False
        self._doubtful: tuple[int, Sequence[Write], int] | None = None  # epoch, writes, revision if written

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

    async def peek(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        return await self.get(keys)

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        await trio.lowlevel.checkpoint()
        _require_once(then)
        _require_once(orelse)
        succeeded = all(self._holds(each) for each in compare)
        return TxnResult(succeeded, self._write(then if succeeded else orelse))

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        _require_once(writes)
        if self._busy:
            raise ValueError("one commit at a time")
        self._busy = True
        try:
            await trio.sleep(self.delay_s)
        finally:
            self._busy = False
        if self._doubtful is not None and self._doubtful[0] == epoch and self._doubtful[1] != writes:
            raise ValueError("the commit before is still ambiguous")
        if self.fail is not None:
            raise self.fail
        return self._fated(epoch, writes, self.fates.pop(0) if self.fates else "")

    def _fated(self, epoch: int, writes: Sequence[Write], fate: str) -> int:
        if fate == "unsent":
            raise Unavailable("not sent")
        revision = self._doubtful[2] if self._doubtful is not None and self._doubtful[0] == epoch else 0
        if not revision and fate != "lost":
            if epoch <= 0 or not self._holds(Compare(LEADER_KEY, "create_revision", epoch)):
                raise Fenced("another epoch leads")
            self.commits.append(len(writes))
            revision = self._write(writes)
        if fate:
            self._doubtful = (epoch, writes, revision)
            raise Ambiguous("time-out")
        self._doubtful = None
        return revision

    def _holds(self, compare: Compare) -> bool:
        found = self.data.get(compare.key)
        missing = None if compare.field == "value" else 0
        return bool((missing if found is None else getattr(found, compare.field)) == compare.value)

    def _between(self, start: str, end: str) -> list[str]:
        keys = sorted(self.data)
        return keys[bisect_left(keys, start) : bisect_left(keys, end)]

    def _write(self, writes: Sequence[Write]) -> int:
        if not any(isinstance(write, Put) or write.key in self.data for write in writes):
            return self.revision
        self.revision += 1
        for write in writes:
            if isinstance(write, Put):
                old = self.data.get(write.key)
                created = old.create_revision if old is not None else self.revision
                self.data[write.key] = KeyValue(write.key, write.value, created, self.revision)
            else:
                self.data.pop(write.key, None)
        return self.revision


def _require_once(writes: Sequence[Write]) -> None:
    if len({write.key for write in writes}) != len(writes):
        raise ValueError("a transaction writes a key at most once")
