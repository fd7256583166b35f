"""`bitinglip migrate` and `takeover` as an operator runs them: killed at any step, run again, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.stores import migration, takeover
from peer.adapters.stores.etcd_client import EtcdClient
from peer.adapters.stores.etcd_member import MemberConfig, initial_cluster
from peer.adapters.stores.etcd_store import EtcdStore
from peer.adapters.stores.etcd_voting import EtcdVoting
from peer.adapters.stores.migration import opened_sqlite
from peer.adapters.stores.store_copy import Copied, measure
from peer.errors import Unavailable
from peer.identity import peer_id
from peer.ports import LEADER_KEY, Put
from tests.contracts.etcd import EtcdProcess, needs_etcd
from tests.contracts.model import lead
from tests.process.peers import BITINGLIP, Peers, free_port, poll

pytestmark = [pytest.mark.process, needs_etcd]
needs_serf = pytest.mark.skipif(shutil.which("serf") is None, reason="serf is not installed (apt: serf)")

RUN_S_MAX = 60.0
RECORDS = 8_000
T = TypeVar("T")


class Host:
    """A data directory, and the commands that are run on it."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir(mode=0o700, parents=True)
        self._config = folder / "bitinglip.yaml"
        self.settings = {
            section: {"bind": f"127.0.0.1:{free_port()}"} for section in ("store", "link", "gossip")
        }
        self._config.write_text(json.dumps(self.settings))
        self._running: list[subprocess.Popen[str]] = []

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BITINGLIP_")}
        process = subprocess.Popen(
            [str(BITINGLIP), *arguments, "--data-dir", str(self.data)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"BITINGLIP_CONFIG": str(self._config)},
        )
        self._running.append(process)
        return process

    def run(self, *arguments: str, code: int = 0) -> str:
        """Its output, both kinds."""
        out, err = self.spawn(*arguments).communicate(timeout=RUN_S_MAX)
        assert self._running[-1].returncode == code, out + err
        return out + err

    def run_json(self, *arguments: str) -> dict[str, Any]:
        out, err = self.spawn(*arguments, "--json").communicate(timeout=RUN_S_MAX)
        assert self._running[-1].returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    def kill_at(self, step: str, *arguments: str) -> bool:
        """Run the command and kill it when it says that line; False if it was over before."""
        process = self.spawn(*arguments)
        assert process.stderr is not None
        guard = threading.Timer(RUN_S_MAX, process.kill)
        guard.start()
        for line in process.stderr:
            if line.startswith(step):
                process.kill()
                break
        guard.cancel()
        process.communicate(timeout=RUN_S_MAX)
        return process.returncode != 0

    def files(self) -> set[str]:
        """Without those that are always there, and what SQLite leaves where a reader was killed."""
        names = {path.name for path in self.data.iterdir()} - {"identity.json", "lock"}
        return {name for name in names if not name.endswith(("-wal", "-shm"))}

    def clean_up(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=10)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.clean_up()


def fill(host: Host, records: int = RECORDS) -> tuple[Copied, int]:
    """Make a single node's store; what is in it, and its epoch."""

    async def work() -> tuple[Copied, int]:
        chance = random.Random(1)
        async with opened_sqlite(host.data / "store.sqlite") as store:
            for at in range(0, records, 1_000):
                await store.txn([], [Put(f"k/{n:06}", chance.randbytes(400)) for n in range(at, at + 1_000)])
            return await measure(store), await lead(store)

    return trio.run(work)


def in_sqlite(host: Host) -> tuple[Copied, int]:
    """The same of the store that is there now, under a new epoch."""

    async def work() -> tuple[Copied, int]:
        async with opened_sqlite(host.data / "store.sqlite") as store:
            return await measure(store), await lead(store)

    return trio.run(work)


