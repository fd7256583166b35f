"""`leadership`, `gossip-key`, `drill` and a status without a leader, against a stub."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peer.cli import drill
from peer.cli.exits import Exit
from tests.cli.conftest import Run
from tests.cli.stub import Stub, error
from tests.cli.test_commands import STATUS

MOVED = {"leader": "h2", "epoch": 9, "previous": "h1", "moved": True}
KEY = {"key_id": "k1", "owner": drill.OWNER, "revoked_at": None}


def voter(name: str, *, linked: bool = True) -> dict[str, Any]:
    return {"peer_id": name, "learner": False, "linked": linked}


def status(leader: str, epoch: int, *voters: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"leader": leader, "epoch": epoch, "voters": list(voters)}


def test_the_leadership_is_handed_over(run: Run, stub: Stub) -> None:
    stub.replies["POST /cluster/leadership/transfer"] = (200, MOVED)
    done = run("leadership", "transfer")
    assert done.code == Exit.OK
    assert done.out.startswith("h2 leads, after ")
    assert done.out.endswith("before it h1\n")
    assert json.loads(run("leadership", "transfer", "--json").out) == MOVED


def test_a_leadership_that_nobody_took_is_a_failure(run: Run, stub: Stub) -> None:
    stub.replies["POST /cluster/leadership/transfer"] = (200, MOVED | {"leader": "h1", "moved": False})
    done = run("leadership", "transfer")
    assert (done.code, done.out) == (Exit.FAILED, "no other peer took it: h1 leads again\n")
    stub.replies["POST /cluster/leadership/transfer"] = error(409, "nobody else could lead")
    assert run("leadership", "transfer").code == Exit.CONFLICT


def test_gossip_gets_a_new_key(run: Run, stub: Stub) -> None:
    stub.replies["POST /cluster/gossip-key"] = (200, {"members": 3, "removed": 1})
    done = run("gossip-key", "rotate")
    assert (done.code, done.out) == (Exit.OK, "3 members use a new key; 1 older one is void\n")
    assert stub.requests[-1][2] == {"force": False}
    stub.replies["POST /cluster/gossip-key"] = (200, {"members": 3, "removed": 2})
    assert "2 older ones are void" in run("gossip-key", "rotate", "--force").out
    assert stub.requests[-1][2] == {"force": True}
    stub.replies["POST /cluster/gossip-key"] = error(503, "h2 has not answered")
    done = run("gossip-key", "rotate")
    assert done.code == Exit.BUSY
    assert "h2 has not answered" in done.err


# ------------------------------------------------------------------------------------------------ the leader's drill


@pytest.fixture
def writes(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(drill, "PAUSE_S", 0.001)
    monkeypatch.setattr(drill, "HEIR_S_MAX", 0.1)
    stub.replies |= {
        "POST /keys": (201, KEY),
        "DELETE /keys/k1": (200, KEY),
        "GET /keys": (200, {"keys": [KEY, KEY | {"owner": "alice", "key_id": "k2"}]}),
        "POST /cluster/leadership/transfer": (200, MOVED),
        "GET /cluster/status": [status("h1", 8, voter("h1"), voter("h2")), status("h2", 9)],
    }
    return stub


def test_a_hand_over_is_measured_and_held_to_the_promise(run: Run, writes: Stub) -> None:
    done = run("drill", "leader")
    assert done.code == Exit.OK, done.err
    assert "h1 led, h2 leads now" in done.out
    assert " ok" in done.out
    assert "a crash takes longer" in done.err
    paths = [f"{method} {path}" for method, path, _ in writes.requests]
    assert paths[-1] == "DELETE /keys/k1"  # what was left in force, and no key of others
    assert "DELETE /keys/k2" not in paths
    before_and_after = [status("h1", 8, voter("h1"), voter("h2")), status("h2", 9)]
    writes.replies["GET /cluster/status"] = before_and_after
    found = json.loads(run("drill", "leader", "--json").out)
    assert found["ok"]
    assert found["rows"][0]["promise_s"] == drill.HANDED_OVER_S_MAX


def test_a_broken_promise_is_said(run: Run, writes: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "HANDED_OVER_S_MAX", 0.0)
    done = run("drill", "leader")
    assert done.code == Exit.FAILED
    assert "NOT OK" in done.out


def test_writes_that_are_refused_are_counted_and_tried_again(run: Run, writes: Stub) -> None:
    writes.replies["POST /keys"] = [(201, KEY), error(503, "no leader"), error(503, "no leader"), (201, KEY)]
    done = run("drill", "leader", "--json")
    assert json.loads(done.out)["refused"] == 2


def test_a_drill_without_an_heir_or_a_change_is_refused(run: Run, writes: Stub) -> None:
    writes.replies["GET /cluster/status"] = status("h1", 8, voter("h1"), voter("h2", linked=False))
    done = run("drill", "leader")
    assert done.code == Exit.CONFLICT
    assert not any(method == "POST" for method, _, _ in writes.requests)
    writes.replies["GET /cluster/status"] = status("h1", 8, voter("h1"), voter("h2"))
    done = run("drill", "leader")
    assert (done.code, "nothing was measured" in done.err) == (Exit.FAILED, True)
    writes.replies["POST /cluster/leadership/transfer"] = error(409, "nobody else could lead")
    assert run("drill", "leader").code == Exit.CONFLICT
    assert writes.requests[-1][:2] == ("DELETE", "/keys/k1")


def test_a_crash_is_waited_for(run: Run, writes: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "CRASH_PAUSE_S", 0.001)
    one = status("h1", 8, voter("h1"), voter("h2"))
    writes.replies["GET /cluster/status"] = [one, one, status("h2", 9)]
    done = run("drill", "leader", "--crash")
    assert done.code == Exit.OK
    assert "kill the peer of h1 now" in done.err
    assert "the leader crashes" in done.out
    assert not any(path.endswith("transfer") for _, path, _ in writes.requests)
    monkeypatch.setattr(drill, "CRASH_WAIT_S_MAX", 0.05)
    writes.replies["GET /cluster/status"] = one
    assert run("drill", "leader", "--crash").code == Exit.FAILED


# ------------------------------------------------------------------------------------------------ the worker's drill


def task(state: str, worker: str | None, attempt: int = 1) -> tuple[int, Any]:
    return 200, {
        "task_id": "t1",
        "status": state,
        "assigned_worker": worker,
        "attempt": attempt,
        "error": None,
    }


def workers(*, tasks: int = 1) -> dict[str, Any]:
    found = [{"worker_id": name, "status": "online", "current_tasks": tasks} for name in ("w1", "w2", "w3")]
    return {
        "GET /workers": (200, {"workers": found}),
        **{f"GET /workers/{each['worker_id']}": (200, each) for each in found},
    }


@pytest.fixture
def probes(stub: Stub) -> Stub:
    replicas = [{"worker_id": name, "status": "loaded"} for name in ("w1", "w2")]
    stub.replies |= workers() | {
        "GET /models": (
            200,
            {"models": [{"name": "once", "replicas": replicas[:1]}, {"name": "m", "replicas": replicas}]},
        ),
        "POST /tasks": (201, {"task_id": "t1"}),
        "GET /tasks/t1": [
            task("queued", None),
            task("running", "w1"),
            task("running", "w1"),
            task("queued", None),
            task("running", "w2", 2),
        ],
        "POST /workers/w1/restart": (200, {}),
        "DELETE /tasks/t1": (200, {}),
    }
    return stub


def test_a_task_runs_again_elsewhere(run: Run, probes: Stub) -> None:
    done = run("drill", "worker")
    assert done.code == Exit.OK, done.err
    assert "w1 was restarted; its task went on at w2" in done.out
    assert probes.requests[-2][:2] == ("DELETE", "/tasks/t1")


def test_another_worker_is_not_touched(run: Run, probes: Stub) -> None:
    probes.replies["GET /tasks/t1"] = task("running", "w1")
    done = run("drill", "worker", "w2")
    assert done.code == Exit.FAILED
    assert "was seen running on w2" in done.err
    paths = [f"{method} {path}" for method, path, _ in probes.requests]
    assert "POST /workers/w2/restart" not in paths
    assert paths.count("DELETE /tasks/t1") == paths.count("POST /tasks") == drill.PROBES_MAX


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--model", "once"), "once is not loaded on two workers"),
        (("w3",), "no model is loaded on w3 and a second worker"),
        (("--model", "none"), "none is not loaded"),
    ],
)
def test_without_a_second_replica_nothing_is_restarted(
    run: Run, probes: Stub, arguments: tuple[str, ...], why: str
) -> None:
    done = run("drill", "worker", *arguments)
    assert (done.code, why in done.err) == (Exit.CONFLICT, True), done.err
    assert not any(method == "POST" for method, _, _ in probes.requests)


def test_a_worker_that_serves_others_is_left_alone(run: Run, probes: Stub) -> None:
    probes.replies |= workers(tasks=3)
    done = run("drill", "worker")
    assert (done.code, "runs 2 other tasks" in done.err) == (Exit.CONFLICT, True)
    assert not any(path.endswith("restart") for _, path, _ in probes.requests)
    probes.replies["GET /tasks/t1"] = [task("running", "w1"), task("running", "w2", 2)]
    assert run("drill", "worker", "--yes").code == Exit.OK


def test_a_task_that_ended_too_soon_or_failed_measures_nothing(run: Run, probes: Stub) -> None:
    probes.replies["DELETE /tasks/t1"] = error(409, "finished already")
    probes.replies["GET /tasks/t1"] = [task("running", "w1"), task("completed", "w1")]
    done = run("drill", "worker")
    assert (done.code, "nothing was measured" in done.err) == (Exit.FAILED, True)
    failed = task("failed", None, 3)
    failed[1]["error"] = {"code": "x", "message": "worn out"}
    probes.replies["GET /tasks/t1"] = [task("running", "w1"), failed]
    assert "worn out" in run("drill", "worker").err


# ------------------------------------------------------------------------------------------------ without a leader


def test_a_status_without_a_leader_is_marked_and_gossip_shown(run: Run, stub: Stub) -> None:
    said = {"role": "follower", "voter": True, "workers": 2, "workers_up": 1, "slots": 8, "running": 3}
    silent = dict.fromkeys(said, None) | {"role": "", "voter": False}
    members = [{"peer_id": "h1", "status": "failed", **silent}, {"peer_id": "h2", "status": "alive", **said}]
    stub.replies["GET /cluster/gossip"] = (200, {"members": members, "total": 2})
    stub.replies["GET /cluster/status"] = (200, STATUS | {"stale_seconds": 12.3})
    done = run("status")
    assert done.code == Exit.OK
    assert "that was so 12 s ago" in done.err
    assert ["h2", "alive", "follower", "yes", "1", "of", "2", "up", "3", "of", "8"] in [
        line.split() for line in done.out.splitlines()
    ]
    stub.replies["GET /cluster/status"] = error(503, "no leader")
    done = run("status")
    assert (done.code, "no leader" in done.err, "h1" in done.out) == (Exit.BUSY, True, True)
    assert run("status", "--json").out == ""
