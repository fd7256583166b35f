"""`bitinglip cluster`: three peers on this machine, joined as on three hosts, until Ctrl-C; then nothing is left."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peer.cli.common import printable
from peer.cli.exits import CliError, Exit
from peer.cli.own_peer import await_ready, clean_environment, own_peer

if TYPE_CHECKING:
    from peer.cli.client import Client

PEERS = 3
MODEL = "smollm2-135m"
NAME = "local"
VOTERS_S_MAX = 90.0  # until all of them vote
COMMAND_S_MAX = 60.0
POLL_S = 0.2


@click.command(hidden=True)
@click.option("--device", default="CPU", show_default=True)
@click.option("--model", default=MODEL, show_default=True)
@click.option("--keep", metavar="DIR", help="Keep the peers' folders here; else they are removed at the end.")
def cluster(device: str, model: str, keep: str | None) -> int:
    """Run a cluster of three peers on 127.0.0.1, 127.0.0.2 and 127.0.0.3, until Ctrl-C."""
    for program in ("serf", "etcd"):
        if shutil.which(program) is None:
            raise CliError(
                f"{program} is not installed", Exit.FAILED, "on Debian: apt install serf etcd-server"
            )
    began = time.monotonic()
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with ExitStack() as stack:
            folder = Path(keep).absolute() if keep else Path(tempfile.mkdtemp(prefix="bitinglip-"))
            if not keep:
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
            peers = [_LocalPeer(folder, number, device) for number in range(1, PEERS + 1)]
            _start(peers, stack, stopped)
            if not stopped.is_set():
                _load(peers, model, stopped)
            if not stopped.is_set():
                _tell(peers, model, time.monotonic() - began)
            while not stopped.wait(1.0):
                for peer in peers:
                    peer.watch()
            print("stopping", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print("all peers are stopped" + ("" if keep else " and their folders removed"))
    return Exit.OK


class _LocalPeer:
    def __init__(self, folder: Path, number: int, device: str) -> None:
        self.address = f"127.0.0.{number}"
        self.directory = folder / f"peer{number}"
        self.log = folder / f"peer{number}.log"
        self.url = ""
        self._config = folder / f"peer{number}.yaml"
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        self._config.parent.mkdir(parents=True, exist_ok=True)
        sections = {"link": 8001, "gossip": 7946, "store": 2380}
        lines = [
            f"{name}: {{bind: '{self.address}:{port}'}}"
            for name, port in sections.items()
            if name != "gossip"
        ]
        lines.append(f"gossip: {{bind: '{self.address}:7946', rpc: '{self.address}:7373'}}")
        lines += [f"api: {{bind: '{self.address}:8000'}}", f"engine: {{devices: [{self._device}], slots: 4}}"]
        self._config.write_text("\n".join(lines) + "\n")

    def command(self, *arguments: str) -> str:
        """A command about this peer; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "peer", *arguments, "--data-dir", str(self.directory)],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
        if done.returncode:
            raise CliError(f"bitinglip {arguments[0]}: {printable(done.stderr.strip())}", Exit.FAILED)
        return done.stdout.strip()

    def start(self, stack: ExitStack) -> None:
        self._process = stack.enter_context(
            own_peer(self.directory, self.log, ["--config", str(self._config)])
        )
        self.url = await_ready(self._process, self.directory, self.log)

    def watch(self) -> None:
        """Say so if it has ended: the others go on without it."""
        if self._process is not None and self._process.poll() is not None:
            print(
                f"the peer at {self.url} ended with {self._process.returncode}; its log: {self.log}",
                flush=True,
            )
            self._process = None

    def client(self) -> Client:
        from peer.cli.client import Client, find

        return Client(find(self.url, str(self.directory / "admin.key"), str(self.directory), {}))


def _start(peers: list[_LocalPeer], stack: ExitStack, stopped: threading.Event) -> None:
    """As an operator does: the first host makes the cluster, each other joins with a token."""
    first = peers[0]
    for peer in peers:
        if stopped.is_set():
            return
        peer.prepare()
        # Connections between loopback addresses come from 127.0.0.1: the store wants it in the certificate.
        addresses = ["--advertise", peer.address, "--advertise", "127.0.0.1"]
        if peer is first:
            peer.command("init", "--cluster", NAME, *addresses)
        else:
            token = first.command("token").splitlines()[0]
            peer.command("join", f"{first.address}:8001", "--token", token, *addresses)
        peer.start(stack)
        print(f"peer {peer.directory.name} serves at {peer.url}; its log: {peer.log}", flush=True)
    end = time.monotonic() + VOTERS_S_MAX
    with first.client() as client:
        while not stopped.wait(POLL_S):
            voters = [each for each in client.get("/cluster/status").data["voters"] if not each["learner"]]
            if len(voters) == PEERS:
                return
            if time.monotonic() > end:
                raise CliError(f"{len(voters)} of {PEERS} peers vote after {VOTERS_S_MAX:.0f} s", Exit.FAILED)


def _load(peers: list[_LocalPeer], model: str, stopped: threading.Event) -> None:
    print(f"loading {model} on every peer; the first start compiles, which takes longest", flush=True)
    with peers[-1].client() as client:
        workers = [worker["worker_id"] for worker in client.get("/workers").data["workers"]]
        client.post("/models/assign", {"model_name": model, "worker_ids": workers, "preload": True})
        while not stopped.wait(POLL_S):
            entry = next(each for each in client.get("/models").data["models"] if each["name"] == model)
            states = [replica["status"] for replica in entry.get("replicas", ())]
            if "error" in states or "failed" in states:
                raise CliError(f"{model} was not loaded: {states}", Exit.FAILED)
            if states.count("loaded") == len(workers):
                return


def _tell(peers: list[_LocalPeer], model: str, seconds: float) -> None:
    with peers[0].client() as client:
        status = client.get("/cluster/status").data
    print(
        f"\n{len(peers)} peers serve after {seconds:.0f} s; {status['leader']} leads; {status['outlook']}\n"
    )
    key = peers[0].directory / "admin.key"
    body = (
        f'{{"task_type":"text_generation","model_name":"{model}",'
        '"parameters":{"prompt":"Once upon a time","max_tokens":40}}'
    )
    print("try, on any of them:")
    for peer in peers:
        print(
            f'curl -H "Authorization: Bearer $(cat {key})" -H "Content-Type: application/json" '
            f"'{peer.url}/tasks?wait=60' -d '{body}'"
        )
    print("\nCtrl-C stops all of them", flush=True)
