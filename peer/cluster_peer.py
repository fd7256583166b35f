"""A peer of a cluster, above its ports: executor, membership, link and, on voters, election and leadership, wired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import msgspec
import structlog
import trio

from peer import health, limits
from peer.decide import elect, members
from peer.decide.quota import Quota
from peer.decide.voters import Bounds
from peer.election import Candidacy, Election, Leadership
from peer.errors import BitinglipError, Conflict, Unavailable
from peer.establish import load_snapshot
from peer.executor import Executor
from peer.follower import Follower
from peer.followers import Followers, shared_of
from peer.gossip_keys import GossipKeys
from peer.journal import Journal
from peer.leader import Leader
from peer.link import wire
from peer.link.session import Session, receive
from peer.membership import Membership
from peer.ports import (
    REFUSED,
    Authority,
    Clock,
    Connection,
    Entropy,
    Gossip,
    Network,
    ReportSink,
    Store,
    Voting,
)
from peer.relay import TokenRelay
from peer.routing import RoutedCluster
from peer.state.enrol import Revocation
from peer.state.member import Load, Member
from peer.state.model import Model
from peer.state.order import Order, Report
from peer.state.snapshot import Policy, Snapshot
from peer.store_space import SpaceKeeper
from peer.streams import StreamHub
from peer.transfer import let_go_politely
from peer.version import VERSION
from peer.voters import VoterKeeper

log = structlog.get_logger("peer")

_NOT_YET: Final = "this peer has just begun to lead: it is about to look at the store's members"
_ELSEWHERE: Final = "the store is not run by this cluster: what the loss of a host means depends on it"
_KNOCK_AGAIN_S: Final = 0.05
_LOADING_S_MAX: Final = 60.0  # a new leader reads the store


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a peer is. `link` and `api` are the addresses that others reach it at."""

    peer_id: str
    cluster_id: str
    link: str
    api: str
    policy: Policy
    catalogue: Mapping[str, Model]
    wire_versions: tuple[int, int] = (wire.WIRE, wire.WIRE_MIN)
    voters: Bounds = field(default_factory=Bounds)


