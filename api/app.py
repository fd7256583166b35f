"""The application: what all requests share, and the Quart app that a server runs."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any

import structlog
import trio
from quart_trio import QuartTrio

from api import cluster as cluster_routes
from api import events_ws, health, hosts, keys, models, openapi, operations, stream, tasks, workers
from api.auth import Authenticator
from api.http import HttpConnection, Router, rate_limited
from peer.config import Config
from peer.errors import NotFound
from peer.ports import Clock, Cluster
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.quota import Spend

ROUTES = (
    *health.ROUTES,
    *cluster_routes.ROUTES,
    *workers.ROUTES,
    *tasks.ROUTES,
    *stream.ROUTES,
    *models.ROUTES,
    *keys.ROUTES,
    *hosts.ROUTES,
    *operations.ROUTES,
    *events_ws.ROUTES,
    *openapi.ROUTES,
)


class Api:
    """What handlers share. `stopping` is set when the server begins to stop: whatever waits then ends."""

    def __init__(self, cluster: Cluster, config: Config, clock: Clock) -> None:
        self.cluster = cluster
        self.clock = clock
        self.router = Router(ROUTES)
        self.query_names = {id(route): route.query_names for route in ROUTES}
        self.auth = Authenticator(cluster, clock)
        self.sockets: Counter[str] = Counter()  # open WebSockets on this peer by key
        self.streams = 0
        self.stopping = trio.Event()
        self.waiting: dict[trio.CancelScope, None] = {}  # requests that wait for something to happen
        self.openapi = b""  # made when it is first asked for
        self.reload(config)

    def stop(self) -> None:
        """Let whatever waits end, now and from now on."""
        self.stopping.set()
        for scope in self.waiting:
            scope.cancel()

    def reload(self, config: Config) -> None:
        """Take over what can change while serving: limits, and the level of the log."""
        self.config = config
        self.log: Any = structlog.get_logger("bitinglip.api").bind()

    def limits_of(self, key: ApiKey) -> tuple[int | None, int | None]:
        """Requests per hour and per minute that hold for this key now; None: no limit."""
        return self.config.limits.of(key)

    async def limit(self, key: ApiKey, headers: list[tuple[bytes, bytes]]) -> None:
        """Count a request of the key, in the cluster, and say in `headers` how much is left. Raises RateLimited."""
        per_hour, per_minute = self.limits_of(key)
        if per_hour is None and per_minute is None:
            return
        ask = Spend(key_id=key.key_id, per_hour=per_hour, per_minute=per_minute)
        verdict = await self.cluster.spend(ask)
        if verdict is None:
            return
        headers.append((b"x-ratelimit-limit", b"%d" % verdict.limit))
        headers.append((b"x-ratelimit-remaining", b"%d" % verdict.remaining))
        headers.append((b"x-ratelimit-reset", b"%d" % verdict.reset_s))
        if not verdict.allowed:
            raise rate_limited(verdict.retry_after_s, verdict.limit)

    def model(self, name: str) -> Model:
        """The catalogue's entry. Raises NotFound with the nearest names."""
        catalogue = self.cluster.models()
        model = catalogue.get(name)
        if model is not None:
            return model
        nearest = difflib.get_close_matches(name, catalogue, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        raise NotFound(
            f"There is no model {name!r}{hint}",
            code="unknown_model",
            details={"field": "model_name", "model_name": name, "nearest": nearest},
        )


class ApiApp(QuartTrio):  # type: ignore[misc]
    """The Quart app. HTTP requests go through `HttpConnection`, WebSockets through Quart."""

    asgi_http_class: Any = HttpConnection
    api: Api

    def reload(self, config: Config) -> None:
        """Swap what can be reloaded; requests that are being answered keep what they have."""
        self.api.reload(config)


def create_app(cluster: Cluster, config: Config, clock: Clock) -> ApiApp:
    """The whole REST and WebSocket API of a peer."""
    app = ApiApp("api", static_folder=None)
    app.api = Api(cluster, config, clock)
    events_ws.register(app)
    return app
