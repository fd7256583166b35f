"""What contract tests do to a store, and a plain dict that does the same.

BATCH_KEY is a store's own: it may be written by every commit or by none. `values` leaves it out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import pytest
import trio
from hypothesis import strategies as st

from peer.errors import Fenced
from peer.ports import BATCH_KEY, LEADER_KEY, Batch, Compare, Delete, KeyValue, Put, Store, Write

Field = Literal["create_revision", "mod_revision", "value"]
KEYS = st.sampled_from(["a", "a/b", "a/c", "b", "ß", "\U0001f600", LEADER_KEY])
BOUNDS = st.sampled_from(["", "a", "a/", "a0", "b", "l", "z", "\U0010ffff"])
VALUES = st.binary(max_size=4)
WRITES = st.lists(
    st.builds(Put, KEYS, VALUES) | st.builds(Delete, KEYS), max_size=4, unique_by=lambda write: write.key
)
PATIENCE_S = 10.0  # of real time


async def put(store: Store, key: str, value: bytes = b"v", lease: int = 0) -> int:
    return (await store.txn((), [Put(key, value, lease)])).revision


async def values(store: Store, start: str = "", end: str = "\U0010ffff") -> dict[str, bytes]:
    items = (await store.range(start, end)).items
    return {item.key: item.value for item in items if item.key != BATCH_KEY}


async def one(store: Store, key: str) -> KeyValue | None:
    return (await store.get([key])).get(key)


async def lead(store: Store, name: bytes = b"me") -> int:
    """Take the leader key; the epoch."""
    await store.txn((), [Delete(LEADER_KEY)])
    await put(store, LEADER_KEY, name)
    leader = await one(store, LEADER_KEY)
    assert leader is not None
    return leader.create_revision


async def take(batches: AsyncIterator[Batch], count: int) -> list[Batch]:
    with trio.fail_after(PATIENCE_S):
        return [await anext(batches) for _ in range(count)]


async def gone(store: Store, key: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while await one(store, key) is not None:  # noqa: ASYNC110 - only watchers are told
            await trio.sleep(0.01)


class Model:
    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.items: dict[str, KeyValue] = {}

    def field(self, key: str, field: str) -> int | bytes | None:
        item = self.items.get(key)
        return (None if field == "value" else 0) if item is None else getattr(item, field)

    def write(self, writes: list[Write]) -> int:
        changing = [write for write in writes if isinstance(write, Put) or write.key in self.items]
        self.revision += bool(changing)
        for write in changing:
            old = self.items.pop(write.key, None)
            if isinstance(write, Put):
                created = old.create_revision if old else self.revision
                self.items[write.key] = KeyValue(write.key, write.value, created, self.revision)
        return self.revision

    def range(self, start: str, end: str) -> tuple[KeyValue, ...]:
        return tuple(self.items[key] for key in sorted(self.items) if start <= key < end)


async def check_against_model(store: Store, data: st.DataObject) -> None:
    leftover = (await store.range("", "\U0010ffff", keys_only=True)).items
    model = Model((await store.txn((), [Delete(item.key) for item in leftover])).revision)
    first = model.revision + 1
    for _ in range(data.draw(st.integers(0, 12))):
        if data.draw(st.booleans()):
            await check_transaction(store, model, data)
        else:
            await check_reads(store, model, data)
    followed: dict[str, bytes] = {}
    async with store.watch("", first) as batches:
        for batch in await take(batches, model.revision - first + 1):
            for change in batch.changes:
                followed.pop(change.key, None)
                if change.value is not None:
                    followed[change.key] = change.value
    assert followed == {key: item.value for key, item in model.items.items()}


async def check_transaction(store: Store, model: Model, data: st.DataObject) -> None:
    writes = data.draw(WRITES)
    if data.draw(st.booleans()):
        await check_commit(store, model, data, writes)
        return
    compares, holds = [], True
    for key in data.draw(st.lists(KEYS, max_size=2)):
        field: Field = data.draw(st.sampled_from(["create_revision", "mod_revision", "value"]))
        wrong = b"none has this" if field == "value" else 1 << 40
        right = data.draw(st.sampled_from([True, True, False]))
        there = model.field(key, field)
        compares.append(Compare(key, field, there if right and there is not None else wrong))
        holds = holds and right and there is not None
    orelse = data.draw(WRITES)
    done = await store.txn(compares, writes, orelse)
    assert (done.succeeded, done.revision) == (holds, model.write(writes if holds else orelse))


async def check_commit(store: Store, model: Model, data: st.DataObject, writes: list[Write]) -> None:
    leads = model.field(LEADER_KEY, "create_revision")
    epoch = data.draw(st.sampled_from([0, 1, leads]))
    assert isinstance(epoch, int)
    if not epoch or epoch != leads:
        with pytest.raises(Fenced):
            await store.commit(epoch, writes)
        return
    revision = await store.commit(epoch, writes)
    batch = await one(store, BATCH_KEY) if writes else None
    if batch is not None:
        assert batch.mod_revision == revision
        writes = [*writes, Put(BATCH_KEY, batch.value)]
    assert revision == model.write(writes)


async def check_reads(store: Store, model: Model, data: st.DataObject) -> None:
    start, end = data.draw(BOUNDS), data.draw(BOUNDS)
    limit, offset = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    there = model.range(start, end)
    wanted = there[offset : offset + limit] if limit else there[offset:]
    page = await store.range(start, end, limit=limit, offset=offset)
    assert (page.items, page.revision) == (wanted, model.revision)
    assert page.more == (bool(wanted) and offset + len(wanted) < len(there))
    assert await store.count(start, end) == len(there)
    keys = data.draw(st.lists(KEYS, max_size=3))
    assert await store.get(keys) == {key: model.items[key] for key in keys if key in model.items}