class Member:
    """A host's own member of the store, run as its peer would, without others."""

    def __init__(self, host: Host) -> None:
        url = "http://127.0.0.1:0"
        name = peer_id(host.data)
        self._process = EtcdProcess(
            MemberConfig(name=name, folder=host.data / "etcd", peer_url=url, initial_cluster={name: url})
        )

    def ask(self, work: Callable[[EtcdStore], Awaitable[T]]) -> T:
        self._process.start()
        try:
            poll("the member answers", self._process.status, RUN_S_MAX)
            return trio.run(self._opened, work)
        finally:
            self._process.kill()

    async def _opened(self, work: Callable[[EtcdStore], Awaitable[T]]) -> T:
        store = EtcdStore(self._process.address, call_s_max=20.0)
        try:
            return await work(store)
        finally:
            await store.aclose()


async def measured_and_led(store: EtcdStore) -> tuple[Copied, int]:
    found = await measure(store)
    epoch = await lead(store)
    await store.commit(epoch, [Put("since", b"1")])
    return found, epoch


# ------------------------------------------------------------------------------------------------ migrate


def test_there_confirmed_and_refusals_on_the_way(host: Host) -> None:
    assert "nothing to migrate" in host.run("migrate", code=5)
    before, epoch = fill(host)
    assert "bitinglip init" in host.run("migrate", code=6)
    assert "no way back" in host.run("migrate", "--back", code=5)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    assert "bitinglip migrate" in migration.unsettled(host.data)
    done = host.run_json("migrate")
    assert done == {
        "state": "migrated",
        "records": before.records,
        "bytes": before.nbytes,
        "sha256": before.digest,
    }
    assert host.files() == {"cluster", "etcd", "migration.json", "store.sqlite.migrated"}
    assert migration.unsettled(host.data) == ""
    assert host.run_json("migrate") == done  # once more changes nothing
    assert "start this host's peer" in host.run("key", "list", code=6)  # and makes no store
    after, newer = Member(host).ask(measured_and_led)
    assert after == before
    assert newer > epoch
    assert "no way back" not in host.run("migrate", "--confirm")
    assert host.files() == {"cluster", "etcd"}
    for arguments, code in ((("--back",), 5), (("--confirm",), 5), ((), 5)):
        host.run("migrate", *arguments, code=code)
    assert host.files() == {"cluster", "etcd"}


def test_back_with_all_that_was_accepted_since(host: Host) -> None:
    before, epoch = fill(host)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    host.run("migrate")
    _, newer = Member(host).ask(measured_and_led)
    done = host.run_json("migrate", "--back")
    assert (done["state"], done["records"]) == ("single", before.records + 1)
    assert host.files() == {"store.sqlite", "etcd.abandoned-1", "cluster.abandoned-1"}
    after, newest = in_sqlite(host)
    assert after.digest == done["sha256"]
    assert epoch < newer < newest
    host.run("init", "--cluster", "c2", "--advertise", "127.0.0.1")
    assert host.run_json("migrate")["records"] == before.records + 1
    host.run("migrate", "--back")
    assert "etcd.abandoned-2" in host.files()


def test_back_before_anything_was_migrated(host: Host) -> None:
    before, _ = fill(host, 1_000)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    assert host.kill_at("copied", "migrate")
    assert host.run_json("migrate", "--back") == {"state": "single"}
    assert host.files() == {"store.sqlite", "cluster.abandoned-1"}
    assert in_sqlite(host)[0] == before


def test_back_is_refused_while_there_are_other_hosts(host: Host) -> None:
    fill(host, 1_000)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    host.run("migrate")

    async def write(store: EtcdStore, *writes: Put) -> None:
        await store.txn([], writes)

    Member(host).ask(
        lambda store: write(store, Put("host/other-1", b"{}"), Put(f"host/{peer_id(host.data)}", b"{}"))
    )
    assert "other-1" in host.run("migrate", "--back", code=6)
    assert "migration.json" in host.files()
    Member(host).ask(lambda store: write(store, Put("revoked/other-1", b"{}")))
    host.run("migrate", "--back")


