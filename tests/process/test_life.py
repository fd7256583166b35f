"""A peer's own life: its folder and port, its signals, its configuration, a disk that fails, what a restart keeps."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process.peers import Peer, Peers, is_engine, poll, submission

pytestmark = pytest.mark.process

SLOW: dict[str, Any] = {"engine": {"slots": 2, "fake": {"tokens_per_s": 10}}}
LONG = " ".join(["word"] * 600)
AT_ONCE_S = 6.0  # an engine may take ENGINE_STOP_S_MAX, open connections GRACE_S
NOT_ZERO_BUT = {"usage": 2, "conflict": 6}
FLAG_ENV = "FSYNC_FAILS_WHILE"  # the product refuses variables with its own prefix that it does not know
FAILING_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int fails(void) {
  const char *file = getenv("FSYNC_FAILS_WHILE");
  if (!file || access(file, F_OK)) return 0;
  errno = EIO;
  return 1;
}
int fsync(int fd) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"""


def refused_start(peer: Peer) -> tuple[int, str]:
    """Exit code and words of a start that must not succeed."""
    peer.spawn()
    return peer.wait_exit(20.0), peer.log()


def test_two_peers_do_not_share_a_folder(peers: Peers) -> None:
    first = peers.start()
    second = peers.make()
    second.data = first.data
    code, said = refused_start(second)
    assert code == NOT_ZERO_BUT["conflict"]
    assert f"another peer runs on {first.data}" in said
    assert "Traceback" not in said
    assert first.submit("still here", wait_s=20)["status"] == "completed"
    assert first.get("/health")["status"] == "healthy"


def test_a_port_in_use_is_said(peers: Peers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        peer = peers.make(port=port)
        code, said = refused_start(peer)
    assert code in NOT_ZERO_BUT.values()
    assert f"127.0.0.1:{port}" in said
    assert "in use" in said
    assert "Traceback" not in said
    peer.start()  # the failed start left nothing behind that is in the way
    assert peer.stop() == 0


def test_sigterm_drains(peers: Peers) -> None:
    """What runs ends, what waits stays for the next start, new work is refused, the exit code is 0."""
    peer = peers.start(SLOW)
    running = [peer.submit("word " * 15)["task_id"] for _ in range(2)]
    for task_id in running:
        peer.await_task(task_id, "running")
    waiting = peer.submit("later")["task_id"]
    answers: list[httpx.Response] = []
    waiter = threading.Thread(
        target=lambda: answers.append(
            httpx.get(f"{peer.url}/tasks/{running[0]}?wait=20", headers=peer.headers, timeout=30)
        )
    )
    waiter.start()
    engines = peer.engine_pids()
    peer.signal(signal.SIGTERM)
    poll("it is not ready", lambda: httpx.get(f"{peer.url}/readyz").status_code == 503)
    refused = peer.client.post("/tasks", json=submission("too late"))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "stopping"
    assert int(refused.headers["retry-after"]) > 0
    assert peer.wait_exit() == 0
    waiter.join(5.0)
    assert answers[0].json()["status"] == "completed"
    assert not any(is_engine(pid) for pid in engines)
    assert not (peer.data / "peer.json").exists()

    peer.start()
    ended = [peer.task(task_id) for task_id in running]
    assert [(task["status"], task["attempt"]) for task in ended] == [("completed", 1)] * 2
    assert peer.task(waiting, wait_s=20)["status"] == "completed"


def test_a_drain_that_takes_too_long_puts_its_tasks_back(peers: Peers) -> None:
    peer = peers.start(SLOW | {"drain_s": 0.3})
    long = peer.submit(LONG)["task_id"]
    peer.await_task(long, "running")
    assert peer.stop(AT_ONCE_S + 1.0) == 0
    peer.configure({})
    peer.start()
    ended = peer.task(long, wait_s=20)
    assert ended["status"] == "completed"
    assert ended["attempt"] == 2


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(peers: Peers, second: signal.Signals) -> None:
    peer = peers.start(SLOW)
    long = peer.submit(LONG)["task_id"]
    peer.await_task(long, "running")
    engines = peer.engine_pids()
    peer.signal(signal.SIGTERM)
    poll("it drains", lambda: peer.log_lines("stopping"))
    peer.signal(second)
    peer.wait_exit(AT_ONCE_S)
    assert not any(is_engine(pid) for pid in engines)
    peer.start()
    assert peer.task(long)["status"] in ("queued", "running")  # it was not lost


def rate_limited_key(peer: Peer) -> dict[str, str]:
    key = peer.post("/keys", {"owner": "someone", "scopes": ["read"]}, 201)["key"]
    return {"Authorization": f"Bearer {key}"}


def test_sighup_reloads_what_can_be_reloaded(peers: Peers) -> None:
    peer = peers.start({"limits": {"requests_per_minute": 50}})
    key = rate_limited_key(peer)

    def limit() -> str:
        return httpx.get(f"{peer.url}/health", headers=key).headers["x-ratelimit-limit"]

    assert limit() == "50"
    peer.configure({"limits": {"requests_per_minute": 70}, "log": {"level": "debug"}, "engine": {"slots": 3}})
    peer.signal(signal.SIGHUP)
    (told,) = poll("it says what changed", lambda: peer.log_lines("reloaded"))
    assert sorted(told["changed"]) == ["limits", "log"]
    (fixed,) = poll("it says what cannot", lambda: peer.log_lines("restart_needed"))
    assert fixed["changed"] == ["engine"]
    assert limit() == "70"
    assert peer.submit("for the log", wait_s=20)["status"] == "completed"
    assert any('"level": "debug"' in line for line in peer.log().splitlines())

    peer.config_file.write_text("limits:\n  requests_per_minuet: 90\n")
    peer.signal(signal.SIGHUP)
    (refused,) = poll("it refuses the file", lambda: peer.log_lines("reload_refused"))
    assert f"{peer.config_file}:2" in refused["why"]
    assert "requests_per_minute" in refused["why"]
    assert limit() == "70"
    peer.config_file.unlink()
    peer.signal(signal.SIGHUP)
    poll("it refuses that there is none", lambda: len(peer.log_lines("reload_refused")) == 2)
    assert limit() == "70"


@pytest.fixture
def failing_fsync(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which fsync fails while the file exists."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: an fsync that fails is made with a preloaded library")
    source, library, flag = tmp_path / "fsync.c", tmp_path / "fsync.so", tmp_path / "fail"
    source.write_text(FAILING_FSYNC)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), FLAG_ENV: str(flag)}, flag


