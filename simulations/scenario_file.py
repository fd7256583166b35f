"""Scenarios in files: YAML that a person writes, and traces that a failed run leaves to be replayed.

A YAML file becomes the same `Scenario` each time: what it leaves to chance (arrivals of a load) its seed decides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import yaml

from peer.decide.rebalance import COSTS
from peer.errors import ConfigError
from peer.settings import nearest
from peer.version import VERSION
from simulations import yaml_fields as y
from simulations.scenario import Fault, Op, Scenario

HOSTS_MAX: Final = 200
GPUS_MAX: Final = 16
MODELS_MAX: Final = 50
DURATION_S_MAX: Final = 7 * 86_400.0
FAULTS_MAX: Final = 10_000
OPS_MAX: Final = 100_000
TRACE_FORMAT: Final = 1
TRACE_BYTES_MAX: Final = 64 << 20
OP_KINDS: Final = (
    "submit", "get", "wait", "cancel", "list", "events", "stream", "assign", "unload", "rebalance", "restart",
    "drain", "undrain", "transfer",
)  # fmt: skip
_ABOUT_A_TASK: Final = frozenset({"get", "wait", "cancel", "stream"})
_ABOUT_A_MODEL: Final = frozenset({"submit", "assign", "unload"})
_ABOUT_A_HOST: Final = frozenset({"drain", "undrain"})

# What a fault needs as targets, by what its kind says of them: (how many at least, at the most).
_TARGETS: Final[Mapping[str, tuple[int, int]]] = {
    "peer": (1, 1), "engine": (1, 1), "worker": (1, 1), "voter": (1, 1), "pair": (2, 2), "group": (1, HOSTS_MAX),
    "leader": (0, 0), "none": (0, 0),
}  # fmt: skip

Kinds = Mapping[str, str]  # of faults: the kind, and what it needs as targets


def read_scenario(path: Path, kinds: Kinds | None = None) -> Scenario:
    """Raises ConfigError with a line for each mistake. `kinds`: the known faults, else the world's."""
    return parse_scenario(y.read_file(path, "scenario"), str(path), kinds)


def parse_scenario(data: bytes, name: str, kinds: Kinds | None = None) -> Scenario:
    """As read_scenario, from the file's bytes."""
    reader = y.Reader(name)
    root = reader.root(data)
    file = _File(root, _world_kinds() if kinds is None else kinds)
    top = reader.fields(
        root,
        "",
        {
            "about": y.text,
            "seed": y.whole(0, 1 << 62),
            "hosts": y.whole(1, HOSTS_MAX),
            "voters": y.whole(1, HOSTS_MAX),
            "gpus": y.whole(1, GPUS_MAX),
            "models": y.whole(1, MODELS_MAX),
            "duration": y.seconds(1.0, DURATION_S_MAX),
            "rebalance": y.one_of(tuple(COSTS)),
            "grows": y.one_of(("true", "false")),
            "upgraded": y.list_of(file.peer, HOSTS_MAX),
            "load": y.list_of(file.load, 100),
            "faults": y.list_of(file.fault, FAULTS_MAX),
            "ops": y.list_of(file.op, OPS_MAX),
        },
        needed=("hosts", "duration"),
    )
    if top.get("voters", 1) > top.get("hosts", HOSTS_MAX):
        reader.mistake(root, "voters", f"{top['voters']} of {top['hosts']} hosts cannot vote")
    reader.end()
    seed = top.get("seed", 0)
    scenario = Scenario(
        seed=seed,
        hosts=top["hosts"],
        voters=top.get("voters", min(3, top["hosts"])),
        gpus=top.get("gpus", 2),
        fault_s=top["duration"],
        models=file.models,
        faults=tuple(sorted(top.get("faults", ()), key=lambda fault: fault.at_s)),
        rebalance=top.get("rebalance", ""),
        grows=top.get("grows") == "true",
        upgraded=top.get("upgraded", ()),
    )
    ops = _in_order([*top.get("ops", ()), *_arrivals(top.get("load", ()), scenario)], reader)
    reader.end()
    return msgspec.structs.replace(scenario, ops=ops)


def model_name(number: int) -> str:
    """What the world calls its models, from 0."""
    return f"m{number}"


def _world_kinds() -> Kinds:
    from simulations.world.faults import KINDS, kind

    return {name: kind(name).targets for name in KINDS}


# ------------------------------------------------------------------------------------------------ a file's parts


@dataclass(frozen=True, slots=True)
class _Named:
    """An operation as written: it may have a name, and name the submission that it is about."""

    op: Op
    name: str
    about: str
    node: yaml.Node | None
    path: str


@dataclass(frozen=True, slots=True)
class _Load:
    rate: float
    from_s: float
    until_s: float
    tokens: int
    timeout_s: float
    priority: int
    cancel: float
    models: tuple[str, ...]
    peers: tuple[str, ...]


