"""Answers of a peer that reaches no leader: with `?stale=ok` a reader takes the last one that the peer had, marked."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from api import schemas
from api.http import Call, Param, Reply, query_choice
from peer.state.command import Query

_encode = msgspec.json.Encoder().encode

STALE = Param(
    "stale",
    Literal["ok"],
    "Where no leader can be reached, take this peer's last answer, marked by X-Bitinglip-Stale and `stale_seconds`",
)
STALE_HEADER = Param(
    "X-Bitinglip-Stale", int, "How old the answer is, in seconds; absent if it is the leader's own"
)


async def read(call: Call, query: Query) -> Any:
    """The cluster's answer, an old one only if the client takes it."""
    if query_choice(call.query, "stale", ("ok",)) is None:
        return await call.api.cluster.call(query)
    found, call.stale_s = await call.api.cluster.read(query)
    return found


def reply(call: Call, answer: schemas.Read) -> Reply:
    """200, marked if the answer is old."""
    if call.stale_s is None:
        return Reply(_encode(answer))
    answer.stale_seconds = round(call.stale_s, 3)
    return Reply(_encode(answer), headers=[(b"x-bitinglip-stale", b"%d" % math.ceil(call.stale_s))])
