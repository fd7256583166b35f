"""One etcd member as a child of the peer.

Its clients' side is a unix socket in the data folder, which other users cannot reach; its peers' side is TCP, with
mutual TLS where certificates are given. etcd 3.4 takes only unix addresses of the form `host:port`, relative to its
working folder: that is why the socket's name ends in `:0`.

A cluster grows one learner at a time. On a voter: `EtcdClient.add_learner([url of the newcomer])`, whose answer gives
`initial_cluster`. On the newcomer: an `EtcdMember` with that and `existing=True`. On the voter, until it stops raising
Conflict: `EtcdClient.promote`. What stands in the data folder wins over both from the second start on.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from peer import limits
from peer.adapters.processes.child import Child, Log
from peer.adapters.stores.etcd_client import EtcdClient, Member, require_version
from peer.adapters.stores.etcd_store import OPERATIONS_MAX, REQUEST_BYTES_MAX
from peer.errors import Conflict, Unavailable

SOCKET: Final = "etcd.sock:0"
METRICS: Final = "metrics.sock:0"
LOGS: Final = "data/member/wal/*.wal"
TORN_LOGS: Final = LOGS + ".broken"
VERSION_S_MAX: Final = 10.0
ANSWER_POLL_S: Final = 0.02
QUOTA_BYTES: Final = 4 * 1024 * 1024 * 1024
SNAPSHOT_ENTRIES: Final = 10_000  # etcd 3.4's own 100,000 keeps logs of gigabytes, and reads them all at a start
HISTORY_KEPT: Final = "1m"  # at ten thousand records a second, more would fill the quota with the past
STOP_S_MAX: Final = (
    3.0  # without a quorum it would take longer, to no end: what it acknowledged is on the disk
)

_LEVELS = {"warn": "warning", "error": "error", "dpanic": "error", "panic": "error", "fatal": "error"}
_REMOVED = "permanently removed from the cluster"
_DROPPED = frozenset({"level", "ts", "msg", "caller", "stacktrace", "errorVerbose"})


class Certificates(msgspec.Struct, frozen=True, kw_only=True):
    """Of the members' own connections: files in PEM. Who shows none of this authority's is refused, and who shows one
    that is in the list `revoked`, which is read at each handshake."""

    certificate: Path
    key: Path
    authority: Path
    revoked: Path | None = None


class MemberConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`peer_url` is where other members reach this one, `listen_url` what it binds (the same if empty).

    `initial_cluster` names the members and their peer URLs, this one among them; with `existing` they are those of a
    cluster that runs, else all of them start together with the same `token`. `heartbeat_ms` is about the longest round
    trip between members, `election_ms` ten times that, the same on all. `history_kept` is for watchers that are behind.
    """

    name: str
    folder: Path
    peer_url: str
    initial_cluster: Mapping[str, str]
    listen_url: str = ""
    existing: bool = False
    token: str = "bitinglip"
    certificates: Certificates | None = None
    quota_bytes: int = QUOTA_BYTES
    history_kept: str = HISTORY_KEPT
    heartbeat_ms: int = 100
    election_ms: int = 1_000
    metrics: bool = False  # at METRICS, also while it cannot serve
    program: str = "etcd"


