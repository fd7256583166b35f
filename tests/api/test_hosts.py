"""Tokens for new hosts, the list of hosts, and revoking one, over real HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from peer.errors import Conflict
from peer.state import enrol as records
from peer.state.command import DrainHost
from peer.state.enrol import CreateJoinToken, RevokeHost
from tests.api.conftest import RunningServer
from tests.api.fake_parts import WALL


def test_a_token_is_made_and_shown_once(client: httpx.Client, server: RunningServer) -> None:
    answer = client.post("/cluster/tokens", json={"ttl_s": 120, "voter": False})
    assert answer.status_code == 201
    made = answer.json()
    assert (made["voter"], made["expires_at"]) == (False, "2025-05-30T10:02:00Z")
    parts = records.split_token(made["token"])
    assert parts is not None
    token_id, secret, ca_sha256 = parts
    assert (token_id, ca_sha256) == (made["token_id"], "c" * 64)
    sent = server.cluster.requests[-1]
    assert sent == CreateJoinToken(
        token_id=token_id,
        secret_sha256=records.digest(secret),
        ttl_s=120.0,
        voter=False,
        created_by="admin-owner",
    )
    assert secret not in repr(sent)  # it does not leave the peer but in the answer


def test_a_token_without_wishes(client: httpx.Client) -> None:
    first, second = client.post("/cluster/tokens").json(), client.post("/cluster/tokens", json={}).json()
    assert (first["voter"], first["expires_at"]) == (True, "2025-05-30T10:30:00Z")
    assert first["token"] != second["token"]


@pytest.mark.parametrize("body", [{"ttl_s": 59}, {"ttl_s": 604_801}, {"ttl_s": "1h"}, {"voter": 1}, {"x": 1}])
def test_a_token_out_of_bounds(client: httpx.Client, server: RunningServer, body: dict[str, Any]) -> None:
    assert client.post("/cluster/tokens", json=body).status_code == 400
    assert not any(isinstance(each, CreateJoinToken) for each in server.cluster.requests)


def test_where_there_is_no_cluster(client: httpx.Client, server: RunningServer) -> None:
    server.cluster.failure = Conflict("this host is in no cluster", code="no_cluster")
    answer = client.post("/cluster/tokens")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_cluster")


def test_hosts_are_listed_and_one_is_revoked(client: httpx.Client, server: RunningServer) -> None:
    first = {
        "peer_id": "gpu-1-000001",
        "status": "online",
        "voter": True,
        "addresses": ["10.0.0.2"],
        "enrolled_at": "2025-05-29T10:00:00Z",
        "certificate_expires_at": "2025-06-28T10:00:00Z",
        "revoked_at": None,
        "draining": False,
        "models": 0,
        "tasks": 0,
    }
    listed = client.get("/cluster/hosts").json()
    assert listed["total"] == 2
    assert listed["hosts"] == [first, first | {"peer_id": "gpu-2-000002", "voter": False}]
    answer = client.delete("/cluster/hosts/gpu-2-000002")
    assert answer.status_code == 200
    assert answer.json() == {"peer_id": "gpu-2-000002", "revoked_at": "2025-05-30T10:00:00Z"}
    assert server.cluster.requests[-1] == RevokeHost(name="gpu-2-000002", revoked_by="admin-owner")
    assert server.cluster.registry.revocations["gpu-2-000002"].revoked_at == WALL
    assert client.get("/cluster/hosts").json()["hosts"] == [
        first,
        {
            "peer_id": "gpu-2-000002",
            "status": "revoked",
            "voter": None,
            "addresses": [],
            "enrolled_at": None,
            "certificate_expires_at": None,
            "revoked_at": "2025-05-30T10:00:00Z",
            "draining": False,
            "models": 0,
            "tasks": 0,
        },
    ]


@pytest.mark.parametrize(("name", "status"), [("nobody", 404), ("gpu-1-000001", 409)])
def test_who_cannot_be_revoked(client: httpx.Client, name: str, status: int) -> None:
    assert client.delete(f"/cluster/hosts/{name}").status_code == status


def test_a_host_is_drained_and_taken_back(client: httpx.Client, server: RunningServer) -> None:
    path = "/cluster/hosts/gpu-1-000001/drain"
    answer = client.post(path)
    assert (answer.status_code, answer.json()) == (200, {"peer_id": "gpu-1-000001", "draining": True})
    assert server.cluster.requests[-1] == DrainHost(name="gpu-1-000001", by="admin-owner")
    assert client.delete(path).json() == {"peer_id": "gpu-1-000001", "draining": False}
    answer = client.post("/cluster/hosts/nowhere/drain")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "host_not_found")
