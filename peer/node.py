"""The composition root: builds a peer out of its parts, starts and stops it, and reloads its configuration.

A host that has joined a cluster (`bitinglip init`, `bitinglip join`) runs a peer of it; any other is one for itself.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog
import trio

from api.app import ApiApp, create_app
from api.serve import serve
from peer import credentials, identity, limits, logs
from peer.adapters.clock import SystemClock, SystemEntropy
from peer.adapters.devices.devices import find_devices
from peer.adapters.devices.engine_process import EngineLimits, EngineProcess
from peer.adapters.devices.telemetry import Telemetries, open_telemetry
from peer.adapters.devices.telemetry_host import Host
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.models.catalogue import read_catalogue
from peer.adapters.models.fetch import Fetcher
from peer.adapters.processes.service_manager import ServiceManager
from peer.adapters.stores import migration
from peer.adapters.stores.sqlite_store import SqliteStore
from peer.cluster_host import open_cluster_host
from peer.config import RELOADABLE, Config
from peer.decide.admit import nearest
from peer.decide.keys import host_owner
from peer.engines import Device
from peer.errors import BitinglipError, ConfigError, Conflict, Unavailable
from peer.executor import Executor
from peer.ports import Cluster, ReportSink
from peer.single_peer import SinglePeer
from peer.state import key as keys
from peer.state.command import AssignModel, CreateKey, ListWorkers, WorkerView
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.snapshot import Policy
from peer.streams import StreamHub

log = structlog.get_logger("node")

_POLL_S = 0.1
_RETRY_S = 1.0  # after a call that no leader answered
_FIRST_LEADER_S_MAX = 20.0  # until there is one: then the peer serves without
_ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a person needs to use a peer that serves."""

    url: str
    data_dir: Path
    admin_key_path: Path
    peer_id: str


class Served(Cluster, Protocol):
    not_ready: str
    """Why requests are not to come here now, "" if they are."""


class Peer(Protocol):
    """What runs on this host: peer.single_peer.SinglePeer or peer.cluster_peer.ClusterPeer."""

    @property
    def executor(self) -> Executor: ...
    @property
    def cluster(self) -> Served: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""

    async def drain(self, limit_s: float) -> bool:
        """Before the end: take no new runs, wait for those that are there, end the engines. False if some were cut
        off at the limit."""

    def configure(self, policy: Policy, catalogue: Mapping[str, Model]) -> None:
        """Take a reloaded configuration."""

    def stuck(self) -> str:
        """Which of its loops stands still, "" if none."""


def policy_of(config: Config) -> Policy:
    return Policy(
        queue_tasks_max=config.limits.queue_tasks_max,
        queue_bytes_max=limits.QUEUE_BYTES_MAX,
        priority_step_s=limits.PRIORITY_STEP_S,
        retention_age_s=config.retention.age_s,
        retention_count=config.retention.count,
        retention_bytes=config.retention.total_bytes,
        events_kept=config.retention.events,
        memory_reserve_bytes=config.engine.memory_reserve_bytes,
        lost_share_max=config.cluster.lost_share_max,
        auto_rebalance="" if config.cluster.rebalance == "off" else config.cluster.rebalance,
    )


