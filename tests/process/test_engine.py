"""Engines that die, freeze or are restarted: the peer goes on, tasks are tried again, slots come free."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from itertools import pairwise
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.process.peers import Peer, Peers, alive, is_engine, poll
from tests.process.traffic import socket_url

pytestmark = pytest.mark.process

SLOT_FREE_S_MAX = 1.0
SLACK_S = 0.7  # for requests and polls on a busy host
SLOW = {"engine": {"slots": 2, "fake": {"tokens_per_s": 10}}}
LONG = " ".join(["word"] * 600)  # a minute at 10 tokens a second


def one_engine(peer: Peer) -> int:
    found = poll("one engine runs", lambda: pids if len(pids := peer.engine_pids()) == 1 else None)
    assert found is not None
    return found[0]


def new_engine(peer: Peer, old: int) -> int:
    """The pid of the engine that took its place."""
    found = poll("another engine runs", lambda: [pid for pid in peer.engine_pids() if pid != old], 20.0)
    assert not is_engine(old)
    return found[0]


def events_since(peer: Peer, since: int, until: Any, within_s: float = 20.0) -> list[dict[str, Any]]:
    """Events after `since` up to the first for which `until` holds."""
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + within_s
    with connect(f"{socket_url(peer.url)}/ws?since={since}", additional_headers=peer.headers) as socket:
        while not found or not until(found[-1]):
            found.append(json.loads(socket.recv(max(0.0, deadline - time.monotonic()))))
    return found


def test_kill_9_of_the_engine_costs_an_attempt_and_no_task(peers: Peers) -> None:
    peer = peers.start({"engine": {"slots": 4, "fake": {"tokens_per_s": 10}}})
    tasks = [peer.submit(f"task {number} " + "word " * 18)["task_id"] for number in range(6)]
    for task_id in tasks[:4]:
        peer.await_task(task_id, "running")
    poll("four run", lambda: peer.get("/cluster/status")["running_tasks"] == 4)
    engine, before = one_engine(peer), peer.pid
    os.kill(engine, signal.SIGKILL)
    new_engine(peer, engine)
    ended = [peer.task(task_id, wait_s=20) for task_id in tasks]
    assert [task["status"] for task in ended] == ["completed"] * 6
    assert [task["attempt"] for task in ended] == [2] * 4 + [1] * 2
    assert all("SIGKILL" in task["requeued_because"] for task in ended[:4])
    assert peer.pid == before
    assert peer.get(f"/workers/{ended[0]['assigned_worker']}")["engine_deaths"] == 1
    assert peer.stop() == 0


def test_three_deaths_are_a_quarantine_that_a_restart_ends(peers: Peers) -> None:
    peer = peers.start()
    (worker_id,) = peer.await_workers()
    doomed = peer.submit("fault:die", wait_s=20)
    assert doomed["status"] == "failed"
    assert doomed["error"]["code"] == "attempts_exhausted"
    assert doomed["attempt"] == 3
    peer.await_workers("error")
    (worker,) = peer.workers()
    assert "quarantined" in worker["message"]
    assert "restart" in worker["message"]
    assert peer.get("/workers?status=error")["error"] == 1
    waiting = peer.submit("patient")
    reasons = peer.task(waiting["task_id"])["pending_reasons"]
    assert [reason["worker_id"] for reason in reasons] == [worker_id]
    assert "quarantined" in reasons[0]["reason"]

    answer = peer.post(f"/workers/{worker_id}/restart")
    assert answer["message"] == "Worker restart initiated"
    assert peer.task(waiting["task_id"], wait_s=15)["status"] == "completed"
    peer.await_workers("online")


def test_bytes_that_are_not_the_protocol_end_the_engine_only(peers: Peers) -> None:
    peer = peers.start(SLOW)
    engine = one_engine(peer)
    peer.await_workers()
    other = peer.submit("word " * 25)["task_id"]
    peer.await_task(other, "running")
    wrong = peer.submit("fault:wrong")
    new_engine(peer, engine)
    assert peer.client.delete(f"/tasks/{wrong['task_id']}").status_code == 200
    ended = peer.task(other, wait_s=30)
    assert ended["status"] == "completed"
    assert ended["attempt"] >= 2
    assert "not the protocol" in ended["requeued_because"]


def test_cancelling_a_run_of_a_frozen_engine_frees_the_device(peers: Peers) -> None:
    peer = peers.start({"engine": {"slots": 1, "fake": {"tokens_per_s": 10}}})
    frozen = peer.submit(LONG)["task_id"]
    peer.await_task(frozen, "running")
    next_one = peer.submit("next")["task_id"]
    engine = one_engine(peer)
    os.kill(engine, signal.SIGSTOP)
    assert peer.client.delete(f"/tasks/{frozen}").status_code == 200
    poll("the frozen engine is gone", lambda: not is_engine(engine), SLOT_FREE_S_MAX + SLACK_S)
    assert peer.task(frozen)["status"] == "cancelled"
    ended = peer.task(next_one, wait_s=15)
    assert ended["status"] == "completed"
    assert not alive(engine)


def test_cancelling_a_running_task_frees_its_slot(peers: Peers) -> None:
    peer = peers.start({"engine": {"slots": 1, "fake": {"tokens_per_s": 10}}})
    engine = one_engine(peer)
    first = peer.submit(LONG)["task_id"]
    peer.await_task(first, "running")
    second = peer.submit(LONG)["task_id"]
    assert peer.task(second)["status"] == "queued"
    began = time.monotonic()
    assert peer.client.delete(f"/tasks/{first}").json()["status"] == "cancelled"
    peer.await_task(second, "running", within_s=SLOT_FREE_S_MAX + SLACK_S)
    poll("it generates", lambda: peer.task(second)["tokens_so_far"] > 0, SLOT_FREE_S_MAX + SLACK_S)
    assert time.monotonic() - began < 2 * SLOT_FREE_S_MAX + SLACK_S
    assert peer.client.delete(f"/tasks/{first}").status_code == 409
    assert peer.task(first)["status"] == "cancelled"
    assert is_engine(engine)  # it obeyed and had not to be killed


def test_a_task_past_its_timeout_fails_and_frees_its_slot(peers: Peers) -> None:
    peer = peers.start({"engine": {"slots": 1, "fake": {"tokens_per_s": 10}}})
    peer.submit("warm up", wait_s=20)
    late = peer.submit(LONG, timeout=1.5)["task_id"]
    peer.await_task(late, "running")
    queued = peer.submit(LONG, timeout=1)["task_id"]
    following = peer.submit(LONG)["task_id"]
    failed = peer.await_task(late, "failed", within_s=1.5 + SLOT_FREE_S_MAX + SLACK_S)
    assert failed["error"]["code"] == "timeout"
    assert failed["result"] is None
    never_ran = peer.await_task(queued, "failed", within_s=SLACK_S)
    assert never_ran["error"]["code"] == "timeout"
    assert never_ran["assigned_worker"] is None
    peer.await_task(following, "running", within_s=SLOT_FREE_S_MAX + SLACK_S)
    poll("it generates", lambda: peer.task(following)["tokens_so_far"] > 0, SLOT_FREE_S_MAX + SLACK_S)


def test_a_restart_is_a_new_process_and_its_downtime_is_told_next_time(peers: Peers) -> None:
    peer = peers.start(SLOW)
    (worker_id,) = peer.await_workers()
    running = peer.submit("word " * 15)["task_id"]
    peer.await_task(running, "running")
    engine = one_engine(peer)
    last = events_since(peer, 0, lambda event: event["event"] == "model_loaded")[-1]["id"]

    answer = peer.post(f"/workers/{worker_id}/restart")
    assert answer["worker_id"] == worker_id
    assert answer["requeued_tasks"] == [running]
    second = new_engine(peer, engine)
    ended = peer.task(running, wait_s=20)
    assert ended["status"] == "completed"
    assert ended["attempt"] == 2
    shown = [
        event["data"]["status"]
        for event in events_since(
            peer,
            last,
            lambda event: event["event"] == "worker_status_changed" and event["data"]["status"] == "online",
        )
        if event["event"] == "worker_status_changed"
    ]
    assert shown == ["offline", "online"]
    measured_s = peer.log_lines("engine_ready")[-1]["downtime_s"]

    again = peer.post(f"/workers/{worker_id}/restart")
    assert again["estimated_downtime_seconds"] == pytest.approx(measured_s, abs=0.01)
    assert re.fullmatch(r"\d+(\.\d)?s", again["estimated_downtime"])
    new_engine(peer, second)


def test_a_stream_of_a_task_whose_engine_dies_says_so_and_goes_on(peers: Peers) -> None:
    peer = peers.start(SLOW)
    prompt = " ".join(f"w{number}" for number in range(12))
    task_id = peer.submit(prompt)["task_id"]
    lines: list[str] = []

    def read() -> None:
        with peer.client.stream("GET", f"/tasks/{task_id}/stream") as answer:
            lines.extend(answer.iter_lines())

    reader = threading.Thread(target=read)
    reader.start()
    poll("tokens come", lambda: sum(line == "event: token" for line in lines) >= 3)
    os.kill(one_engine(peer), signal.SIGKILL)
    reader.join(20.0)
    events = [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in pairwise(lines)
        if name.startswith("event: ")
    ]
    assert [data["attempt"] for name, data in events if name == "restart"] == [2]
    second = [data for name, data in events if name == "token" and data["attempt"] == 2]
    assert "".join(data["text"] for data in second) == prompt
    assert events[-1][0] == "done"
    assert events[-1][1]["result"]["generated_text"] == prompt


def test_logprobs_go_from_the_engine_to_the_client(peers: Peers) -> None:
    peer = peers.start()
    parameters = {"prompt": "one two", "logprobs": True, "min_p": 0.1, "logit_bias": {"3": -1}}
    task = peer.submit("", wait_s=10.0, parameters=parameters)
    told = task["result"]["logprobs"]
    assert [each["token"] for each in told] == ["one", "two"]
    with peer.client.stream("GET", f"/tasks/{task['task_id']}/stream") as answer:
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    tokens = [json.loads(each) for each in data[:-1]]
    assert [each for token in tokens for each in token["logprobs"]] == told
