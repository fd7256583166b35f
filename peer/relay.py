"""Tokens between peers: the peer that runs an attempt gives its text to the peer whose client reads it, over a
connection of its own. The leader has nothing to do with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog
import trio

from peer import limits
from peer.errors import Unavailable
from peer.link import wire
from peer.link.session import Session
from peer.ports import Network
from peer.state.command import StreamToken
from peer.streams import Stream, StreamHub

log = structlog.get_logger("relay")


class Addresses(Protocol):
    """peer.membership.Membership"""

    def address(self, peer_id: str) -> str | None:
        """Of its link."""


class TokenRelay:
    """Both ends of it. At most limits.STREAMS_MAX attempts are given to other peers, and as many taken from them."""

    def __init__(self, peer_id: str, streams: StreamHub, network: Network, addresses: Addresses) -> None:
        self._peer_id = peer_id
        self._streams = streams
        self._network = network
        self._addresses = addresses
        self.given = 0
        self.taken = 0

    # ---------------------------------------------------------------- where the attempt runs

    async def serve(self, session: Session, follow: wire.Follow) -> None:
        """Give an attempt's text from its beginning, as it comes, until it gives no more or the reader goes.

        A reader that is slow gets more at a time; one that does not read is cut off, as in any session.
        """
        async with session.serve() as frames, trio.open_nursery() as nursery:
            nursery.start_soon(self._give, session, follow)
            try:
                async for frame in frames:
                    if isinstance(frame, wire.Bye):
                        session.end(frame.reason)
            except Unavailable as error:
                session.end(error.message)
            nursery.cancel_scope.cancel()

    async def _give(self, session: Session, follow: wire.Follow) -> None:
        try:
            if self.given >= limits.STREAMS_MAX:
                await session.put(wire.Refused(reason=f"{self.given} streams are read here already"))
                return
            self.given += 1
            try:
                async with self._streams.subscribe_attempt(follow.task_id, follow.attempt) as tokens:
                    async for token in tokens:
                        await session.put(token)
            finally:
                self.given -= 1
            await session.put(wire.Bye(reason=f"attempt {follow.attempt} gives no more"))
        except Unavailable as error:
            session.end(error.message)

    # ---------------------------------------------------------------- where the client is

    async def copy(self, peer_id: str, task_id: str, attempt: int, into: Stream) -> None:
        """Append what that peer's attempt gives, until it gives no more. Raises Unavailable; may be called again."""
        if peer_id == self._peer_id:
            async with self._streams.subscribe_attempt(task_id, attempt) as tokens:
                async for token in tokens:
                    _take(token, into)
            return
        address = self._addresses.address(peer_id)
        if address is None:
            raise Unavailable(f"it is not known where {peer_id} is")
        with self._one_more():
            session = Session(await self._network.dial(peer_id, address))
            async with session.serve() as frames:
                session.post(wire.Follow(task_id=task_id, attempt=attempt))
                async for frame in frames:
                    match frame:
                        case StreamToken():
                            _take(frame, into)
                        case wire.Bye():
                            return
                        case wire.Refused():
                            session.end(f"{peer_id} said: {frame.reason}")
        raise Unavailable(session.why, code="link_broken")

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        if self.taken >= limits.STREAMS_MAX:
            raise Unavailable(f"{self.taken} streams are read from other peers already")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def _take(token: StreamToken, into: Stream) -> None:
    if not into.take(token):
        raise Unavailable(f"tokens before {token.index} are missing", code="wire_error")
