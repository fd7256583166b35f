"""Serf's RPC: msgpack over TCP on loopback, no framing.

A request is a map {Command, Seq} and, for some commands, a map after it; so is an answer: {Seq, Error}, then a body
where the command has one. Requests on one connection are answered one after the other, and one that takes long (join,
keys) holds up those behind it: such ones get a connection of their own. The agent closes a connection whose request it
does not understand. Text from other hosts may be any bytes: it is decoded with surrogate escapes, then mended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgpack
import trio

from peer.errors import Unavailable
from peer.state.member import KeyReport

CALL_S_MAX: Final = 2.0
JOIN_S_MAX: Final = 15.0
KEYS_S_MAX: Final = 20.0  # a query to all members: Serf waits for them some seconds
LEAVE_S_MAX: Final = 10.0
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
RECV_BYTES: Final = 64 * 1024

_VERSION: Final = 1
_BODIES: Final = frozenset(
    {"members", "stats", "join", "install-key", "use-key", "remove-key", "list-keys", "get-coordinate"}
)
_BODILESS_ERRORS: Final = ("Handshake required", "Authentication required", "Unsupported command")


class Refused(Exception):
    """The agent has answered with an error. `body` is what came with it."""

    def __init__(self, message: str, body: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.message = message
        self.body = body


class SerfRpc:
    """One agent's RPC. `call` uses a kept connection; needs no nursery."""

    def __init__(self, host: str, port: int, auth_key: str) -> None:
        self._host = host
        self._port = port
        self._auth_key = auth_key
        self._kept: _Connection | None = None
        self._turn = trio.Lock()

    async def aclose(self) -> None:
        """Close the kept connection; it is made anew when it is wanted."""
        await trio.lowlevel.checkpoint()
        self._drop()

    async def call(self, command: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A command that is answered at once. Raises Refused, Unavailable."""
        async with self._turn:
            done = False
            try:
                with trio.move_on_after(CALL_S_MAX):
                    if self._kept is None or self._kept.ended():
                        self._drop()
                        self._kept = await self._open()
                    try:
                        answer = await self._kept.ask(command, body)
                    except Refused:
                        done = True
                        raise
                    done = True
                    return answer
            finally:
                if not done:  # an answer that comes later would be taken for the next one's
                    self._drop()
        raise Unavailable(f"the gossip agent has not answered within {CALL_S_MAX:g} s", retry_after_s=1.0)

    async def call_alone(
        self, command: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> dict[str, Any] | None:
        """A command on a connection of its own; None if it was sent and takes longer than that: it goes on.

        Raises Refused, Unavailable.
        """
        connection, sent = None, False
        try:
            with trio.move_on_after(timeout_s):
                connection = await self._open()
                await connection.send(command, body)
                sent = True
                return await connection.answer(command)
        finally:
            if connection is not None:
                connection.close()
        if not sent:
            raise Unavailable(f"the gossip agent has not answered within {timeout_s:g} s", retry_after_s=1.0)
        return None

    # ---------------------------------------------------------------- commands

    async def members(self) -> list[dict[str, Any]]:
        """As the agent tells of them. Raises Unavailable."""
        try:
            answer = await self.call("members")
        except Refused as error:
            raise Unavailable(f"the gossip agent: {error.message}") from error
        return list(answer.get("Members") or ())

    async def stats(self) -> dict[str, dict[str, str]]:
        """Raises Unavailable."""
        try:
            return await self.call("stats")
        except Refused as error:
            raise Unavailable(f"the gossip agent: {error.message}") from error

    async def join(self, addresses: Sequence[str]) -> int:
        """How many of these (`host:port`) were joined. Raises Unavailable if none could be."""
        body = {"Existing": list(addresses), "Replay": False}
        try:
            answer = await self.call_alone("join", body, JOIN_S_MAX)
        except Refused as error:
            raise Unavailable(error.message.strip(), retry_after_s=1.0) from error
        if answer is None:
            raise Unavailable(f"joining has not ended within {JOIN_S_MAX:g} s", retry_after_s=1.0)
        return int(answer.get("Num", 0))

    async def leave(self) -> None:
        """Leave politely; the agent's process ends. Raises Unavailable."""
        await self._plain("leave", None, LEAVE_S_MAX)

    async def force_leave(self, name: str) -> None:
        """Call a failed member left. Unknown ones are ignored. Raises Unavailable."""
        await self._plain("force-leave", {"Node": name}, LEAVE_S_MAX)

    async def tags(self, tags: Mapping[str, str], delete: Sequence[str], wait_s: float) -> None:
        """Set these and delete those. The agent has them at once and answers when it has told others, which is waited
        for no longer than `wait_s`. Raises Refused (too large), Unavailable.
        """
        await self.call_alone("tags", {"Tags": dict(tags), "DeleteTags": list(delete)}, wait_s)

    async def install_key(self, key: str) -> KeyReport:
        """Every member can then read what is encrypted with it (base64 of 32 bytes). Raises Unavailable."""
        return await self._keys("install-key", key)

    async def use_key(self, key: str) -> KeyReport:
        """Every member encrypts with it from now on; it was installed. Raises Unavailable."""
        return await self._keys("use-key", key)

    async def remove_key(self, key: str) -> KeyReport:
        """Not the one in use. Raises Unavailable."""
        return await self._keys("remove-key", key)

    async def list_keys(self) -> KeyReport:
        """Raises Unavailable."""
        return await self._keys("list-keys", "")

    async def _plain(self, command: str, body: Mapping[str, Any] | None, timeout_s: float) -> None:
        try:
            await self.call_alone(command, body, timeout_s)
        except Refused as error:
            raise Unavailable(f"the gossip agent: {error.message}") from error

    async def _keys(self, command: str, key: str) -> KeyReport:
        error = ""
        try:
            answer = await self.call_alone(command, {"Key": key} if key else None, KEYS_S_MAX)
        except Refused as refused:
            answer, error = dict(refused.body), refused.message
        if answer is None:
            raise Unavailable(f"not all members have answered about their keys within {KEYS_S_MAX:g} s")
        return KeyReport(
            nodes=int(answer.get("NumNodes", 0)),
            answered=int(answer.get("NumResp", 0)),
            failed=int(answer.get("NumErr", 0)),
            messages={mended(name): mended(text) for name, text in (answer.get("Messages") or {}).items()},
            keys=answer.get("Keys") or {},
            error=error,
        )

    # ---------------------------------------------------------------- connections

    async def _open(self) -> _Connection:
        try:
            stream = await trio.open_tcp_stream(self._host, self._port)
        except OSError as error:
            raise Unavailable(f"the gossip agent does not answer: {error}", retry_after_s=1.0) from error
        connection = _Connection(stream)
        try:
            await connection.ask("handshake", {"Version": _VERSION})
            await connection.ask("auth", {"AuthKey": self._auth_key})
        except Refused as error:
            connection.close()
            raise Unavailable(f"what answers for the gossip agent refuses us: {error.message}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


class _Connection:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._seq = 0
        self._unpacker = msgpack.Unpacker(
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=False,
            max_buffer_size=ANSWER_BYTES_MAX,
        )

    def ended(self) -> bool:
        return self._stream.socket.fileno() < 0

    def close(self) -> None:
        self._stream.socket.close()

    async def ask(self, command: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        await self.send(command, body)
        return await self.answer(command)

    async def send(self, command: str, body: Mapping[str, Any] | None) -> None:
        self._seq += 1
        parts: list[Mapping[str, Any]] = [{"Command": command, "Seq": self._seq}]
        if body is not None:
            parts.append(body)
        data = b"".join(
            msgpack.packb(part, use_bin_type=False, unicode_errors="surrogateescape") for part in parts
        )
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unavailable("the gossip agent has closed its connection", retry_after_s=1.0) from error

    async def answer(self, command: str) -> dict[str, Any]:
        header = await self._object()
        if header.get("Seq") != self._seq:
            raise Unavailable(f"the gossip agent answers {header.get('Seq')}, not {self._seq}")
        error = mended(str(header.get("Error") or ""))
        has_body = command in _BODIES and error not in _BODILESS_ERRORS
        body = await self._object() if has_body else {}
        if error:
            raise Refused(error, body)
        return body

    async def _object(self) -> dict[str, Any]:
        while True:
            try:
                found = next(self._unpacker, None)
            except (ValueError, msgpack.UnpackException) as error:
                raise Unavailable(f"the gossip agent sends what is not msgpack: {error}") from error
            if isinstance(found, dict):
                return found
            if found is not None:
                raise Unavailable(f"the gossip agent sends {type(found).__name__} where a map is due")
            await self._receive()

    async def _receive(self) -> None:
        try:
            data = await self._stream.receive_some(RECV_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self.close()
            raise Unavailable("the gossip agent has closed its connection", retry_after_s=1.0)
        try:
            self._unpacker.feed(bytes(data))
        except msgpack.BufferFull as error:
            raise Unavailable(f"the gossip agent answers more than {ANSWER_BYTES_MAX} bytes") from error


def mended(text: str) -> str:
    """Text that can be encoded: bytes that were not UTF-8 become the replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
