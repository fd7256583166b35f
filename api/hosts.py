"""The cluster's hosts: tokens that let new ones in, who is there, and putting one out."""

from __future__ import annotations

import secrets

import msgspec

from api import format, schemas_hosts
from api.decode import BodyDecoder
from api.http import Call, Reply, Route
from peer.state import enrol as records
from peer.state.command import DrainedHost, DrainHost
from peer.state.enrol import CreateJoinToken, HostView, ListHosts, NewJoinToken, Revocation, RevokeHost

_encode = msgspec.json.Encoder().encode
_decode_create = BodyDecoder(schemas_hosts.CreateJoinToken)


async def create_token(call: Call) -> Reply:
    body = _decode_create(call.body or b"{}")
    secret = secrets.token_hex(16)
    made: NewJoinToken = await call.api.cluster.call(
        CreateJoinToken(
            token_id=secrets.token_hex(6),
            secret_sha256=records.digest(secret),
            ttl_s=body.ttl_s,
            voter=body.voter,
            created_by=call.caller.owner,
        )
    )
    answer = schemas_hosts.JoinToken(
        token=records.token_text(made.token.token_id, secret, made.ca_sha256),
        token_id=made.token.token_id,
        expires_at=format.timestamp(made.token.expires_at),
        voter=made.token.voter,
    )
    return Reply(_encode(answer), 201)


def view(found: HostView) -> schemas_hosts.Host:
    host, revocation = found.host, found.revocation
    return schemas_hosts.Host(
        peer_id=found.peer_id,
        status=found.status,
        voter=host.voter if host is not None else None,
        addresses=host.addresses if host is not None else (),
        enrolled_at=format.timestamp_or_none(host.enrolled_at if host is not None else None),
        certificate_expires_at=format.timestamp_or_none(host.expires_at if host is not None else None),
        revoked_at=format.timestamp_or_none(revocation.revoked_at if revocation is not None else None),
        draining=found.draining,
        models=found.models,
        tasks=found.tasks,
    )


async def list_hosts(call: Call) -> Reply:
    found: tuple[HostView, ...] = await call.api.cluster.call(ListHosts())
    return Reply(_encode(schemas_hosts.HostList(hosts=[view(each) for each in found], total=len(found))))


async def revoke(call: Call) -> Reply:
    revoked: Revocation = await call.api.cluster.call(
        RevokeHost(name=call.args[0], revoked_by=call.caller.owner)
    )
    answer = schemas_hosts.RevokedHost(peer_id=revoked.peer_id, revoked_at=format.timestamp(revoked.revoked_at))
    return Reply(_encode(answer))


async def drain(call: Call) -> Reply:
    return await _drain(call, undo=False)


async def undo_drain(call: Call) -> Reply:
    return await _drain(call, undo=True)


async def _drain(call: Call, *, undo: bool) -> Reply:
    drained: DrainedHost = await call.api.cluster.call(
        DrainHost(name=call.args[0], undo=undo, by=call.caller.owner)
    )
    return Reply(_encode(schemas_hosts.DrainedHost(peer_id=drained.peer_id, draining=drained.draining)))


ROUTES = (
    Route(
        "POST",
        "/cluster/tokens",
        create_token,
        "admin",
        "Make a one-time token that lets a host join",
        schemas_hosts.JoinToken,
        201,
        body=schemas_hosts.CreateJoinToken,
        body_optional=True,
        errors=(409,),
        description="409 where there is no cluster to join.",
    ),
    Route(
        "GET",
        "/cluster/hosts",
        list_hosts,
        "read",
        "All hosts of the cluster, and the revoked ones",
        schemas_hosts.HostList,
        description="A host that is alone is in no cluster: then there are none.",
    ),
    Route(
        "DELETE",
        "/cluster/hosts/{name}",
        revoke,
        "admin",
        "Put a host out of the cluster at once",
        schemas_hosts.RevokedHost,
        errors=(404, 409),
        description="By its peer_id, or by its host name if only one host has it. 409 for the host that leads.",
    ),
    Route(
        "POST",
        "/cluster/hosts/{name}/drain",
        drain,
        "admin",
        "Empty a host: models and tasks move away, and none come",
        schemas_hosts.DrainedHost,
        errors=(404, 409),
        description="Models are loaded elsewhere before they leave. `GET /cluster/hosts` shows what is left. "
        "409 where there is no other host.",
    ),
    Route(
        "DELETE",
        "/cluster/hosts/{name}/drain",
        undo_drain,
        "admin",
        "Take a host back into use",
        schemas_hosts.DrainedHost,
        errors=(404,),
    ),
)
