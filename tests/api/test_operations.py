"""An operator's actions over real HTTP: handing the leadership over, a new key for gossip."""

from __future__ import annotations

import httpx

from peer.errors import Conflict, Unavailable
from peer.state.command import GetStatus, TransferLeadership
from tests.api.conftest import RunningServer
from tests.api.fake_parts import token


def test_the_leadership_is_handed_over(client: httpx.Client, server: RunningServer) -> None:
    answer = client.post("/cluster/leadership/transfer")
    assert (answer.status_code, answer.json()) == (
        200,
        {"leader": "peer-2", "epoch": 4, "previous": "peer-1", "moved": True},
    )
    assert server.cluster.requests[-2:] == [GetStatus(), TransferLeadership(epoch=3)]


def test_nobody_else_could_lead(client: httpx.Client, server: RunningServer) -> None:
    server.cluster.failure = Conflict("no other voter is up", code="no_other_voter")
    answer = client.post("/cluster/leadership/transfer")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_other_voter")


def test_gossip_gets_a_new_key(client: httpx.Client, server: RunningServer) -> None:
    assert client.post("/cluster/gossip-key").json() == {"members": 2, "removed": 1}
    assert client.post("/cluster/gossip-key", json={"force": True}).status_code == 200
    assert server.cluster.rotations == [False, True]
    assert client.post("/cluster/gossip-key", json={"force": 1}).status_code == 400
    server.cluster.failure = Unavailable("h2 has not answered", code="rotation_incomplete")
    answer = client.post("/cluster/gossip-key")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "rotation_incomplete")


def test_only_admins_may(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {token('operate')}"}
    for path in ("/cluster/leadership/transfer", "/cluster/gossip-key"):
        answer = httpx.post(server.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "insufficient_scope")
    assert not server.cluster.rotations
