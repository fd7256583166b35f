"""`bitinglip drain` against a stub of the documented API."""

from __future__ import annotations

from typing import Any

import pytest

from peer.cli import drain as drain_module
from peer.cli.exits import Exit
from tests.cli.conftest import Run
from tests.cli.stub import Stub, error

HOST = "gpu-2-ab12cd"
PATH = f"/cluster/hosts/{HOST}/drain"


def hosts(models: int, tasks: int, *, draining: bool = True) -> tuple[int, Any]:
    """The answer of GET /cluster/hosts; another host stands before ours."""
    ours = {"peer_id": HOST, "status": "online", "draining": draining, "models": models, "tasks": tasks}
    other = {"peer_id": "gpu-1-ab12cd", "status": "online", "draining": False, "models": 7, "tasks": 9}
    return 200, {"hosts": [other, ours], "total": 2}


@pytest.fixture
def draining(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(drain_module, "POLL_S", 0.0)
    stub.replies[f"POST {PATH}"] = (200, {"peer_id": HOST, "draining": True})
    stub.replies[f"DELETE {PATH}"] = (200, {"peer_id": HOST, "draining": False})
    return stub


def test_waits_until_the_host_holds_nothing(run: Run, draining: Stub) -> None:
    draining.replies["GET /cluster/hosts"] = [hosts(2, 1), hosts(2, 1), hosts(1, 0), hosts(0, 0)]
    ran = run("drain", HOST)
    assert (ran.code, ran.out) == (0, f"{HOST} holds nothing any more\n")
    assert ran.err.count("2 models, 1 tasks") == 1  # told once, not at every look
    assert "1 models, 0 tasks" in ran.err
    assert f"bitinglip drain {HOST} --undo" in ran.err
    assert draining.requests[0] == ("POST", PATH, None)  # the peer takes no body here
    assert [each[:2] for each in draining.requests[1:]] == [("GET", "/cluster/hosts")] * 4


def test_the_peer_says_which_host_is_meant(run: Run, draining: Stub) -> None:
    """Hosts may be named by their host's name; the answer has the peer_id, which is what is followed."""
    draining.replies["POST /cluster/hosts/gpu-2/drain"] = (200, {"peer_id": HOST, "draining": True})
    draining.replies["GET /cluster/hosts"] = hosts(0, 0)
    ran = run("drain", "gpu-2", "--json")
    assert (ran.code, ran.err, ran.json["total"]) == (0, "", 2)


def test_does_not_wait_if_told_so(run: Run, draining: Stub) -> None:
    ran = run("drain", HOST, "--no-wait")
    assert (ran.code, ran.out) == (0, f"{HOST} is being emptied\n")
    assert run("drain", HOST, "--no-wait", "--json").json == {"peer_id": HOST, "draining": True}
    assert {each[0] for each in draining.requests} == {"POST"}


def test_undo(run: Run, draining: Stub) -> None:
    ran = run("drain", HOST, "--undo")
    assert (ran.code, ran.out) == (0, f"{HOST} is back in use\n")
    assert run("drain", HOST, "--undo", "--json").json == {"peer_id": HOST, "draining": False}
    assert draining.requests == [("DELETE", PATH, None)] * 2


def test_somebody_else_takes_it_back_into_use(run: Run, draining: Stub) -> None:
    draining.replies["GET /cluster/hosts"] = [hosts(1, 0), hosts(1, 0, draining=False)]
    ran = run("drain", HOST)
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert "taken back into use" in ran.err


def test_the_wait_has_a_bound(run: Run, draining: Stub) -> None:
    draining.replies["GET /cluster/hosts"] = hosts(1, 0)
    ran = run("drain", HOST, "--timeout", "1ms")
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert f"{HOST} still holds 1 models, 0 tasks" in ran.err
    assert "bitinglip unload" in ran.err


def test_what_cannot_be_drained(run: Run, draining: Stub) -> None:
    assert run("drain", HOST, "--timeout", "soon").code == Exit.USAGE
    assert draining.requests == []
    draining.replies["POST /cluster/hosts/x/drain"] = error(404, "there is no host `x`")
    draining.replies["POST /cluster/hosts/only/drain"] = error(409, "there is no other host")
    assert run("drain", "x").code == Exit.NOT_FOUND
    assert run("drain", "only").code == Exit.CONFLICT