class _File:
    """The parsers that depend on what else the file says: its peers, models and duration."""

    def __init__(self, root: yaml.MappingNode, kinds: Kinds) -> None:
        known: dict[str, y.Parse] = {
            "hosts": y.whole(1, HOSTS_MAX),
            "voters": y.whole(1, HOSTS_MAX),
            "gpus": y.whole(1, GPUS_MAX),
            "models": y.whole(1, MODELS_MAX),
            "duration": y.seconds(1.0, DURATION_S_MAX),
        }
        first = y.Reader("").fields(root, "", known)  # its mistakes are found again by the real reader
        hosts, gpus = first.get("hosts", HOSTS_MAX), first.get("gpus", 2)
        self.peers = tuple(f"h{n}" for n in range(1, hosts + 1))
        self.workers = tuple(f"{peer}-gpu{n}" for peer in self.peers for n in range(gpus))
        self.voters: int = first.get("voters", min(3, hosts))
        self.models: int = first.get("models", 3)
        self.model_names = tuple(model_name(n) for n in range(self.models))
        self.duration_s: float = first.get("duration", DURATION_S_MAX)
        self.kinds = kinds
        self.peer = partial(self._one, "peer", self.peers)
        self.worker = partial(self._one, "worker", self.workers)
        self.model = partial(self._one, "model", self.model_names)
        self.at = y.seconds(0.0, self.duration_s)

    @staticmethod
    def _one(what: str, known: tuple[str, ...], reader: y.Reader, node: yaml.Node, path: str) -> str:
        name = y.scalar(node)
        if name not in known:
            few = f"{known[0]} to {known[-1]}" if len(known) > 1 else known[0]
            raise ValueError(f"there is no {what} `{name}`{nearest(name, known) or f' ({few})'}")
        return name

    def kind(self, reader: y.Reader, node: yaml.Node, path: str) -> str:
        name = y.scalar(node)
        if name not in self.kinds:
            raise ValueError(f"there is no fault `{name}`{nearest(name, self.kinds)}; {_list(self.kinds)}")
        return name

    def fault(self, reader: y.Reader, node: yaml.Node, path: str) -> Fault | None:
        found = reader.fields(
            node,
            path,
            {
                "at": self.at,
                "kind": self.kind,
                "targets": y.list_of(self.peer, HOSTS_MAX),
                "for": y.seconds(0.0, self.duration_s),
                "strength": y.number(-1e9, 1e9),
            },
            needed=("at", "kind"),
        )
        if not {"at", "kind"} <= found.keys():
            return None  # a mistake that is noted
        kind, targets = found["kind"], found.get("targets", ())
        wrong = self._wrong_targets(kind, targets)
        if wrong:
            reader.mistake(node, f"{path}.targets", wrong)
        return Fault(
            at_s=found["at"],
            kind=kind,
            targets=targets,
            for_s=found.get("for", 0.0),
            strength=found.get("strength", 0.0),
        )

    def _wrong_targets(self, kind: str, targets: tuple[str, ...]) -> str:
        what = self.kinds[kind]
        least, most = _TARGETS[what]
        if least <= len(targets) <= most:
            beyond = [each for each in targets if what == "voter" and each not in self.peers[: self.voters]]
            return f"{', '.join(beyond)} is no voter; {self.voters} are: the first peers" if beyond else ""
        if most == 0:
            return f"`{kind}` needs none" + (": it strikes whoever leads then" if what == "leader" else "")
        count = {(1, 1): "one peer", (2, 2): "two peers, from and to"}.get((least, most), "peers")
        return f"`{kind}` needs {count}"

    def load(self, reader: y.Reader, node: yaml.Node, path: str) -> _Load:
        found = reader.fields(
            node,
            path,
            {
                "rate": y.number(0.0, 10_000.0),
                "from": self.at,
                "until": self.at,
                "tokens": y.whole(1, 100_000),
                "timeout": y.seconds(1.0, 86_400.0),
                "priority": y.whole(1, 10),
                "cancel": y.number(0.0, 1.0),
                "models": y.list_of(self.model, MODELS_MAX),
                "peers": y.list_of(self.peer, HOSTS_MAX),
            },
            needed=("rate",),
        )
        return _Load(
            rate=found.get("rate", 0.0),
            from_s=found.get("from", 0.0),
            until_s=found.get("until", self.duration_s),
            tokens=found.get("tokens", 32),
            timeout_s=found.get("timeout", 60.0),
            priority=found.get("priority", 5),
            cancel=found.get("cancel", 0.0),
            models=found.get("models", self.model_names),
            peers=found.get("peers", self.peers),
        )

    def op(self, reader: y.Reader, node: yaml.Node, path: str) -> _Named | None:
        found = reader.fields(
            node,
            path,
            {
                "at": self.at,
                "kind": y.one_of(OP_KINDS),
                "peer": self.peer,
                "name": y.name,
                "task": y.name,
                "client": y.whole(0, 10_000),
                "model": self.model,
                "tokens": y.whole(1, 100_000),
                "timeout": y.seconds(1.0, 86_400.0),
                "priority": y.whole(1, 10),
                "key": y.text,
                "worker": self.worker,
                "host": self.peer,
                "vanish": y.seconds(0.0, 86_400.0),
            },
            needed=("at", "kind", "peer"),
        )
        if not {"at", "kind", "peer"} <= found.keys():
            return None
        kind: str = found["kind"]
        for key, kinds in (("task", _ABOUT_A_TASK), ("model", _ABOUT_A_MODEL), ("host", _ABOUT_A_HOST)):
            if kind in kinds and key not in found:
                reader.mistake(node, path, f"`{kind}` needs `{key}`")
        op = Op(
            at_s=found["at"],
            kind=kind,
            peer=found["peer"],
            client=found.get("client", 0),
            model=found.get("model", ""),
            tokens=found.get("tokens", 32 if kind == "submit" else 0),
            timeout_s=found.get("timeout", 60.0),
            priority=found.get("priority", 5),
            key=found.get("key", ""),
            worker=found.get("worker", ""),
            host=found.get("host", ""),
            vanish_s=found.get("vanish", 0.0),
        )
        return _Named(op, found.get("name", ""), found.get("task", ""), node, path)


