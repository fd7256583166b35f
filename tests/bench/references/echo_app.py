"""The bare web stack: quart-trio answering a JSON body with itself, on hypercorn's trio worker.

hypercorn has the product's settings (date header once a second, no server header, connections stay).

`python -m tests.bench.references.echo_app PORT`, in the project's own environment.
"""

from __future__ import annotations

import sys

import trio
from hypercorn.trio import serve
from quart import ResponseReturnValue, request
from quart_trio import QuartTrio

from api.serve import Settings

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
