"""The composition root: builds a peer out of its parts, starts and stops it, and reloads its configuration."""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from api.app import ApiApp, create_app
from api.serve import serve
from peer import identity, limits, logs
from peer.adapters.catalogue import read_catalogue
from peer.adapters.clock import SystemClock, SystemEntropy
from peer.adapters.devices import find_devices
from peer.adapters.engine_process import EngineProcess
from peer.adapters.fetch import Fetcher
from peer.adapters.local_link import LeaderSink, LocalLink
from peer.adapters.sqlite_store import SqliteStore
from peer.adapters.telemetry import open_telemetry
from peer.adapters.telemetry_host import Host
from peer.config import RELOADABLE, Config
from peer.decide.admit import nearest
from peer.engines import Device
from peer.errors import BitinglipError, ConfigError
from peer.establish import load_snapshot, take_leadership
from peer.executor import Executor
from peer.journal import Journal
from peer.leader import Leader
from peer.ports import Store
from peer.service import LocalCluster
from peer.state import key as keys
from peer.state.command import AssignModel, CreateKey, ListWorkers, WorkerView
from peer.state.key import ApiKey
from peer.state.model import Model
from peer.state.snapshot import Policy
from peer.streams import StreamHub

log = structlog.get_logger("node")

_POLL_S = 0.1
_ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a person needs to use a peer that serves."""

    url: str
    data_dir: Path
    admin_key_path: Path
    peer_id: str


@dataclass(frozen=True, slots=True)
class Peer:
    """The running parts that stopping and reloading need."""

    leader: Leader
    executor: Executor
    cluster: LocalCluster
    app: ApiApp
    no_more_requests: trio.Event


def policy_of(config: Config) -> Policy:
    return Policy(
        queue_tasks_max=config.limits.queue_tasks_max,
        queue_bytes_max=limits.QUEUE_BYTES_MAX,
        priority_step_s=limits.PRIORITY_STEP_S,
        retention_age_s=config.retention.age_s,
        retention_count=config.retention.count,
        events_kept=config.retention.events,
        memory_reserve_bytes=config.engine.memory_reserve_bytes,
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
    data_dir = Path(config.data_dir)
    identity.make_folder(data_dir)
    catalogue = read_catalogue(config.models.catalogue)
    wanted = (*preload, *config.models.preload)
    _require_known(wanted, catalogue)
    devices = find_devices(config.engine.devices)
    with identity.exclusive(data_dir), trio.open_signal_receiver(*_SIGNALS) as signals:
        clock = SystemClock()
        async with trio.open_nursery() as storing:
            store = await SqliteStore.open(data_dir / identity.STORE_FILE, storing, clock=clock)
            try:
                node = _Node(config, data_dir, catalogue, devices, store, clock)
                await node.serve(signals, wanted, on_ready, reload)
            finally:
                with trio.CancelScope(shield=True):
                    await store.aclose()
                storing.cancel_scope.cancel()
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
        store: Store,
        clock: SystemClock,
    ) -> None:
        self._config = config
        self._data_dir = data_dir
        self._catalogue = catalogue
        self._devices = devices
        self._store = store
        self._clock = clock
        self._entropy = SystemEntropy()

    async def serve(
        self,
        signals: Any,
        wanted: tuple[str, ...],
        on_ready: Callable[[NodeInfo], None] | None,
        reload: Callable[[], Config] | None,
    ) -> None:
        peer = await self._build()
        peer_file = self._data_dir / identity.PEER_FILE
        try:
            async with trio.open_nursery() as leading:
                await leading.start(peer.leader.run)
                await self._ensure_admin_key(peer.leader)
                async with trio.open_nursery() as serving:
                    bound = await serving.start(
                        partial(serve, peer.app, self._config, shutdown=peer.no_more_requests)
                    )
                    info = self._announce(bound, peer.executor.peer_id, peer_file)
                    peer.cluster.not_ready = ""
                    if on_ready is not None:
                        on_ready(info)
                    async with trio.open_nursery() as executing:
                        ended = trio.Event()
                        executing.start_soon(self._execute, peer.executor, ended)
                        for name in wanted:
                            executing.start_soon(self._preload, peer.leader, name)
                        await self._wait_for_stop(signals, peer, reload)
                        executing.start_soon(self._second_signal, signals, executing.cancel_scope)
                        await self._drain(peer)
                        peer.executor.stop()
                        with trio.move_on_after(limits.ENGINE_STOP_S_MAX + 1.0):
                            await ended.wait()
                        executing.cancel_scope.cancel()
                    peer.no_more_requests.set()
                leading.cancel_scope.cancel()
        finally:
            peer_file.unlink(missing_ok=True)
            await self._close_telemetry()

    # ---------------------------------------------------------------- building

    async def _build(self) -> Peer:
        config, clock = self._config, self._clock
        peer_id = identity.peer_id(self._data_dir)
        epoch = await take_leadership(self._store, peer_id)
        snapshot = await load_snapshot(
            self._store,
            epoch,
            peer_id=peer_id,
            cluster_id=config.cluster.name,
            policy=policy_of(config),
            catalogue=self._catalogue,
            clock=clock,
        )
        telemetries = await open_telemetry(self._devices)
        self._close_telemetry: Callable[[], Awaitable[None]] = telemetries.close
        streams = StreamHub(clock)
        sink = LeaderSink()
        models_dir = Path(config.models.directory or self._data_dir / "models")
        executor = Executor(
            peer_id,
            telemetries.devices,
            engine=self._engine,
            telemetry=telemetries.source,
            host_info=Host(),
            files=Fetcher(models_dir),
            sink=sink,
            streams=streams,
            clock=clock,
            thresholds=config.alerts,
            slots_max=config.engine.slots,
        )
        journal = Journal(self._store, last=snapshot.events_next - 1)
        link = LocalLink(executor)
        leader = Leader(snapshot, journal, self._store, link, clock, self._entropy, streams)
        sink.leader = leader
        cluster = LocalCluster(leader, executor, streams, journal)
        app = create_app(cluster, config, clock)
        log.info("leading", peer_id=peer_id, epoch=epoch, live_tasks=len(snapshot.tasks))
        return Peer(leader, executor, cluster, app, trio.Event())

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
            fake=msgspec.to_builtins(self._config.engine.fake),
        )

    async def _ensure_admin_key(self, leader: Leader) -> None:
        """The file's key must be in force; on the first start, or if either was lost, a new one is made."""
        token = identity.read_admin_token(self._data_dir)
        parts = keys.split(token) if token is not None else None
        if parts is not None:
            known = leader.key(parts[0])
            if known is not None and keys.matches(known, parts[1]) and known.revoked_at is None:
                return
        key_id, secret = secrets.token_hex(4), secrets.token_hex(32)
        key = ApiKey(
            key_id=key_id,
            owner=_ADMIN,
            scopes=("admin",),
            secret_sha256=keys.digest(secret),
            created_at=self._clock.wall(),
            requests_per_hour=None,
            requests_per_minute=None,
        )
        await leader.call(CreateKey(key=key))
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

    async def _preload(self, leader: Leader, name: str) -> None:
        """Wish for the model, where nobody has yet, as soon as a worker is up."""
        with trio.move_on_after(limits.ENGINE_START_S_MAX):
            while True:
                views: tuple[WorkerView, ...] = await leader.call(ListWorkers())
                if any(view.status in ("online", "busy") for view in views):
                    break
                await self._clock.sleep(_POLL_S)
            try:
                await leader.call(AssignModel(model_name=name, worker_ids=(), preload=True, priority=5))
            except BitinglipError as error:
                log.error("preload_failed", model=name, why=error.message)
            return
        log.error("preload_failed", model=name, why=f"no worker was up in {limits.ENGINE_START_S_MAX:g} s")

    async def _execute(self, executor: Executor, ended: trio.Event) -> None:
        await executor.run()
        ended.set()

    async def _wait_for_stop(self, signals: Any, peer: Peer, reload: Callable[[], Config] | None) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                log.info("stopping", signal=signal.Signals(number).name, drain_s=self._config.drain_s)
                return
            if reload is not None:
                self._reload(peer, reload)

    def _reload(self, peer: Peer, reload: Callable[[], Config]) -> None:
        try:
            config = reload()
            catalogue = read_catalogue(config.models.catalogue)
        except ConfigError as error:
            log.error("reload_refused", why=str(error))
            return
        peer.leader.configure(policy_of(config), catalogue)
        peer.app.reload(config)
        peer.executor.thresholds = config.alerts
        logs.set_level(config.log.level)
        changed = [n for n in Config.__struct_fields__ if getattr(config, n) != getattr(self._config, n)]
        fixed = [name for name in changed if name not in RELOADABLE]
        log.info("reloaded", changed=[name for name in changed if name in RELOADABLE])
        if fixed:
            log.warning("restart_needed", changed=fixed, note="these are read at the start only")

    # ---------------------------------------------------------------- stopping

    async def _drain(self, peer: Peer) -> None:
        """Take no new tasks, begin none, and let those that run come to their end within the bound."""
        peer.cluster.not_ready = "this peer is stopping"
        peer.leader.refuse_new("this peer is stopping; try another one, or again when it is back")
        if await peer.executor.drain(self._config.drain_s):
            with trio.move_on_after(limits.TICK_S):
                while peer.leader.held_tasks():
                    await self._clock.sleep(_POLL_S / 10)
        else:
            log.warning("drain_ended", left=peer.leader.held_tasks(), note="they are re-queued")

    async def _second_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                log.warning("stopping_at_once", signal=signal.Signals(number).name)
                scope.cancel()
                return
