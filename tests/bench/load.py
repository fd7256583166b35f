"""A cheap HTTP/1.1 load client: one process, one thread, epoll, requests precomputed, closed loop.

Run as `python -m tests.bench.load`: a `Spec` as JSON on stdin, an `Outcome` as JSON on stdout. Each connection
sends its request, waits for the whole response, sends the next. A spec with `then` makes an exchange of two
requests: `{task_id}` in the second is what the first one's JSON body says. `marker` is the text whose first
arrival in the (last) response counts as the first byte. Bounded by `seconds` and `exchanges_max`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass, field

RECV_BYTES = 256 * 1024
RESPONSE_BYTES_MAX = 16 * 1024 * 1024
SAMPLES_MAX = 3  # wrong answers kept for the report
CONNECT_S = 10.0
EXCHANGES_MAX = 1_000_000

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
TASK_ID = re.compile(rb'"task_id" *: *"([^"]+)"')


@dataclass(frozen=True)
class Spec:
    """What to send, how often and how long. Requests are whole HTTP/1.1 requests as text."""

    port: int
    request: str
    then: str = ""
    marker: str = ""
    connections: int = 1
    seconds: float = 3.0
    warmup_s: float = 0.5
    exchanges_max: int = EXCHANGES_MAX
    grace_s: float = 5.0  # for answers that are out when the time is up; they are not counted
    statuses: tuple[int, ...] = (200, 201, 202)
    core: int | None = None


@dataclass
class Outcome:
    """Of the exchanges that ended well in the measured window. Latencies in milliseconds."""

    exchanges: int = 0
    total: int = 0  # well ended, warm-up and grace included: what the server has really done
    failed: int = 0
    unanswered: int = 0
    reconnects: int = 0
    window_s: float = 0.0
    per_s: float = 0.0
    latency_ms: dict[str, float] = field(default_factory=dict)
    first_byte_ms: dict[str, float] = field(default_factory=dict)
    client_cpu_s: float = 0.0
    bad: list[str] = field(default_factory=list)
    foreign: float = (
        0.0  # share of all cores that processes of others took meanwhile; told by who runs the load
    )


def summary(values: list[float]) -> dict[str, float]:
    """Mean and percentiles (nearest rank) of seconds, as milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    picked = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
    picked["mean"] = sum(ordered) / len(ordered)
    picked["max"] = ordered[-1]
    return {name: round(value * 1000.0, 4) for name, value in picked.items()}


def http_request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> str:
    """A whole keep-alive request; `Host` is loopback."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines) + "\r\n\r\n" + body.decode()


class Response:
    """Incremental: `feed` bytes until it says True. `body` is decoded from chunks."""

    __slots__ = ("_chunked", "_left", "_raw", "body", "close", "head", "status")

    def __init__(self) -> None:
        self._raw = b""
        self._left = -1
        self._chunked = False
        self.head = False
        self.close = False
        self.status = 0
        self.body = b""

    def feed(self, data: bytes) -> bool:
        if not self.head:
            self._raw += data
            end = self._raw.find(b"\r\n\r\n")
            if end < 0:
                return False
            head, data = self._raw[: end + 2], self._raw[end + 4 :]
            self._raw = b""
            self._read_head(head)
        if self._chunked:
            return self._feed_chunks(data)
        self.body += data
        return len(self.body) >= self._left

    def _read_head(self, head: bytes) -> None:
        self.head = True
        self.status = int(head[9:12])
        self.close = CLOSE.search(head) is not None
        if CHUNKED.search(head):
            self._chunked = True
            return
        length = LENGTH.search(head)
        self._left = int(length[1]) if length else 0

    def _feed_chunks(self, data: bytes) -> bool:
        self._raw += data
        at, raw, parts = 0, self._raw, []
        while (line := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:line].split(b";")[0], 16)
            end = line + 2 + size + 2
            if len(raw) < end:
                break
            parts.append(raw[line + 2 : end - 2])
            at = end
            if size == 0:
                self.body += b"".join(parts)
                return True
        if at:
            self._raw = raw[at:]
        self.body += b"".join(parts)
        if len(self.body) > RESPONSE_BYTES_MAX:
            raise ValueError(f"a response of more than {RESPONSE_BYTES_MAX} bytes")
        return False


class Connection:
    """One keep-alive connection and its exchange in progress."""

    __slots__ = ("began_s", "first_s", "response", "second", "sock")

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.response = Response()
        self.second = False
        self.began_s = 0.0
        self.first_s = 0.0

    def send(self, request: bytes, second: bool = False) -> None:
        """Requests are small: what a fresh or idle socket's buffer does not take at once is an error."""
        self.response = Response()
        self.second = second
        if not second:
            self.began_s = time.perf_counter()
            self.first_s = 0.0
        if self.sock.send(request) != len(request):
            raise OSError("the request did not fit the socket's buffer")


