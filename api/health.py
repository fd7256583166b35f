"""Whether this peer lives, and serves."""

from __future__ import annotations

import msgspec

from api import format, schemas
from api.http import Call, Reply, Route
from peer.errors import Unavailable
from peer.version import VERSION

_encode = msgspec.json.Encoder().encode
_OK = _encode(schemas.Probe(status="ok"))
_READY = _encode(schemas.Probe(status="ready"))


async def health(call: Call) -> Reply:
    reason = call.api.cluster.ready()
    if reason:
        raise Unavailable(f"The peer is not healthy: {reason}")
    wall = call.api.clock.wall()
    return Reply(_encode(schemas.Health(status="healthy", timestamp=format.timestamp(wall), version=VERSION)))


async def livez(call: Call) -> Reply:
    return Reply(_OK)


async def readyz(call: Call) -> Reply:
    """Anyone may ask, so the reason stays inside."""
    if call.api.stopping.is_set() or call.api.cluster.ready():
        raise Unavailable("Not ready", code="not_ready")
    return Reply(_READY)


ROUTES = (
    Route("GET", "/health", health, "read", "Health of this peer", schemas.Health, errors=(503,)),
    Route("GET", "/livez", livez, None, "Whether the process answers", schemas.Probe),
    Route("GET", "/readyz", readyz, None, "Whether requests are served", schemas.Probe, errors=(503,)),
)