async def run_node(
    config: Config,
    *,
    preload: tuple[str, ...] = (),
    on_ready: Callable[[NodeInfo], None] | None = None,
    reload: Callable[[], Config] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM, then drain and stop; a second signal stops at once. Returns the exit code.

    Raises ConfigError, Conflict (the folder is in use), OSError (it cannot be written, the port is taken) and
    StoreError (the store broke while serving).
    """
    logs.setup(config.log.level, config.log.format)
    manager = ServiceManager.from_environment(os.environ)
    data_dir = Path(config.data_dir)
    identity.make_folder(data_dir)
    catalogue = read_catalogue(config.models.catalogue)
    wanted = (*preload, *config.models.preload)
    _require_known(wanted, catalogue)
    devices = find_devices(config.engine.devices)
    with identity.exclusive(data_dir), trio.open_signal_receiver(*_SIGNALS) as signals:
        node = _Node(config, data_dir, catalogue, devices, manager)
        await node.serve(signals, wanted, on_ready, reload)
    log.info("stopped")
    return 0


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _require_known(names: tuple[str, ...], catalogue: Mapping[str, Model]) -> None:
    for name in names:
        if name not in catalogue:
            near = nearest(name, list(catalogue))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"there is no model `{name}` in the catalogue{hint}")


class _Node:
    """One life of a peer, from an open store to the end of its last task."""

    def __init__(
        self,
        config: Config,
        data_dir: Path,
        catalogue: Mapping[str, Model],
        devices: tuple[Device, ...],
        manager: ServiceManager,
    ) -> None:
        self._manager = manager
        self._config = config
        self._data_dir = data_dir
        self._catalogue = catalogue
        self._devices = devices
        self._clock = SystemClock()
        self._entropy = SystemEntropy()
        self._files = ClusterFiles(data_dir)
        self._in_a_cluster = self._files.belonging() is not None

    async def serve(
        self,
        signals: Any,
        wanted: tuple[str, ...],
        on_ready: Callable[[NodeInfo], None] | None,
        reload: Callable[[], Config] | None,
    ) -> None:
        peer_file = self._data_dir / identity.PEER_FILE
        no_more_requests = trio.Event()
        telemetries = await open_telemetry(self._devices)
        try:
            async with self._open_peer(telemetries) as peer, trio.open_nursery() as running:
                peer.cluster.not_ready = "this peer is starting"
                await running.start(peer.run)
                app = create_app(peer.cluster, self._config, self._clock)
                async with trio.open_nursery() as serving:
                    bound = await serving.start(partial(serve, app, self._config, shutdown=no_more_requests))
                    async with trio.open_nursery() as meanwhile:
                        await self._admin_key(peer.cluster, meanwhile)
                        info = self._announce(bound, peer.executor.peer_id, peer_file)
                        peer.cluster.not_ready = ""
                        self._manager.ready(f"serving at {info.url}")
                        meanwhile.start_soon(self._manager.watchdog, peer.stuck)
                        if on_ready is not None:
                            on_ready(info)
                        for name in wanted:
                            meanwhile.start_soon(self._preload, peer, name)
                        await self._wait_for_stop(signals, peer, app, reload)
                        meanwhile.start_soon(self._second_signal, signals, meanwhile.cancel_scope)
                        peer.cluster.not_ready = "this peer is stopping"
                        self._manager.stopping(self._config.drain_s)
                        await peer.drain(self._config.drain_s)
                        meanwhile.cancel_scope.cancel()
                    no_more_requests.set()
                running.cancel_scope.cancel()
        finally:
            peer_file.unlink(missing_ok=True)
            await telemetries.close()

    # ---------------------------------------------------------------- building

    def _open_peer(self, telemetries: Telemetries) -> AbstractAsyncContextManager[Peer]:
        unsettled = migration.unsettled(self._data_dir)
        if unsettled:
            raise Conflict(unsettled, code="store_unsettled")
        executor = partial(self._executor, telemetries)
        if not self._in_a_cluster:
            return self._open_single(executor)
        return open_cluster_host(
            self._config,
            self._data_dir,
            executor,
            policy=policy_of(self._config),
            catalogue=self._catalogue,
            clock=self._clock,
            entropy=self._entropy,
        )

    @asynccontextmanager
    async def _open_single(
        self, executor: Callable[[ReportSink, StreamHub], Executor]
    ) -> AsyncIterator[SinglePeer]:
        async with trio.open_nursery() as storing:
            store = await SqliteStore.open(self._data_dir / identity.STORE_FILE, storing, clock=self._clock)
            try:
                peer = SinglePeer(identity.peer_id(self._data_dir), executor, self._clock, self._entropy)
                await peer.open(
                    store,
                    cluster_id=self._config.cluster.name,
                    policy=policy_of(self._config),
                    catalogue=self._catalogue,
                )
                yield peer
            finally:
                with trio.CancelScope(shield=True):
                    await store.aclose()
                storing.cancel_scope.cancel()

    def _executor(
        self,
        telemetries: Telemetries,
        sink: ReportSink,
        streams: StreamHub,
        epoch: int = 0,
        remember_epoch: Callable[[int], None] | None = None,
    ) -> Executor:
        config = self._config
        return Executor(
            identity.peer_id(self._data_dir),
            telemetries.devices,
            engine=self._engine,
            telemetry=telemetries.source,
            host_info=Host(),
            files=Fetcher(Path(config.models.directory or self._data_dir / "models")),
            sink=sink,
            streams=streams,
            clock=self._clock,
            thresholds=config.alerts,
            slots_max=config.engine.slots,
            epoch=epoch,
            remember_epoch=remember_epoch,
        )

    def _engine(self, worker_id: str, device: Device) -> EngineProcess:
        cache = self._data_dir / "cache" / device.label
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return EngineProcess(
            worker_id,
            device,
            self._clock,
            slots_max=self._config.engine.slots,
            memory_limit_bytes=self._config.engine.memory_limit_bytes,
            cache_dir=str(cache),
            beam=self._config.engine.beam,
            fake=msgspec.to_builtins(self._config.engine.fake),
            allowed=EngineLimits(stall_s=self._config.engine.stall.by_phase()),
        )

    async def _admin_key(self, cluster: Cluster, nursery: trio.Nursery) -> None:
        """See that there is one; where no leader answers for now, when one does."""
        done = trio.Event()

        async def ensure() -> None:
            while True:
                try:
                    await self._ensure_admin_key(cluster)
                    done.set()
                    return
                except BitinglipError as error:
                    log.info("no_admin_key_yet", why=error.message)
                await self._clock.sleep(_RETRY_S)

        if not self._in_a_cluster:
            await self._ensure_admin_key(cluster)
            return
        nursery.start_soon(ensure)
        with trio.move_on_after(_FIRST_LEADER_S_MAX):
            await done.wait()

    async def _ensure_admin_key(self, cluster: Cluster) -> None:
        """The owner's key must be in force, else the file's; on the first start, or if either was lost, one is made.

        Raises ConfigError if the owner's key was revoked, or its id is of another key.
        """
        given = credentials.admin_key(os.environ)
        token = identity.read_admin_token(self._data_dir)
        parts = given or (keys.split(token) if token is not None else None)
        if parts is not None:
            await cluster.call(ListWorkers())  # when this is answered, so are the keys known here
            known = cluster.key(parts[0])
            matches = known is not None and keys.matches(known, parts[1])
            if known is not None and matches and known.revoked_at is None:
                if keys.token(*parts) != token:
                    self._write_admin_key(*parts)
                return
            if given is not None and known is not None:
                why = "is revoked" if matches else "has the id of another key"
                raise ConfigError(f"the credential {credentials.ADMIN_KEY} {why}: give a new one")
        key_id, secret = given or (secrets.token_hex(4), secrets.token_hex(32))
        key = ApiKey(
            key_id=key_id,
            owner=host_owner(identity.peer_id(self._data_dir)) if self._in_a_cluster else _ADMIN,
            scopes=("admin",),
            secret_sha256=keys.digest(secret),
            created_at=self._clock.wall(),
            requests_per_hour=None,
            requests_per_minute=None,
        )
        await cluster.call(CreateKey(key=key))
        self._write_admin_key(key_id, secret)

    def _write_admin_key(self, key_id: str, secret: str) -> None:
        identity.write_private(self._data_dir / identity.ADMIN_KEY_FILE, keys.token(key_id, secret) + "\n")

    def _announce(self, bound: tuple[str, int], peer_id: str, peer_file: Path) -> NodeInfo:
        host, port = bound
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        scheme = "https" if self._config.api.tls is not None else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        identity.write_private(peer_file, json.dumps({"url": url, "pid": os.getpid(), "peer_id": peer_id}))
        return NodeInfo(url, self._data_dir, self._data_dir / identity.ADMIN_KEY_FILE, peer_id)

    # ---------------------------------------------------------------- while it runs

    async def _preload(self, peer: Peer, name: str) -> None:
        """Wish for the model, as soon as a worker is up: in a cluster on this host, which this configuration is of."""
        mine = set(peer.executor.worker_ids)
        with trio.move_on_after(limits.ENGINE_START_S_MAX):
            while True:
                try:
                    views: tuple[WorkerView, ...] = await peer.cluster.call(ListWorkers())
                    up = [
                        view.worker.worker_id
                        for view in views
                        if view.status in ("online", "busy") and view.worker.worker_id in mine
                    ]
                    if up:
                        where = tuple(up) if self._in_a_cluster else ()
                        await peer.cluster.call(
                            AssignModel(model_name=name, worker_ids=where, preload=True, priority=5)
                        )
                        return
                except Unavailable as error:
                    log.info("preload_waits", model=name, why=error.message)
                except BitinglipError as error:
                    log.error("preload_failed", model=name, why=error.message)
                    return
                await self._clock.sleep(_POLL_S)
        log.error("preload_failed", model=name, why=f"no worker was up in {limits.ENGINE_START_S_MAX:g} s")

    async def _wait_for_stop(
        self, signals: Any, peer: Peer, app: ApiApp, reload: Callable[[], Config] | None
    ) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                log.info("stopping", signal=signal.Signals(number).name, drain_s=self._config.drain_s)
                return
            if reload is not None:
                self._manager.reloading()
                self._reload(peer, app, reload)
                self._manager.ready()

    def _reload(self, peer: Peer, app: ApiApp, reload: Callable[[], Config]) -> None:
        try:
            config = reload()
            catalogue = read_catalogue(config.models.catalogue)
        except ConfigError as error:
            log.error("reload_refused", why=str(error))
            return
        peer.configure(policy_of(config), catalogue)
        app.reload(config)
        peer.executor.thresholds = config.alerts
        logs.set_level(config.log.level)
        changed = [n for n in Config.__struct_fields__ if getattr(config, n) != getattr(self._config, n)]
        fixed = [name for name in changed if name not in RELOADABLE]
        log.info("reloaded", changed=[name for name in changed if name in RELOADABLE])
        if fixed:
            log.warning("restart_needed", changed=fixed, note="these are read at the start only")

    async def _second_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                log.warning("stopping_at_once", signal=signal.Signals(number).name)
                scope.cancel()
                return
