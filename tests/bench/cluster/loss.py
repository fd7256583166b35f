"""kill -9 of a follower's peer while its worker runs tasks: until each runs elsewhere, and how often any task began.

The model is loaded on every worker. A task is echoed word by word and takes some seconds.
"""

from __future__ import annotations

import time
from typing import Any

from tests.bench.cluster.bed import Client, bed, say
from tests.bench.processes import Missing
from tests.bench.report import Options, Result, Row, median
from tests.process.cluster.cluster import Cluster
from tests.process.cluster.history import FINISHED
from tests.process.cluster.member import Member
from tests.process.peers import poll

TOKENS_PER_S = 20.0
WORDS = 120  # six seconds
TASKS = 9
ROUNDS, QUICK_ROUNDS = 10, 2
CALM_TASKS, QUICK_CALM_TASKS = 60, 15
CALM_WORDS = 20
POLL_S = 0.005
MOVE_S_MAX = 30.0
END_S_MAX = 60.0
OTHERS = "in an earlier measurement Ray needed 1.8 s, NATS with tuned acknowledgements 1.5 s"


def measure(options: Options) -> Result:
    moved: list[float] = []
    rounds: list[dict[str, Any]] = []
    with bed(TOKENS_PER_S) as (made, client):
        client.load_everywhere()
        calm = _calm(made, client, QUICK_CALM_TASKS if options.quick else CALM_TASKS)
        too_often = 0
        for number in range(QUICK_ROUNDS if options.quick else ROUNDS):
            took, attempts = _kill(made, client, made.followers()[number % 2])
            moved += took.values()
            wrong = {each: count for each, count in attempts.items() if count != (2 if each in took else 1)}
            too_often += len(wrong)
            rounds.append({"moved_s": list(took.values()), "attempts": attempts, "wrong": wrong})
            made.settle()
            client.await_loaded()
    name = "kill -9 of a worker's peer until its task runs elsewhere"
    begun = sum(count - 1 for count in calm.values())
    rows = [
        Row(f"{name}, median", median(moved), None, "s", "", "ours<=0.5", OTHERS),
        Row(f"{name}, worst of {len(moved)}", max(moved, default=None), None, "s"),
        Row("tasks begun again without a fault", float(begun), None, "", "", "ours<=0", f"of {len(calm)}"),
        Row("tasks begun not once for each host they were on", float(too_often), None, "", "", "ours<=0"),
    ]
    return Result(rows, {"rounds": rounds, "attempts_without_fault": calm})


def _calm(made: Cluster, client: Client, count: int) -> dict[str, int]:
    """The attempts of tasks that nothing is done to, submitted at all peers."""
    tasks = [
        client.submit(made.members[number % len(made.members)], "word " * CALM_WORDS)
        for number in range(count)
    ]
    return _attempts(client, made.leader(), tasks)


def _attempts(client: Client, member: Member, tasks: list[str]) -> dict[str, int]:
    """Once all have ended. Raises Missing if one has not completed."""
    found = {}
    for task_id in tasks:
        view = poll(
            f"{task_id} ends", lambda task_id=task_id: _ended(client, member, task_id), END_S_MAX, 0.1
        )
        assert view is not None
        if view["status"] != "completed":
            raise Missing(f"{task_id} is {view['status']}: {view['error']}")
        found[task_id] = int(view["attempt"])
    return found


def _ended(client: Client, member: Member, task_id: str) -> dict[str, Any] | None:
    view: dict[str, Any] = client.get(member, f"/tasks/{task_id}")
    return view if view["status"] in FINISHED else None


def _kill(made: Cluster, client: Client, victim: Member) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds until each of its tasks ran elsewhere, and every task's attempts."""
    leader = made.leader()
    tasks = [client.submit(leader, "word " * WORDS) for _ in range(TASKS)]

    def running() -> list[dict[str, Any]]:
        views = [client.get(leader, f"/tasks/{task_id}") for task_id in tasks]
        return views if all(view["status"] == "running" for view in views) else []

    views = poll("all tasks run", running, MOVE_S_MAX)
    there = f"{victim.host.name}-"  # how ids of its workers begin
    waiting = {view["task_id"] for view in views if view["assigned_worker"].startswith(there)}
    if not waiting:
        raise Missing(f"no task is on {victim.host.name}")
    took: dict[str, float] = {}
    assert victim.process is not None
    began = time.monotonic()
    victim.process.kill()
    while waiting:
        for task_id in sorted(waiting):
            view = client.get(leader, f"/tasks/{task_id}")
            elsewhere = not (view["assigned_worker"] or there).startswith(there)
            if view["status"] == "running" and elsewhere:
                took[task_id] = time.monotonic() - began
                waiting.remove(task_id)
        if time.monotonic() - began > MOVE_S_MAX:
            raise Missing(f"{waiting} do not run elsewhere after {MOVE_S_MAX:g} s")
        time.sleep(POLL_S)
    say(
        f"peer of {victim.host.name} killed: its tasks ran elsewhere after {max(took.values()):.2f} s at most"
    )
    victim.kill()
    return took, _attempts(client, leader, tasks)
