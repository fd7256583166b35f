"""What Serf's agents tell the peers: peer.ports.Gossip, late as measured, and wrong where a fault says so.

Each observer has a view of its own, changed by entries that come due, so that asking costs little while nothing
happens. What is modelled: joins are seen after 0.2-1.5 s and tags after 1.1-1.6 s; who cannot be heard of in a round
by any way of links is failed after 7 s or more, and alive again some seconds after the heal; who leaves politely is
left at once; a newcomer knows nobody who is dead; a few updates are lost and repaired by the exchange of whole states.
The agent is a child of the peer's process: it dies with it, but a frozen process's agent goes on and calls it alive.
Not modelled: suspicion and refutation one by one (faults say dead of the living instead), reaping, name conflicts.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

import trio

from peer.errors import Unavailable
from peer.limits import TAGS_BYTES_MAX
from peer.state.member import KeyReport, KeyStep, Member
from simulations.errors import SimulatorError
from simulations.world.kernel import Incarnation, World
from simulations.world.network import SimNetwork

Status = Literal["alive", "leaving", "left", "failed"]

JOIN_S = (0.2, 1.5)
TAGS_S = (1.1, 1.6)
LEAVE_S = (0.1, 0.4)
FAILED_S = (6.5, 8.0)  # with few agents
FAILED_MORE_S = 4.0  # with a hundred
SPREAD_S = 1.0  # from the first observer to the last
HEALED_S = (1.0, 5.0)
LOST = 0.01  # of all updates
REPAIR_S = (15.0, 30.0)
FLAP_S = (0.5, 3.0)
FLAP_UNBOUNDED_S = 600.0


class _News(NamedTuple):
    """An entry that changes a view of `subject` at `at`; `extra` of its delay is a fault's. Status None: tags only."""

    at: float
    number: int
    subject: str
    generation: int
    status: Status | None
    version: int
    tags: Mapping[str, str]
    extra: float


@dataclass(eq=False)
class _View:
    member: Member
    version: int  # of the tags


@dataclass(eq=False)
class _Agent:
    incarnation: Incarnation
    address: str
    up: bool = True
    has_left: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    version: int = 0
    views: dict[str, _View] = field(default_factory=dict)
    early: dict[str, _News] = field(default_factory=dict)  # tags of who is not known yet
    generations: dict[str, int] = field(default_factory=dict)  # older news about a subject's status is void
    news: list[_News] = field(default_factory=list)
    shown: tuple[Member, ...] | None = None
    shown_until: float = 0.0


@dataclass(eq=False)
class _Lie:
    """What observers are shown of a subject in place of their views, until then. `turns`: when it changes."""

    subject: str
    observers: frozenset[str]  # empty: everybody
    until: float
    kind: Literal["dead", "alive", "flapping"]
    turns: tuple[float, ...] = ()
    lags: dict[str, float] = field(default_factory=dict)


class SimGossipPort:
    """peer.ports.Gossip of one life."""

    def __init__(self, gossip: SimGossip, agent: _Agent) -> None:
        self._gossip = gossip
        self._agent = agent

    async def members(self) -> tuple[Member, ...]:
        await trio.lowlevel.checkpoint()
        self._check()
        return self._gossip.shown(self._agent)

    async def set_tags(self, tags: Mapping[str, str]) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        size = tags_bytes(tags)
        if size > TAGS_BYTES_MAX:
            self._gossip.world.violated("port_contract", f"tags of {size} bytes: {dict(tags)}")
        self._gossip.tagged(self._agent, dict(tags))

    async def keys(self) -> KeyReport:
        """Simulated gossip is not encrypted."""
        await trio.lowlevel.checkpoint()
        raise Unavailable("simulated gossip has no keys")

    async def change_key(self, step: KeyStep) -> KeyReport:
        return await self.keys()

    def _check(self) -> None:
        if not self._agent.incarnation.alive or not self._agent.up:
            raise Unavailable("the gossip agent does not answer")


