"""A small HTTP server on trio that serves one file, or several by their paths, and misbehaves as told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11
import trio


@dataclass
class Asked:
    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int | None:
        text = self.headers.get("range", "")
        return int(text.removeprefix("bytes=").rstrip("-")) if text else None


@dataclass
class Answer:
    """`cut` bytes of the body are sent, then the connection is closed, or reset."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    reset: bool = False
    announced: int | None = None  # a Content-Length that is not the body's
    pause_s: float = 0.0


@dataclass
class Web:
    data: bytes = b""
    files: dict[str, bytes] | None = None  # by path; anything else is 404
    etag: str = '"v1"'
    ranges: bool = True
    asked: list[Asked] = field(default_factory=list)
    answers: list[Callable[[Asked], Answer]] = field(default_factory=list)  # for the first requests
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def whole(self, asked: Asked) -> Answer:
        """As a good server: ranges, If-Range, 416."""
        data = self.data if self.files is None else self.files.get(asked.path.partition("?")[0])
        if data is None:
            return Answer(404)
        start, same = asked.start, asked.headers.get("if-range", self.etag) == self.etag
        headers = {"etag": self.etag} if self.etag else {}
        if start is None or not self.ranges or not same:
            return Answer(200, headers, data)
        size = len(data)
        if start >= size:
            return Answer(416, headers | {"content-range": f"bytes */{size}"})
        headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
        return Answer(206, headers, data[start:])

    def cut_after(self, count: int, *, reset: bool = False) -> Callable[[Asked], Answer]:
        def answer(asked: Asked) -> Answer:
            good = self.whole(asked)
            good.cut, good.reset = count, reset
            return good

        return answer

    async def handle(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while await self.one(connection, stream):
                    connection.start_next_cycle()
            except (trio.BrokenResourceError, h11.ProtocolError):
                pass

    async def one(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        asked = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                headers = {name.decode(): value.decode() for name, value in event.headers}
                asked = Asked(event.target.decode(), headers)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                return False
        assert asked is not None
        self.asked.append(asked)
        answer = self.answers.pop(0)(asked) if self.answers else self.whole(asked)
        length = len(answer.body) if answer.announced is None else answer.announced
        headers = [(name, value) for name, value in answer.headers.items()]
        if not any(name == "transfer-encoding" for name, _ in headers):
            headers.append(("content-length", str(length)))
        head = h11.Response(status_code=answer.status, headers=headers)
        body = answer.body if answer.cut is None else answer.body[: answer.cut]
        await stream.send_all(connection.send(head) or b"")
        if body:
            await stream.send_all(connection.send(h11.Data(data=body)) or b"")
        await trio.sleep(answer.pause_s)
        if answer.cut is not None or answer.announced is not None:
            if answer.reset:
                import socket
                import struct

                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        return connection.our_state is h11.DONE


@asynccontextmanager
async def serving(data: bytes = b"", **options: object) -> AsyncIterator[Web]:
    web = Web(data, **options)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        web.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, web.handle, listeners)
        try:
            yield web
        finally:
            nursery.cancel_scope.cancel()
