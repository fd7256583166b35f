"""`peer.ports.Gossip` over the RPC of a Serf agent."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, cast

from peer.adapters.gossip.serf_rpc import Refused, SerfRpc, mended
from peer.errors import Unavailable
from peer.state.member import KeyReport, KeyStep, Member

TAGS_WAIT_S: Final = (
    0.3  # the agent refuses tags at once; that it has told the others takes it more than a second
)

_STATUSES: Final = frozenset({"alive", "leaving", "left", "failed"})


class SerfGossip:
    """Polls: members are compared by who asks. `name` is this peer's, as the agent knows it."""

    def __init__(self, name: str, rpc: SerfRpc) -> None:
        self._name = name
        self._rpc = rpc

    async def members(self) -> tuple[Member, ...]:
        return tuple(_members(await self._rpc.members()))

    async def set_tags(self, tags: Mapping[str, str]) -> None:
        """Returns when the agent has them. Raises ValueError for more than 512 bytes, Unavailable."""
        mine = next((each for each in await self.members() if each.peer_id == self._name), None)
        if mine is not None and mine.tags == tags:
            return
        delete = [tag for tag in (mine.tags if mine is not None else ()) if tag not in tags]
        try:
            await self._rpc.tags(tags, delete, TAGS_WAIT_S)
        except Refused as error:
            if "exceeds limit" in error.message:
                raise ValueError(f"tags {dict(tags)}: {error.message}") from error
            raise Unavailable(f"the gossip agent: {error.message}", retry_after_s=1.0) from error

    async def keys(self) -> KeyReport:
        return await self._rpc.list_keys()

    async def change_key(self, step: KeyStep) -> KeyReport:
        change = {
            "install": self._rpc.install_key,
            "use": self._rpc.use_key,
            "remove": self._rpc.remove_key,
        }[step.action]
        return await change(step.key)


def _members(found: list[dict[str, Any]]) -> Iterator[Member]:
    """What is not understood is left out: it was sent by other hosts."""
    for each in found:
        status, address = each.get("Status"), _address(each.get("Addr"))
        port = each.get("Port")
        if status in _STATUSES and address and isinstance(port, int):
            yield Member(
                peer_id=mended(str(each.get("Name"))),
                address=address,
                status=cast(Literal["alive", "leaving", "left", "failed"], status),
                tags={mended(str(k)): mended(str(v)) for k, v in (each.get("Tags") or {}).items()},
                port=port,
            )


def _address(packed: object) -> str:
    """Of 4 or 16 bytes; "" for anything else. IPv4 in IPv6 is IPv4."""
    if isinstance(packed, str):
        packed = packed.encode("utf-8", "surrogateescape")
    if not isinstance(packed, bytes) or len(packed) not in (4, 16):
        return ""
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