class Load:
    """Runs a spec."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._request = spec.request.encode()
        self._marker = spec.marker.encode()
        self._connections: dict[int, Connection] = {}
        self._poll = select.epoll()
        self._outcome = Outcome()
        self._latencies: list[float] = []
        self._firsts: list[float] = []
        self._open = True

    def run(self) -> Outcome:
        spec, outcome = self._spec, self._outcome
        for _ in range(spec.connections):
            self._connect()
        began = time.perf_counter()
        self._measure_from = began + spec.warmup_s
        self._measure_to = self._measure_from + spec.seconds
        for connection in self._connections.values():
            connection.send(self._request)
        self._pump(self._measure_to)
        ended = min(time.perf_counter(), self._measure_to)
        self._open = False
        self._pump(time.perf_counter() + spec.grace_s)
        outcome.unanswered = len(self._connections)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        outcome.client_cpu_s = round(usage.ru_utime + usage.ru_stime, 4)
        outcome.window_s = round(max(ended - self._measure_from, 1e-9), 4)
        outcome.exchanges = len(self._latencies)
        outcome.per_s = round(outcome.exchanges / outcome.window_s, 2)
        outcome.latency_ms = summary(self._latencies)
        outcome.first_byte_ms = summary(self._firsts)
        return outcome

    def _connect(self) -> Connection:
        connection = Connection(self._spec.port)
        number = connection.sock.fileno()
        self._connections[number] = connection
        self._poll.register(number, select.EPOLLIN)
        return connection

    def _drop(self, connection: Connection) -> None:
        number = connection.sock.fileno()
        self._poll.unregister(number)
        del self._connections[number]
        connection.sock.close()

    def _pump(self, until_s: float) -> None:
        while self._connections and (left := until_s - time.perf_counter()) > 0:
            if self._open and self._outcome.total >= self._spec.exchanges_max:
                return
            for number, _ in self._poll.poll(left, len(self._connections)):
                self._read(self._connections[number])

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:  # the server closed: an answer is lost unless none was due
            self._outcome.failed += 1
            self._again(connection, reconnect=True)
            return
        complete = connection.response.feed(data)
        last = connection.second or not self._spec.then
        if last and self._marker and not connection.first_s and self._marker in connection.response.body:
            connection.first_s = time.perf_counter()
        if complete:
            self._finish(connection, last)

    def _finish(self, connection: Connection, last: bool) -> None:
        now = time.perf_counter()
        response = connection.response
        if response.status not in self._spec.statuses or (last and self._marker and not connection.first_s):
            self._outcome.failed += 1
            if len(self._outcome.bad) < SAMPLES_MAX:
                self._outcome.bad.append(f"{response.status} {response.body[:300].decode(errors='replace')}")
        elif not last:
            found = TASK_ID.search(response.body)
            if found is None:
                raise ValueError(f"no task_id in {response.body[:200]!r}")
            connection.send(self._spec.then.replace("{task_id}", found[1].decode()).encode(), second=True)
            return
        else:
            self._outcome.total += 1
            if self._open and self._measure_from <= now <= self._measure_to:
                self._latencies.append(now - connection.began_s)
                if self._marker:
                    self._firsts.append(connection.first_s - connection.began_s)
        self._again(connection, reconnect=response.close)

    def _again(self, connection: Connection, reconnect: bool) -> None:
        if reconnect or not self._open:
            self._drop(connection)
        if not self._open:
            return
        if reconnect:
            self._outcome.reconnects += 1
            connection = self._connect()
        connection.send(self._request)


def main() -> None:
    spec = Spec(**json.load(sys.stdin))
    if spec.core is not None:
        os.sched_setaffinity(0, {spec.core})
    outcome = asdict(Load(spec).run())
    del outcome["foreign"]
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