class ClusterPeer:
    """`executor` is built with a sink that hands over to `report`. `cluster` serves clients as soon as `run` runs.

    Where the cluster runs its own store, `voting` is this host's part in it: this peer may become a voter, or cease to.
    Else `store` is the whole life's, None on peers that are no voters. `authority` None: no host can join.
    """

    def __init__(
        self,
        identity: Identity,
        executor: Callable[[ReportSink, StreamHub], Executor],
        *,
        store: Store | None,
        gossip: Gossip,
        network: Network,
        clock: Clock,
        entropy: Entropy,
        voting: Voting | None = None,
        authority: Authority | None = None,
    ) -> None:
        self._identity = identity
        self.store: Store | None = None  # by way of this host's own member, while it has one
        self._voting = voting
        self._network = network
        self._clock = clock
        self._entropy = entropy
        self._authority = authority
        self._streams = StreamHub(clock)
        self.executor = executor(self, self._streams)
        self.membership = Membership(identity.peer_id, gossip, clock, self._rumour)
        self.follower = Follower(
            identity.peer_id,
            network,
            self.executor,
            self.membership,
            entropy,
            suspect=self._suspect,
            trust=self._trust,
            revoke=self._revoke,
            wire_versions=identity.wire_versions,
            voting=voting,
            keyed=authority.ready if authority is not None else lambda: True,
        )
        self.election: Election | None = None
        self._nursery: trio.Nursery | None = None
        self._candidacy: Candidacy | None = None
        self._stopping = False
        self._load: Load | None = None  # as it was told
        self._announced = 0  # the epoch, likewise
        self._executed = trio.Event()
        self._holder, self._holder_address = "", ""  # of the leader key, when this voter last looked
        self._followers: Followers | None = None
        self.leader: Leader | None = None
        self.journal: Journal | None = None
        self._began_leading = trio.Event()
        self._relay = TokenRelay(identity.peer_id, self._streams, network, self.membership)
        self.cluster = RoutedCluster(
            self,
            self.follower,
            self.executor,
            self._relay,
            identity.catalogue,
            clock,
            GossipKeys(gossip, entropy),
            self.membership,
        )
        if store is not None:
            self.begin_voting(store)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `stop` or cancelled. Raises StoreBroken when this voter's store or this host's disk is."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._announce(epoch=0)
            nursery.start_soon(self._execute)
            nursery.start_soon(self.membership.run)
            nursery.start_soon(self._tell_load)
            await nursery.start(self._network.listen, self._accept)
            nursery.start_soon(self.follower.run, self._may_follow)
            if self._candidacy is not None:
                nursery.start_soon(self._stand, self._candidacy)
            if self._voting is not None:
                nursery.start_soon(self._voting.run, self.begin_voting, self.end_voting)
                nursery.start_soon(self.follower.watch_store, self._voting)
                nursery.start_soon(SpaceKeeper(self._voting, self, self._clock, self.cluster.tell_full).run)
            task_status.started()

    async def stop(self, drain_s: float = limits.DRAIN_S_MAX) -> bool:
        """`drain`, then end `run`."""
        done = await self.drain(drain_s)
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        return done

    async def drain(self, limit_s: float) -> bool:
        """Hand the leadership over, let runs end, then end the engines; clients are served on. False if some run was
        cut off at the limit."""
        self._stopping = True
        election, leader = self.election, self.leader
        if election is not None and leader is not None:
            await let_go_politely(leader.settled, election.resign)
        elif election is not None:
            election.resign()
        done = await self.executor.drain(limit_s)
        self.executor.stop()
        with trio.move_on_after(limits.ENGINE_STOP_S_MAX):
            await self._executed.wait()
        return done

    def stuck(self) -> str:
        """Which loop stands still: see peer.health."""
        leading = self.leader.came_round_at if self.leader is not None else None
        return health.stuck(trio.current_time(), leader=leading, executor=self.executor.came_round_at)

    def configure(self, policy: Policy, catalogue: Mapping[str, Model]) -> None:
        """Take a reloaded configuration: it is in force while this peer leads."""
        self._identity = replace(self._identity, policy=policy, catalogue=catalogue)
        if self.leader is not None:
            self.leader.configure(policy, catalogue)

    # ---------------------------------------------------------------- voting

    def begin_voting(self, store: Store) -> None:
        """Take part in elections by this store, until `end_voting`."""
        if self._stopping:
            return
        identity = self._identity
        self.store = store
        self.election = Election(
            identity.peer_id,
            identity.link,
            store,
            self._clock,
            self._entropy,
            lead=self._lead,
            seen=self._seen_leader,
        )
        self._candidacy = Candidacy(self.election)
        if self._nursery is not None:
            self._announce(epoch=0)
            self._nursery.start_soon(self._stand, self._candidacy)

    async def end_voting(self) -> None:
        """Take part no more; a leadership of this peer is over on return, and its store is not used any more."""
        candidacy = self._candidacy
        if candidacy is not None:
            candidacy.scope.cancel()
            await candidacy.over.wait()

    async def _stand(self, candidacy: Candidacy) -> None:
        try:
            with candidacy.scope:
                await candidacy.election.run()
        finally:
            candidacy.over.set()
            if candidacy.scope.cancel_called:
                self.store, self.election, self._candidacy = None, None, None
                self._holder, self._holder_address = "", ""
                self._announce(epoch=0)

    async def _execute(self) -> None:
        await self.executor.run()
        self._executed.set()

    def _may_follow(self) -> bool:
        return self._followers is None

    async def _tell_load(self) -> None:
        """Until cancelled: how busy this host is, in its tags, when that has changed much."""
        while True:
            load = self.executor.load()
            if self.leader is not None:
                load = msgspec.structs.replace(load, queued=self.leader.queued())
            if members.worth_telling(self._load, load):
                self._load = load
                self._announce(self._announced)
            await self._clock.sleep(limits.LOAD_TELL_S)

    def _announce(self, epoch: int) -> None:
        identity, self._announced = self._identity, epoch
        self.membership.announce(
            members.tags(
                role="leader" if epoch else "follower",
                epoch=epoch,
                api=identity.api,
                link=identity.link,
                voter=self.store is not None,
                wire=identity.wire_versions[0],
                version=VERSION,
                load=self._load.text() if self._load is not None else "",
            )
        )

    # ---------------------------------------------------------------- evidence

    def _suspect(self, peer_id: str, why: str) -> None:
        if self.election is not None:
            self.election.suspect(peer_id, why)

    def _trust(self, peer_id: str) -> None:
        if self.election is not None:
            self.election.trust(peer_id)

    def _seen_leader(self, peer_id: str, address: str) -> None:
        self._holder, self._holder_address = peer_id, address
        if peer_id and not self.follower.leader:
            self.follower.hint(peer_id, address)

    def _rumour(self, member: Member) -> None:
        if self.leader is not None:
            self.leader.rumour(member.peer_id, member.status)
        if member.status != "alive" and member.peer_id != self.follower.leader:
            self._suspect(member.peer_id, f"gossip says {member.status}")

    def _revoke(self, revoked: tuple[Revocation, ...]) -> None:
        """These are all that are revoked: nothing goes to them or comes from them any more."""
        serials = [serial for each in revoked for serial in each.serials]
        self._network.revoke([each.peer_id for each in revoked], serials)
        if self._voting is not None:
            self._voting.revoke(serials)

    def _linked(self, peer_id: str, up: bool) -> None:
        if self.leader is not None:
            self.leader.linked(peer_id, up)
            if not up and self._nursery is not None:
                self._nursery.start_soon(self._knock, peer_id, self.leader)

    async def _knock(self, peer_id: str, leader: Leader) -> None:
        """A host where the peer's process has ended says so at once; one that is gone does not answer.

        While a process ends, its port may take a connection yet, which then breaks: so again. A session that has come
        meanwhile knows better: between hosts there may be what refuses in their stead.
        """
        until = self._clock.now() + limits.RELINK_S  # then it is lost anyway
        while (address := self.membership.address(peer_id)) and self._clock.now() < until:
            try:
                await (await self._network.dial(peer_id, address)).aclose()
                return
            except Unavailable as error:
                refused, followers = error.code == REFUSED, self._followers
            if followers is not None and peer_id in followers.linked:
                return
            if refused:
                leader.linked(peer_id, False, dead=True)
                return
            await self._clock.sleep(_KNOCK_AGAIN_S)

    # ---------------------------------------------------------------- reports

    async def report(self, report: Report) -> None:
        """ports.ReportSink: to whoever leads, here or elsewhere."""
        while True:
            try:
                if self.leader is not None:
                    return await self.leader.report(report)
                return await self.follower.report(report)
            except Unavailable:
                began = self._began_leading
                with trio.move_on_after(limits.REPORT_INTERVAL_S):
                    await (began.wait() if self._followers is not None else self.follower.wait_for_change())

    # ---------------------------------------------------------------- leading

    async def _lead(self, leadership: Leadership) -> None:
        """Load what the store holds and lead until cancelled. Raises BitinglipError when that ends it."""
        identity, store, election = self._identity, self.store, self.election
        assert store is not None
        assert election is not None
        try:
            self.executor.accept(leadership.epoch)
        except Unavailable:
            election.step_aside()  # a host whose disk takes nothing more leaves it to another
            raise
        followers = Followers(identity.peer_id, leadership.epoch, self, self._linked)
        self._followers = followers
        self.follower.leave("this peer leads now")
        try:
            snapshot = None
            with trio.move_on_after(_LOADING_S_MAX):
                snapshot = await load_snapshot(
                    store,
                    leadership.epoch,
                    peer_id=identity.peer_id,
                    cluster_id=identity.cluster_id,
                    policy=identity.policy,
                    catalogue=identity.catalogue,
                    clock=self._clock,
                )
            if snapshot is None:
                raise Unavailable(f"the store was not read in {_LOADING_S_MAX:g} s")
            journal = Journal(store, last=snapshot.events_next - 1)
            leader = Leader(
                snapshot,
                journal,
                store,
                followers,
                self._clock,
                self._entropy,
                self._streams,
                leadership,
                self._authority,
                self.membership.seeds,
            )
            leader.quota = Quota(self.cluster.windows)

            def share() -> None:
                shared = shared_of(leader)
                self.follower.take(shared)
                followers.share(shared)

            leader.on_shared = share
            leader.let_go = partial(self._hand_over, snapshot, followers)
            share()
            await self._serve(leader, journal, leadership.epoch, snapshot, followers)
        finally:
            try:
                await followers.farewell("it leads no more")
            finally:
                self._followers = None
                self._announce(epoch=0)

    async def _serve(
        self, leader: Leader, journal: Journal, epoch: int, snapshot: Snapshot, followers: Followers
    ) -> None:
        log.info("leading", peer_id=self._identity.peer_id, epoch=epoch)
        self._announce(epoch)
        self.leader, self.journal = leader, journal
        for member in self.membership.members.values():
            leader.rumour(member.peer_id, member.status)
        self.executor.report_all()
        self._began_leading.set()
        managed = self._voting is not None and self._voting.members is not None
        snapshot.outlook = _NOT_YET if managed else _ELSEWHERE
        try:
            async with trio.open_nursery() as nursery:
                if self._voting is not None:
                    keeper = VoterKeeper(
                        snapshot,
                        self._voting,
                        followers,
                        self._clock,
                        self._identity.voters,
                        leader.settled,
                    )
                    nursery.start_soon(keeper.run)
                nursery.start_soon(self._knock_at_absent, leader, snapshot, followers)
                await leader.run()
        except BaseExceptionGroup as group:
            errors, others = group.split(BitinglipError)
            if errors is None or others is not None:  # cancelled, for one: then the errors are of no interest
                raise (others or group) from None
            raise _first(errors) from None
        finally:
            self.leader, self.journal = None, None
            self._began_leading = trio.Event()
            journal.end("this peer leads no more")

    async def _knock_at_absent(self, leader: Leader, snapshot: Snapshot, followers: Followers) -> None:
        """A new leader has had no session yet that could end. Peers that live come by themselves."""
        await self._clock.sleep(limits.RELINK_S)
        # At once: those that are gone without a word take a while each.
        async with trio.open_nursery() as nursery:
            for peer_id in snapshot.peers:
                if peer_id != self._identity.peer_id and peer_id not in followers.linked:
                    nursery.start_soon(self._knock, peer_id, leader)

    def _hand_over(self, snapshot: Snapshot, followers: Followers) -> None:
        """Let go of the leadership for another voter. Raises Conflict if there is none that could take it."""
        me, gossiped = self._identity.peer_id, self.membership.members.values()
        if self.election is None or not elect.heirs(me, snapshot.voters, gossiped, followers.linked):
            raise Conflict("no other voter is up: nobody else could lead", code="no_other_voter")
        self.election.step_aside()

    async def send(self, peer_id: str, order: Order) -> None:
        """ports.Link to this peer's own executor."""
        await self.executor.order(order)

    # ---------------------------------------------------------------- connections that come in

    async def _accept(self, connection: Connection) -> None:
        try:
            hello = wire.decode(await receive(connection))
            if not isinstance(hello, wire.Hello | wire.Follow):
                raise Unavailable(f"{type(hello).__name__} before Hello")
        except Unavailable as error:
            log.info("caller_not_understood", peer_id=connection.peer_id, why=error.message)
            return
        if isinstance(hello, wire.Follow):
            await self._relay.serve(Session(connection), hello)
            return
        version = wire.agreed(self._identity.wire_versions, (hello.wire, hello.wire_min))
        followers, leader, journal = self._followers, self.leader, self.journal
        if version is None:
            await _refuse(connection, f"no common wire version: here {self._identity.wire_versions}")
        elif followers is None or leader is None or journal is None:
            await self._refuse_to_lead(connection, hello.peer_id)
        else:
            await followers.serve(Session(connection), hello, version, leader, journal)

    async def _refuse_to_lead(self, connection: Connection, caller: str) -> None:
        """Say who leads, if this peer knows and it is news to the caller."""
        leader = self.follower.leader or self._holder
        address = self.membership.address(leader)
        if leader == self._holder:
            address = self._holder_address or address
        known = leader if leader not in (caller, self._identity.peer_id) else ""
        await _refuse(connection, "this peer does not lead", known, (known and address) or "")


async def _refuse(connection: Connection, reason: str, leader: str = "", address: str = "") -> None:
    with trio.move_on_after(limits.LINK_SILENT_S), suppress(Unavailable):
        await connection.send(wire.encode(wire.Refused(reason=reason, leader=leader, address=address)))


def _first(group: BaseExceptionGroup[BitinglipError]) -> BitinglipError:
    """Any one of a group's errors: each of them ends the leadership."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
