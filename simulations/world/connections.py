"""One TCP connection between two simulated peers: two pipes, and a side at each end. What is modelled: network.py."""

from __future__ import annotations

import random
from collections import deque
from math import inf
from typing import Protocol

import trio

from peer import limits
from peer.errors import Unavailable
from simulations.world.kernel import World
from simulations.world.links import Links
from simulations.world.timers import Bell

BYTES_PER_S = 125e6
WINDOW_FRAMES = 4_096
RETRANSMIT_S = 0.2  # the first time, doubled each time
RETRANSMIT_S_MAX = 8.0
LETS_OTHERS_GO_FIRST = 0.2  # of the sends


class Fabric(Protocol):
    """What connections ask of the network."""

    world: World
    rng: random.Random
    links: Links

    def latency(self, source: str, target: str) -> float: ...
    def forget(self, connection: SimConnection) -> None: ...


class Pipe:
    """One direction of a connection. A frame of None is its end; one to arrive at infinity is stalled."""

    def __init__(self, fabric: Fabric, source: str, target: str, limit_s: float, window: int) -> None:
        self.source = source
        self.target = target
        self.limit_s = limit_s
        self.window = window
        self.frames: deque[tuple[float, bytes | None]] = deque()
        self.bytes = 0
        self.ended = False  # the source's end was sent
        self.gone = False  # nobody is at the target's side any more
        self.unacknowledged_since = inf
        self.readable = Bell()
        self.writable = Bell()
        self._fabric = fabric
        self._last_at = 0.0

    @property
    def break_at(self) -> float:
        return self.unacknowledged_since + self.limit_s

    def has_room(self) -> bool:
        return self.gone or (self.bytes < self.window and len(self.frames) < WINDOW_FRAMES)

    def push(self, frame: bytes | None) -> None:
        if self.ended:
            return
        self.ended = frame is None
        links = self._fabric.links
        forward = links.link(self.source, self.target)
        if not forward.is_open or not links.is_open(self.target, self.source):
            self.unacknowledged_since = min(self.unacknowledged_since, trio.current_time())
            self._fabric.world.count("net: frame into a cut link")
        if self.gone:  # one that waits for the reset is enough
            if not self.frames:
                self.frames.append((inf, b""))
            return
        size = 0 if frame is None else len(frame)
        at = inf
        if forward.is_open and not (self.frames and self.frames[-1][0] == inf):
            at = self._arrival(size)
            if at > trio.current_time() + self.limit_s:  # retransmitted too often
                at = inf
                self.unacknowledged_since = min(self.unacknowledged_since, trio.current_time())
        self.frames.append((at, frame))
        self.bytes += size
        if len(self.frames) == 1:
            self.readable.ring_by(at)

    def release(self) -> None:
        """The link is open again: what stalled is sent anew, when the backed-off timer gets to it."""
        if not (self.frames and self.frames[-1][0] == inf):
            return
        waited = min(trio.current_time() - self.unacknowledged_since, RETRANSMIT_S_MAX)
        self._last_at = max(
            self._last_at, trio.current_time() + self._fabric.rng.uniform(0.0, max(0.0, waited))
        )
        frames, self.frames = self.frames, deque()
        for at, frame in frames:
            size = 0 if frame is None else len(frame)
            self.frames.append((self._arrival(size) if at == inf else at, frame))
        self._fabric.world.count("net: stalled frames arrive")
        self.readable.ring()

    def drop(self, *, stalled_only: bool = False) -> None:
        kept = [each for each in self.frames if stalled_only and each[0] != inf]
        self.frames = deque(kept)
        self.bytes = sum(len(frame) for _, frame in kept if frame is not None)
        self.writable.ring()

    def _arrival(self, size: int) -> float:
        at = trio.current_time() + self._fabric.latency(self.source, self.target)
        self._last_at = max(at, self._last_at) + size / BYTES_PER_S
        return self._last_at


