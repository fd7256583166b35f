"""Gossip over real Serf agents against the contract, and their own: names, keys, restarts, bytes that are no RPC."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from peer.adapters.gossip.serf_agent import AgentConfig, SerfAgent
from peer.adapters.gossip.serf_gossip import SerfGossip
from peer.adapters.gossip.serf_rpc import SerfRpc
from peer.errors import Conflict, Unavailable
from tests.contracts.etcd import free_port
from tests.contracts.gossip import SEEN_S_MAX, GossipContract, Rig, Scenario, called, tagged

pytestmark = pytest.mark.skipif(shutil.which("serf") is None, reason="serf is not installed (apt: serf)")

KEY = base64.b64encode(bytes(range(32))).decode()
NEW_KEY = base64.b64encode(bytes(range(1, 33))).decode()
START_S_MAX = 20.0


class SerfRig(Rig):
    """Agents on 127.0.0.x, supervised as in a peer, each in a scope of its own."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        super().__init__()
        self.folder = folder
        self.nursery = nursery
        self.agents: dict[str, SerfAgent] = {}
        self.ports: dict[str, int] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.ended: dict[str, trio.Event] = {}

    def address(self, peer_id: str) -> str:
        return f"127.0.0.{peer_id[1:]}"

    def port(self, peer_id: str) -> int:
        return self.ports[peer_id]

    def config(self, peer_id: str, name: str = "") -> AgentConfig:
        port = self.ports.setdefault(peer_id, free_port(self.address(peer_id)))
        return AgentConfig(
            name=name or peer_id,
            folder=self.folder / peer_id,
            bind=f"{self.address(peer_id)}:{port}",
            rpc=f"127.0.0.1:{free_port()}",
            key=KEY,
            seeds=[f"{self.address(other)}:{self.ports[other]}" for other in self.gossips],
        )

    async def start(self, peer_id: str) -> None:
        agent = self.agents[peer_id] = SerfAgent(self.config(peer_id), backoff_s=(0.1,))
        self.scopes[peer_id], self.ended[peer_id] = trio.CancelScope(), trio.Event()
        await self.nursery.start(self._run, peer_id)
        await agent.answering(START_S_MAX)
        self.gossips[peer_id] = SerfGossip(peer_id, agent.rpc)

    async def _run(self, peer_id: str, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scopes[peer_id]:
            await self.agents[peer_id].run(task_status=task_status)
        self.ended[peer_id].set()

    def pid(self, peer_id: str) -> int:
        pid = self.agents[peer_id].child.pid
        assert pid is not None
        return pid

    async def kill(self, peer_id: str) -> None:
        self.gossips.pop(peer_id)
        os.kill(self.pid(peer_id), signal.SIGKILL)
        await self._end(peer_id)

    async def leave(self, peer_id: str) -> None:
        """As a peer that stops: its supervisor is cancelled."""
        self.gossips.pop(peer_id)
        await self._end(peer_id)

    async def _end(self, peer_id: str) -> None:
        self.scopes[peer_id].cancel()
        await self.ended[peer_id].wait()


def play(folder: Path, scenario: Callable[[SerfRig], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            rig = SerfRig(folder, nursery)
            try:
                await scenario(rig)
            finally:
                for child in [agent.child for agent in rig.agents.values()]:
                    if child.pid is not None:
                        os.kill(child.pid, signal.SIGKILL)  # nobody is left to hear a polite leave
                nursery.cancel_scope.cancel()

    trio.run(main)


class TestSerfGossip(GossipContract):
    """The contract."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self._folder = tmp_path

    def play(self, scenario: Scenario) -> None:
        play(self._folder, scenario)


# ------------------------------------------------------------------------------------------------ agents


def test_an_agent_that_dies_is_started_again_and_finds_the_others(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        await rig.start("h2")
        await rig.all_alive()
        await rig.gossips["h2"].set_tags({"a": "b"})
        await rig.seen("tags", tagged("h2", {"a": "b"}))
        os.kill(rig.pid("h2"), signal.SIGKILL)
        with trio.fail_after(START_S_MAX):
            while rig.agents["h2"].child.lives < 2:  # noqa: ASYNC110 - a process
                await trio.sleep(0.01)
        await rig.agents["h2"].answering(START_S_MAX)
        await rig.all_alive()  # by its snapshot: its seeds are not asked
        assert (await rig.view("h2"))["h2"].tags == {}
        await rig.gossips["h2"].set_tags({"a": "c"})
        await rig.seen("tags set again", tagged("h2", {"a": "c"}))

    play(tmp_path, scenario)


def test_a_name_that_is_taken_ends_the_newcomer_with_a_reason(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        await rig.start("h2")
        await rig.all_alive()
        newcomer = SerfAgent(rig.config("h3", name="h2"), backoff_s=(0.1,))
        with trio.fail_after(SEEN_S_MAX):
            with pytest.raises(Conflict, match="'h2' already"):
                await newcomer.run()
        assert newcomer.child.lives == 1
        await rig.all_alive()

    play(tmp_path, scenario)


def test_keys_are_installed_used_and_removed_on_all(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        await rig.start("h2")
        await rig.all_alive()
        rpc = rig.agents["h1"].rpc
        for report in (await rpc.install_key(NEW_KEY), await rpc.use_key(NEW_KEY), await rpc.remove_key(KEY)):
            assert report.done, report
        assert (await rpc.list_keys()).keys == {NEW_KEY: 2}
        for peer_id in ("h1", "h2"):  # kept for the next start
            assert json.loads((tmp_path / peer_id / "keyring.json").read_text()) == [NEW_KEY]
        refused = await rpc.install_key("no base64 of 32 bytes")
        assert refused.error
        assert not refused.done
        missing = await rpc.remove_key(NEW_KEY)  # the one in use
        assert not missing.done
        assert missing.messages or missing.error

    play(tmp_path, scenario)


def check_secrets(folder: Path, pid: int) -> None:
    """Only this user reads them, and no list of processes shows them."""
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o077 for file in folder.iterdir()} == {0}
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    settings = json.loads((folder / "agent.json").read_text())
    assert KEY.encode() not in command
    assert settings["rpc_auth"].encode() not in command


def test_calls_of_the_agent(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        rpc = rig.agents["h1"].rpc
        assert (await rpc.stats())["agent"]["name"] == "h1"
        with pytest.raises(ValueError, match="512"):
            await rig.gossips["h1"].set_tags({"a": "x" * 600})
        assert (await rig.view("h1"))["h1"].tags == {}
        with pytest.raises(Unavailable, match="refused"):
            await rpc.join([f"127.0.0.1:{free_port()}"])
        await rpc.force_leave("nobody")
        host, _, port = rig.config("h1").rpc.rpartition(":")
        with pytest.raises(Unavailable):
            await SerfRpc(host, int(port), "").members()  # nobody is there
        check_secrets(tmp_path / "h1", rig.pid("h1"))

    play(tmp_path, scenario)


def test_a_wrong_key_is_refused(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        settings = json.loads((tmp_path / "h1" / "agent.json").read_text())
        host, _, port = settings["rpc_addr"].rpartition(":")
        stranger = SerfRpc(host, int(port), "wrong")
        with pytest.raises(Unavailable, match="refuses us"):
            await stranger.members()
        await stranger.aclose()

    play(tmp_path, scenario)


def test_a_failed_member_is_called_left_when_told_so(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await rig.start("h1")
        await rig.start("h2")
        await rig.all_alive()
        await rig.kill("h2")
        await rig.agents["h1"].rpc.force_leave("h2")
        await rig.seen("h2 has left", called("h2", "left"), "h1")

    play(tmp_path, scenario)


# ------------------------------------------------------------------------------------------------ no protocol


@pytest.mark.parametrize(
    "answer", [b"\xc1", b"HTTP/1.1 400\r\n\r\n", b"\x81\xa3Seq\x63", b"", b"\x93\x01\x02\x03"]
)
async def test_bytes_that_are_not_serfs_are_unavailable(answer: bytes, nursery: trio.Nursery) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)
        await stream.aclose()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    rpc = SerfRpc("127.0.0.1", listener.socket.getsockname()[1], "key")
    with pytest.raises(Unavailable):
        await rpc.members()
    await rpc.aclose()
    nursery.cancel_scope.cancel()