def test_a_disk_that_fails_stops_the_peer(peers: Peers, failing_fsync: tuple[dict[str, str], Path]) -> None:
    environment, flag = failing_fsync
    peer = peers.start(environment=environment)
    kept = [peer.submit(f"task {number}", wait_s=20) for number in range(3)]
    engines = peer.engine_pids()
    flag.touch()
    try:
        answer = peer.client.post("/tasks", json=submission("never"))
    except httpx.TransportError:
        pass
    else:
        assert answer.status_code == 503, answer.text
    code = peer.wait_exit(AT_ONCE_S + 2.0)
    said = peer.log()
    assert code == 1
    assert "bitinglip: " in said
    assert any(word in said for word in ("fsync", "disk", "I/O")), said[-600:]
    assert "Traceback" not in said
    poll("its engines are gone", lambda: not any(is_engine(pid) for pid in engines))

    flag.unlink()
    peer.start()
    assert [peer.task(task["task_id"]) for task in kept] == kept
    assert peer.submit("works again", wait_s=20)["status"] == "completed"


def test_metrics_and_keys_outlive_a_restart(peers: Peers) -> None:
    peer = peers.start()
    for number in range(5):
        assert peer.submit(f"task {number}", wait_s=20)["status"] == "completed"
    key = rate_limited_key(peer)
    before = peer.get("/cluster/metrics?timeframe=1h")["metrics"]
    assert (before["total_tasks"], before["successful_tasks"], before["failed_tasks"]) == (5, 5, 0)
    worker = peer.workers()[0]["worker_id"]
    peer.kill()
    peer.start()
    for timeframe in ("1h", "24h", "7d", "30d"):
        after = peer.get(f"/cluster/metrics?timeframe={timeframe}")["metrics"]
        assert (after["total_tasks"], after["successful_tasks"]) == (5, 5), timeframe
        assert after["success_rate"] == 100.0
        assert after["average_response_time"] == before["average_response_time"]
    assert httpx.get(f"{peer.url}/health", headers=key).status_code == 200
    assert [each["worker_id"] for each in peer.workers()] == [worker]
    assert peer.get(f"/workers/{worker}")["task_history"]["completed_today"] in (0, 5)  # midnight may pass


def test_retention_forgets_the_oldest_and_its_result(peers: Peers) -> None:
    peer = peers.start({"retention": {"count": 5}})
    tasks = [peer.submit(f"task {number}", wait_s=20)["task_id"] for number in range(12)]
    poll("the number is kept", lambda: peer.get("/tasks")["total"] == 5)
    assert [task["task_id"] for task in peer.get("/tasks")["tasks"]] == tasks[:6:-1]
    assert peer.client.get(f"/tasks/{tasks[0]}").status_code == 404
    assert peer.task(tasks[-1])["status"] == "completed"


def test_a_worker_whose_device_is_gone_is_listed_offline(peers: Peers) -> None:
    peer = peers.start(device="fake:2")
    both = peer.await_workers(count=2)
    assert peer.stop() == 0
    peer.device = "fake"
    peer.start()
    (online,) = peer.await_workers()
    offline = [worker for worker in peer.workers() if worker["status"] == "offline"]
    assert [worker["worker_id"] for worker in offline] == [each for each in both if each != online]
    listed = peer.get("/workers?status=offline")
    assert (listed["total"], listed["offline"], listed["online"]) == (1, 1, 0)
    assert peer.get("/cluster/status")["active_workers"] == 1


def test_the_folder_is_private(peers: Peers) -> None:
    peer = peers.start()
    assert peer.data.stat().st_mode & 0o777 == 0o700
    for name in ("admin.key", "peer.json", "identity.json", "store.sqlite"):
        assert (peer.data / name).stat().st_mode & 0o077 == 0, name
    environment = Path(f"/proc/{peer.engine_pids()[0]}/environ").read_bytes()
    assert peer.key.encode() not in environment
    assert os.fsencode(peer.data / "store.sqlite") not in environment
