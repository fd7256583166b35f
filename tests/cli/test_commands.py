"""The client commands against a stub that answers as the documented API."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from peer.cli import COMMANDS, HIDDEN
from peer.cli.exits import Exit
from tests.adapters.pki import Pki
from tests.cli.conftest import Run
from tests.cli.stub import Stub, error, serve

TASK: dict[str, Any] = {
    "task_id": "task-1",
    "status": "completed",
    "assigned_worker": "w-1",
    "created_at": "2025-05-30T10:00:00Z",
    "started_at": "2025-05-30T10:00:15Z",
    "completed_at": "2025-05-30T10:00:18Z",
    "duration": "3.2s",
    "model_name": "m",
    "result": {"generated_text": "hello \x1b[31mred", "tokens_generated": 3, "processing_time": "2.8s"},
}
QUEUED = {**TASK, "status": "queued", "result": None, "assigned_worker": None, "duration": None}
FAILED = {
    **TASK,
    "status": "failed",
    "result": None,
    "error": {"code": "timeout", "message": "took too long"},
}
STATUS = {
    "cluster_id": "c",
    "status": "operational",
    "total_workers": 2,
    "active_workers": 1,
    "queued_tasks": 3,
    "running_tasks": 4,
    "gpu_utilization": 65.5,
    "total_memory": "40GB",
    "available_memory": "14GB",
    "uptime": "7d 4h 23m",
}
WORKER = {
    "worker_id": "worker-001",
    "status": "online",
    "gpu_info": {
        "model": "AMD Radeon RX 7900 XTX",
        "memory_total": "24GB",
        "memory_used": "8GB",
        "temperature": 65,
        "utilization": None,
    },
    "loaded_models": ["llama-2-7b"],
    "current_tasks": 2,
    "last_heartbeat": None,
    "performance_score": 8.5,
}


def sse(*events: tuple[str, Any]) -> bytes:
    return b"".join(
        f": comment\nevent: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        for name, data in events
    )


def test_status_for_people_and_programs(run: Run, stub: Stub) -> None:
    stub.replies["GET /cluster/status"] = (200, STATUS)
    shown = run("status")
    assert shown.code == 0
    assert "workers      1 of 2 active" in shown.out
    assert run("status", "--json").json == STATUS
    assert stub.headers[0]["authorization"] == "Bearer blk_id_secret"


def test_workers_as_a_table_without_escape_codes(run: Run, stub: Stub) -> None:
    stub.replies["GET /workers"] = (200, {"workers": [WORKER], "total": 1, "online": 1, "offline": 0})
    ran = run("workers", "--status", "online")
    assert ran.out.splitlines()[0].split() == [
        "WORKER", "STATUS", "DEVICE", "MEMORY", "TEMP", "BUSY", "TASKS", "MODELS",
    ]  # fmt: skip
    assert "AMD Radeon RX 7900 XTX  8GB of 24GB" in ran.out
    assert "\x1b" not in ran.out
    assert stub.requests[0][1] == "/workers?status=online"


def test_an_empty_list_says_so(run: Run, stub: Stub) -> None:
    stub.replies["GET /tasks"] = (200, {"tasks": [], "total": 0, "limit": 50, "offset": 0})
    assert run("tasks").out == "no tasks\n"


def test_tasks_and_their_filters(run: Run, stub: Stub) -> None:
    stub.replies["GET /tasks"] = (200, {"tasks": [TASK], "total": 9, "limit": 1, "offset": 2})
    ran = run("tasks", "--status", "failed", "--worker", "w", "--limit", "1", "--offset", "2")
    assert stub.requests[0][1] == "/tasks?status=failed&worker_id=w&limit=1&offset=2"
    assert "task-1" in ran.out
    assert "3 to 3 of 9" in ran.err


def test_one_task_shows_its_text_and_cannot_steer_the_terminal(run: Run, stub: Stub) -> None:
    stub.replies["GET /tasks/task-1"] = (200, TASK)
    ran = run("tasks", "task-1")
    assert "hello [31mred" in ran.out
    assert run("tasks", "task-1", "--json").json == TASK


def test_one_task_says_why_it_is_pending(run: Run, stub: Stub) -> None:
    stub.replies["GET /tasks/task-1"] = (
        200,
        {**QUEUED, "pending_reasons": [{"worker_id": "w-1", "reason": "all slots busy"}]},
    )
    assert "w-1: all slots busy" in run("tasks", "task-1").out


def test_submit_sends_what_was_asked(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    ran = run(
        "submit", "m", "hi", "--max-tokens", "5", "--temperature", "0", "--stop", "a", "--stop", "b",
        "--priority", "3", "--timeout", "9", "--idempotency-key", "k", "--seed", "0",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.out == "task-1\n"
    assert stub.requests[0][2] == {
        "task_type": "text_generation",
        "model_name": "m",
        "parameters": {"prompt": "hi", "max_tokens": 5, "temperature": 0.0, "stop": ["a", "b"], "seed": 0},
        "priority": 3,
        "timeout": 9.0,
    }
    assert stub.headers[0]["idempotency-key"] == "k"


def test_submit_sends_how_to_choose_tokens(run: Run, stub: Stub, tmp_path: Path) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    (tmp_path / "wrong.json").write_text("{")
    ran = run(
        "submit", "m", "hi", "--min-p", "0.1", "--presence-penalty", "-1", "--frequency-penalty", "0.5",
        "--logit-bias", "42=-1.5", "--logit-bias", "7=3", "--logprobs", "--top-logprobs", "2",
        "--json-schema", str(tmp_path / "schema.json"),
    )  # fmt: skip
    assert ran.code == 0
    assert stub.requests[0][2]["parameters"] == {
        "prompt": "hi",
        "min_p": 0.1,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {"42": -1.5, "7": 3.0},
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "schema": {"type": "integer"}},
    }
    assert run("submit", "m", "hi", "--json-object").code == 0
    assert stub.requests[1][2]["parameters"] == {"prompt": "hi", "response_format": {"type": "json_object"}}
    for wrong, text in (
        (("--logit-bias", "42"), "42=-1.5"),
        (("--logit-bias", "42=much"), "42=-1.5"),
        (("--json-schema", str(tmp_path / "wrong.json")), "wrong.json is no JSON"),
        (("--json-object", "--json-schema", str(tmp_path / "schema.json")), "either"),
    ):
        ran = run("submit", "m", "hi", *wrong)
        assert (ran.code, len(stub.requests)) == (2, 2)
        assert text in ran.err


def test_submit_reads_the_prompt_from_a_pipe(run: Run, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    run("submit", "m", "-")
    assert stub.requests[0][2]["parameters"]["prompt"] == "from a pipe"


def test_submit_waits(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    stub.replies["GET /tasks/task-1"] = [(200, QUEUED), (200, TASK)]
    ran = run("submit", "m", "hi", "--wait")
    assert (ran.code, ran.out) == (0, "hello \x1b[31mred\n")  # a pipe gets the very text
    assert "wait=60" in stub.requests[1][1]
    assert len(stub.requests) == 3


def test_a_failed_task_is_exit_code_1(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, FAILED)
    ran = run("submit", "m", "hi", "--wait")
    assert ran.code == 1
    assert "took too long (timeout)" in ran.err
    assert run("submit", "m", "hi", "--wait", "--json").json == FAILED


def test_submit_streams(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    tokens = [
        ("token", {"text": text, "index": 0, "count": 1, "attempt": 1}) for text in ("a\u2028", "b\n", "c")
    ]
    stub.replies["GET /tasks/task-1/stream"] = sse(*tokens, ("done", TASK))
    ran = run("submit", "m", "hi", "--stream")
    assert (ran.code, ran.out) == (0, "a\u2028b\nc\n")
    lines = run("submit", "m", "hi", "--stream", "--json").out.split("\n")
    assert json.loads(lines[0])["event"] == "token"
    assert json.loads(lines[3])["event"] == "done"


def test_a_stream_that_fails(run: Run, stub: Stub) -> None:
    stub.replies["POST /tasks"] = (201, QUEUED)
    stub.replies["GET /tasks/task-1/stream"] = sse(
        ("restart", {"attempt": 2, "reason": "the engine died"}), ("done", FAILED)
    )
    ran = run("submit", "m", "hi", "--stream")
    assert ran.code == 1
    assert "the engine died" in ran.err
    stub.replies["GET /tasks/task-1/stream"] = sse(("error", {"error": {"message": "no leader"}}))
    assert "no leader" in run("submit", "m", "hi", "--stream").err
    stub.replies["GET /tasks/task-1/stream"] = sse()
    assert run("submit", "m", "hi", "--stream").code == 3


def test_cancel(run: Run, stub: Stub) -> None:
    stub.replies["DELETE /tasks/task-1"] = (200, {"message": "x", "task_id": "task-1", "status": "cancelled"})
    assert run("cancel", "task-1").out == "task-1 cancelled\n"
    stub.replies["DELETE /tasks/task-1"] = error(409, "it is completed")
    ran = run("cancel", "task-1")
    assert ran.code == 6
    assert ran.err == "bitinglip: it is completed\n"


def test_ids_stay_in_their_segment(run: Run, stub: Stub) -> None:
    assert run("cancel", "../workers").code == 5
    assert stub.requests[0][1] == "/tasks/..%2Fworkers"
    assert run("tasks", "..").code == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 2), (401, 4), (404, 5), (409, 6), (413, 2), (429, 7), (500, 1), (503, 7)],
)
def test_exit_codes(run: Run, stub: Stub, status: int, code: int) -> None:
    stub.replies["GET /cluster/status"] = error(status, "the reason")
    ran = run("status")
    assert ran.code == code
    assert "the reason" in ran.err
    if status in (429, 503):
        assert "try again in 7 s" in ran.err


def test_what_is_no_peer(run: Run, stub: Stub) -> None:
    stub.replies["GET /cluster/status"] = (200, b"<html>")
    ran = run("status")
    assert ran.code == 1
    assert "is that address a bitinglip peer?" in ran.err
    stub.replies["GET /cluster/status"] = (502, b"<html>")
    assert "is that address a bitinglip peer?" in run("status").err


def test_nobody_answers(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITINGLIP_KEY", "k")
    ran = run("status", "--url", "http://127.0.0.1:9")
    assert ran.code == 3
    assert "bitinglip up" in ran.err
    data = tmp_path / "data"
    data.mkdir()
    (data / "peer.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": 2**22 + 1}))
    assert "has ended" in run("status").err


def test_an_authority_of_ones_own_is_trusted_also_on_the_peers_host(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pki = Pki(tmp_path)
    pki.host("p1")
    monkeypatch.setenv("BITINGLIP_KEY", "blk_id_secret")
    with serve(next(tmp_path.glob("p1-*.pem"))) as stub:
        stub.replies["GET /cluster/status"] = (200, STATUS)
        monkeypatch.setenv("BITINGLIP_URL", stub.url)
        refused = run("status")
        assert refused.code == Exit.UNREACHABLE
        assert "SSL_CERT_FILE" in refused.err
        (tmp_path / "ca.crt").write_text(pki.ca_pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
        assert run("status").code == 0


def test_no_key(run: Run) -> None:
    ran = run("status")
    assert ran.code == 4
    assert "admin.key" in ran.err


def test_the_data_directory_leads_to_its_peer(
    run: Run, stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub.replies["GET /cluster/status"] = (200, STATUS)
    monkeypatch.delenv("BITINGLIP_URL")
    monkeypatch.delenv("BITINGLIP_KEY")
    data = tmp_path / "other"
    data.mkdir()
    (data / "peer.json").write_text(json.dumps({"url": stub.url, "pid": os.getpid()}))
    (data / "admin.key").write_text("blk_admin_secret\n")
    assert run("status", "--data-dir", str(data)).code == 0
    assert stub.headers[-1]["authorization"] == "Bearer blk_admin_secret"


def test_the_admin_key_does_not_leave_the_host_unasked(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "admin.key").write_text("blk_admin_secret\n")
    ran = run("status", "--url", "http://192.0.2.1:8000")
    assert ran.code == 4
    assert "--key-file" in ran.err


@pytest.mark.parametrize("url", ["peer:8000", "ftp://x", "http://", "http://x:y"])
def test_addresses_that_are_none(run: Run, url: str) -> None:
    assert run("status", "--url", url).code == 2


def test_models_load_and_unload(run: Run, stub: Stub) -> None:
    model = {
        "name": "m",
        "family": "llama",
        "context": 2048,
        "size": "1GB",
        "replicas": [],
        "queued_tasks": 0,
    }
    stub.replies["GET /models"] = (200, {"models": [model], "total": 1})
    assert "llama" in run("models").out
    placed = {"worker_id": "w-1", "status": "loading", "estimated_time": "45s", "reason": "fits best"}
    stub.replies["POST /models/assign"] = (
        200,
        {"assignment_id": "a", "model_name": "m", "assignments": [placed]},
    )

    def state(status: str, problem: str = "", stage: str | None = None) -> tuple[int, Any]:
        replica = {"name": "m", "status": status, "stage": stage, "progress": 50.0, "error": problem}
        return 200, {"assignments": [{"worker_id": "w-1", "models": [replica]}]}

    stub.replies["GET /models/assignments"] = [state("loading", stage="upload"), state("loaded")]
    ran = run("load", "m", "--worker", "w-1")
    assert ran.code == 0
    assert "w-1: loading, 45s estimated (fits best)" in ran.out
    assert ran.err.splitlines() == ["m on w-1: loading, upload", "m on w-1: loaded"]
    stub.replies["GET /models/assignments"] = state("failed", "out of memory")
    ran = run("load", "m")
    assert ran.code == 1
    assert "out of memory" in ran.err
    stub.replies["POST /models/unload"] = (
        200,
        {"message": "ok", "model_name": "m", "affected_workers": ["w-1"]},
    )
    assert run("unload", "m", "--force").out == "ok: w-1\n"
    assert stub.requests[-1][2] == {"model_name": "m", "worker_ids": [], "force": True}


def test_rebalance_and_metrics(run: Run, stub: Stub) -> None:
    plan = {
        "rebalance_id": "r",
        "status": "planned",
        "estimated_duration": "0s",
        "affected_workers": [],
        "operations": [],
        "reasons": ["one worker"],
    }
    stub.replies["POST /cluster/rebalance"] = (200, plan)
    ran = run("rebalance", "--dry-run", "--strategy", "load_balanced")
    assert stub.requests[0][2] == {"strategy": "load_balanced", "force": False, "dry_run": True}
    assert "nothing to move" in ran.out
    metrics = {
        "total_tasks": 1,
        "successful_tasks": 1,
        "failed_tasks": 0,
        "success_rate": 100.0,
        "average_response_time": None,
        "peak_throughput": "1 tasks/min",
        "gpu_utilization": {"average": 1.0, "peak": 2.0, "minimum": None},
        "memory_usage": {"average": "1%", "peak": "2%", "efficiency": None},
    }
    stub.replies["GET /cluster/metrics"] = (200, {"timeframe": "7d", "metrics": metrics})
    assert "throughput, peak      1 tasks/min" in run("metrics", "--timeframe", "7d").out
    assert stub.requests[-1][1] == "/cluster/metrics?timeframe=7d"


def test_wrong_usage(run: Run) -> None:
    ran = run("stauts")
    assert ran.code == 2
    assert "did you mean `status`?" in ran.err
    assert run("submit").code == 2
    assert run("tasks", "--limit", "0").code == 2


def test_unknown_events_are_named(run: Run, stub: Stub) -> None:
    ran = run("events", "--events", "task_complete")
    assert ran.code == 2
    assert "did you mean `task_completed`?" in ran.err


def test_help_names_every_command(run: Run) -> None:
    shown = run("--help").out
    for name in set(COMMANDS) - HIDDEN:
        assert f"  {name}" in shown
        assert run(name, "--help").code == 0
    assert run("--version").out.startswith("bitinglip 0.")
