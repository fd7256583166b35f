"""kill -9 on the peer, again and again, while clients submit and tasks run: no promise is broken."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, defaultdict
from typing import Any

import pytest

from tests.process.peers import Peer, Peers, free_port, is_engine, poll
from tests.process.traffic import FINISHED, Client, Promises, follow, replay

pytestmark = pytest.mark.process

CYCLES = int(os.environ.get("BITINGLIP_KILL_CYCLES", "100"))
CYCLES_S_MAX = 240.0  # on a very busy host the rest is left out, down to half
SEED = 20_250_530
CLIENTS = 4
SERVING_S_MAX = 5.0
ENGINE_GONE_S_MAX = 3.0
LIFE_S_MAX = 0.9
EARLY_EVERY = 5  # every fifth life may end before it serves
SAMPLE = 12
CONFIG = {
    "engine": {"slots": 24, "fake": {"tokens_per_s": 60}},
    "retention": {"events": 1_000_000},
}


def serve_again(peer: Peer) -> float:
    """Start it: a submission is acknowledged within the bound. Returns the seconds that it took."""
    began = time.monotonic()
    peer.start(within_s=SERVING_S_MAX)
    peer.submit("I am back")
    took_s = time.monotonic() - began
    assert took_s <= SERVING_S_MAX, f"served after {took_s:.1f} s"
    return took_s


def listed(peer: Peer) -> dict[str, dict[str, Any]]:
    """Every task, page by page; what is submitted meanwhile moves tasks on, never out of sight."""
    found: dict[str, dict[str, Any]] = {}
    offset = 0
    while True:
        page = peer.get(f"/tasks?limit=500&offset={offset}")
        found |= {task["task_id"]: task for task in page["tasks"]}
        offset += len(page["tasks"])
        if not page["tasks"] or offset >= page["total"]:
            return found


def check_kept(peer: Peer, promises: Promises, chance: random.Random) -> None:
    """All that was acknowledged is there, and some of what was read is as it was."""
    before = promises.acknowledged()
    lost = before - set(listed(peer))
    assert not lost, f"acknowledged and lost: {sorted(lost)}"
    for task_id in chance.sample(sorted(before), min(SAMPLE, len(before))):
        promises.read(peer.task(task_id))
    assert not promises.broken, promises.broken


def kill(peer: Peer) -> None:
    engines = peer.kill()
    poll(
        f"the engines {engines} die with their peer",
        lambda: not any(is_engine(pid) for pid in engines),
        ENGINE_GONE_S_MAX,
    )


def cycles(peer: Peer, promises: Promises) -> tuple[int, list[float]]:
    """Kill and start. Returns how often, and how long each start took."""
    chance = random.Random(SEED)
    took: list[float] = []
    began = time.monotonic()
    early = False
    for cycle in range(CYCLES):
        if time.monotonic() - began > CYCLES_S_MAX and cycle >= CYCLES // 2 and not early:
            return cycle, took
        # the moment of death: anywhere in a life, and in an early one shortly before or after it serves
        time.sleep(chance.uniform(0.5, 1.1) * took[-1] if early else chance.uniform(0.0, LIFE_S_MAX))
        kill(peer)
        early = cycle % EARLY_EVERY == EARLY_EVERY - 2 and cycle + 1 < CYCLES
        if early:
            peer.spawn()
        else:
            took.append(serve_again(peer))
            check_kept(peer, promises, chance)
    return CYCLES, took


def check_events(promises: Promises, events: list[dict[str, Any]]) -> None:
    """The journal is complete, the same as when it was followed, and tells of each end once."""
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert events[: len(promises.events)] == promises.events
    ends: dict[str, list[str]] = defaultdict(list)
    requeued: dict[str, list[int]] = defaultdict(list)
    for event in events:
        name, data = event["event"], event["data"]
        if name in ("task_completed", "task_failed", "task_cancelled"):
            ends[data["task_id"]].append(name.removeprefix("task_"))
        elif name == "task_requeued":
            requeued[data["task_id"]].append(data["attempt"])
    for task_id, task in promises.finished.items():
        assert ends[task_id] == [task["status"]], task
        assert requeued[task_id] == list(range(1, len(requeued[task_id]) + 1)), task
        if task["status"] == "completed":
            assert task["attempt"] == len(requeued[task_id]) + 1, task
        elif task["status"] == "failed":
            assert task["error"]["code"] == "attempts_exhausted", task
            assert task["attempt"] == 3, task
            assert len(requeued[task_id]) == 2, task


def test_kill_9_breaks_no_promise(peers: Peers) -> None:
    peer = peers.start(CONFIG, port=free_port())
    promises = Promises()
    threads = [
        threading.Thread(target=Client(f"client{number}", peer.url, peer.headers, promises, SEED).run)
        for number in range(CLIENTS)
    ]
    threads.append(threading.Thread(target=follow, args=(peer.url, peer.headers, promises)))
    for thread in threads:
        thread.start()
    try:
        done, took = cycles(peer, promises)
    finally:
        promises.stop.set()
        for thread in threads:
            thread.join(30.0)
    assert not promises.broken, promises.broken
    assert not peer.orphans()

    poll(
        "every task ends",
        lambda: all(task["status"] in FINISHED for task in listed(peer).values()),
        60.0,
        0.5,
    )
    for task_id in sorted(promises.acknowledged()):
        promises.read(peer.task(task_id))
    assert not promises.broken, promises.broken
    assert promises.acknowledged() <= set(promises.finished)
    check_events(promises, replay(peer.url, peer.headers))

    statuses = Counter(task["status"] for task in promises.finished.values())
    print(f"{done} cycles, {dict(statuses)}, starts {min(took):.1f} to {max(took):.1f} s")
    assert statuses["completed"] > done
