"""A scenario: everything that happens to a simulated cluster from outside, as data.

A seed draws one, a YAML file can fix one, a trace file holds one, and the shrinker takes parts of one away. The run
is a function of it alone.
"""

from __future__ import annotations

import msgspec


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing that goes wrong. What `targets` and `strength` mean is said with each kind."""

    at_s: float
    kind: str
    targets: tuple[str, ...] = ()  # peers: "h1"; for links: from, to
    for_s: float = 0.0  # 0: a moment, or for good
    strength: float = 0.0


class Op(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request of a client or owner, sent to `peer` at `at_s` whatever became of earlier ones."""

    at_s: float
    kind: str  # submit, get, wait, cancel, list, events, stream, assign, unload, rebalance, restart, drain, undrain,
    # transfer
    peer: str
    client: int = 0
    task: int = -1  # the submit that it is about: its place in `Scenario.ops`
    model: str = ""
    tokens: int = 0
    timeout_s: float = 60.0
    priority: int = 5
    key: str = ""  # idempotency key
    worker: str = ""
    host: str = ""  # to drain
    vanish_s: float = 0.0  # the client gives up after so long; 0: never


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`faults` and `ops` lie within `fault_s`; after it everything is mended and must settle."""

    seed: int
    hosts: int = 5
    voters: int = 3
    gpus: int = 2  # per host
    fault_s: float = 90.0
    models: int = 3
    faults: tuple[Fault, ...] = ()
    ops: tuple[Op, ...] = ()
    rebalance: str = ""  # the strategy by which the leader plans by itself
    grows: bool = False  # the first host alone begins the store, and the leader makes the voters
    upgraded: tuple[str, ...] = ()  # peers that run the next wire version from the beginning
