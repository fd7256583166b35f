"""A Serf agent as a child of the peer.

Its secrets stand in files that only this user reads, not on its command line. The keys that gossip is encrypted with
are in its keyring file, which the agent rewrites as they are rotated: the peer writes it once. A snapshot file lets an
agent that starts anew find the others without the seeds. Tags are not kept: who set them sets them again (see
peer.membership).

When the peer stops the agent leaves politely; when it dies the agent dies with it, and the others see it fail.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from peer import limits
from peer.adapters.gossip.serf_rpc import SerfRpc
from peer.adapters.links.cluster_files import KEYRING_FILE
from peer.adapters.processes.child import Child, Log
from peer.errors import Conflict, Unavailable

STOP_S_MAX: Final = 8.0  # a polite leave takes a second or two, up to 6 when others do not answer
ANSWER_POLL_S: Final = 0.02
RETRY_JOIN_S: Final = 2.0
RECONNECT_S: Final = 5  # how often a failed member is tried again, once gossip to it has ended

_LEVELS = {"[WARN]": "warning", "[ERR]": "error"}


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is unique in the cluster. Addresses are `host:port`; `advertise` is `bind` if empty.

    `key` (base64 of 32 bytes) is used when there is no keyring file yet. `seeds` are tried until one is joined.
    """

    name: str
    folder: Path
    bind: str
    rpc: str
    key: str
    advertise: str = ""
    seeds: Sequence[str] = ()
    retry_s: float = RETRY_JOIN_S
    program: str = "serf"


class SerfAgent:
    """Usage: `await nursery.start(agent.run)`, `await agent.answering(seconds)`, then `agent.rpc`."""

    def __init__(self, config: AgentConfig, *, backoff_s: Sequence[float] = limits.RESTART_BACKOFF_S) -> None:
        self._config = config
        self._auth_key = secrets.token_hex(16)
        self._conflict = ""
        host, _, port = config.rpc.rpartition(":")
        self.rpc = SerfRpc(host, int(port), self._auth_key)
        self.child = Child(
            "serf",
            [config.program, "agent", f"-config-file={config.folder / 'agent.json'}"],
            config.folder,
            say=self._say,
            prepare=self._prepare,
            judge=self._judge,
            stop_signal=signal.SIGINT,  # to Serf: leave, then end
            stop_s_max=STOP_S_MAX,
            backoff_s=backoff_s,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the agent running until cancelled. Started when its process is, which may not answer yet.

        Raises Conflict when another member of the cluster has this name, Unavailable if there is no such program.
        """
        if shutil.which(self._config.program) is None:
            raise Unavailable(f"{self._config.program} is not installed")
        try:
            await self.child.run(task_status=task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self.rpc.aclose()

    async def answering(self, within_s: float) -> None:
        """Wait until the agent answers. Raises Unavailable when it does not within the time."""
        why = "it has not started"
        with trio.move_on_after(within_s):
            while True:
                try:
                    await self.rpc.stats()
                    return
                except Unavailable as error:
                    why = self.child.problem or error.message
                await trio.sleep(ANSWER_POLL_S)
        raise Unavailable(f"the gossip agent does not answer within {within_s:g} s: {why}", retry_after_s=1.0)

    def _prepare(self) -> None:
        config, folder = self._config, self._config.folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        keyring = folder / KEYRING_FILE
        if not keyring.exists():
            _write_private(keyring, [config.key])
        settings: dict[str, Any] = {
            "node_name": config.name,
            "bind": config.bind,
            "rpc_addr": config.rpc,
            "rpc_auth": self._auth_key,
            "keyring_file": str(keyring),
            "snapshot_path": str(folder / "snapshot"),
            "rejoin_after_leave": True,
            "profile": "lan",  # the others are for other networks: `local` leaves stragglers for half a minute
            "log_level": "info",
            "retry_join": list(config.seeds),
            "retry_interval": f"{config.retry_s:g}s",
            "reconnect_interval": f"{RECONNECT_S}s",
            "disable_coordinates": True,
        }
        if config.advertise:
            settings["advertise"] = config.advertise
        _write_private(folder / "agent.json", settings)

    def _judge(self, status: int) -> None:
        """An agent that ends by itself and in peace has lost its name to another member."""
        if status == 0 and self._conflict:
            raise Conflict(
                f"another member of the cluster is called {self._config.name!r} already, so the gossip agent of "
                f"this one has stopped; give this host another name ({self._conflict})",
                code="name_taken",
            )

    def _say(self, line: str, log: Log) -> None:
        """A line of Serf's: date, time, [LEVEL], text. Failures of other hosts are no errors of this one."""
        text = line.strip()
        parts = text.split(" ", 3)
        level = parts[2] if len(parts) == 4 else ""
        if "name conflict" in text or "conflicts with another node" in text:
            self._conflict = parts[-1]
        message = parts[3] if level.startswith("[") else text
        method = _LEVELS.get(level, "debug")
        if method != "debug" and message.startswith("memberlist:"):
            method = "info"
        getattr(log, method)("serf_log", message=message)


def _write_private(path: Path, content: object) -> None:
    """Whole or not at all, for this user alone."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
