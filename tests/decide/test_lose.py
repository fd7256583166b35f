"""When a peer is lost: by its session or its silence, not by this leader's own sleep, and never too many at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from peer.decide import lose, place, record, recover
from peer.decide.decision import Decision
from peer.decide.workers import away, reachable, status
from peer.limits import LOSS_CONFIRM_S, LOSS_WINDOW_S, STARVED_S
from peer.state.model import ReplicaState
from peer.state.snapshot import Alive, Foresee, Linked, Rumoured
from tests.decide.build import POLICY, T0, World, replica, snapshot, worker_report

Said = Literal["alive", "leaving", "left", "failed"]


def cluster(peers: int, share: float = 0.34) -> World:
    """One worker for each of p0, p1, ...; the leader ticks."""
    world = World(snapshot(replace(POLICY, lost_share_max=share)))
    for i in range(peers):
        world.worker(f"w{i}", replica("echo"), peer_id=f"p{i}")
    tick(world)
    return world


def tick(world: World) -> list[str]:
    """Who was declared lost."""
    before = dict(world.s.lost)
    world.take(lose.wake(world.s, world.now))
    world.take(lose.lose(world.s, world.now))
    return [peer_id for peer_id in world.s.lost if peer_id not in before]


def wait(world: World, seconds: float) -> list[str]:
    """Ticks all the time."""
    lost = []
    for _ in range(round(seconds / 0.25)):
        world.later(0.25)
        lost += tick(world)
    return lost


def hear(world: World, *numbers: int) -> None:
    for i in numbers:
        world.hear(worker_report(f"w{i}", replica("echo"), peer_id=f"p{i}"))


def link(world: World, peer_id: str, up: bool) -> None:
    world.take(Decision(changes=[Linked(peer_id, up, world.now)]))


def rumour(world: World, peer_id: str, said: Said) -> None:
    world.take(Decision(changes=[Rumoured(peer_id, said, world.now)]))


# ---------------------------------------------------------------- evidence


def test_a_session_that_does_not_come_back_is_a_loss() -> None:
    world = cluster(3)
    task = world.held("echo", "w1")
    link(world, "p1", False)
    assert not reachable(world.s, "w1", world.now)
    assert reachable(world.s, "w0", world.now)
    assert status(world.s, "w1", world.now) == "online"
    assert wait(world, 1.0) == []
    assert wait(world, 0.25) == ["p1"]
    assert status(world.s, "w1", world.now) == "offline"
    assert away(world.s, "w1", world.now) == "its session ended 1.2 s ago"
    world.take(recover.lost_attempts(world.s, world.now))
    data = world.data("task_requeued")
    assert (data["code"], data["message"]) == (
        "worker_lost",
        "worker w1 is lost: its session ended 1.2 s ago",
    )
    assert world.task(task).strikes == 1
    world.take(recover.announce(world.s, world.now))
    told = {event.data["worker_id"]: event.data["message"] for event in world.batch.events}
    assert told["w1"] == "its session ended 1.2 s ago"


def test_a_session_that_comes_back_in_time_is_none() -> None:
    world = cluster(3)
    link(world, "p1", False)
    wait(world, 0.75)
    link(world, "p1", True)
    hear(world, 0, 1, 2)
    assert wait(world, 3.0) == []
    link(world, "p1", False)
    wait(world, 0.75)
    hear(world, 0, 1, 2)  # by another session, of which nobody has told yet
    assert wait(world, 3.0) == []


def test_whose_host_says_that_it_is_dead_is_lost_at_once_however_many_are() -> None:
    world = cluster(3)
    for peer_id in ("p0", "p1", "p2"):
        world.take(Decision(changes=[Linked(peer_id, False, world.now, dead=True)]))
    assert tick(world) == ["p0", "p1", "p2"]
    assert all(loss.confirmed for loss in world.s.lost.values())
    hear(world, 1)
    assert "p1" not in world.s.lost


def test_the_dead_stay_dead_while_the_leader_sleeps() -> None:
    world = cluster(3)
    world.take(Decision(changes=[Linked("p0", False, world.now, dead=True)]))
    world.later(STARVED_S + 1.0)
    assert tick(world) == ["p0"]


def test_silence_is_a_loss_and_a_report_ends_it() -> None:
    world = cluster(2)
    world.held("echo", "w0")
    wait(world, 3.0)
    hear(world, 1)
    assert wait(world, 3.0) == []
    assert wait(world, 0.25) == ["p0"]
    assert world.s.lost["p0"].because == "it has not reported for 6.2 s"
    assert tick(world) == []
    hear(world, 0)
    assert (status(world.s, "w0", world.now), world.s.lost) == ("online", {})


def test_a_peer_is_there_while_any_of_its_workers_reports() -> None:
    world = cluster(2)
    world.worker("w0b", peer_id="p0")
    wait(world, 4.0)
    hear(world, 1)
    world.hear(worker_report("w0b", peer_id="p0"))
    assert wait(world, 3.0) == []
    assert status(world.s, "w0", world.now) == "offline"
    assert away(world.s, "w0", world.now) == "it has not reported for 7 s"


def test_who_never_reported_to_this_leader_is_lost_after_a_time() -> None:
    world = World()
    world.known("w9")
    assert tick(world) == []
    assert wait(world, 6.0) == []
    assert wait(world, 0.25) == ["p1"]


def test_a_worker_that_moved_to_another_peer_is_judged_by_that() -> None:
    world = cluster(1)
    world.worker("w0", replica("echo"), peer_id="new")
    assert world.s.peers == {"p0": {}, "new": {"w0": None}}
    link(world, "p0", False)
    assert wait(world, 2.0) == []


def test_who_has_nothing_to_add_is_heard_all_the_same() -> None:
    world = cluster(2)
    world.known("w9", "p1")
    wait(world, 4.0)
    assert away(world.s, "w9", world.now) == "it has not reported to this leader yet"
    world.take(
        Decision(changes=[Alive("p0", world.now), Alive("p1", world.now), Alive("unknown", world.now)])
    )
    wait(world, 4.0)
    assert {w: status(world.s, w, world.now) for w in ("w0", "w1", "w9")} == {
        "w0": "online",
        "w1": "online",
        "w9": "offline",
    }
    assert away(world.s, "w9", world.now) == "it has not reported for 8 s"
    assert wait(world, 3.0) == ["p1"]
    world.take(Decision(changes=[Alive("p1", world.now)]))
    assert (status(world.s, "w1", world.now), world.s.lost) == ("online", {})


def test_what_was_foreseen_ends_without_news_as_well() -> None:
    world = cluster(2)
    world.take(Decision(changes=[Foresee("w9", "echo", replica("echo"), world.now)]))  # which nobody knows
    world.drain("echo", "w0")
    world.take(place.reconcile(world.s, world.now))
    assert world.s.replicas["w0"]["echo"].state is ReplicaState.UNLOADING
    for peer_id in ("p0", "p1"):
        world.take(record.still_so(world.s, world.now, peer_id))
    assert world.s.replicas["w0"]["echo"].state is ReplicaState.UNLOADING
    world.later(31)
    for peer_id in ("p0", "p1"):
        world.take(record.still_so(world.s, world.now, peer_id))
    assert world.s.replicas["w0"]["echo"].state is ReplicaState.READY  # the order was lost


def test_one_worker_of_a_lost_peer_reports_and_the_other_does_not() -> None:
    world = cluster(1)
    world.worker("w0b", peer_id="p0")
    assert wait(world, 6.25) == ["p0"]
    hear(world, 0)
    assert (status(world.s, "w0", world.now), status(world.s, "w0b", world.now)) == ("online", "offline")
    assert list(world.s.silent) == ["w0b"]
    assert wait(world, 5.0) == []


# ---------------------------------------------------------------- not too many at once


def test_no_more_than_the_share_is_lost_at_once() -> None:
    world = cluster(10)
    for i in range(6):
        link(world, f"p{i}", False)
    assert wait(world, 2.0) == ["p0", "p1", "p2"]
    assert world.batch.reasons[0].startswith("p3 is not declared lost yet: too many at once")
    for i in range(6):
        world.held("echo", f"w{i}")
    world.take(recover.lost_attempts(world.s, world.now))
    assert [event.data["worker_id"] for event in world.batch.events] == ["w0", "w1", "w2"]
    hear(world, 6, 7, 8, 9)
    assert wait(world, 4.0) == []


def test_after_the_window_and_with_confirmation_more_are_lost() -> None:
    world = cluster(10)
    for i in range(5):
        link(world, f"p{i}", False)
    assert wait(world, 2.0) == ["p0", "p1", "p2"]
    rumour(world, "p4", "failed")
    assert wait(world, 0.25) == ["p4"]
    rumour(world, "p1", "left")  # no longer without confirmation
    assert wait(world, 0.25) == ["p3"]
    assert world.s.losses["p4"].confirmed
    assert not world.s.losses["p3"].confirmed


def test_the_window_passes() -> None:
    world = cluster(3)
    link(world, "p0", False)
    link(world, "p1", False)
    assert wait(world, 2.0) == ["p0"]
    lost: list[str] = []
    for _ in range(round(LOSS_WINDOW_S) - 1):
        hear(world, 2)
        lost += wait(world, 1.0)
    assert lost == []
    assert wait(world, 1.0) == ["p1"]


def test_a_peer_that_is_lost_twice_counts_once() -> None:
    world = cluster(4)
    link(world, "p3", False)
    assert wait(world, 1.5) == ["p3"]
    hear(world, 0, 1, 2, 3)
    link(world, "p3", True)
    tick(world)
    assert not world.s.lost
    link(world, "p0", False)
    link(world, "p3", False)
    assert wait(world, 1.5) == ["p3"]  # and takes nobody else's place


def test_one_peer_may_always_be_lost() -> None:
    world = cluster(2, share=0.0)
    link(world, "p0", False)
    link(world, "p1", False)
    assert wait(world, 2.0) == ["p0"]


def test_a_long_silence_confirms_itself() -> None:
    world = cluster(9, share=0.0)
    assert wait(world, 6.25) == ["p0"]
    wait(world, LOSS_CONFIRM_S - 6.25)
    assert wait(world, 0.25) == [f"p{i}" for i in range(9) if f"p{i}" not in world.s.losses or i > 1]
    assert set(world.s.lost) == {f"p{i}" for i in range(9)}


def test_gossip_alone_is_no_evidence_and_old_gossip_confirms_nothing() -> None:
    world = cluster(4)
    for i in range(4):
        rumour(world, f"p{i}", "failed")
    hear(world, 0, 1, 2, 3)
    assert wait(world, 3.0) == []
    assert wait(world, 3.25) == ["p0"]  # they have reported since
    rumour(world, "p1", "alive")
    assert wait(world, 0.25) == []


# ---------------------------------------------------------------- a leader that sleeps


def test_the_leaders_own_sleep_is_nobodys_silence() -> None:
    world = cluster(3)
    world.held("echo", "w0")
    link(world, "p2", False)
    world.later(30)
    assert tick(world) == []
    assert world.s.listened == dict.fromkeys(("w0", "w1", "w2"), world.now)
    assert status(world.s, "w0", world.now) == "online"
    assert wait(world, 1.0) == []
    assert wait(world, 0.25) == ["p2"]  # its session had time to come back
    hear(world, 0)
    assert list(world.s.listened) == ["w1", "w0"]
    assert wait(world, 5.0) == []  # p1 is silent now, but too many would be lost at once
    assert list(world.s.silent) == ["w1"]


def test_a_leader_that_sleeps_before_its_first_tick_blames_nobody() -> None:
    world = World()
    world.known("w1")
    world.later(12)
    assert tick(world) == []
    assert list(world.s.listened) == ["w1"]
    assert wait(world, 6.0) == []
    assert wait(world, 0.25) == ["p1"]


def test_sleep_raises_nobody_from_the_dead() -> None:
    world = cluster(3)
    link(world, "p1", False)
    world.held("echo", "w0")
    wait(world, 2.0)
    for _ in range(7):
        hear(world, 2)
        wait(world, 1.0)
    world.take(recover.lost_attempts(world.s, world.now))
    assert world.events == []  # silent, but too many would be lost at once
    assert status(world.s, "w0", world.now) == "offline"
    world.later(STARVED_S + 1)
    tick(world)
    assert list(world.s.listened) == ["w2"]
    assert {i: status(world.s, f"w{i}", world.now) for i in range(3)} == {
        0: "offline",
        1: "offline",
        2: "online",
    }


def test_a_leader_that_never_wakes_in_time_blames_nobody() -> None:
    world = cluster(3)
    for _ in range(20):
        world.later(STARVED_S + 0.5)
        assert tick(world) == []
    assert world.now > T0 + 40


def test_who_is_revoked_is_lost_at_once_however_many_are() -> None:
    world = cluster(3)
    for number in range(3):
        decision = lose.revoked(world.s, world.now, f"p{number}")
        world.take(decision)
        assert world.s.lost[f"p{number}"].because == "it was revoked"
        assert status(world.s, f"w{number}", world.now) == "offline"
    assert lose.revoked(world.s, world.now, "p0").changes == []
    assert lose.revoked(world.s, world.now, "without-workers").changes == []