def test_killed_at_every_step_and_run_again(host: Host) -> None:
    before, epoch = fill(host)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    for step in ("measured", "copied", "compared", "verified"):
        host.kill_at(step, "migrate")
    assert host.run_json("migrate")["sha256"] == before.digest
    assert host.files() == {"cluster", "etcd", "migration.json", "store.sqlite.migrated"}
    after, newer = Member(host).ask(measured_and_led)
    assert (after, newer > epoch) == (before, True)
    for step in ("measured", "copied", "compared", "verified"):
        host.kill_at(step, "migrate", "--back")
    if "migration.json" in host.files():
        host.run("migrate", "--back")
    assert host.files() == {"store.sqlite", "etcd.abandoned-1", "cluster.abandoned-1"}
    after, newest = in_sqlite(host)
    assert (after.records, newest > newer) == (before.records + 1, True)


def test_killed_at_random_moments(host: Host) -> None:
    before, _ = fill(host)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    chance = random.Random(7)
    for _ in range(6):
        process = host.spawn("migrate")
        time.sleep(chance.uniform(0.5, 3.0))  # anywhere is right
        process.kill()
        process.communicate(timeout=RUN_S_MAX)
    assert host.run_json("migrate")["sha256"] == before.digest
    assert Member(host).ask(measured_and_led)[0] == before


class Interrupted(Exception):
    pass


def interruptions(host: Host, work: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch) -> int:
    """Interrupt it after each rename and do it again, to its end; how often that was."""
    real = migration.sync
    address = f"127.0.0.1:{free_port()}"

    def sync(folder: Path) -> None:
        real(folder)
        raise Interrupted

    def make_voting(folder: Path) -> EtcdVoting:
        return EtcdVoting(folder, peer_id(host.data), address)

    count = 0
    with monkeypatch.context() as patched:
        for module in (migration, takeover):
            patched.setattr(module, "sync", sync)
        while True:
            try:
                trio.run(work, host.data, make_voting, lambda what, records: None)
                return count
            except Interrupted:
                count += 1


