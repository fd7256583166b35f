"""Calls of one etcd member by its JSON gateway, and what its errors mean.

In the gateway's JSON 64-bit integers are text, keys and values base64, and fields with their zero value are left out:
the records below decode all of it (int from text, bytes from base64, defaults).

A write that failed is one of three things (etcdserver/v3_server.go, apply/quota.go, raft's node.go):

    it has no effect      refused before it was proposed: no leader, too many requests, proposal dropped, too large,
                          too many operations, unknown lease, a learner
    it is undecided       it was proposed, and the wait for its application ended: request timed out (whatever the
                          reason added), leader changed, server stopped, deadline exceeded; and anything not known here
    it may have effect,   "database space exceeded": a member that crosses its quota applies the transaction and then
    but will not later    answers so all the same. Nothing is under way any more: reading the keys tells. Ambiguous,
                          with code `store_full`

A read that failed is Unavailable, whatever the reason.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec

from peer import limits
from peer.adapters.stores.etcd_http import Answer, HttpPool, Lines, NoAnswer, NotSent, TooLong
from peer.adapters.stores.fenced_commits import STORE_FULL
from peer.errors import (
    Ambiguous,
    BitinglipError,
    Compacted,
    Conflict,
    NotFound,
    StoreBroken,
    StoreError,
    TooLarge,
    Unavailable,
)

_NO_EFFECT: Final = (
    "no leader",
    "not leader",
    "too many requests",
    "raft proposal dropped",
    "not supported for learner",
    "not capable",
    "unhealthy cluster",
)
_TOO_LARGE: Final = ("request is too large", "too many operations", "larger than max")
_CONFLICTS: Final = (
    "can only promote a learner",
    "not enough started members",
    "Peer URLs already exists",
    "member ID already exist",
    "too many learner",
    "bad leader transferee",
)
_INVALID: Final = 3  # gRPC's code: the request itself cannot be
_RETRY_S: Final = 1.0
_CHANGE_S_MAX: Final = 10.0  # of a change of the membership, which the whole cluster agrees on
_DEFRAGMENT_S_MAX: Final = 120.0

NO_SPACE: Final = "NOSPACE"  # a member's alarm: its file has reached the quota

T = TypeVar("T")


class AnswerTooLarge(Exception):
    """A read found more than one answer carries."""


# ------------------------------------------------------------------------------------------------ records


class Header(msgspec.Struct, frozen=True):
    revision: int = 0
    member_id: int = 0
    cluster_id: int = 0


class Member(msgspec.Struct, frozen=True):
    """Of the etcd cluster. One that was added and has not started yet has no name."""

    member_id: int = msgspec.field(name="ID", default=0)
    name: str = ""
    peer_urls: tuple[str, ...] = msgspec.field(name="peerURLs", default=())
    client_urls: tuple[str, ...] = msgspec.field(name="clientURLs", default=())
    is_learner: bool = msgspec.field(name="isLearner", default=False)


class Members(msgspec.Struct, frozen=True):
    members: tuple[Member, ...] = ()
    member: Member = Member()  # that was added
    header: Header = Header()


class Status(msgspec.Struct, frozen=True):
    """Of the member that is asked. `leader` 0: it knows none. Sizes in bytes."""

    version: str = ""
    db_bytes: int = msgspec.field(name="dbSize", default=0)
    db_bytes_in_use: int = msgspec.field(name="dbSizeInUse", default=0)
    leader: int = 0
    is_learner: bool = msgspec.field(name="isLearner", default=False)
    errors: tuple[str, ...] = ()
    header: Header = Header()


class _Alarm(msgspec.Struct, frozen=True):
    member_id: int = msgspec.field(name="memberID", default=0)
    alarm: str = "NONE"


class _Alarms(msgspec.Struct, frozen=True):
    alarms: tuple[_Alarm, ...] = ()


class _Version(msgspec.Struct, frozen=True):
    etcdserver: str = ""


class _StreamError(msgspec.Struct, frozen=True):
    message: str = ""
    code: int = 0
    grpc_code: int = 0


class _Failure(msgspec.Struct, frozen=True):
    """`error` is text in answers of one piece, a record in those that go on."""

    error: str | _StreamError = ""
    message: str = ""
    code: int = 0


# ------------------------------------------------------------------------------------------------ errors


def require_version(text: str) -> None:
    """Raises Conflict for an etcd that this product does not work with: 3.5.0 to 3.5.2 corrupt data in crashes."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise Conflict(f"the version of etcd cannot be told from {text!r}", code="store_version")
    version = tuple(int(part) for part in found.groups())
    if (3, 5, 0) <= version < (3, 5, 3):
        raise Conflict(
            f"etcd {found[0]} may lose or corrupt data when it crashes: install 3.5.3 or newer, or 3.4",
            code="store_version",
        )
    if not (3, 4, 0) <= version < (4, 0, 0):
        raise Conflict(f"etcd {found[0]} is not supported: 3.4, or 3.5.3 and newer", code="store_version")