class SimConnection:
    """peer.ports.Connection: one side."""

    def __init__(
        self, fabric: Fabric, held: dict[SimConnection, None], peer_id: str, outgoing: Pipe, incoming: Pipe
    ) -> None:
        """`held`: what this side's process holds, this among it until it is over."""
        self.peer_id = peer_id
        self.over = ""  # why
        self.refused = False  # by the other side, before it was accepted
        self.accepted = trio.Event()
        self.other: SimConnection
        self._fabric = fabric
        self._held = held
        self._outgoing = outgoing
        self._incoming = incoming
        held[self] = None

    async def send(self, *frames: bytes) -> None:
        for frame in frames:
            await self._send(frame)

    async def _send(self, frame: bytes) -> None:
        world = self._fabric.world
        if not isinstance(frame, bytes) or len(frame) > limits.FRAME_BYTES_MAX:
            world.violated("port_contract", f"a frame of {len(frame)} bytes is sent by {self.other.peer_id}")
        if self._fabric.rng.random() < LETS_OTHERS_GO_FIRST:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        pipe = self._outgoing
        self._check()
        while not pipe.has_room():
            world.count("net: a send waits")
            await pipe.writable.wait(pipe.break_at)
            self._check()
        before = pipe.unacknowledged_since
        pipe.push(frame)
        if pipe.unacknowledged_since != before:
            self._incoming.readable.ring()  # its receiver has a deadline now
        if pipe.gone and self._fabric.links.both_open(pipe.source, pipe.target):
            self._reset_by_other()

    async def receive(self) -> bytes:
        pipe = self._incoming
        if self.over or (pipe.frames and pipe.frames[0][0] <= trio.current_time()):  # else it waits anyway
            await trio.lowlevel.checkpoint()
        while True:
            self._check()
            next_at = pipe.frames[0][0] if pipe.frames else inf
            if next_at <= trio.current_time():
                _, frame = pipe.frames.popleft()
                if frame is None:
                    self._finish(f"{self.peer_id} has ended the connection")
                    self._check()
                assert frame is not None
                pipe.bytes -= len(frame)
                pipe.writable.ring()
                return frame
            await pipe.readable.wait(min(next_at, self._outgoing.break_at))

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """What was sent goes on its way, but where something unread is left the kernel resets, which may lose it."""
        if self.over:
            return
        unread = any(at <= trio.current_time() and frame is not None for at, frame in self._incoming.frames)
        if unread and self._fabric.rng.random() < 0.5:
            self._fabric.world.count("net: a close loses frames")
            self._outgoing.drop()
        self._finish("this side has closed")

    def died(self, how: str) -> None:
        """Its process is no more."""
        if self.over:
            return
        if how == "power":
            self._outgoing.drop(stalled_only=True)
            self._outgoing.ended = True  # nothing more, not even an end
        elif self._fabric.rng.random() < 0.5:
            self._outgoing.drop(stalled_only=True)
        self._finish("the process has died")

    def reset(self) -> None:
        """Both sides are told at once that it is over."""
        for side in (self, self.other):
            side._incoming.drop()
            side._finish("reset", quiet=True)

    def links_changed(self) -> None:
        self._expire()
        pipe, links = self._outgoing, self._fabric.links
        if not links.is_open(pipe.source, pipe.target):
            if len(pipe.writable) > 0:  # a full window is probed, and the probes are not answered
                pipe.unacknowledged_since = min(pipe.unacknowledged_since, trio.current_time())
                pipe.writable.ring()
                self._incoming.readable.ring()
            return
        pipe.release()
        if links.is_open(pipe.target, pipe.source):
            pipe.unacknowledged_since = inf
            if pipe.gone and pipe.frames and not self.over:
                self._reset_by_other()

    def _check(self) -> None:
        self._expire()
        if self.over:
            raise Unavailable(f"connection to {self.peer_id}: {self.over}")

    def _expire(self) -> None:
        if trio.current_time() >= self._outgoing.break_at:
            self._outgoing.drop(stalled_only=True)
            self._outgoing.ended = True
            self._outgoing.unacknowledged_since = inf
            if not self.over:
                self._fabric.world.count("net: a connection times out")
                self._finish("not acknowledged for too long", quiet=True)

    def _reset_by_other(self) -> None:
        """It was sent to where nobody is any more: a reset comes back."""
        pipe = self._outgoing
        pipe.drop()
        back = self._incoming
        back.drop(stalled_only=True)
        back.ended = False
        back.push(None)

    def _finish(self, why: str, *, quiet: bool = False) -> None:
        """This side is over; unless `quiet`, the other is told in line with what was sent to it."""
        self.over = why
        if not quiet:
            self._outgoing.push(None)
        self._incoming.drop()
        self._incoming.gone = True
        self._incoming.readable.ring()
        self._outgoing.writable.ring()
        self._held.pop(self, None)
        if not self.other.accepted.is_set() and self._fabric.links.both_open(
            self.peer_id, self.other.peer_id
        ):
            self.other.refused = True
            self.other.accepted.set()
        if self.other.over:
            self._fabric.forget(self)