class EtcdMember:
    """Usage: `await member.check()`, `await nursery.start(member.run)`, `await member.answering()`."""

    def __init__(
        self, config: MemberConfig, *, backoff_s: Sequence[float] = limits.RESTART_BACKOFF_S
    ) -> None:
        self._config = config
        self._removed = False
        self.address = f"unix:{config.folder / SOCKET}"
        """For `EtcdStore` and `EtcdClient`."""
        self.child = Child(
            "etcd",
            member_command(config),
            config.folder,
            say=self._say,
            prepare=self._prepare,
            judge=self._judge,
            stop_s_max=STOP_S_MAX,
            backoff_s=backoff_s,
        )

    async def check(self) -> str:
        """The program's version. Raises Conflict for one that is not supported, Unavailable if there is none."""
        try:
            with trio.fail_after(VERSION_S_MAX):
                done = await trio.run_process(
                    [self._config.program, "--version"],
                    capture_stdout=True,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env={},
                )
        except (OSError, trio.TooSlowError) as error:
            raise Unavailable(f"{self._config.program} cannot be run: {error or 'it hangs'}") from error
        text = done.stdout.decode("utf-8", "replace").strip()
        line = text.partition("\n")[0]
        require_version(line)
        return line.rpartition(" ")[2]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the member running until cancelled. Started when its process is, which may not answer yet.

        Raises Conflict once it was removed from its cluster: its data is of no use, also to a new member.
        """
        await self.child.run(task_status=task_status)

    def _prepare(self) -> None:
        folder = self._config.folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        for name in (SOCKET, METRICS):  # that of a life which was killed keeps etcd 3.4 from starting
            (folder / name).unlink(missing_ok=True)
        # Before etcd cuts a torn record off its log it copies the whole, which nobody reads or removes: after a few
        # full disks the copies are what fills the disk.
        for copy in folder.glob(TORN_LOGS):
            copy.unlink(missing_ok=True)

    def _judge(self, status: int) -> None:
        if self._removed and status == 0:
            raise Conflict(
                f"etcd's member {self._config.name} was removed from its cluster", code="member_removed"
            )

    def _say(self, line: str, log: Log) -> None:
        """etcd's records keep their fields; its `info` is for who debugs it."""
        self._removed = self._removed or _REMOVED in line
        record: Any = None
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
        if not isinstance(record, dict):
            log.warning("etcd_output", line=line)
            return
        fields = {
            f"etcd_{str(name).replace('-', '_')}": value
            for name, value in record.items()
            if name not in _DROPPED
        }
        write = getattr(log, _LEVELS.get(str(record.get("level")), "debug"))
        write("etcd_log", message=str(record.get("msg")), **fields)

    async def answering(self, within_s: float) -> str:
        """Wait until the member serves clients, which takes a quorum; its version.

        Raises Unavailable when it does not within the time, Conflict for a version that is not supported.
        """
        client = EtcdClient(self.address)
        why = "it has not started"
        try:
            with trio.move_on_after(within_s):
                while True:
                    try:
                        version = await client.version()
                        require_version(version)
                        return version
                    except Unavailable as error:
                        why = self.child.problem or error.message
                    await trio.sleep(ANSWER_POLL_S)
        finally:
            client.close()
        raise Unavailable(f"the etcd member does not answer within {within_s:g} s: {why}", retry_after_s=1.0)


def initial_cluster(members: Sequence[Member], newcomer: Member, name: str) -> dict[str, str]:
    """What the newcomer is started with, out of `EtcdClient.add_learner`'s answer.

    Raises Conflict for a member with several URLs, or one that was added before and has not started.
    """
    urls: dict[str, str] = {}
    for member in members:
        called = name if member.member_id == newcomer.member_id else member.name
        if not called or len(member.peer_urls) != 1:
            raise Conflict(
                f"etcd's member {member.member_id:x} has {member.peer_urls} and the name {called!r}"
            )
        urls[called] = member.peer_urls[0]
    return urls


def member_command(config: MemberConfig) -> list[str]:
    """How the program is started, in the configuration's folder."""
    listen = config.listen_url or config.peer_url
    command = [
        config.program,
        f"--name={config.name}",
        "--data-dir=data",
        f"--listen-client-urls=unix://{SOCKET}",
        f"--advertise-client-urls=unix://{SOCKET}",
        f"--listen-peer-urls={listen}",
        f"--initial-advertise-peer-urls={config.peer_url}",
        f"--initial-cluster={','.join(f'{name}={url}' for name, url in config.initial_cluster.items())}",
        f"--initial-cluster-state={'existing' if config.existing else 'new'}",
        f"--initial-cluster-token={config.token}",
        f"--snapshot-count={SNAPSHOT_ENTRIES}",
        f"--max-txn-ops={OPERATIONS_MAX}",
        f"--max-request-bytes={REQUEST_BYTES_MAX}",
        f"--quota-backend-bytes={config.quota_bytes}",
        "--auto-compaction-mode=periodic",
        f"--auto-compaction-retention={config.history_kept}",
        f"--heartbeat-interval={config.heartbeat_ms}",
        f"--election-timeout={config.election_ms}",
        "--pre-vote=true",  # a member that was cut off does not end the others' leadership when it is back
        "--logger=zap",
        "--log-outputs=stderr",
    ]
    if config.metrics:
        command.append(f"--listen-metrics-urls=unix://{METRICS}")
    if config.certificates is not None:
        command += [
            "--peer-client-cert-auth=true",
            f"--peer-cert-file={config.certificates.certificate}",
            f"--peer-key-file={config.certificates.key}",
            f"--peer-trusted-ca-file={config.certificates.authority}",
        ]
        if config.certificates.revoked is not None:
            command.append(f"--peer-crl-file={config.certificates.revoked}")
    return command