def failure(status: int, body: bytes, *, writes: bool) -> BitinglipError | AnswerTooLarge:
    """What an answer with an error means. `writes`: the request may have changed something."""
    message, code = f"HTTP status {status}", 0
    try:
        said = msgspec.json.decode(body, type=_Failure)
    except msgspec.DecodeError:
        if status == 404:  # not of the gateway: those are JSON
            return StoreError("what answers has no JSON gateway under /v3: is it etcd 3.4 or newer?")
    else:
        error = said.error
        if isinstance(error, _StreamError):
            message, code = error.message, error.code or error.grpc_code
        else:
            message, code = said.message or error or message, said.code
    return _meaning(message, code, writes)


def _meaning(message: str, code: int, writes: bool) -> BitinglipError | AnswerTooLarge:
    text = f"etcd: {message.removeprefix('etcdserver: ')}"
    if "requested lease not found" in message or "member not found" in message:
        return NotFound(text)
    if "has been compacted" in message:
        return Compacted(text)
    if "corrupt cluster" in message:
        return StoreBroken(text)
    if any(each in message for each in _NO_EFFECT):
        return Unavailable(text, retry_after_s=_RETRY_S)
    if any(each in message for each in _CONFLICTS):
        return Conflict(text)
    if any(each in message for each in _TOO_LARGE):
        return TooLarge(text) if writes else AnswerTooLarge(text)
    if "database space exceeded" in message and writes:
        return Ambiguous(text, code=STORE_FULL, retry_after_s=5.0)
    if code == _INVALID:
        return StoreError(text)
    return Ambiguous(text) if writes else Unavailable(text, retry_after_s=_RETRY_S)


# ------------------------------------------------------------------------------------------------ calls


