"""The hosts of one world with what lies between them: network, gossip, store. Nothing is checked here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peer.decide.voters import Bounds
from peer.ports import LEADER_KEY
from peer.routing import RoutedCluster
from simulations.scenario import Scenario
from simulations.world.cards import catalogue, profile
from simulations.world.gossip import SimGossip
from simulations.world.host import POLICY, Shared, SimHost
from simulations.world.kernel import World
from simulations.world.network import SimNetwork
from simulations.world.store import EtcdModel
from simulations.world.voting import SimRoster


class Fleet:
    """As a scenario says: hosts h1, h2, ...; the first of them are voters. Nobody runs before `start`.

    With `grows` the first host alone begins the store, and the leader makes others voters, by these bounds.
    """

    def __init__(
        self,
        world: World,
        scenario: Scenario,
        on_order: Callable[..., None] = lambda *_, **__: None,
        *,
        grows: Bounds | None = None,
    ) -> None:
        self.world = world
        names = [f"h{number}" for number in range(1, scenario.hosts + 1)]
        voters = names[: scenario.voters] if grows is None else []
        self.network = SimNetwork(world, world.rng("network"))
        self.gossip = SimGossip(world, self.network, world.rng("gossip"))
        self.store = EtcdModel(
            names if grows is not None else voters,
            world.rng("store"),
            reachable=self.network.links.is_open,
            violated=world.violated,
            voters=names[:1] if grows is not None else None,
        )
        self.roster = SimRoster(self.store, names[0]) if grows is not None else None
        models = catalogue(scenario.models)
        shared = Shared(
            world,
            self.store,
            self.network,
            self.gossip,
            models,
            profile(models),
            self.roster,
            grows,
            replace(POLICY, auto_rebalance=scenario.rebalance),
        )
        self.hosts = {
            name: SimHost(shared, name, voter=name in voters, gpus=scenario.gpus, on_order=on_order)
            for name in names
        }
        for name in scenario.upgraded:
            self.hosts[name].upgrade()

    def start(self, absent: frozenset[str] = frozenset()) -> None:
        self.world.spawn(self.store.run)
        for name, host in self.hosts.items():
            if name not in absent:
                host.start()

    def key_holder(self) -> str:
        """Who holds the leader key now, "" for nobody."""
        key = self.store.data.get(LEADER_KEY)
        return key.value.decode().partition(" ")[0] if key is not None else ""

    def leaders(self) -> list[str]:
        """Who serves as the leader, as far as it knows."""
        return [
            name
            for name, host in self.hosts.items()
            if host.peer is not None and host.peer.leader is not None
        ]

    def cluster_of(self, peer_id: str) -> RoutedCluster | None:
        """What a client that asks this peer gets to; None: nobody answers there."""
        host = self.hosts[peer_id]
        if host.peer is None or not host.up or host.incarnation is None or host.incarnation.frozen:
            return None
        return host.peer.cluster

    def voters(self) -> list[str]:
        """Of the store, as its members have it."""
        return list(self.store.voting)

    def any(self) -> Any:
        """The first peer that answers."""
        return next(each for each in map(self.cluster_of, self.hosts) if each is not None)
