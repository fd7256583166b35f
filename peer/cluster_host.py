"""A host's peer of a cluster with all that touches the world: gossip agent, store member, TLS network, certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
import trio

from peer import identity
from peer.adapters.gossip.serf_agent import AgentConfig, SerfAgent
from peer.adapters.gossip.serf_gossip import SerfGossip
from peer.adapters.gossip.serf_rpc import SerfRpc
from peer.adapters.links import renewal
from peer.adapters.links.cluster_files import SERF_FOLDER, Belonging, ClusterFiles
from peer.adapters.links.enrolment import EnrolmentServer
from peer.adapters.links.tls_network import TlsNetwork
from peer.adapters.stores.etcd_member import Certificates
from peer.adapters.stores.etcd_voting import EtcdVoting, ExternalVoting
from peer.cluster_peer import ClusterPeer, Identity
from peer.config import Config
from peer.decide.voters import Bounds
from peer.errors import ConfigError, Conflict, Unavailable
from peer.executor import Executor
from peer.ports import Clock, Entropy, ReportSink
from peer.settings import split_bind
from peer.state.command import Request
from peer.state.model import Model
from peer.state.snapshot import Policy
from peer.streams import StreamHub

log = structlog.get_logger("node")

AGENT_S_MAX: Final = 20.0  # until the gossip agent answers
EPOCH_FILE: Final = "epoch"
ETCD_FOLDER: Final = "etcd"


class MakeExecutor(Protocol):
    def __call__(
        self,
        sink: ReportSink,
        streams: StreamHub,
        epoch: int = 0,
        remember_epoch: Callable[[int], None] | None = None,
    ) -> Executor: ...


@asynccontextmanager
async def open_cluster_host(
    config: Config,
    data_dir: Path,
    executor: MakeExecutor,
    *,
    policy: Policy,
    catalogue: Mapping[str, Model],
    clock: Clock,
    entropy: Entropy,
) -> AsyncIterator[ClusterPeer]:
    """What the peer needs runs within the block, and ends after the peer has: its last words go through it.

    Raises ConfigError, Conflict (its name is taken, etcd is too old), Unavailable (a program is missing).
    """
    files = ClusterFiles(data_dir)
    belonging = _belonging(files, data_dir)
    addresses = Addresses(config, files.credentials().addresses)
    voting = voting_of(config, data_dir, files, belonging, addresses)
    if isinstance(voting, EtcdVoting) and (voting.address or voting.seat):
        await voting.check()
    async with trio.open_nursery() as children:
        rpc = await _gossip_agent(config, data_dir, files, belonging, addresses, children)

        async def ask(request: Request) -> Any:
            return await peer.cluster.call(request)

        enrolment = EnrolmentServer(files.ca_pem(), ask, clock)
        network = TlsNetwork(config.link.bind, files.credentials(), enrol=enrolment.serve)
        epoch_file = files.folder / EPOCH_FILE
        peer = ClusterPeer(
            Identity(
                peer_id=belonging.peer_id,
                cluster_id=belonging.cluster,
                link=addresses.link,
                api=addresses.api,
                policy=policy,
                catalogue=catalogue,
                voters=Bounds(wanted=config.cluster.voters_wanted, dead_s=config.cluster.voter_dead_s),
            ),
            lambda sink, streams: executor(sink, streams, _read_epoch(epoch_file), _keep(epoch_file)),
            store=None,
            gossip=SerfGossip(belonging.peer_id, rpc),
            network=network,
            clock=clock,
            entropy=entropy,
            voting=voting,
            authority=files,
        )
        children.start_soon(renewal.keep_renewed, files, network.renew, ask, clock, entropy)
        children.start_soon(renewal.keep_authority, files, ask, clock, entropy)
        yield peer
        network.close()
        children.cancel_scope.cancel()


def _belonging(files: ClusterFiles, data_dir: Path) -> Belonging:
    belonging = files.belonging()
    if belonging is None:
        raise ConfigError(f"{data_dir} is of no cluster: `bitinglip init` or `bitinglip join` first")
    if belonging.peer_id != identity.peer_id(data_dir):
        raise ConfigError(
            f"{files.folder} is that of {belonging.peer_id}, but this host is {identity.peer_id(data_dir)}: "
            "a data directory is not to be copied to another host"
        )
    return belonging


class Addresses:
    """Where others reach this host: as configured, else at the first address of its certificate."""

    def __init__(self, config: Config, certified: tuple[str, ...]) -> None:
        self._certified = certified
        self.link = self._advertised(config.link.bind, config.link.advertise, "link")
        self.gossip = self._advertised(config.gossip.bind, config.gossip.advertise, "gossip")
        self.store = self._advertised(config.store.bind, config.store.advertise, "store")
        self.api = self._advertised(config.api.bind, "", "api")

    def _advertised(self, bind: str, advertise: str, section: str) -> str:
        host, port = split_bind(advertise or bind)
        if port == 0 and section != "api":
            raise ConfigError(f"{section}.bind: other hosts need a fixed port, not 0")
        if not advertise and host in ("0.0.0.0", "::"):
            if not self._certified:
                raise ConfigError(
                    f"{section}.advertise: the certificate names no address of this host: say where others reach it"
                )
            host = self._certified[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _gossip_agent(
    config: Config,
    data_dir: Path,
    files: ClusterFiles,
    belonging: Belonging,
    addresses: Addresses,
    children: trio.Nursery,
) -> SerfRpc:
    """Its RPC, once it answers: of our own child, or of one that others run."""
    gossip = config.gossip
    if gossip.agent:
        host, port = split_bind(gossip.agent)
        rpc = SerfRpc(host, port, _agent_key(Path(gossip.agent_key_file)))
        names = {member.peer_id for member in await SerfGossip(belonging.peer_id, rpc).members()}
        if belonging.peer_id not in names:
            raise ConfigError(f"gossip.agent: no member of it is called {belonging.peer_id}, as this peer is")
        return rpc
    agent = SerfAgent(
        AgentConfig(
            name=belonging.peer_id,
            folder=data_dir / SERF_FOLDER,
            bind=gossip.bind,
            advertise=addresses.gossip,
            rpc=gossip.rpc,
            key=files.gossip_key(),
            seeds=_seeds(gossip.seeds, belonging.seeds, addresses.gossip),
            retry_s=gossip.retry_s,
        )
    )
    await children.start(agent.run)
    await agent.answering(AGENT_S_MAX)
    return agent.rpc


def _agent_key(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"gossip.agent_key_file: {file}: {error.strerror}") from None


def _seeds(configured: tuple[str, ...], known: tuple[str, ...], mine: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(seed for seed in (*configured, *known) if seed != mine))


def voting_of(
    config: Config, data_dir: Path, files: ClusterFiles, belonging: Belonging, addresses: Addresses
) -> EtcdVoting | ExternalVoting:
    """This host's part in the store. The first host of a cluster begins it, once."""
    if config.store.member:
        return ExternalVoting(config.store.member)
    may_vote = belonging.voter and (not config.cluster.voters or belonging.peer_id in config.cluster.voters)
    host = files.folder / "host.pem"
    heartbeat_ms = round(config.store.heartbeat_s * 1_000)
    voting = EtcdVoting(
        data_dir / ETCD_FOLDER,
        belonging.peer_id,
        addresses.store if may_vote else "",
        listen=config.store.bind,
        certificates=Certificates(certificate=host, key=host, authority=files.folder / "ca.pem"),
        token=belonging.cluster,
        heartbeat_ms=heartbeat_ms,
        election_ms=10 * heartbeat_ms,
        quota_bytes=config.store.quota_bytes,
    )
    if belonging.founder:
        with suppress(Conflict):  # it was, and the host died before it was noted
            voting.found()
        files.store_founded()
    return voting


def _read_epoch(file: Path) -> int:
    """The newest epoch that this host has obeyed: also after a restart no older one is."""
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None


def _keep(file: Path) -> Callable[[int], None]:
    def keep(epoch: int) -> None:
        try:
            identity.write_private(file, f"{epoch}\n")
        except OSError as error:
            raise Unavailable(f"{file}: the newest epoch cannot be kept: {error.strerror}") from error

    return keep