class EtcdClient:
    """One member's gateway at `unix:PATH` or `HOST:PORT`. Needs no nursery; many tasks may call at once."""

    def __init__(self, address: str, *, call_s_max: float = limits.STORE_CALL_S_MAX) -> None:
        self.address = address
        self.call_s_max = call_s_max
        self._pool = HttpPool(address)
        self.closed = False

    def close(self) -> None:
        """Calls under way end as if the member had gone; later ones raise Unavailable."""
        self.closed = True
        self._pool.close()

    async def call(
        self,
        path: str,
        request: Any,
        decoder: msgspec.json.Decoder[T],
        *,
        writes: bool,
        timeout_s: float | None = None,
    ) -> T:
        """POST `request` as JSON to /v3/`path`. Raises as `failure` says, Unavailable, and Ambiguous if `writes`."""
        answer = await self._exchange("POST", f"/v3/{path}", msgspec.json.encode(request), writes, timeout_s)
        if answer.status != 200:
            raise failure(answer.status, answer.body, writes=writes)
        try:
            return decoder.decode(answer.body)
        except msgspec.DecodeError as error:
            raise StoreError(f"etcd's answer to {path} is not understood: {error}") from error

    async def _exchange(
        self, method: str, path: str, body: bytes, writes: bool, timeout_s: float | None
    ) -> Answer:
        if self.closed:
            raise Unavailable("the store is closed")
        try:
            return await self._pool.call(method, path, body, timeout_s or self.call_s_max)
        except NotSent as error:
            raise Unavailable(f"the store is not reached: {error}", retry_after_s=_RETRY_S) from error
        except NoAnswer as error:
            if isinstance(error, TooLong) and not writes:
                raise AnswerTooLarge(str(error)) from error
            if writes:
                raise Ambiguous(f"the store has not answered: {error}") from error
            raise Unavailable(f"the store has not answered: {error}", retry_after_s=_RETRY_S) from error

    @asynccontextmanager
    async def stream(self, path: str, request: Any) -> AsyncIterator[Lines]:
        """The lines of an answer that goes on. Raises as `call` does for a read."""
        if self.closed:
            raise Unavailable("the store is closed")
        body = msgspec.json.encode(request)
        try:
            async with self._pool.stream(f"/v3/{path}", body, self.call_s_max) as (status, lines):
                if status != 200:
                    line = await anext(lines)
                    raise failure(status, line, writes=False)
                yield lines
        except (NotSent, NoAnswer) as error:
            reason = "the store is closed" if self.closed else f"the store's answers have ended: {error}"
            raise Unavailable(reason, retry_after_s=_RETRY_S) from error

    # ---------------------------------------------------------------- the member

    async def version(self) -> str:
        """Of the member that answers. Raises Unavailable."""
        answer = await self._exchange("GET", "/version", b"", False, None)
        try:
            return msgspec.json.decode(answer.body, type=_Version).etcdserver
        except msgspec.DecodeError as error:
            raise StoreError(f"what answers at {self.address} is not etcd") from error

    async def status(self) -> Status:
        """Of this very member, asked alone. Raises Unavailable."""
        return await self.call("maintenance/status", {}, _STATUS, writes=False)

    async def move_leader(self, member_id: int) -> None:
        """Only the leader's own member does it. Raises Conflict, Unavailable, Ambiguous."""
        request = {"targetID": str(member_id)}
        await self.call(
            "maintenance/transfer-leadership", request, _ANY, writes=True, timeout_s=_CHANGE_S_MAX
        )

    # ---------------------------------------------------------------- members, one change at a time

    async def members(self) -> tuple[Member, ...]:
        """As this member knows them: it may lag behind a change. Raises Unavailable."""
        return (await self.call("cluster/member/list", {}, _MEMBERS, writes=False)).members

    async def add_learner(self, peer_urls: Sequence[str]) -> tuple[Member, tuple[Member, ...]]:
        """The new member and all of them: what it needs to start, with state `existing`.

        For some seconds after a change etcd refuses the next one (Unavailable). Raises Conflict (known already, or
        another learner is there), Unavailable, Ambiguous: then `members` tells.
        """
        request = {"peerURLs": list(peer_urls), "isLearner": True}
        done = await self.call("cluster/member/add", request, _MEMBERS, writes=True, timeout_s=_CHANGE_S_MAX)
        return done.member, done.members

    async def promote(self, member_id: int) -> tuple[Member, ...]:
        """Make a learner a voter. Raises Conflict while it has not caught up, NotFound, Unavailable, Ambiguous."""
        request = {"ID": str(member_id)}
        done = await self.call(
            "cluster/member/promote", request, _MEMBERS, writes=True, timeout_s=_CHANGE_S_MAX
        )
        return done.members

    async def update(self, member_id: int, peer_urls: Sequence[str]) -> tuple[Member, ...]:
        """It is to be reached there from now on. Raises Conflict for a URL of another member, NotFound, Unavailable,
        Ambiguous: may be repeated."""
        request = {"ID": str(member_id), "peerURLs": list(peer_urls)}
        done = await self.call(
            "cluster/member/update", request, _MEMBERS, writes=True, timeout_s=_CHANGE_S_MAX
        )
        return done.members

    async def remove(self, member_id: int) -> tuple[Member, ...]:
        """Raises Conflict or Unavailable where quorum would go, NotFound, Ambiguous."""
        request = {"ID": str(member_id)}
        done = await self.call(
            "cluster/member/remove", request, _MEMBERS, writes=True, timeout_s=_CHANGE_S_MAX
        )
        return done.members

    # ---------------------------------------------------------------- space

    async def compact(self, revision: int, *, physical: bool = False) -> None:
        """Forget history up to this revision; `physical`: return when the space is free. Raises Compacted if it was."""
        request = {"revision": str(revision), "physical": physical}
        await self.call("kv/compaction", request, _ANY, writes=True, timeout_s=_CHANGE_S_MAX)

    async def defragment(self) -> None:
        """Give this member's free space back to the disk. It serves nothing meanwhile."""
        await self.call("maintenance/defragment", {}, _ANY, writes=True, timeout_s=_DEFRAGMENT_S_MAX)

    async def alarms(self) -> tuple[tuple[int, str], ...]:
        """(member, "NOSPACE" or "CORRUPT"). Raises Unavailable."""
        found = await self.call("maintenance/alarm", {"action": "GET"}, _ALARMS, writes=False)
        return tuple((each.member_id, each.alarm) for each in found.alarms)

    async def disarm(self, member_id: int, alarm: str = NO_SPACE) -> None:
        """Let it write again: after space was made."""
        request = {"action": "DEACTIVATE", "memberID": str(member_id), "alarm": alarm}
        await self.call("maintenance/alarm", request, _ANY, writes=True, timeout_s=_CHANGE_S_MAX)


def decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """Of the gateway's JSON, where integers are text."""
    return msgspec.json.Decoder(kind, strict=False)


_ANY = decoder(dict[str, Any])
_STATUS = decoder(Status)
_MEMBERS = decoder(Members)
_ALARMS = decoder(_Alarms)
