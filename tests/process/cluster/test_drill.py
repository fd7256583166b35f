"""An operator's actions on a real cluster: handing the leadership over, a new key for gossip, drills."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from peer.cli.drill import CRASH_S_MAX, HANDED_OVER_S_MAX
from peer.limits import GUARD_S, HOLD_S_MAX
from tests.process.cluster.cluster import Cluster, cluster
from tests.process.cluster.hosts import DISK_BYTES, unusable
from tests.process.cluster.member import Member
from tests.process.peers import BITINGLIP, poll

pytestmark = [pytest.mark.process, pytest.mark.skipif(bool(unusable()), reason=unusable())]

MODEL = "echo"
WAIT_S_MAX = 30.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), 3) as up:
        yield up


def keyring(member: Member) -> list[str]:
    found: list[str] = json.loads(member.host.seen(member.data / "serf" / "keyring.json").read_text())
    return found


def test_the_leadership_is_handed_over(made: Cluster) -> None:
    for asked in range(2):  # of the leader itself, of another
        leader = made.leader()
        member = leader if asked == 0 else made.followers()[0]
        began = time.monotonic()
        found = member.bitinglip("leadership", "transfer")
        assert time.monotonic() - began < HOLD_S_MAX
        assert (found["moved"], found["previous"]) == (True, leader.peer_id)
        assert made.leader().peer_id == found["leader"] != leader.peer_id


def test_the_leaders_drill_measures_it(made: Cluster) -> None:
    before = made.leader()
    found = before.bitinglip("drill", "leader")
    print(found)
    assert found["ok"], found
    assert found["refused"] == 0
    assert found["leader_before"] == before.peer_id != found["leader_after"]
    keys = made.get(before, "/keys")["keys"]
    drilled = [key for key in keys if key["owner"] == "bitinglip-drill"]
    assert drilled
    assert all(key["revoked_at"] for key in drilled)


def test_a_leader_that_stops_hands_over_first(made: Cluster) -> None:
    """Writes through another peer wait about as long as for a hand-over that was asked for."""
    leader, other = made.leader(), made.followers()[0]
    assert leader.process is not None
    leader.process.send_signal(signal.SIGTERM)
    began, slowest = time.monotonic(), 0.0
    while leader.process.poll() is None or time.monotonic() - began < 2.0:
        asked = time.monotonic()
        assert made.submits(other)
        slowest = max(slowest, time.monotonic() - asked)
        assert time.monotonic() - began < WAIT_S_MAX
        time.sleep(0.05)
    print(f"slowest {slowest:.2f} s; the peer ended with {leader.process.returncode}")
    assert slowest < HANDED_OVER_S_MAX
    assert leader.process.returncode == 0
    made.settle()


def test_a_crash_is_measured_while_somebody_kills_the_leader(made: Cluster) -> None:
    leader, other = made.leader(), made.followers()[0]
    log = other.host.folder / "drill.log"
    command = [str(BITINGLIP), "drill", "leader", "--crash", "--json"]
    drill = other.host.popen(command, log, {"BITINGLIP_DATA_DIR": str(other.data)})
    poll("the drill waits for the crash", lambda: "kill the peer of" in log.read_text(), WAIT_S_MAX)
    leader.kill()
    poll("the drill has ended", lambda: drill.poll() is not None, WAIT_S_MAX)
    found = json.loads(log.read_text().splitlines()[-1])
    print(found)
    assert drill.returncode == (0 if found["ok"] else 1)
    assert found["leader_before"] == leader.peer_id != found["leader_after"]
    (row, _) = found["rows"]
    assert (
        GUARD_S < row["measured_s"] < 3 * CRASH_S_MAX
    )  # the promise is the benchmark's: this host may be busy
    made.settle()


def test_gossip_shows_hosts_and_their_load(made: Cluster) -> None:
    def told() -> bool:
        members = made.get(made.members[0], "/cluster/gossip")["members"]
        return len(members) == len(made.members) and all(
            each["status"] == "alive" and each["workers_up"] == each["workers"] == 1 for each in members
        )

    poll("all hosts have told their load", told, WAIT_S_MAX)


def test_gossip_gets_a_new_key_which_a_new_host_has_too(made: Cluster) -> None:
    before = keyring(made.members[0])
    found = made.members[1].bitinglip("gossip-key", "rotate")
    assert found == {"members": 3, "removed": 1}
    after = [keyring(member) for member in made.members]
    assert after[0] == after[1] == after[2]
    assert len(after[0]) == 1
    assert after[0] != before
    newcomer = Member(made.net.add(DISK_BYTES))
    made.join(newcomer)
    made.members.append(newcomer)
    made.settle()
    assert keyring(newcomer) == after[0]


def test_the_workers_drill_needs_a_second_replica_and_measures(made: Cluster) -> None:
    workers = [each["worker_id"] for each in made.get(made.members[0], "/workers")["workers"]]
    member = made.members[1]

    def loaded() -> list[str]:
        return [
            replica["worker_id"]
            for entry in made.get(member, "/models")["models"]
            for replica in entry["replicas"]
            if replica["status"] == "loaded"
        ]

    for worker_id in loaded():  # the other drills' tasks brought it there
        member.bitinglip("unload", MODEL, "--worker", worker_id)
    poll("it is unloaded", lambda: not loaded(), WAIT_S_MAX)
    member.bitinglip("load", MODEL, "--worker", workers[0])
    poll("the model is loaded", loaded, WAIT_S_MAX)
    with pytest.raises(AssertionError, match="no model is loaded on two workers"):
        member.bitinglip("drill", "worker")
    member.bitinglip("load", MODEL, "--worker", workers[1])
    poll("the model is loaded twice", lambda: len(loaded()) >= 2, WAIT_S_MAX)
    found = member.bitinglip("drill", "worker")
    print(found)
    assert found["ok"], found
    assert found["worker"] != found["task_moved_to"]
    tasks = made.get(member, "/tasks")["tasks"]
    assert not [task for task in tasks if task["status"] in ("queued", "running")]