def test_interrupted_after_every_rename(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = fill(host, 1_000)
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    assert interruptions(host, migration.migrate, monkeypatch) == 2
    assert host.files() == {"cluster", "etcd", "migration.json", "store.sqlite.migrated"}
    assert interruptions(host, migration.back, monkeypatch) == 3
    assert host.files() == {"store.sqlite", "etcd.abandoned-1", "cluster.abandoned-1"}
    assert in_sqlite(host)[0] == before


def test_a_peer_does_not_start_on_what_is_half_done(host: Host) -> None:
    fill(host, 1_000)
    assert migration.unsettled(host.data) == ""
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    assert "`bitinglip migrate` takes its records" in migration.unsettled(host.data)
    host.run("migrate")
    (host.data / "store.sqlite.migrated").rename(host.data / "store.sqlite")  # as before the last step
    assert "run `bitinglip migrate` again" in migration.unsettled(host.data)
    assert "again" in host.run("migrate", "--confirm", code=6)
    host.run("migrate")
    marker = migration.read_marker(host.data)
    assert marker is not None
    copied = Copied(marker.records, marker.nbytes, marker.digest)
    migration.write_marker(host.data, "returned", copied, migration.MARKER)
    assert "--back` again" in migration.unsettled(host.data)
    assert "--back" in host.run("migrate", code=6)
    assert "--back" in host.run("migrate", "--confirm", code=6)


@needs_serf
def test_tasks_of_a_single_peer_are_served_by_the_cluster_and_again_by_a_single_peer(peers: Peers) -> None:
    sections = {name: {"bind": f"127.0.0.1:{free_port()}"} for name in ("store", "link", "gossip")}
    sections["gossip"]["rpc"] = f"127.0.0.1:{free_port()}"
    peer = peers.start(sections)
    single = peer.submit("from the single peer", wait_s=20.0)
    assert single["status"] == "completed"
    peer.stop()
    host = Host(peer.home / "commands")
    host.data = peer.data
    host._config = peer.config_file
    host.run("init", "--cluster", "c1", "--advertise", "127.0.0.1")
    host.run("migrate")
    peer.start()
    assert peer.task(single["task_id"])["result"] == single["result"]
    joint = peer.submit("from the cluster", wait_s=20.0)
    peer.stop()
    host.run("migrate", "--back")
    peer.start()
    for task in (single, joint):
        assert peer.task(task["task_id"])["result"] == task["result"]
    assert peer.submit("alone again", wait_s=20.0)["status"] == "completed"


# ------------------------------------------------------------------------------------------------ takeover


class Pair:
    """Two hosts: a voter's member of the store, and a host whose member learns from it."""

    def __init__(self, folder: Path, host: Host) -> None:
        self.host = host
        self.name = peer_id(host.data)
        files = ClusterFiles(host.data)
        files.found("c1", self.name, ("127.0.0.1",), time.time())
        files.store_founded()
        (files.folder / "epoch").write_text("5000000\n")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.voter = EtcdProcess(
            MemberConfig(
                name="lost-host",
                folder=folder / "voter",
                peer_url=self.url,
                initial_cluster={"lost-host": self.url},
            )
        )
        self.learner: EtcdProcess | None = None

    async def build(self) -> None:
        self.voter.start()
        poll("the voter answers", self.voter.status)
        store = EtcdStore(self.voter.address, call_s_max=20.0)
        await store.txn([], [Put(f"k/{number:05}", bytes(100)) for number in range(2_000)])
        url = f"http://127.0.0.1:{free_port()}"
        client = EtcdClient(self.voter.address)
        added = None
        while added is None:
            try:
                added, members = await client.add_learner([url])
            except Unavailable:
                await trio.sleep(0.1)
        self.learner = EtcdProcess(
            MemberConfig(
                name=self.name,
                folder=self.host.data / "etcd",
                peer_url=url,
                initial_cluster=initial_cluster(members, added, self.name),
                existing=True,
            )
        )
        self.learner.start()
        poll("the learner answers", self.learner.status)
        await store.txn([], [Put(f"late/{number:05}", bytes(500)) for number in range(2_000)])
        await store.txn([], [Put(LEADER_KEY, b"lost-host")])
        self.measured = await measure(store)
        self.revision = (await store.range("", "")).revision
        poll("the learner has it all", lambda: self._revision() == self.revision)
        client.close()
        await store.aclose()

    def _revision(self) -> int:
        assert self.learner is not None
        header: Any = self.learner.status().get("header", {})
        return int(header.get("revision", 0))

    def kill(self) -> None:
        self.voter.kill()
        if self.learner is not None:
            self.learner.kill()


@pytest.fixture
def pair(tmp_path: Path, host: Host) -> Iterator[Pair]:
    pair = Pair(tmp_path, host)
    try:
        trio.run(pair.build)
        yield pair
    finally:
        pair.kill()


def test_a_learner_takes_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    host = pair.host
    assert pair.learner is not None
    pair.learner.kill()  # at once: what was committed last may be in its log alone
    said = host.run("takeover", code=2)
    assert "lost-host" in said
    assert "split brain" in said
    assert "cannot be known" in said
    refused = host.run("takeover", "--yes", code=6)
    assert pair.url.removeprefix("http://") in refused
    pair.voter.kill()
    before = host.files()
    for step in ("measured", "copied", "compared"):
        assert host.kill_at(step, "takeover", "--yes")
        assert before <= host.files()
    done = host.run_json("takeover", "--yes")
    assert done == {
        "state": "alone",
        "records": pair.measured.records,
        "bytes": pair.measured.nbytes,
        "sha256": pair.measured.digest,
    }
    assert host.files() == {"cluster", "etcd", "etcd.replaced-1"}
    after, epoch = Member(host).ask(measured_and_led)
    assert after == pair.measured
    assert epoch > 1_000_000_000 + 5_000_000  # above what this host has obeyed, with room
    assert "no other member" in host.run("takeover", "--yes", code=6)


def test_a_takeover_that_is_interrupted_after_every_rename(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.kill()
    assert interruptions(pair.host, takeover.take_over, monkeypatch) == 2
    assert pair.host.files() == {"cluster", "etcd", "etcd.replaced-1"}
    assert Member(pair.host).ask(measured_and_led)[0] == pair.measured


def test_there_is_nothing_to_take_over_without_a_member(host: Host) -> None:
    assert "nothing to take over" in host.run("takeover", "--yes", code=5)
