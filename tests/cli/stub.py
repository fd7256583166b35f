"""A peer that answers what a test tells it to, over real HTTP."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, Any] | bytes


class Stub:
    """`replies` maps "GET /path" to (status, JSON) or to bytes, which are sent as server-sent events.

    A list of replies is used up one by one; its last one stays.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.replies: dict[str, Reply | list[Reply]] = {}
        self.requests: list[tuple[str, str, Any]] = []  # method, path with query, body
        self.headers: list[dict[str, str]] = []

    def reply(self, request: str) -> Reply:
        found = self.replies.get(request, error(404, f"nothing at {request}"))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": "c", "message": message, "request_id": "req-1"}, "detail": message}


@contextmanager
def serve(certificate: Path | None = None) -> Iterator[Stub]:
    """`certificate`: a PEM file with its key, for HTTPS."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            raw = self.rfile.read(length)
            stub.requests.append((self.command, self.path, json.loads(raw) if raw else None))
            stub.headers.append({name.lower(): value for name, value in self.headers.items()})
            found = stub.reply(f"{self.command} {self.path.partition('?')[0]}")
            if isinstance(found, bytes):
                status, content_type, body = 200, "text/event-stream", found
            else:
                status, content_type = found[0], "application/json"
                body = found[1] if isinstance(found[1], bytes) else json.dumps(found[1]).encode()
            self.send_response(status)
            if status in (429, 503):
                self.send_header("Retry-After", "7")
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    stub = Stub(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
