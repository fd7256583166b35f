"""What is rehearsed, from YAML: hosts, catalogue, measured speeds, load by the hour, and what goes wrong when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import yaml

from peer.adapters.models.catalogue import read_catalogue
from peer.limits import BEAT_S, LEASE_TTL_S
from peer.settings import nearest
from peer.state.model import Model
from simulations import yaml_fields as y

HOSTS_MAX: Final = 5_000
DAY_S: Final = 86_400.0
RUNS_AT_ONCE_MAX: Final = 1_024
TASKS_MAX: Final = 2_000_000
PROFILE: Final = Path(__file__).with_name("profiles") / "measured.yaml"
# Until a lost leader's lease has ended and another peer has campaigned: what the design allows at the most.
FAILOVER_S: Final = LEASE_TTL_S + BEAT_S


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured: seconds of a load, and tokens per second of so many runs together."""

    load_s: float
    tokens_per_s: tuple[tuple[int, float], ...]  # by rising number of runs
    memory_bytes: int = 0  # 0: the catalogue's

    def together(self, runs: int) -> float:
        """Of all of them; between two measured points on the line between them, beyond the last one no faster."""
        points = self.tokens_per_s
        if runs <= points[0][0]:
            return points[0][1] * runs / points[0][0]
        for (fewer, slower), (more, faster) in pairwise(points):
            if runs <= more:
                return slower + (faster - slower) * (runs - fewer) / (more - fewer)
        return points[-1][1]


@dataclass(frozen=True, slots=True)
class Host:
    peer_id: str
    device: str  # a name in the profile
    gpus: int
    memory_bytes: int  # of each


@dataclass(frozen=True, slots=True)
class Placement:
    model: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Stream:
    """Tasks of one model. `per_hour`: (second of the day, from then on so many)."""

    model: str
    per_hour: tuple[tuple[float, float], ...]
    tokens: int
    timeout_s: float
    priority: int


@dataclass(frozen=True, slots=True)
class Event:
    """Hosts that lose power, in seconds of the day; `for_s` 0: for good."""

    at_s: float
    hosts: tuple[str, ...]
    for_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    about: str
    seed: int
    from_s: float
    until_s: float
    leader: str
    failover_s: float
    hosts: tuple[Host, ...]
    catalogue: Mapping[str, Model]
    speeds: Mapping[tuple[str, str], Speed]  # by device and model
    placement: tuple[Placement, ...]
    load: tuple[Stream, ...]
    events: tuple[Event, ...]


def read_plan(path: Path) -> Plan:
    """Raises ConfigError with a line for each mistake. Paths in the file are relative to its folder."""
    reader = y.Reader(str(path))
    root = reader.root(y.read_file(path, "rehearsal"))
    known = y.Reader("").fields(
        root, "", {"hosts": y.list_of(_group, HOSTS_MAX)}
    )  # mistakes: found again below
    hosts = _numbered(known.get("hosts", ()))
    names = [host.peer_id for host in hosts]
    host = partial(_host, names)
    top = reader.fields(
        root,
        "",
        {
            "about": y.text,
            "seed": y.whole(0, 1 << 62),
            "from": y.time_of_day,
            "until": y.time_of_day,
            "catalogue": y.text,
            "profile": y.text,
            "leader": host,
            "failover": y.seconds(0.0, 3_600.0),
            "hosts": y.list_of(_group, HOSTS_MAX),
            "placement": y.by_name(y.whole(1, HOSTS_MAX), 1_000),
            "load": y.list_of(_stream, 1_000),
            "events": y.list_of(partial(_event, host), 1_000),
        },
        needed=("from", "until", "hosts", "placement", "load", "events"),
    )
    reader.end()
    plan = Plan(
        about=top.get("about", ""),
        seed=top.get("seed", 0),
        from_s=top["from"],
        until_s=top["until"],
        leader=top.get("leader", names[0]),
        failover_s=top.get("failover", FAILOVER_S),
        hosts=hosts,
        catalogue=read_catalogue(str(path.parent / top["catalogue"]) if "catalogue" in top else ""),
        speeds=read_profile(path.parent / top["profile"] if "profile" in top else PROFILE),
        placement=tuple(Placement(model, count) for model, count in top["placement"].items()),
        load=top["load"],
        events=top["events"],
    )
    _contradictions(plan, reader, root)
    reader.end()
    return plan


def read_profile(path: Path) -> Mapping[tuple[str, str], Speed]:
    """Measured speeds by device and model. Raises ConfigError."""
    reader = y.Reader(str(path))
    root = reader.root(y.read_file(path, "profile"))
    top = reader.fields(
        root, "", {"devices": y.by_name(y.by_name(_speed, 1_000), 1_000)}, needed=("devices",)
    )
    reader.end()
    return {(device, model): speed for device, of in top["devices"].items() for model, speed in of.items()}


# ------------------------------------------------------------------------------------------------ parsers


def _speed(reader: y.Reader, node: yaml.Node, path: str) -> Speed:
    found = reader.fields(
        node,
        path,
        {
            "load": y.seconds(0.0, 86_400.0),
            "tokens_per_s": y.by_name(y.number(0.001, 1e9), 1_000),
            "memory": y.sizes,
        },
        needed=("load", "tokens_per_s"),
    )
    rates = found.get("tokens_per_s", {})
    wrong = [runs for runs in rates if not runs.isdigit() or not 1 <= int(runs) <= RUNS_AT_ONCE_MAX]
    if wrong or not rates:
        reader.mistake(
            node, f"{path}.tokens_per_s", "expected rates by runs at once, like {1: 23.75, 8: 91.18}"
        )
        rates = {}
    points = tuple(sorted((int(runs), rate) for runs, rate in rates.items()))
    return Speed(found.get("load", 0.0), points or ((1, 1.0),), found.get("memory", 0))


