"""The configuration's schema and its defaults. Reading it (files, environment, flags) is `peer.settings`.

In YAML a field that ends in `_s` takes seconds or a text with a unit ("90s", "5m", "30d"), one that ends in
`_bytes` takes bytes or a text with a unit ("24GB", "512MiB").
"""

from __future__ import annotations

from typing import Literal

import msgspec

from peer import limits
from peer.limits import DRAIN_S_MAX
from peer.state.key import ApiKey


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: unknown keys are refused."""


class Cluster(Section, frozen=True):
    name: str = "biting-lip-cluster"  # of a single node; a host that has joined a cluster shows that one's
    voters: tuple[str, ...] = ()  # peers that may run a store member; none: all that joined as such
    voters_wanted: int = 0  # 1, 3 or 5; 0: 3 as soon as there are as many, else 1
    voter_dead_s: float = 600.0  # a voter that is away for so long is replaced, if it can be
    lost_share_max: float = 0.34  # of the peers; more are not given up at once without confirmation
    rebalance: Literal["off", "memory_optimized", "load_balanced", "latency_optimized"] = "load_balanced"


class Link(Section, frozen=True):
    """Between peers; only in a cluster. `advertise` "": the first address of this host's certificate."""

    bind: str = "0.0.0.0:8001"
    advertise: str = ""


class Gossip(Section, frozen=True):
    """Serf. `agent`: the RPC address of one that runs already; "": the peer runs its own."""

    bind: str = "0.0.0.0:7946"
    advertise: str = ""
    rpc: str = "127.0.0.1:7373"
    seeds: tuple[str, ...] = ()  # gossip addresses of other hosts, besides those known from joining
    retry_s: float = 2.0  # between two tries to find them
    agent: str = ""
    agent_key_file: str = ""


class Store(Section, frozen=True):
    """etcd, on voters. `member`: the client address of one that runs already; "": the peer runs its own."""

    bind: str = "0.0.0.0:2380"
    advertise: str = ""
    member: str = ""
    heartbeat_s: float = 0.1  # about the longest round trip between voters; an election takes ten
    quota_bytes: int = 4 * 1024**3  # of a member's file; no new tasks from 85 % of it on


class Tls(Section, frozen=True):
    certificate: str  # paths of PEM files
    key: str


class Api(Section, frozen=True):
    bind: str = "127.0.0.1:8000"
    insecure: bool = False  # must be said in words to bind a non-loopback address without TLS
    tls: Tls | None = None
    body_bytes_max: int = limits.BODY_BYTES_MAX


class FakeDevice(Section, frozen=True):
    """The stand-in engine's behaviour; only read when a device is `fake`."""

    tokens_per_s: float = 0.0  # 0: as fast as it goes
    load_s: float = 0.0
    model_memory_bytes: int = 1_000_000_000
    memory_total_bytes: int = 16_000_000_000
    temperature_c: float = 45.0
    fault: Literal["none", "hang", "die", "slow", "wrong", "out_of_memory", "hot"] = "none"


class Stall(Section, frozen=True):
    """For how long an engine may give no sign of life in each phase before it is ended."""

    start_s: float = limits.STALL_S["start"]
    idle_s: float = limits.STALL_S["idle"]
    load_s: float = limits.STALL_S["load"]
    warmup_s: float = limits.STALL_S["warmup"]
    prefill_s: float = limits.STALL_S["prefill"]
    decode_s: float = limits.STALL_S["decode"]

    def by_phase(self) -> dict[str, float]:
        """As `engine.protocol.Phase` names them."""
        return {phase: getattr(self, f"{phase}_s") for phase in limits.STALL_S}


class Engine(Section, frozen=True):
    """`devices`: "auto" (every AMD GPU, an error if there is none), "AMD", "AMD:0,2", "AMD:0+1", "CPU", "fake", ..."""

    devices: tuple[str, ...] = ("auto",)
    slots: int = 64
    memory_limit_bytes: int = 0  # 0: the device's own
    memory_reserve_bytes: int = 256 * 1024 * 1024  # of each device, kept free
    beam: int = 0  # width of a search for faster kernels while a model is loaded; 0: none
    stall: Stall = Stall()
    fake: FakeDevice = FakeDevice()


class Models(Section, frozen=True):
    catalogue: str = ""  # "": the one that is installed with bitinglip
    directory: str = ""  # "": DATA_DIR/models
    preload: tuple[str, ...] = ()