def _list(kinds: Kinds) -> str:
    return f"known: {', '.join(sorted(kinds))}"


def _arrivals(loads: tuple[_Load, ...], scenario: Scenario) -> list[_Named]:
    """Submissions at random intervals, some of them cancelled; the seed decides."""
    found: list[_Named] = []
    for number, load in enumerate(loads):
        rng = random.Random(f"{scenario.seed}/load/{number}")
        at = load.from_s + (rng.expovariate(load.rate) if load.rate else scenario.fault_s + 1)
        while at < load.until_s and len(found) < OPS_MAX:
            label = f"load.{number}.{len(found)}"
            client = rng.randrange(4)
            submit = Op(
                at_s=round(at, 3),
                kind="submit",
                peer=rng.choice(load.peers),
                client=client,
                model=rng.choice(load.models),
                tokens=load.tokens,
                timeout_s=load.timeout_s,
                priority=load.priority,
            )
            found.append(_Named(submit, label, "", None, ""))
            cancel_at = round(at + rng.uniform(0.1, 5.0), 3)
            if rng.random() < load.cancel and cancel_at < scenario.fault_s:
                cancel = Op(at_s=cancel_at, kind="cancel", peer=rng.choice(load.peers), client=client)
                found.append(_Named(cancel, "", label, None, ""))
            at += rng.expovariate(load.rate)
    return found


def _in_order(named: list[_Named | None], reader: y.Reader) -> tuple[Op, ...]:
    """By time, with the names turned into places."""
    ops = sorted((each for each in named if each is not None), key=lambda each: each.op.at_s)
    if len(ops) > OPS_MAX:
        reader.mistakes.append(f"{reader.name}: {len(ops)} operations, at most {OPS_MAX} are allowed")
    places: dict[str, int] = {}
    for place, each in enumerate(ops):
        if each.name and each.node is not None:
            if each.op.kind != "submit":
                reader.mistake(each.node, f"{each.path}.name", "only a submission has a name")
            elif each.name in places:
                reader.mistake(each.node, f"{each.path}.name", f"`{each.name}` is taken")
        places[each.name] = place
    found: list[Op] = []
    for each in ops:
        task = places.get(each.about, -1) if each.about else -1
        if each.about and task < 0 and each.node is not None:
            written = [name for name in places if name and not name.startswith("load.")]
            hint = nearest(each.about, written)
            reader.mistake(each.node, f"{each.path}.task", f"no submission is named `{each.about}`{hint}")
        found.append(msgspec.structs.replace(each.op, task=task))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ traces


class Trace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A failed run: what to replay, and what to expect. `format` comes first, and is all that never changes."""

    format: int = TRACE_FORMAT
    product: str = VERSION
    level: str = "world"
    check: str = ""
    message: str = ""
    at_s: float = 0.0
    bug: str = ""
    trace_hash: str = ""
    scenario: Scenario


class _Head(msgspec.Struct, kw_only=True):
    format: int
    product: str = "an unknown version"


def write_trace(path: Path, trace: Trace) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(trace), indent=1) + b"\n")


def read_trace(path: Path) -> Trace:
    """Raises ConfigError for what is no trace, and for one of another format."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(TRACE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from None
    if len(data) > TRACE_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {TRACE_BYTES_MAX} bytes: not a trace")
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ConfigError(f"{path}: is not a trace that `bitinglip simulate` has written") from None
    if head.format != TRACE_FORMAT:
        raise ConfigError(
            f"{path}: has format {head.format}, written by bitinglip {head.product}; "
            f"this is bitinglip {VERSION}, which reads format {TRACE_FORMAT}"
        )
    try:
        return msgspec.json.decode(data, type=Trace)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
