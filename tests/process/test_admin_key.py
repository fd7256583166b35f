"""The owner's own admin key, handed to the service as a credential."""

from __future__ import annotations

from pathlib import Path

import httpx

from peer.cli.exits import Exit
from tests.process.peers import Peers

KEY = f"blk_owner1_{'ab' * 32}"


def test_the_owner_gives_the_admin_key(peers: Peers, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "admin.key").write_text(KEY + "\n")
    peer = peers.make(environment={"CREDENTIALS_DIRECTORY": str(credentials)})
    peer.start()
    assert peer.key == KEY  # for who works on this host
    made = peer.post("/keys", {"owner": "second", "scopes": ["admin"]}, 201)
    second = {"Authorization": f"Bearer {made['key']}"}
    assert peer.stop() == Exit.OK
    peer.start()
    assert [each["key_id"] for each in peer.get("/keys")["keys"]].count("owner1") == 1
    assert peer.key == KEY
    assert httpx.delete(f"{peer.url}/keys/owner1", headers=second).status_code == 200
    assert peer.stop() == Exit.OK

    peer.spawn()
    assert peer.wait_exit(20.0) == Exit.USAGE
    assert "the credential admin.key is revoked" in peer.log()

    (credentials / "admin.key").write_text(f"blk_owner1_{'cd' * 32}")
    peer.spawn()
    assert peer.wait_exit(20.0) == Exit.USAGE
    assert "has the id of another key" in peer.log()