class Limits(Section, frozen=True):
    requests_per_hour: int = limits.REQUESTS_PER_HOUR
    requests_per_minute: int = limits.REQUESTS_PER_MINUTE
    websockets_per_client: int = limits.WEBSOCKETS_PER_CLIENT
    queue_tasks_max: int = limits.QUEUE_TASKS_MAX

    def of(self, key: ApiKey) -> tuple[int | None, int | None]:
        """Requests per hour and per minute that hold for a key; None: no limit."""
        hour, minute = key.requests_per_hour, key.requests_per_minute
        return (
            self.requests_per_hour if hour == "default" else hour,
            self.requests_per_minute if minute == "default" else minute,
        )


class Retention(Section, frozen=True):
    """Finished tasks are forgotten when they are older than `age_s`, or more than `count` or `total_bytes`."""

    age_s: float = 30 * 86_400.0
    count: int = 100_000
    total_bytes: int = 1024**3  # of results; in a cluster at most half of store.quota_bytes
    events: int = limits.EVENTS_KEPT_MAX


class Alerts(Section, frozen=True):
    """An alert is raised at its threshold and cleared below its `_clear` value."""

    temperature_c: float = 95.0
    temperature_clear_c: float = 88.0
    memory_percent: float = 97.0
    memory_clear_percent: float = 92.0


class Log(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"  # auto: console on a terminal, JSON elsewhere


class Config(Section, frozen=True):
    data_dir: str = ""  # "": $XDG_STATE_HOME/bitinglip, for root /var/lib/bitinglip
    cluster: Cluster = Cluster()
    link: Link = Link()
    gossip: Gossip = Gossip()
    store: Store = Store()
    api: Api = Api()
    engine: Engine = Engine()
    models: Models = Models()
    limits: Limits = Limits()
    retention: Retention = Retention()
    alerts: Alerts = Alerts()
    log: Log = Log()
    drain_s: float = DRAIN_S_MAX  # `limits` is a field here


RELOADABLE = frozenset({"limits", "retention", "alerts", "log", "models"})  # by SIGHUP; keys are live anyway

# What a number may be: the lowest and the highest value, both allowed. Every number has its entry.
BOUNDS: dict[str, tuple[float, float]] = {
    "cluster.voters_wanted": (0, 5),
    "cluster.voter_dead_s": (30, 30 * 86_400),
    "cluster.lost_share_max": (0, 1),
    "gossip.retry_s": (1, 600),
    "store.heartbeat_s": (0.01, 5),
    "store.quota_bytes": (64 * 1024**2, 16 * 1024**3),
    "api.body_bytes_max": (1_024, 1024**3),
    "engine.slots": (1, 256),
    "engine.memory_limit_bytes": (0, 1024**5),
    "engine.memory_reserve_bytes": (0, 1024**4),
    "engine.beam": (0, 16),
    **{f"engine.stall.{phase}_s": (3, 7_200) for phase in limits.STALL_S},  # idle engines speak once a second
    "engine.fake.tokens_per_s": (0, 1_000_000),
    "engine.fake.load_s": (0, 3_600),
    "engine.fake.model_memory_bytes": (1, 1024**5),
    "engine.fake.memory_total_bytes": (1, 1024**5),
    "engine.fake.temperature_c": (-50, 200),
    "limits.requests_per_hour": (1, 1_000_000_000),
    "limits.requests_per_minute": (1, 1_000_000_000),
    "limits.websockets_per_client": (1, limits.WEBSOCKETS_MAX),
    "limits.queue_tasks_max": (1, 10_000_000),
    "retention.age_s": (60, 10 * 366 * 86_400),
    "retention.count": (1, 10_000_000),
    "retention.total_bytes": (1024**2, 1024**4),
    "retention.events": (100, 1_000_000),
    "alerts.temperature_c": (0, 150),
    "alerts.temperature_clear_c": (0, 150),
    "alerts.memory_percent": (1, 100),
    "alerts.memory_clear_percent": (0, 100),
    "drain_s": (0, 3_600),
}
PATHS = frozenset(
    {
        "data_dir",
        "gossip.agent_key_file",
        "api.tls.certificate",
        "api.tls.key",
        "models.catalogue",
        "models.directory",
    }
)
