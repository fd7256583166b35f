"""Real members as children of a peer: versions, deaths, and a cluster that grows one learner at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from peer.adapters.stores.etcd_client import EtcdClient, require_version
from peer.adapters.stores.etcd_member import LOGS, TORN_LOGS, EtcdMember, MemberConfig, initial_cluster
from peer.adapters.stores.etcd_store import EtcdStore
from peer.errors import Ambiguous, Conflict, NotFound, Unavailable
from peer.ports import Put
from tests.contracts.etcd import free_port, needs_etcd, poll
from tests.contracts.model import put, values

pytestmark = needs_etcd

START_S_MAX = 20.0
T = TypeVar("T")


def config(folder: Path, name: str = "m0", existing: dict[str, str] | None = None) -> MemberConfig:
    url = (existing or {}).get(name) or f"http://127.0.0.1:{free_port()}"
    return MemberConfig(
        name=name,
        folder=folder / name,
        peer_url=url,
        initial_cluster=existing or {name: url},
        existing=existing is not None,
        heartbeat_ms=20,
        election_ms=200,
    )


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1", "3.5.2", "3.3.27", "2.3.7", "4.0.0", "unknown"])
async def test_versions_that_are_refused(version: str, tmp_path: Path) -> None:
    with pytest.raises(Conflict) as refused:
        require_version(version)
    assert refused.value.code == "store_version"
    program = tmp_path / "etcd"
    program.write_text(f"#!/bin/sh\necho etcd Version: {version}\n")
    program.chmod(0o755)
    member = EtcdMember(
        MemberConfig(name="a", folder=tmp_path, peer_url="", initial_cluster={}, program=str(program))
    )
    with pytest.raises(Conflict):
        await member.check()


async def test_versions_that_are_taken_and_programs_that_are_not_there(tmp_path: Path) -> None:
    for version in ("3.4.23", "etcd Version: 3.4.0", "3.5.3", "3.5.12", "3.6.1"):
        require_version(version)
    assert (await EtcdMember(config(tmp_path)).check()).startswith("3.")
    missing = MemberConfig(
        name="a", folder=tmp_path, peer_url="", initial_cluster={}, program="/no/such/etcd"
    )
    with pytest.raises(Unavailable, match="/no/such/etcd"):
        await EtcdMember(missing).check()


async def test_a_member_that_is_killed_is_started_again_with_its_data(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    member = EtcdMember(config(tmp_path), backoff_s=(0.1,))
    await nursery.start(member.run)
    await member.answering(START_S_MAX)
    store = EtcdStore(member.address)
    await eventually(lambda: put(store, "a"))
    pid = member.child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with trio.fail_after(START_S_MAX):
        while member.child.lives < 2:  # noqa: ASYNC110 - a process
            await trio.sleep(0.01)
    await member.answering(START_S_MAX)
    await eventually(lambda: put(store, "b"))
    assert await values(store) == {"a": b"v", "b": b"v"}
    await store.aclose()
    last = member.child.pid
    nursery.cancel_scope.cancel()
    assert last is not None


async def test_copies_of_torn_logs_do_not_fill_the_disk(tmp_path: Path) -> None:
    described = config(tmp_path)
    lives: list[dict[str, bytes]] = []

    async def live() -> None:
        member = EtcdMember(described)
        async with trio.open_nursery() as nursery:
            await nursery.start(member.run)
            await member.answering(START_S_MAX)
            store = EtcdStore(member.address)
            await eventually(lambda: put(store, f"life{len(lives)}"))
            lives.append(await values(store))
            await store.aclose()
            nursery.cancel_scope.cancel()

    await live()
    (log,) = described.folder.glob(LOGS)
    written = log.read_bytes().rstrip(b"\0")
    log.write_bytes(written[:-4])
    await live()
    assert [copy.name for copy in described.folder.glob(TORN_LOGS)] == [log.name + ".broken"]
    await live()
    assert list(described.folder.glob(TORN_LOGS)) == []
    assert lives[2] == {"life0": b"v", "life1": b"v", "life2": b"v"}


async def test_the_clients_socket_is_this_users_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    member = EtcdMember(config(tmp_path))
    await nursery.start(member.run)
    await member.answering(START_S_MAX)
    path = Path(member.address.removeprefix("unix:"))
    assert path.stat().st_mode & 0o077 == 0  # noqa: ASYNC240
    assert path.parent.stat().st_mode & 0o077 == 0
    nursery.cancel_scope.cancel()


async def test_a_program_that_cannot_be_run_is_said(tmp_path: Path) -> None:
    member = EtcdMember(
        MemberConfig(name="a", folder=tmp_path / "a", peer_url="http://x", initial_cluster={}),
        backoff_s=(0.05,),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(member.run)
        with pytest.raises(Unavailable, match="etcd ended with status"):
            await member.answering(1.0)
        nursery.cancel_scope.cancel()
    assert member.child.lives > 1


def test_a_member_ends_with_its_peer(tmp_path: Path) -> None:
    """However that ends."""
    code = f"""