class SimGossip:
    """All agents. Faults with `for_s` 0 last until `mend`; `observers` empty is everybody."""

    def __init__(self, world: World, network: SimNetwork, rng: random.Random) -> None:
        self.world = world
        self._network = network
        self._rng = rng
        self._agents: dict[str, _Agent] = {}  # the newest of each peer
        self._parts: dict[str, str] = {}  # of those up: the first agent of all that hear of each other
        self._lies: list[_Lie] = []
        self._late: list[tuple[frozenset[str], float, float]] = []  # observers, until, extra seconds
        self._number = 0
        network.links.watchers.append(self._links_changed)

    def port(self, incarnation: Incarnation, address: str = "") -> SimGossipPort:
        """The agent of a new life starts and joins."""
        peer_id = incarnation.peer_id
        known = self._agents.get(peer_id)
        if known is not None and known.incarnation.alive:
            raise SimulatorError(f"{known.incarnation.name} has an agent")
        agent = _Agent(incarnation, address or f"{peer_id}.example")
        self._agents[peer_id] = agent
        self._parts.pop(peer_id, None)
        self._starts(agent)
        incarnation.on_death(lambda how: self._stops(agent))
        return SimGossipPort(self, agent)

    def leave(self, peer_id: str) -> None:
        """It leaves politely: before its process ends, or as that does so by itself. From the dead it is nothing."""
        agent = self._agents.get(peer_id)
        if agent is None or (not agent.up and agent.incarnation.how != "exited"):
            return
        self.world.count("gossip: left")
        agent.has_left = True
        self._stops(agent)
        for name, observer in self._living():
            if self._network.links.both_open(name, peer_id):
                self._tell(observer, agent, self._delay(LEAVE_S), "left")

    # ---------------------------------------------------------------- faults

    def late(self, seconds: float, *, for_s: float = 0.0, observers: Iterable[str] = ()) -> None:
        """All that these observers hear of from now on takes so much longer."""
        self.world.count("gossip: late")
        self._late.append((frozenset(observers), self._until(for_s), seconds))

    def says_dead(self, subject: str, *, for_s: float = 0.0, observers: Iterable[str] = ()) -> None:
        """Others call it failed, though it lives."""
        self._lie(_Lie(subject, frozenset(observers), self._until(for_s), "dead"))

    def says_alive(self, subject: str, *, for_s: float = 0.0, observers: Iterable[str] = ()) -> None:
        """Who knew it goes on calling it alive, whatever became of it."""
        self._lie(_Lie(subject, frozenset(observers), self._until(for_s), "alive"))

    def flapping(self, subject: str, *, for_s: float = 0.0, observers: Iterable[str] = ()) -> None:
        """Others call it failed and alive in turn, each a little later than the other."""
        at, end = trio.current_time(), trio.current_time() + (for_s or FLAP_UNBOUNDED_S)
        turns = []
        while at < end:
            turns.append(at)
            at += self._rng.uniform(*FLAP_S)
        self._lie(_Lie(subject, frozenset(observers), self._until(for_s), "flapping", tuple(turns)))

    def agent_dies(self, peer_id: str, *, for_s: float = 0.0) -> None:
        """Only the agent: the peer's calls of it fail, and others call the peer failed, until it is back."""
        agent = self._agents[peer_id]
        if agent.up and agent.incarnation.alive:
            self.world.count("gossip: agent died")
            self._stops(agent)
            if for_s > 0.0:
                self.world.spawn(self._back_later, agent, for_s)

    def mend(self) -> None:
        """End every fault; what was late is due when it would have been."""
        self._lies.clear()
        self._late.clear()
        for agent in self._agents.values():
            agent.shown = None
            agent.news = [news._replace(at=news.at - news.extra, extra=0.0) for news in agent.news]
            heapq.heapify(agent.news)
            self._back(agent)

    # ---------------------------------------------------------------- what ports ask

    def shown(self, agent: _Agent) -> tuple[Member, ...]:
        """What this agent answers now."""
        now = trio.current_time()
        self._hear_all(agent, now)
        if agent.shown is None or now >= agent.shown_until:
            agent.shown, agent.shown_until = self._show(agent, now)
        return agent.shown

    def tagged(self, agent: _Agent, tags: dict[str, str]) -> None:
        agent.tags = tags
        agent.version = self._next()
        self._know_itself(agent)
        peer_id = agent.incarnation.peer_id
        for name, observer in self._living():
            if name != peer_id and self._parts[name] == self._parts[peer_id]:
                self._tell(observer, agent, self._delay(TAGS_S), None)

    # ---------------------------------------------------------------- views

    def _hear_all(self, agent: _Agent, now: float) -> None:
        while agent.news and agent.news[0].at <= now:
            self._hear(agent, heapq.heappop(agent.news))

    def _hear(self, agent: _Agent, news: _News) -> None:
        view = agent.views.get(news.subject)
        if news.status is not None and news.generation != agent.generations.get(news.subject, 0):
            return
        if view is None:
            if news.status is None:
                agent.early[news.subject] = news
            if news.status != "alive":
                return
            early = agent.early.pop(news.subject, news)
            newest = early if early.version > news.version else news
            address = self._agents[news.subject].address
            member = Member(peer_id=news.subject, address=address, status="alive", tags=newest.tags)
            agent.views[news.subject] = _View(member, newest.version)
        else:
            old = view.member
            status = news.status or old.status
            newer = news.version > view.version
            if status == old.status and not newer:
                return
            tags = news.tags if newer else old.tags
            view.member = Member(peer_id=old.peer_id, address=old.address, status=status, tags=tags)
            view.version = max(view.version, news.version)
        if news.status == "failed":
            self.world.count("gossip: seen failed")
        agent.shown = None

    def _show(self, agent: _Agent, now: float) -> tuple[tuple[Member, ...], float]:
        """The view with the lies laid over it, and until when that holds if no news comes."""
        self._lies = [lie for lie in self._lies if lie.until > now]
        me, until = agent.incarnation.peer_id, inf
        lies: dict[str, Status] = {}
        for lie in self._lies:
            view = agent.views.get(lie.subject)
            if lie.subject == me or view is None or (lie.observers and me not in lie.observers):
                continue
            status, changes = self._told(lie, me, now)
            until = min(until, changes)
            is_lie = status is not None and status != view.member.status
            if status is not None and is_lie and view.member.status in ("alive", "failed", "left"):
                lies[lie.subject] = status
                self.world.count(f"gossip: {lie.kind} said wrongly")
        if not lies:
            return tuple(view.member for view in agent.views.values()), until
        return tuple(
            Member(
                peer_id=name,
                address=view.member.address,
                status=lies.get(name, view.member.status),
                tags=view.member.tags,
            )
            for name, view in agent.views.items()
        ), until

    def _told(self, lie: _Lie, observer: str, now: float) -> tuple[Status | None, float]:
        """What the lie says now (None: nothing), and when it says something else."""
        if lie.kind != "flapping":
            return ("failed" if lie.kind == "dead" else "alive"), lie.until
        lag = lie.lags.get(observer)
        if lag is None:
            lag = lie.lags[observer] = self._rng.uniform(0.0, SPREAD_S)
        past = sum(turn + lag <= now for turn in lie.turns)
        following = lie.turns[past] + lag if past < len(lie.turns) else inf
        return ("failed" if past % 2 else None), min(following, lie.until)

    # ---------------------------------------------------------------- facts

    def _starts(self, agent: _Agent) -> None:
        agent.version = self._next()
        self._know_itself(agent)
        self._divide(newcomer=agent.incarnation.peer_id)

    def _stops(self, agent: _Agent) -> None:
        if agent.up:
            agent.up = False
            agent.news.clear()
            self._divide()

    def _back(self, agent: _Agent) -> None:
        if not agent.up and agent.incarnation.alive and not agent.has_left:
            agent.up = True
            agent.views.clear()
            agent.early.clear()
            agent.generations.clear()
            agent.shown = None
            self._starts(agent)

    async def _back_later(self, agent: _Agent, seconds: float) -> None:
        await trio.sleep(seconds)
        if self._agents[agent.incarnation.peer_id] is agent:
            self._back(agent)

    def _links_changed(self) -> None:
        if self._agents:
            self._divide()

    def _divide(self, newcomer: str = "") -> None:
        """Tell each agent whom it hears of no more, and whom again, since links or agents have changed."""
        before, after = self._parts, self._components()
        self._parts = after
        if before == after:
            return
        joined, failed = self._rng.uniform(*JOIN_S), self._failed_s()
        only = newcomer if {**after, **before} == after and len(after) == len(before) + 1 else ""
        for name in after:
            observer = self._agents[name]
            part_before, part_after = before.get(name), after[name]
            subjects = self._agents if not only or name == only else {only: self._agents[only]}
            for other, subject in subjects.items():
                if other == name:
                    continue
                heard = part_before is not None and before.get(other) == part_before
                hears = after.get(other) == part_after
                if heard and not hears:
                    self._tell(observer, subject, failed + self._rng.uniform(0.0, SPREAD_S), "failed")
                elif hears and not heard:
                    seconds = joined if newcomer in (name, other) else self._rng.uniform(*HEALED_S)
                    self._tell(observer, subject, seconds * self._rng.uniform(0.9, 1.0), "alive")

    def _components(self) -> dict[str, str]:
        """Those up, by the first of the agents that can hear of each other over some way of open links."""
        names = [name for name, _ in self._living()]
        links = self._network.links
        if links.all_open or not names:
            return dict.fromkeys(names, names[0]) if names else {}
        parts: dict[str, str] = {}
        for first in names:
            if first in parts:
                continue
            rest = [name for name in names if name not in parts]
            hearers = _reached(first, rest, links.is_open)
            heard = _reached(first, rest, lambda one, other: links.is_open(other, one))
            for name in rest:
                if name in hearers and name in heard:
                    parts[name] = first
        return {name: parts[name] for name in names}

    def _tell(self, observer: _Agent, subject: _Agent, seconds: float, status: Status | None) -> None:
        """A change of status voids what was under way before; a change of tags does not."""
        now, name, other = trio.current_time(), observer.incarnation.peer_id, subject.incarnation.peer_id
        if status is not None:
            self._hear_all(observer, now)  # what was heard by now, though nobody has asked, is not void
            observer.generations[other] = observer.generations.get(other, 0) + 1
        self._late = [each for each in self._late if each[1] > now]
        extra = sum(each[2] for each in self._late if not each[0] or name in each[0])
        generation = observer.generations.get(other, 0)
        number = self._next()
        at = now + seconds + extra
        news = _News(at, number, other, generation, status, subject.version, subject.tags, extra)
        heapq.heappush(observer.news, news)

    def _know_itself(self, agent: _Agent) -> None:
        me = agent.incarnation.peer_id
        member = Member(peer_id=me, address=agent.address, status="alive", tags=agent.tags)
        agent.views[me] = _View(member, agent.version)
        agent.shown = None

    def _living(self) -> list[tuple[str, _Agent]]:
        return [(name, agent) for name, agent in self._agents.items() if agent.up]

    def _delay(self, between: tuple[float, float]) -> float:
        if self._rng.random() < LOST:
            self.world.count("gossip: an update is lost and repaired")
            return self._rng.uniform(*REPAIR_S)
        return self._rng.uniform(*between)

    def _failed_s(self) -> float:
        return self._rng.uniform(*FAILED_S) + FAILED_MORE_S * min(1.0, max(0.0, len(self._parts) - 10) / 90)

    def _lie(self, lie: _Lie) -> None:
        self._lies.append(lie)
        for agent in self._agents.values():
            agent.shown = None

    def _until(self, for_s: float) -> float:
        return trio.current_time() + for_s if for_s > 0.0 else inf

    def _next(self) -> int:
        self._number += 1
        return self._number


def tags_bytes(tags: Mapping[str, str]) -> int:
    """As Serf sends them: a type byte, then a msgpack map of text."""
    sizes = [len(text.encode()) for pair in tags.items() for text in pair]
    headers = sum(1 if size < 32 else 2 if size < 256 else 3 for size in sizes)
    return 1 + (1 if len(tags) < 16 else 3) + headers + sum(sizes)


def _reached(first: str, names: list[str], is_open: Callable[[str, str], bool]) -> set[str]:
    """Only to be asked whether a name is in it: sets have no order here."""
    reached, way = {first}, [first]
    rest = [name for name in names if name != first]
    while way and rest:
        here = way.pop()
        missed = []
        for name in rest:
            if is_open(here, name):
                reached.add(name)
                way.append(name)
            else:
                missed.append(name)
        rest = missed
    return reached
