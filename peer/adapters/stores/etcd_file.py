"""The records in the file of an etcd member that does not run: for a member that can never serve again.

A learner whose voters are lost answers nobody after a restart, so its records are read from where it keeps them:
`data/member/snap/db`, a bbolt file (go.etcd.io/bbolt, file format 2, the same in etcd 3.4 to 3.6).

A page begins with its number, kind and count of elements; a branch's elements point to pages, a leaf's hold keys and
values; a bucket is a leaf's value that names its own root page. Of the two meta pages the one with the higher
transaction that is whole counts. The bucket `members` has the cluster's members in JSON. The bucket `key` has a record
for every revision of every key: its key is that revision, its value a protobuf `mvccpb.KeyValue`, and the key of a
deletion ends in `t`.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

import msgspec

from peer.adapters.stores.etcd_store import BASE_KEY
from peer.errors import StoreBroken
from peer.ports import KeyValue, Page

FILE: Final = "data/member/snap/db"  # in the member's folder
_MAGIC: Final = 0xED0CDAED
_VERSION: Final = 2
_BRANCH, _LEAF = 0x01, 0x02
_IS_BUCKET: Final = 0x01
_PAGE: Final = struct.Struct("<QHHI")  # number, kind, count, pages that follow as part of this one
_META_FIELDS: Final = struct.Struct("<IIIIQQQQQQ")  # …, root page, …, transaction, checksum
_BRANCH_ELEMENT: Final = struct.Struct("<IIQ")  # distance, length of the key, page
_LEAF_ELEMENT: Final = struct.Struct("<IIII")  # kind, distance, lengths of key and value
_BUCKET: Final = struct.Struct("<QQ")  # root page (0: it follows right here), sequence
_REVISION: Final = struct.Struct(">QcQ")  # of the transaction, "_", place in it
_DEPTH_MAX: Final = 64
_FNV: Final = (0xCBF29CE484222325, 0x100000001B3)


class _Where(NamedTuple):
    """Of a value in the file, with what is known of its key."""

    created: int
    modified: int
    lease: int
    at: int
    length: int


class FileMember(msgspec.Struct, frozen=True):
    """Of the cluster, as this member knew it. One that had not started has no name."""

    name: str = ""
    peer_urls: tuple[str, ...] = msgspec.field(name="peerURLs", default=())
    is_learner: bool = msgspec.field(name="isLearner", default=False)


class EtcdFile:
    """Usage: `with EtcdFile(folder / FILE) as file: await file.range("", "z", limit=100)`.

    Opening it raises StoreBroken if the file is damaged, OSError. Values stay in the file until they are asked for.
    `revision` is the newest, as an `EtcdStore` would give it out: etcd's own and the store's base.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._page_bytes, root = self._meta()
            buckets = dict(self._buckets(root))
            self._found, self.own_revision = self._read(buckets)
            self.members = self._read_members(buckets)
        except (struct.error, IndexError, KeyError, ValueError) as error:  # msgspec's are ValueErrors
            self._bytes.close()
            raise StoreBroken(f"{path} is damaged: {error}") from error
        self._keys = sorted(self._found, key=str.encode)
        self._order = [key.encode() for key in self._keys]
        base = self._found.get(BASE_KEY)
        self._base = int(self._value(base)) if base is not None else 0
        self.revision = self.own_revision + self._base

    def __enter__(self) -> EtcdFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bytes.close()

    async def range(self, start: str, end: str, *, limit: int = 0) -> Page:
        """As `peer.ports.Store.range`."""
        first, last = bisect_left(self._order, start.encode()), bisect_left(self._order, end.encode())
        stop = min(last, first + limit) if limit else last
        items = tuple(self._item(key) for key in self._keys[first:stop])
        return Page(items, self.revision, stop < last)

    def _item(self, key: str) -> KeyValue:
        found = self._found[key]
        created, modified = found.created + self._base, found.modified + self._base
        return KeyValue(key, self._value(found), created, modified, found.lease)

    def _value(self, found: _Where) -> bytes:
        return self._bytes[found.at : found.at + found.length]

    # ---------------------------------------------------------------- bbolt

    def _meta(self) -> tuple[int, int]:
        """(bytes of a page, root page) of the newest meta page that is whole."""
        metas = []
        (page_bytes,) = struct.unpack_from("<I", self._bytes, _PAGE.size + 8)
        for at in dict.fromkeys((0, page_bytes if 512 <= page_bytes <= 65_536 else 4_096)):
            magic, version, size, _, root, _, _, _, transaction, checksum = _META_FIELDS.unpack_from(
                self._bytes, at + _PAGE.size
            )
            body = self._bytes[at + _PAGE.size : at + _PAGE.size + _META_FIELDS.size - 8]
            if (magic, version, checksum) == (_MAGIC, _VERSION, _fnv(body)):
                metas.append((transaction, size, root))
        if not metas:
            raise ValueError("neither of its meta pages is whole")
        _, size, root = max(metas)
        return size, root

    def _buckets(self, root: int) -> Iterator[tuple[bytes, int]]:
        """(name, where its root page is)."""
        for name, kind, at, _ in self._elements(root * self._page_bytes):
            if kind & _IS_BUCKET:
                page, _ = _BUCKET.unpack_from(self._bytes, at)
                yield name, page * self._page_bytes if page else at + _BUCKET.size

    def _read(self, buckets: Mapping[bytes, int]) -> tuple[dict[str, _Where], int]:
        """Every key as it is now, and the newest revision."""
        found: dict[str, _Where] = {}
        newest = 0
        for key, _, at, length in self._elements(buckets[b"key"]):
            newest = _REVISION.unpack_from(key)[0]  # they are in order
            where, text = self._record(at, length)
            if key[_REVISION.size :] == b"t":
                found.pop(text, None)
            else:
                found[text] = where
        return found, newest

    def _read_members(self, buckets: Mapping[bytes, int]) -> tuple[FileMember, ...]:
        values = (self._bytes[at : at + n] for _, _, at, n in self._elements(buckets[b"members"]))
        return tuple(msgspec.json.decode(value, type=FileMember) for value in values)

    def _elements(self, at: int, depth: int = 0) -> Iterator[tuple[bytes, int, int, int]]:
        """(key, kind, where the value is, its length) of all leaves below the page there, in order."""
        _, kind, count, _ = _PAGE.unpack_from(self._bytes, at)
        first = at + _PAGE.size
        if kind == _BRANCH and depth < _DEPTH_MAX:
            for each in range(first, first + count * _BRANCH_ELEMENT.size, _BRANCH_ELEMENT.size):
                _, _, page = _BRANCH_ELEMENT.unpack_from(self._bytes, each)
                yield from self._elements(page * self._page_bytes, depth + 1)
        elif kind == _LEAF:
            for each in range(first, first + count * _LEAF_ELEMENT.size, _LEAF_ELEMENT.size):
                flags, distance, key_length, length = _LEAF_ELEMENT.unpack_from(self._bytes, each)
                value_at = each + distance + key_length
                if value_at + length > len(self._bytes):
                    raise ValueError(f"an element of the page at {at} goes beyond its end")
                yield self._bytes[each + distance : value_at], flags, value_at, length
        else:
            raise ValueError(f"the page at {at} is of no known kind ({kind})")

    # ---------------------------------------------------------------- protobuf

    def _record(self, at: int, length: int) -> tuple[_Where, str]:
        """An mvccpb.KeyValue: 1 key, 2 create_revision, 3 mod_revision, 4 version, 5 value, 6 lease."""
        end = at + length
        numbers = {2: 0, 3: 0, 4: 0, 6: 0}
        parts = {1: (at, 0), 5: (at, 0)}
        while at < end:
            tag, at = self._varint(at)
            number, at = self._varint(at)
            if tag & 7 == 0 and tag >> 3 in numbers:
                numbers[tag >> 3] = number
            elif tag & 7 == 2 and tag >> 3 in parts:
                parts[tag >> 3] = (at, number)
                at += number
            else:
                raise ValueError(f"the record that ends at {end} has an unknown field {tag >> 3}")
        if at != end:
            raise ValueError(f"the record that ends at {end} is cut off")
        (key_at, key_length), (value_at, value_length) = parts[1], parts[5]
        key = self._bytes[key_at : key_at + key_length].decode()
        return _Where(numbers[2], numbers[3], numbers[6], value_at, value_length), key

    def _varint(self, at: int) -> tuple[int, int]:
        """(number, where it ends)."""
        number = shift = 0
        while True:
            byte = self._bytes[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, at
            shift += 7
            if shift > 63:
                raise ValueError(f"no number ends at {at}")


def _fnv(data: bytes) -> int:
    """FNV-1a of 64 bits."""
    number, prime = _FNV
    for byte in data:
        number = (number ^ byte) * prime & 0xFFFFFFFFFFFFFFFF
    return number