import trio
from pathlib import Path
from tests.contracts.test_etcd_member import config
from peer.adapters.stores.etcd_member import EtcdMember

async def main():
    member = EtcdMember(config(Path({str(tmp_path)!r})))
    async with trio.open_nursery() as nursery:
        await nursery.start(member.run)
        await member.answering({START_S_MAX})
        print(member.child.pid, flush=True)

trio.run(main)
"""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, text=True) as peer:
        assert peer.stdout is not None
        pid = 0
        while not pid:
            line = peer.stdout.readline()
            assert line
            pid = int(line) if line.strip().isdigit() else 0
        peer.kill()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    poll("the member has ended", gone, 5.0)


# ------------------------------------------------------------------------------------------------ growing


async def eventually(call: Callable[[], Awaitable[T]], *retried: type[Exception]) -> T:
    """For some seconds after a change etcd refuses the next one."""
    with trio.fail_after(START_S_MAX):
        while True:
            try:
                return await call()
            except (Unavailable, Ambiguous, *retried):
                await trio.sleep(0.05)


async def test_a_cluster_grows_one_learner_at_a_time_and_shrinks(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    removed = trio.Event()

    async def until_removed(member: EtcdMember, *, task_status: trio.TaskStatus[None]) -> None:
        with pytest.raises(Conflict, match="m2 was removed"):
            await member.run(task_status=task_status)
        removed.set()

    first = EtcdMember(config(tmp_path))
    await nursery.start(first.run)
    await first.answering(START_S_MAX)
    client, store = EtcdClient(first.address), EtcdStore(first.address)
    await eventually(lambda: store.txn((), [Put(f"k/{number:03}", bytes(1000)) for number in range(500)]))
    for name in ("m1", "m2"):
        url = f"http://127.0.0.1:{free_port()}"
        newcomer, members = await eventually(lambda url=url: client.add_learner([url]))  # type: ignore[misc]
        with pytest.raises(Conflict):
            await client.add_learner([url])
        with pytest.raises((Conflict, Unavailable)):
            await client.promote(newcomer.member_id)  # it has not even started
        with pytest.raises(Conflict):
            initial_cluster(members, members[0] if members[0] != newcomer else members[1], name)
        member = EtcdMember(config(tmp_path, name, initial_cluster(members, newcomer, name)))
        await nursery.start(until_removed, member)
        await eventually(lambda new=newcomer: client.promote(new.member_id), Conflict)  # type: ignore[misc]
        await member.answering(START_S_MAX)
        other = EtcdStore(member.address)
        page = await eventually(lambda other=other: other.range("k/", "k0", keys_only=True))  # type: ignore[misc]
        assert len(page.items) == 500
        await other.aclose()
    found = {each.name: each for each in await client.members()}
    assert {name: each.is_learner for name, each in found.items()} == {"m0": False, "m1": False, "m2": False}
    await eventually(lambda: client.remove(found["m2"].member_id))
    with trio.fail_after(START_S_MAX):
        await removed.wait()
    with pytest.raises(NotFound):
        await client.remove(found["m2"].member_id)
    assert {each.name for each in await client.members()} == {"m0", "m1"}
    await eventually(lambda: put(store, "k/last"))
    client.close()
    await store.aclose()
    nursery.cancel_scope.cancel()


async def test_a_learner_serves_nobody(tmp_path: Path, nursery: trio.Nursery) -> None:
    first = EtcdMember(config(tmp_path))
    await nursery.start(first.run)
    await first.answering(START_S_MAX)
    client = EtcdClient(first.address)
    url = f"http://127.0.0.1:{free_port()}"
    newcomer, members = await eventually(lambda: client.add_learner([url]))
    member = EtcdMember(config(tmp_path, "m1", initial_cluster(members, newcomer, "m1")))
    await nursery.start(member.run)
    await member.answering(START_S_MAX)
    store = EtcdStore(member.address)
    for call in (lambda: put(store, "a"), lambda: store.get(["a"]), lambda: store.grant(5.0)):
        with pytest.raises(Unavailable, match="learner"):
            await call()
    assert (await store.client.status()).is_learner
    client.close()
    await store.aclose()
    nursery.cancel_scope.cancel()
