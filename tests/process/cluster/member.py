"""One host's peer: configured, started, killed, started again, and read from outside."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from tests.process.cluster import faults
from tests.process.cluster.hosts import Host
from tests.process.peers import BITINGLIP, LOG_CHARS_SHOWN, poll

API: Final = 8000
LINK: Final = 8001
GOSSIP: Final = 7946
STORE: Final = 2380
START_S_MAX: Final = 60.0
ASK_S_MAX: Final = 3.0
POLL_S: Final = 0.1
TOKENS_PER_S: Final = 20.0  # so that a task of some words is seen while it runs
SLOTS: Final = 24
COMMAND_S_MAX: Final = 40.0


class Member:
    """One host's peer, in one life after the other."""

    def __init__(self, host: Host, tokens_per_s: float = TOKENS_PER_S) -> None:
        self.host = host
        self.data = host.disk / "data"
        self.url = f"http://{host.address}:{API}"
        self.peer_id = host.name
        self.process: subprocess.Popen[bytes] | None = None
        self._config = host.folder / "bitinglip.yaml"
        self._config.write_text(yaml.safe_dump(self._settings(tokens_per_s)))

    def prepare(self) -> None:
        """Make its data folder, with a name that tells which host it is."""
        folder = self.host.seen(self.data)
        folder.mkdir(mode=0o700)
        (folder / "identity.json").write_text(json.dumps({"peer_id": self.peer_id}))

    def _settings(self, tokens_per_s: float) -> dict[str, Any]:
        address = self.host.address
        return {
            "data_dir": str(self.data),
            "api": {"bind": f"0.0.0.0:{API}", "insecure": True},
            "link": {"bind": f"0.0.0.0:{LINK}", "advertise": f"{address}:{LINK}"},
            "gossip": {"bind": f"0.0.0.0:{GOSSIP}", "advertise": f"{address}:{GOSSIP}"},
            "store": {"bind": f"0.0.0.0:{STORE}", "advertise": f"{address}:{STORE}"},
            "engine": {"devices": ["fake"], "slots": SLOTS, "fake": {"tokens_per_s": tokens_per_s}},
            "retention": {"events": 1_000_000},
            "log": {"level": "info", "format": "json"},
        }

    def bitinglip(self, *arguments: str) -> Any:
        """The answer of a command with --json, on this host."""
        command = [str(BITINGLIP), *arguments, "--json"]
        out = self.host.run(
            command, within_s=COMMAND_S_MAX, more_environment={"BITINGLIP_DATA_DIR": str(self.data)}
        )
        return json.loads(out)

    def start(self) -> None:
        """Call this in the main thread."""
        assert self.process is None or self.process.poll() is not None, f"{self.host.name} runs already"
        command = [str(BITINGLIP), "up", "--config", str(self._config)]
        self.process = self.host.popen(command, self.log_file)

    def await_ready(self, within_s: float = START_S_MAX) -> None:
        poll(f"{self.host.name} is ready", self.is_ready, within_s, POLL_S)

    def is_ready(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the peer of {self.host.name} ended with {code}: {self.log_end(2_000)}"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=ASK_S_MAX, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the peer; its children die with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(faults.KILL_S_MAX)

    @property
    def log_file(self) -> Path:
        """Of all its lives."""
        return self.host.folder / "peer.log"

    def log_lines(self) -> Iterator[dict[str, Any]]:
        with suppress(FileNotFoundError), self.log_file.open(errors="replace") as file:
            for line in file:
                with suppress(ValueError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        yield found

    def log_end(self, characters: int = LOG_CHARS_SHOWN) -> str:
        return self.log_file.read_text(errors="replace")[-characters:] if self.log_file.exists() else ""

    def has(self, name: str) -> bool:
        return self.host.seen(self.data / name).exists()

    def read(self, name: str) -> str:
        """A file of its data folder."""
        return self.host.seen(self.data / name).read_text().strip()
