"""The store of a cluster: `peer.ports.Store` over one etcd member's JSON gateway.

Usage: `store = EtcdStore("unix:/run/…/etcd.sock:0")`, and `await store.aclose()` at the end. No nursery is needed.

Reads are linearizable: they wait for a quorum. Large reads are made of pages, all of one revision, and so are `get`s of
many keys: small at first, and as large as fits once sizes are known. Writes are never split: a transaction is one
request, of at most REQUEST_BYTES_MAX and OPERATIONS_MAX, which the member must have been started with
(`--max-txn-ops`).

Errors are those of `etcd_client`. Every call ends within limits.STORE_CALL_S_MAX, a transaction with a second more for
each SENT_BYTES_PER_S of it; a read of several pages takes that long for each. A keepalive or revocation without an
answer is Ambiguous, and safe to repeat.

Revisions. A store that was copied from another one goes on where that one stood, though its etcd counts from 1: what
this class gives out is etcd's revision plus a base, which the copy has written under BASE_KEY before all else. It is
read before the first call that needs it, unless it is given. A revision that is no greater than the base is of the
store before: nothing has it here, and its history is gone.

Watches are served by this member alone, without a quorum: one that is cut off tells nothing and ends nothing until it
is back. etcd itself tells who watches from exactly the revision of the last compaction of no gap, though deletions of
that revision are gone: here that is Compacted, too, unless the compaction comes between the two requests of the entry.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import trio

from peer import limits
from peer.adapters.stores.etcd_client import AnswerTooLarge, EtcdClient, Header, decoder, failure
from peer.adapters.stores.etcd_http import Lines, NoAnswer
from peer.adapters.stores.fenced_commits import FencedCommits
from peer.errors import Compacted, NotFound, StoreError, TooLarge, Unavailable
from peer.ports import Batch, Change, Compare, KeyValue, Lease, Page, Put, TxnResult, Write

REQUEST_BYTES_MAX: Final = (
    12 * 1024 * 1024
)  # keys and values of one request; the member's --max-request-bytes
OPERATIONS_MAX: Final = 8_192  # of one transaction; the member's --max-txn-ops
SENT_BYTES_PER_S: Final = 4 * 1024 * 1024  # at least, on a busy host
LEASE_S_MIN: Final = 2.0  # etcd's, with its usual election time-out
PAGE_BYTES: Final = 1024 * 1024  # aimed at
PAGE_ITEMS_FIRST: Final = 4  # of values that may each be as large as a request
PAGE_KEYS: Final = 8_192  # without values
TRIES_MAX: Final = 3  # of a read of pages, when its revision is compacted in between
INTEGER_MAX: Final = 2**63 - 1

BASE_KEY: Final = "revision_base"  # decimal; written once, by `peer.adapters.stores.store_copy`

_FIRST_KEY: Final = b"\0"  # no key is empty
_TARGETS: Final = {"create_revision": "CREATE", "mod_revision": "MOD", "value": "VALUE"}

T = TypeVar("T")


class _Kv(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    lease: int = 0


class _Range(msgspec.Struct):
    header: Header = Header()
    kvs: list[_Kv] = []
    more: bool = False
    count: int = 0


class _Response(msgspec.Struct):
    response_range: _Range | None = None


class _Txn(msgspec.Struct):
    header: Header = Header()
    succeeded: bool = False
    responses: list[_Response] = []


class _Granted(msgspec.Struct):
    lease_id: int = msgspec.field(name="ID", default=0)
    ttl_s: int = msgspec.field(name="TTL", default=0)


class _Kept(msgspec.Struct):
    result: _Granted | None = None
    error: Any = None


class _Event(msgspec.Struct):
    kv: _Kv
    kind: str = msgspec.field(name="type", default="PUT")


class _Watched(msgspec.Struct):
    header: Header = Header()
    created: bool = False
    canceled: bool = False
    fragment: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[_Event] = []


class _WatchLine(msgspec.Struct):
    result: _Watched | None = None
    error: Any = None


_RANGE = decoder(_Range)
_TXN = decoder(_Txn)
_GRANTED = decoder(_Granted)
_KEPT = decoder(_Kept)
_WATCH = decoder(_WatchLine)
_ANY = decoder(dict[str, Any])


class EtcdStore:
    """See the module's docstring."""

    def __init__(
        self, address: str, *, revision_base: int | None = None, call_s_max: float = limits.STORE_CALL_S_MAX
    ) -> None:
        self.client = EtcdClient(address, call_s_max=call_s_max)
        self._commits = FencedCommits(self)
        self._revision_base = revision_base

    async def aclose(self) -> None:
        """Close all connections. Calls under way end as if the member had gone. May be called again."""
        await trio.lowlevel.checkpoint()
        self.client.close()

    async def revision_base(self) -> int:
        """What is added to etcd's revisions. Raises as a read does, also on a member that is a learner."""
        if self._revision_base is None:
            found = await self._ask(BASE_KEY.encode(), None)
            self._revision_base = int(found.kvs[0].value) if found.kvs else 0
        return self._revision_base

    # ------------------------------------------------------------------------------------------ reading

    async def range(
        self, start: str, end: str, *, limit: int = 0, offset: int = 0, keys_only: bool = False
    ) -> Page:
        if limit < 0 or offset < 0 or max(limit, offset) > INTEGER_MAX:
            raise ValueError(f"limit {limit}, offset {offset}")
        first, last = start.encode() or _FIRST_KEY, end.encode()
        base = await self.revision_base()

        async def read() -> Page:
            if last <= first or last == _FIRST_KEY:  # which etcd would take for "to the end" or one key
                found = await self._ask(_FIRST_KEY, None, keys_only=True)
                return Page((), found.header.revision + base)
            reader = _Reader(self._ask, first, last)
            if offset and not await reader.skip(offset):
                return Page((), reader.revision + base)
            items = await reader.take(limit, keys_only)
            more = bool(limit) and reader.more
            return Page(tuple(_key_value(item, base) for item in items), reader.revision + base, more)

        return await _while_compacted(read)

    async def count(self, start: str, end: str) -> int:
        first, last = start.encode() or _FIRST_KEY, end.encode()
        if last <= first or last == _FIRST_KEY:
            last, first = (
                b"\1",
                _FIRST_KEY,
            )  # asked all the same: whether the store answers is part of the answer
            await self._ask(first, last, count_only=True)
            return 0
        return (await self._ask(first, last, count_only=True)).count

    async def get(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        wanted = [key.encode() for key in dict.fromkeys(keys) if key]
        base = await self.revision_base()

        async def read() -> dict[str, KeyValue]:
            found: dict[str, KeyValue] = {}
            revision, size, rest = 0, PAGE_ITEMS_FIRST, deque(wanted)
            while True:
                now = [rest[at] for at in range(min(size, len(rest)))]
                try:
                    done = await self._get_some(now, revision)
                except (AnswerTooLarge, Unavailable) as error:
                    size = _fewer(len(now), error)
                    continue
                revision = revision or done.header.revision
                nbytes = 0
                for response in done.responses:
                    for item in response.response_range.kvs if response.response_range else ():
                        found[item.key.decode()] = _key_value(item, base)
                        nbytes += len(item.value)
                size = min(_more(len(now), nbytes), OPERATIONS_MAX // 8)
                for _ in now:
                    rest.popleft()
                if not rest:
                    return found

        return await _while_compacted(read)

    async def peek(self, keys: Sequence[str]) -> dict[str, KeyValue]:
        base = await self.revision_base()
        wanted = [key.encode() for key in dict.fromkeys(keys) if key]
        done = await self._get_some(wanted, 0, serializable=True)
        found = [each.response_range.kvs for each in done.responses if each.response_range]
        return {item.key.decode(): _key_value(item, base) for items in found for item in items}

    async def _get_some(self, keys: Sequence[bytes], revision: int, *, serializable: bool = False) -> _Txn:
        asked = {"revision": revision, "serializable": serializable}
        reads = [{"request_range": {"key": key, **asked}} for key in keys]
        return await self.client.call("kv/txn", {"success": reads}, _TXN, writes=False)

    async def _ask(
        self,
        first: bytes,
        last: bytes | None,
        *,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
        serializable: bool = False,
    ) -> _Range:
        request: dict[str, Any] = {"key": first, "limit": limit, "revision": revision}
        if last is not None:
            request["range_end"] = last
        request |= {"keys_only": keys_only, "count_only": count_only, "serializable": serializable}
        return await self.client.call("kv/range", request, _RANGE, writes=False)

    # ------------------------------------------------------------------------------------------ writing

    async def txn(
        self, compare: Sequence[Compare], then: Sequence[Write], orelse: Sequence[Write] = ()
    ) -> TxnResult:
        nbytes = _require_sendable(compare, then, orelse)
        base = await self.revision_base()
        request = {
            "compare": [_comparison(each, base) for each in compare],
            "success": [_operation(write) for write in then],
            "failure": [_operation(write) for write in orelse],
        }
        done = await self.client.call(
            "kv/txn",
            request,
            _TXN,
            writes=bool(then or orelse),
            timeout_s=self.client.call_s_max + nbytes / SENT_BYTES_PER_S,
        )
        return TxnResult(done.succeeded, done.header.revision + base)

    async def commit(self, epoch: int, writes: Sequence[Write]) -> int:
        return await self._commits.commit(epoch, writes)

    # ------------------------------------------------------------------------------------------ leases

    async def grant(self, ttl_s: float) -> Lease:
        """Of whole seconds, rounded up, and not less than etcd's least."""
        if not (math.isfinite(ttl_s) and ttl_s > 0):
            raise ValueError(f"a lease of {ttl_s} s")
        request = {"TTL": math.ceil(max(ttl_s, LEASE_S_MIN))}
        done = await self.client.call("lease/grant", request, _GRANTED, writes=True)
        return Lease(done.lease_id, float(done.ttl_s))

    async def keepalive(self, lease_id: int) -> Lease:
        done = await self.client.call("lease/keepalive", {"ID": lease_id}, _KEPT, writes=True)
        if done.error is not None:
            raise failure(200, msgspec.json.encode({"error": done.error}), writes=True)
        if done.result is None or done.result.ttl_s <= 0:
            raise NotFound(f"lease {lease_id} has expired or never was")
        return Lease(lease_id, float(done.result.ttl_s))

    async def revoke(self, lease_id: int) -> None:
        try:
            await self.client.call("lease/revoke", {"ID": lease_id}, _ANY, writes=True)
        except NotFound:
            return

    # ------------------------------------------------------------------------------------------ watching

    @asynccontextmanager
    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[AsyncIterator[Batch]]:
        base = await self.revision_base()
        if base and from_revision <= base:
            raise Compacted(
                f"history up to revision {base} stayed with the store that this one was copied from"
            )
        first = max(1, from_revision - base)  # to etcd 0 means: from now on
        key = prefix.encode()
        create = {
            "key": key or _FIRST_KEY,
            "range_end": key[:-1] + bytes([key[-1] + 1]) if key else b"\0",
            "start_revision": first,
            "fragment": True,
        }
        async with self.client.stream("watch", {"create_request": create}) as lines:
            watcher = _Watcher(lines, base)
            with trio.move_on_after(self.client.call_s_max) as scope:
                await watcher.created()
            if scope.cancelled_caught:
                raise Unavailable("the store has not begun to watch in time", retry_after_s=1.0)
            await self._require_history(first)
            yield watcher

    async def _require_history(self, revision: int) -> None:
        """Raises Compacted if the member that watches has forgotten anything of that revision or a later one."""
        try:
            await self._ask(
                _FIRST_KEY, None, revision=max(1, revision - 1), keys_only=True, serializable=True
            )
        except Unavailable as error:
            if "future revision" not in error.message:
                raise


# ------------------------------------------------------------------------------------------------ pages


class _Reader:
    """Goes through a range in pages of one revision, as large as fits."""

    def __init__(self, ask: Callable[..., Awaitable[_Range]], first: bytes, last: bytes) -> None:
        self._ask = ask
        self._next = first
        self._last = last
        self.revision = 0
        self.more = True

    async def skip(self, count: int) -> bool:
        """False if the range ends before: etcd has no offsets, so the keys are read."""
        while count and self.more:
            count -= len(await self._page(min(count, PAGE_KEYS), keys_only=True))
        return not count and self.more

    async def take(self, limit: int, keys_only: bool) -> list[_Kv]:
        """`limit` 0: all."""
        items: list[_Kv] = []
        size = PAGE_KEYS if keys_only else PAGE_ITEMS_FIRST
        while self.more and (not limit or len(items) < limit):
            wanted = min(size, limit - len(items)) if limit else size
            try:
                page = await self._page(wanted, keys_only)
            except (AnswerTooLarge, Unavailable) as error:
                if keys_only and isinstance(error, Unavailable):
                    raise  # it was not for its size
                size = _fewer(wanted, error)
                continue
            items += page
            size = min(_more(wanted, sum(len(item.value) for item in page)), PAGE_KEYS)
        return items

    async def _page(self, limit: int, keys_only: bool) -> list[_Kv]:
        page = await self._ask(
            self._next, self._last, limit=limit, revision=self.revision, keys_only=keys_only
        )
        self.revision = self.revision or page.header.revision
        self.more = page.more
        if page.kvs:
            self._next = page.kvs[-1].key + b"\0"
        return page.kvs


def _more(count: int, nbytes: int) -> int:
    """How many to ask for after so many that had so many bytes."""
    return max(1, min(count * 4, count * PAGE_BYTES // max(nbytes, 1)))


def _fewer(count: int, error: AnswerTooLarge | Unavailable) -> int:
    """How many to ask for after so many were too much, or took too long. Raises where that cannot be why."""
    if count > PAGE_ITEMS_FIRST:
        return PAGE_ITEMS_FIRST
    if isinstance(error, Unavailable):
        raise error
    if count <= 1:
        raise StoreError(f"an item is larger than etcd can answer: {error}") from error
    return 1


async def _while_compacted(read: Callable[[], Awaitable[T]]) -> T:
    """Begin again when the revision that is read was compacted between two pages."""
    for _ in range(TRIES_MAX):
        try:
            return await read()
        except Compacted:
            continue
    raise Unavailable("the store forgets its history faster than it can be read", retry_after_s=1.0)


# ------------------------------------------------------------------------------------------------ watching


class _Watcher(AsyncIterator[Batch]):
    """Batches out of etcd's responses, which may hold several revisions, or parts of one."""

    def __init__(self, lines: Lines, base: int) -> None:
        self._lines = lines
        self._base = base
        self._ready: deque[Batch] = deque()
        self._revision = 0  # of the batch that may not be whole yet
        self._changes: list[Change] = []

    async def created(self) -> None:
        """Until etcd says that it watches. Raises Unavailable, Compacted."""
        while not (await self._response()).created:
            pass

    async def __anext__(self) -> Batch:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ready:
            self._take(await self._response())
        return self._ready.popleft()

    async def _response(self) -> _Watched:
        try:
            text = await anext(self._lines)
        except NoAnswer as error:
            raise Unavailable(f"the watch has ended: {error}", retry_after_s=1.0) from error
        line = _WATCH.decode(text)
        if line.error is not None or line.result is None:
            raise failure(200, text, writes=False)
        if line.result.compact_revision:
            raise Compacted(f"history up to revision {line.result.compact_revision} is gone")
        if line.result.canceled:
            raise Unavailable(f"etcd has ended the watch: {line.result.cancel_reason}", retry_after_s=1.0)
        return line.result

    def _take(self, response: _Watched) -> None:
        for event in response.events:
            if event.kv.mod_revision != self._revision:
                self._end_batch()
                self._revision = event.kv.mod_revision
            value = None if event.kind == "DELETE" else event.kv.value
            self._changes.append(Change(event.kv.key.decode(), value))
        if not response.fragment:
            self._end_batch()

    def _end_batch(self) -> None:
        if self._changes:
            self._ready.append(Batch(self._revision + self._base, tuple(self._changes)))
            self._changes = []


# ------------------------------------------------------------------------------------------------ requests


def _key_value(item: _Kv, base: int) -> KeyValue:
    created, modified = item.create_revision + base, item.mod_revision + base
    return KeyValue(item.key.decode(), item.value, created, modified, item.lease)


def _comparison(compare: Compare, base: int) -> dict[str, Any]:
    value = compare.value
    if isinstance(value, int) and value:  # 0 stays: the key does not exist
        value = value - base if value > base else -1  # which no revision is
    key, target = compare.key.encode(), _TARGETS[compare.field]
    return {"key": key, "target": target, "result": "EQUAL", compare.field: value}


def _operation(write: Write) -> dict[str, Any]:
    if not isinstance(write, Put):
        return {"request_delete_range": {"key": write.key.encode()}}
    put: dict[str, Any] = {"key": write.key.encode(), "value": write.value}
    if write.lease:
        put["lease"] = write.lease
    return {"request_put": put}


def _require_sendable(compare: Sequence[Compare], *branches: Sequence[Write]) -> int:
    """Its bytes. Raises ValueError, TypeError for what no store takes, TooLarge for what etcd refuses."""
    for each in compare:
        if each.field not in _TARGETS:
            raise ValueError(f"no field {each.field}")
    nbytes = sum(len(each.key) for each in compare)
    for writes in branches:
        if len({write.key for write in writes}) != len(writes):
            raise ValueError("a transaction writes a key at most once")
        if len(writes) > OPERATIONS_MAX:
            raise TooLarge(f"a transaction of {len(writes)} writes: at most {OPERATIONS_MAX} are taken")
        for write in writes:
            if not write.key:
                raise ValueError("a key must not be empty")
            nbytes += len(write.key)
            if isinstance(write, Put):
                if not isinstance(write.value, bytes):
                    raise TypeError(f"the value of {write.key} is {type(write.value).__name__}, not bytes")
                if not 0 <= write.lease <= INTEGER_MAX:
                    raise ValueError(f"{write.lease} is no lease")
                nbytes += len(write.value)
    if nbytes > REQUEST_BYTES_MAX:
        raise TooLarge(f"a transaction of {nbytes} bytes: at most {REQUEST_BYTES_MAX} are taken")
    return nbytes
