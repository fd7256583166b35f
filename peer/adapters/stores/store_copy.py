"""All records of one store into another that is empty, each compared byte by byte afterwards.

Keys that belong to a store's own leadership stay behind (STAYS), and so does what stands under a lease: a leader takes
its key anew. Epochs go on growing, since the target gives out revisions greater than the source's: see
`EtcdStore.revision_base` and `SqliteStore.open`.

Nobody else may write to either store meanwhile. A copy that was interrupted is begun anew, with an empty target.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple, Protocol

from peer.adapters.stores.etcd_store import BASE_KEY, REQUEST_BYTES_MAX, EtcdStore
from peer.errors import Conflict, StoreError, TooLarge
from peer.ports import BATCH_KEY, BEAT_KEY, LEADER_KEY, Compare, KeyValue, Page, Put, Store

STAYS: Final = frozenset({LEADER_KEY, BEAT_KEY, BATCH_KEY, BASE_KEY})
PAGE_ITEMS: Final = 64  # so that a page of the largest values fits into memory
WRITES_MAX: Final = 1_000  # of one transaction
WRITES_BYTES_MAX: Final = REQUEST_BYTES_MAX // 4  # a larger record goes alone
RECORD_BYTES_MAX: Final = REQUEST_BYTES_MAX - 64 * 1024  # the rest is for what a request adds
CALL_S_MAX: Final = 60.0  # of a store that is copied, where nobody else waits
_END: Final = "\U0010ffff"


class Readable(Protocol):
    """That much of `peer.ports.Store`."""

    async def range(self, start: str, end: str, *, limit: int = 0) -> Page: ...


class Copied(NamedTuple):
    """`digest` is the SHA-256, in hexadecimal, of every key and value in order, each with its length before it."""

    records: int
    nbytes: int
    digest: str


Progress = Callable[[str, int], None]
"""Told after each page what is done ("measured", "copied", "compared") and to how many records."""


async def copy(source: Readable, target: Store, progress: Progress = lambda what, records: None) -> Copied:
    """Raises TooLarge before anything is written if a record is too large, Conflict if the target is not empty,
    StoreError if it is not the same afterwards, and what the stores raise."""
    if await anext(_Records(target), None) is not None:
        raise Conflict("the store to copy into is not empty", code="store_not_empty")
    before = await measure(source, progress)
    await _write(source, target, progress)
    after = await compare(source, target, progress)
    if before != after:
        raise StoreError("the store was changed while it was copied: does a peer run on it?")
    return after


async def measure(source: Readable, progress: Progress = lambda what, records: None) -> Copied:
    """What there is to copy. Raises TooLarge for a record that no transaction of a cluster's store takes."""
    total = _Total()
    async for items in _Pages(source):
        for item in items:
            size = len(item.key.encode()) + len(item.value)
            if size > RECORD_BYTES_MAX:
                raise TooLarge(
                    f"the record {item.key} has {size} bytes: a cluster's store takes at most {RECORD_BYTES_MAX}"
                )
            total.add(item)
        progress("measured", total.records)
    return total.copied()


async def compare(
    source: Readable, target: Readable, progress: Progress = lambda what, records: None
) -> Copied:
    """Both hold the same records, or StoreError names the first that differs."""
    total = _Total()
    theirs = _Records(target)
    async for items in _Pages(source):
        for item in items:
            other = await anext(theirs, None)
            if other is None or (other.key, other.value) != (item.key, item.value):
                raise StoreError(f"the copy differs from the store at {_first(item, other)}")
            total.add(item)
        progress("compared", total.records)
    more = await anext(theirs, None)
    if more is not None:
        raise StoreError(f"the copy has the record {more.key}, which the store has not")
    return total.copied()


async def set_base(address: str, base: int) -> None:
    """Let a new cluster's store go on after revision `base`. Raises Conflict if it has a base, or records."""
    store = EtcdStore(address, revision_base=0, call_s_max=CALL_S_MAX)
    try:
        if (await store.range("", _END, limit=1)).items:
            raise Conflict("the store to copy into is not empty", code="store_not_empty")
        await store.txn([Compare(BASE_KEY, "create_revision", 0)], [Put(BASE_KEY, str(base).encode())])
    finally:
        await store.aclose()


# ------------------------------------------------------------------------------------------------ parts


class _Total:
    def __init__(self) -> None:
        self.records = 0
        self._nbytes = 0
        self._hash = hashlib.sha256()

    def add(self, item: KeyValue) -> None:
        key = item.key.encode()
        self.records += 1
        self._nbytes += len(key) + len(item.value)
        for part in (key, item.value):
            self._hash.update(len(part).to_bytes(8, "big"))
            self._hash.update(part)

    def copied(self) -> Copied:
        return Copied(self.records, self._nbytes, self._hash.hexdigest())


async def _write(source: Readable, target: Store, progress: Progress) -> None:
    writes: list[Put] = []
    nbytes = written = 0
    async for items in _Pages(source):
        for item in items:
            size = len(item.key.encode()) + len(item.value)
            if writes and (len(writes) == WRITES_MAX or nbytes + size > WRITES_BYTES_MAX):
                await target.txn([], writes)
                written += len(writes)
                writes, nbytes = [], 0
                progress("copied", written)
            writes.append(Put(item.key, item.value))
            nbytes += size
    if writes:
        await target.txn([], writes)
        progress("copied", written + len(writes))


class _Pages(AsyncIterator[list[KeyValue]]):
    """Those records of a store that are copied, some at a time, maybe none."""

    def __init__(self, store: Readable) -> None:
        self._store = store
        self._next: str | None = ""

    async def __anext__(self) -> list[KeyValue]:
        if self._next is None:
            raise StopAsyncIteration
        page = await self._store.range(self._next, _END, limit=PAGE_ITEMS)
        self._next = page.items[-1].key + "\0" if page.more else None
        return [item for item in page.items if item.key not in STAYS and not item.lease]


class _Records(AsyncIterator[KeyValue]):
    """The same one by one."""

    def __init__(self, store: Readable) -> None:
        self._pages = _Pages(store)
        self._ready: deque[KeyValue] = deque()

    async def __anext__(self) -> KeyValue:
        while not self._ready:
            self._ready.extend(await anext(self._pages))
        return self._ready.popleft()


def _first(item: KeyValue, other: KeyValue | None) -> str:
    if other is None or other.key > item.key:
        return f"{item.key}, which it has not"
    return f"{other.key}, which the store has not" if other.key < item.key else item.key
