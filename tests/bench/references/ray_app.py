"""Ray Serve: one deployment, one replica, its own HTTP proxy. `ray_app.py PORT TEMPDIR ONGOING`, until ended.

ONGOING is `max_ongoing_requests`; 0 leaves Serve's default (5), with which more clients than that collapse to
a few requests a second (its router backs off), so the benchmark measures a raised one too.
"""

from __future__ import annotations

import os
import signal
import sys

import ray
from ray import serve
from starlette.requests import Request


@serve.deployment
class Echo:
    async def __call__(self, request: Request) -> dict[str, object]:
        parameters = (await request.json())["parameters"]
        words = parameters["prompt"].split()[: parameters["max_tokens"]]
        return {"generated_text": " ".join(words), "tokens_generated": len(words)}


def main() -> None:
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=sys.argv[2],
        num_cpus=4,  # what the controller, the proxy and a replica ask for; no cgroups behind it
        object_store_memory=100 * 2**20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    ongoing = int(sys.argv[3])
    deployment = Echo.options(max_ongoing_requests=ongoing) if ongoing else Echo
    serve.run(deployment.bind(), route_prefix="/")
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # the benchmark ends the daemons by pid; serve.shutdown() can take 30 s


if __name__ == "__main__":
    main()
