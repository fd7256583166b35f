"""An operator's actions on a running cluster: handing the leadership over, a new key for gossip."""

from __future__ import annotations

import msgspec

from api import schemas_operations as schemas
from api.decode import BodyDecoder
from api.http import Call, Reply, Route
from peer.state.command import ClusterStatus, GetStatus, Led, TransferLeadership
from peer.state.member import Member, load_of

_encode = msgspec.json.Encoder().encode
_decode_rotate = BodyDecoder(schemas.RotateGossipKey)


async def transfer(call: Call) -> Reply:
    """Asked with the epoch that is to end: however often it reaches a leader, the leadership moves once."""
    before: ClusterStatus = await call.api.cluster.call(GetStatus())
    now: Led = await call.api.cluster.call(TransferLeadership(epoch=before.epoch))
    answer = schemas.Leadership(
        leader=now.peer_id, epoch=now.epoch, previous=before.leader, moved=now.peer_id != before.leader
    )
    return Reply(_encode(answer))


def member_view(member: Member) -> schemas.GossipMember:
    tags, load = member.tags, load_of(member.tags)
    return schemas.GossipMember(
        peer_id=member.peer_id,
        status=member.status,
        role=tags.get("role", ""),
        epoch=tags.get("epoch", ""),
        voter=tags.get("voter") == "1",
        api=tags.get("api", ""),
        version=tags.get("version", ""),
        workers=load.workers if load is not None else None,
        workers_up=load.up if load is not None else None,
        slots=load.slots if load is not None else None,
        running=load.running if load is not None else None,
        queued=load.queued if load is not None and tags.get("role") == "leader" else None,
    )


async def gossip(call: Call) -> Reply:
    found = sorted(call.api.cluster.gossip(), key=lambda member: member.peer_id)
    return Reply(_encode(schemas.Gossip(members=[member_view(each) for each in found], total=len(found))))


async def rotate_gossip_key(call: Call) -> Reply:
    body = _decode_rotate(call.body or b"{}")
    rotated = await call.api.cluster.rotate_gossip_key(force=body.force)
    return Reply(_encode(schemas.GossipKeyRotated(members=rotated.members, removed=rotated.removed)))


ROUTES = (
    Route(
        "GET",
        "/cluster/gossip",
        gossip,
        "read",
        "Who is there and how busy, by gossip",
        schemas.Gossip,
        description="A hint, answered also while nobody leads.",
    ),
    Route(
        "POST",
        "/cluster/leadership/transfer",
        transfer,
        "admin",
        "Hand the leadership over to another peer",
        schemas.Leadership,
        errors=(409,),
        description="Answered when somebody leads again. 409 where nobody else could lead.",
    ),
    Route(
        "POST",
        "/cluster/gossip-key",
        rotate_gossip_key,
        "admin",
        "Give gossip a new key",
        schemas.GossipKeyRotated,
        body=schemas.RotateGossipKey,
        body_optional=True,
        errors=(409,),
        description=(
            "409 while a host is away, or a revoked one still there. 503 `rotation_incomplete` if some member did not"
            " do its part: gossip goes on, and the same request again completes it."
        ),
    ),
)
