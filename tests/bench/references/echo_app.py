"""The bare web stack: quart-trio answering a JSON body with itself, on hypercorn's trio worker.

hypercorn has the product's settings (date header once a second, no server header, connections stay).

`python -m tests.bench.references.echo_app PORT`, in the project's own environment.
"""

from __future__ import annotations

import sys
import time
from wsgiref.handlers import format_date_time

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import ResponseReturnValue, request
from quart_trio import QuartTrio


class Settings(Config):  # type: ignore[misc]
    """What the product sets (api/serve.py), without importing it: this app is also a reference of memory."""

    include_server_header = False
    errorlog = None
    keep_alive_max_requests = 100_000
    _second = 0
    _headers: tuple[tuple[bytes, bytes], ...] = ()

    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._headers = ((b"date", format_date_time(second).encode("ascii")),)
        return list(self._headers)


app = QuartTrio(__name__)


@app.post("/echo")
async def echo() -> ResponseReturnValue:
    return await request.get_json(), 201


@app.get("/readyz")
async def ready() -> ResponseReturnValue:
    return {"ready": True}


def main() -> None:
    config = Settings()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    trio.run(serve, app, config)


if __name__ == "__main__":
    main()
