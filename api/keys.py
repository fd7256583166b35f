"""API keys: made, listed, revoked. The secret leaves the peer once, in the answer that made it."""

from __future__ import annotations

import secrets

import msgspec
from msgspec import UNSET

from api import format, schemas
from api.decode import BodyDecoder
from api.http import Call, Reply, Route
from peer.errors import Conflict
from peer.state import command
from peer.state import key as keys
from peer.state.key import ApiKey

_encode = msgspec.json.Encoder().encode
_decode_create = BodyDecoder(schemas.CreateKey)


def view(call: Call, key: ApiKey) -> schemas.Key:
    return shown(key, *call.api.limits_of(key))


def shown(key: ApiKey, per_hour: int | None, per_minute: int | None) -> schemas.Key:
    """A key with the limits that hold for it."""
    return schemas.Key(
        key_id=key.key_id,
        owner=key.owner,
        scopes=key.scopes,
        created_at=format.timestamp(key.created_at),
        expires_at=format.timestamp_or_none(key.expires_at),
        revoked_at=format.timestamp_or_none(key.revoked_at),
        requests_per_hour=per_hour,
        requests_per_minute=per_minute,
    )


async def create(call: Call) -> Reply:
    body = _decode_create(call.body)
    wall = call.api.clock.wall()
    expires_at = None if body.expires_at is None else body.expires_at.timestamp()
    if expires_at is not None and expires_at <= wall:
        raise Conflict("expires_at lies in the past", code="expired", details={"field": "expires_at"})
    secret = secrets.token_hex(32)
    overrides = {
        name: value
        for name in ("requests_per_hour", "requests_per_minute")
        if (value := getattr(body, name)) is not UNSET
    }
    made: ApiKey = await call.api.cluster.call(
        command.CreateKey(
            key=ApiKey(
                key_id=secrets.token_hex(6),
                owner=body.owner,
                scopes=tuple(dict.fromkeys(body.scopes)),
                secret_sha256=keys.digest(secret),
                created_at=wall,
                expires_at=expires_at,
                **overrides,
            )
        )
    )
    answer = schemas.NewKey(**msgspec.structs.asdict(view(call, made)), key=keys.token(made.key_id, secret))
    location = (b"location", f"/keys/{made.key_id}".encode())
    return Reply(_encode(answer), 201, [location])


async def list_keys(call: Call) -> Reply:
    found: tuple[ApiKey, ...] = await call.api.cluster.call(command.ListKeys())
    return Reply(_encode(schemas.KeyList(keys=[view(call, key) for key in found], total=len(found))))


async def revoke(call: Call) -> Reply:
    revoked: ApiKey = await call.api.cluster.call(command.RevokeKey(key_id=call.args[0]))
    return Reply(_encode(view(call, revoked)))


ROUTES = (
    Route(
        "POST", "/keys", create, "admin", "Make an API key", schemas.NewKey, 201,
        body=schemas.CreateKey, errors=(409,),
    ),
    Route("GET", "/keys", list_keys, "admin", "All API keys, without their secrets", schemas.KeyList),
    Route("DELETE", "/keys/{key_id}", revoke, "admin", "Revoke an API key", schemas.Key, errors=(404, 409)),
)  # fmt: skip