def _group(reader: y.Reader, node: yaml.Node, path: str) -> tuple[int, Host]:
    found = reader.fields(
        node,
        path,
        {
            "count": y.whole(1, HOSTS_MAX),
            "device": y.text,
            "gpus": y.whole(1, 16),
            "memory": y.sizes,
        },
        needed=("count", "device", "memory"),
    )
    host = Host("", found.get("device", ""), found.get("gpus", 1), found.get("memory", 0))
    return found.get("count", 0), host


def _numbered(groups: tuple[tuple[int, Host], ...]) -> tuple[Host, ...]:
    """h1, h2, ... in the order of the file."""
    each = [host for count, host in groups for _ in range(count)][: HOSTS_MAX + 1]
    return tuple(Host(f"h{n}", host.device, host.gpus, host.memory_bytes) for n, host in enumerate(each, 1))


def _host(names: list[str], reader: y.Reader, node: yaml.Node, path: str) -> str:
    name = y.scalar(node)
    if name not in names:
        raise ValueError(f"there is no host `{name}`; they are h1 to h{len(names)}, in the order of `hosts`")
    return name


def _stream(reader: y.Reader, node: yaml.Node, path: str) -> Stream:
    found = reader.fields(
        node,
        path,
        {
            "model": y.name,
            "per_hour": _rates,
            "tokens": y.whole(1, 1_000_000),
            "timeout": y.seconds(1.0, 86_400.0),
            "priority": y.whole(1, 10),
        },
        needed=("model", "per_hour", "tokens"),
    )
    return Stream(
        found.get("model", ""),
        found.get("per_hour", ()),
        found.get("tokens", 1),
        found.get("timeout", 300.0),
        found.get("priority", 5),
    )


def _rates(reader: y.Reader, node: yaml.Node, path: str) -> tuple[tuple[float, float], ...]:
    """One number for the whole day, or numbers from times of day on."""
    rate = y.number(0.0, 10_000_000.0)
    if not isinstance(node, yaml.MappingNode):
        return ((0.0, rate(reader, node, path)),)
    found = {}
    for key, value in node.value:
        at_s = y.time_of_day(reader, key, path)
        if at_s in found:
            raise ValueError(f"`{key.value}` is there twice")
        found[at_s] = rate(reader, value, path)
    return tuple(sorted(found.items()))


def _event(host: y.Parse, reader: y.Reader, node: yaml.Node, path: str) -> Event:
    found = reader.fields(
        node,
        path,
        {
            "at": y.time_of_day,
            "kind": y.one_of(("power_loss",)),
            "hosts": y.list_of(host, HOSTS_MAX),
            "for": y.seconds(1.0, DAY_S),
        },
        needed=("at", "kind", "hosts"),
    )
    return Event(found.get("at", 0.0), found.get("hosts", ()), found.get("for", 0.0))


# ------------------------------------------------------------------------------------------------ contradictions


def _contradictions(plan: Plan, reader: y.Reader, root: yaml.MappingNode) -> None:
    def wrong(path: str, text: str) -> None:
        reader.mistake(_node(root, path), path, text)

    if plan.until_s <= plan.from_s:
        wrong("until", "must be later than `from`; a rehearsal is within one day")
    if len(plan.hosts) > HOSTS_MAX:
        wrong("hosts", f"more than {HOSTS_MAX}")
    for event in plan.events:
        if not plan.from_s <= event.at_s < plan.until_s:
            wrong("events", "every event must lie within `from` and `until`")
    devices = dict.fromkeys(host.device for host in plan.hosts)
    replicas_max = sum(host.gpus for host in plan.hosts)
    placed = {placement.model for placement in plan.placement}
    for placement in plan.placement:
        if placement.replicas > replicas_max:
            wrong("placement", f"{placement.replicas} of {placement.model}, and {replicas_max} devices")
        if placement.model not in plan.catalogue:
            hint = nearest(placement.model, plan.catalogue)
            wrong("placement", f"the catalogue has no model `{placement.model}`{hint}")
            continue
        for device in devices:
            if (device, placement.model) not in plan.speeds:
                measured = ", ".join(f"{model} on {name}" for name, model in plan.speeds)
                wrong(
                    "placement",
                    f"nobody has measured {placement.model} on {device}: the profile has {measured}. "
                    "Measure it and add it to a file of your own, named by `profile`",
                )
    for stream in plan.load:
        if stream.model not in placed:
            wrong("load", f"`{stream.model}` is not in `placement`{nearest(stream.model, placed)}")
    if expected_tasks(plan) > TASKS_MAX:
        wrong("load", f"about {expected_tasks(plan):,.0f} tasks, at most {TASKS_MAX:,} are rehearsed")


def expected_tasks(plan: Plan) -> float:
    return sum(rate * (b - a) / 3600 for stream in plan.load for a, b, rate in pieces(stream, plan))


def pieces(stream: Stream, plan: Plan) -> list[tuple[float, float, float]]:
    """(from, until, per hour) within the plan's time; before the first time of day the last one counts."""
    found = []
    steps = [(0.0, stream.per_hour[-1][1]), *stream.per_hour, (DAY_S, 0.0)] if stream.per_hour else []
    for (a, rate), (b, _) in pairwise(steps):
        a, b = max(a, plan.from_s), min(b, plan.until_s)
        if a < b and rate > 0:
            found.append((a, b, rate))
    return found


def _node(root: yaml.MappingNode, path: str) -> yaml.Node:
    found: Any = next((key for key, _ in root.value if key.value == path), root)
    return found if isinstance(found, yaml.Node) else root
