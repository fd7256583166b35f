"""An operator's actions over real HTTP: handing the leadership over, a new key for gossip."""

from __future__ import annotations

import httpx

from peer.errors import Conflict, Unavailable
from peer.state.command import GetStatus, TransferLeadership
from peer.state.member import Load, Member
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


def test_gossip_is_shown_whether_anybody_leads_or_not(client: httpx.Client, server: RunningServer) -> None:
    assert client.get("/cluster/gossip").json() == {"members": [], "total": 0}
    load = Load(workers=2, up=1, slots=8, running=3, queued=4)
    said = {
        "role": "leader",
        "epoch": "7",
        "voter": "1",
        "api": "h2:8000",
        "version": "0.1.0",
        "load": load.text(),
    }
    server.cluster.gossiped = (
        Member(peer_id="h2", address="192.0.2.2", status="alive", tags=said),
        Member(peer_id="h1", address="192.0.2.1", status="failed", tags={"load": "nonsense"}),
    )
    server.cluster.failure = Unavailable("nobody leads", code="no_leader")
    silent, leader = client.get("/cluster/gossip").json()["members"]
    assert leader == {
        "peer_id": "h2",
        "status": "alive",
        "role": "leader",
        "epoch": "7",
        "voter": True,
        "api": "h2:8000",
        "version": "0.1.0",
        "workers": 2,
        "workers_up": 1,
        "slots": 8,
        "running": 3,
        "queued": 4,
    }
    assert (silent["peer_id"], silent["status"], silent["voter"], silent["workers"]) == (
        "h1",
        "failed",
        False,
        None,
    )
