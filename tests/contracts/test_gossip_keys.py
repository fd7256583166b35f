"""Rotations of gossip's key over real Serf agents: done, refused, interrupted at every step, with members that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from peer.adapters.clock import SystemEntropy
from peer.adapters.links.cluster_files import ClusterFiles
from peer.errors import Conflict, Unavailable
from peer.gossip_keys import GossipKeys
from peer.ports import Gossip
from peer.state.enrol import Host, HostView
from peer.state.member import KeyReport, KeyStep, Member
from tests.contracts.gossip import SEEN_S_MAX, called, tagged
from tests.contracts.test_serf_gossip import KEY, SerfRig, play

pytestmark = pytest.mark.skipif(shutil.which("serf") is None, reason="serf is not installed (apt: serf)")


class Interrupted(Exception):
    pass


class Cut:
    """Gossip that fails before or after the given call of `change_key`, as when the peer ends there."""

    def __init__(self, gossip: Gossip, at: int, *, after: bool) -> None:
        self._gossip = gossip
        self._left = at
        self._after = after

    async def members(self) -> tuple[Member, ...]:
        return await self._gossip.members()

    async def set_tags(self, tags: dict[str, str]) -> None:
        await self._gossip.set_tags(tags)

    async def keys(self) -> KeyReport:
        return await self._gossip.keys()

    async def change_key(self, step: KeyStep) -> KeyReport:
        self._left -= 1
        if self._left < 0 and not self._after:
            raise Interrupted
        report = await self._gossip.change_key(step)
        if self._left < 0:
            raise Interrupted
        return report


def hosts(*names: str) -> tuple[HostView, ...]:
    return tuple(
        HostView(
            peer_id=name,
            status="online",
            host=Host(
                peer_id=name,
                enrolled_at=0.0,
                serial="5e",
                key_sha256="0",
                expires_at=1.0,
                voter=True,
                addresses=(),
            ),
        )
        for name in names
    )


def keyring(folder: Path, peer_id: str) -> list[str]:
    found: list[str] = json.loads((folder / peer_id / "keyring.json").read_text())
    return found


async def whole(rig: SerfRig, names: Sequence[str]) -> None:
    for name in names:
        await rig.start(name)
    await rig.all_alive()


def test_every_member_has_one_new_key_and_keeps_it(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        names = ("h1", "h2", "h3")
        await whole(rig, names)
        done = await GossipKeys(rig.gossips["h2"], SystemEntropy()).rotate(hosts(*names), force=False)
        assert (done.members, done.removed) == (3, 1)
        rings = [keyring(tmp_path, name) for name in names]
        assert rings[0] == rings[1] == rings[2]
        assert len(rings[0]) == 1
        assert rings[0] != [KEY]
        await rig.gossips["h1"].set_tags({"a": "b"})
        await rig.seen("tags", tagged("h1", {"a": "b"}))
        os.kill(rig.pid("h3"), signal.SIGKILL)  # its agent comes back, with its keyring
        with trio.fail_after(SEEN_S_MAX):
            while rig.agents["h3"].child.lives < 2:  # noqa: ASYNC110 - a process
                await trio.sleep(0.01)
        await rig.agents["h3"].answering(SEEN_S_MAX)
        await rig.all_alive()

    play(tmp_path, scenario)


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_every_step_the_next_one_completes_it(tmp_path: Path, after: bool) -> None:
    async def scenario(rig: SerfRig) -> None:
        names = ("h1", "h2", "h3")
        await whole(rig, names)
        for at in range(3):
            cut = Cut(rig.gossips["h1"], at, after=after)
            with pytest.raises(Interrupted):
                await GossipKeys(cut, SystemEntropy()).rotate(hosts(*names), force=False)
            await rig.gossips["h2"].set_tags({"n": str(at)})  # all hear all in between
            await rig.seen("tags", tagged("h2", {"n": str(at)}))
            before = set(keyring(tmp_path, "h3"))
            await GossipKeys(rig.gossips["h3"], SystemEntropy()).rotate(hosts(*names), force=False)
            rings = [keyring(tmp_path, name) for name in names]
            assert rings[0] == rings[1] == rings[2]
            assert len(rings[0]) == 1
            assert rings[0][0] not in before

    play(tmp_path, scenario)


def test_nothing_is_changed_while_a_host_is_away(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        await whole(rig, ("h1", "h2"))
        keys = GossipKeys(rig.gossips["h1"], SystemEntropy())
        with pytest.raises(Conflict, match="not in gossip now: h3"):
            await keys.rotate(hosts("h1", "h2", "h3"), force=False)
        with pytest.raises(Conflict, match="no host of the cluster: h2"):
            await keys.rotate(hosts("h1"), force=False)
        assert keyring(tmp_path, "h1") == keyring(tmp_path, "h2") == [KEY]
        assert (await keys.rotate(hosts("h1", "h2", "h3"), force=True)).members == 2
        assert keyring(tmp_path, "h1") == keyring(tmp_path, "h2") != [KEY]

    play(tmp_path, scenario)


def test_a_member_that_does_not_answer_stops_it_with_the_old_key_in_use(tmp_path: Path) -> None:
    async def scenario(rig: SerfRig) -> None:
        names = ("h1", "h2", "h3")
        await whole(rig, names)
        keys = GossipKeys(rig.gossips["h1"], SystemEntropy())
        os.kill(rig.pid("h3"), signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="members have answered") as error:
                await keys.rotate(hosts(*names), force=False)
        finally:
            os.kill(rig.pid("h3"), signal.SIGCONT)
        assert error.value.code == "rotation_incomplete"
        assert {keyring(tmp_path, name)[0] for name in names} == {KEY}
        await rig.seen("h3 is back", called("h3", "alive"))
        await keys.rotate(hosts(*names), force=False)
        rings = [keyring(tmp_path, name) for name in names]
        assert rings[0] == rings[1] == rings[2] != [KEY]

    play(tmp_path, scenario)


def test_a_host_that_joins_later_gets_the_newest_key(tmp_path: Path) -> None:
    files = ClusterFiles(tmp_path)
    files.found("lab", "h1", ("192.0.2.1",), 1_750_000_000.0)
    first = files.gossip_key()
    (tmp_path / "serf").mkdir()
    (tmp_path / "serf" / "keyring.json").write_text(json.dumps([KEY, first]))
    assert files.gossip_key() == KEY != first
