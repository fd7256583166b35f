"""The served OpenAPI description against the running product: no 5xx, nothing that it does not describe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.process.peers import Peer, Peers

pytestmark = pytest.mark.process

SEED = 20_250_530
EXAMPLES = 20  # of each operation and phase
RUN_S_MAX = 240.0  # a bound for a busy host; it takes about half a minute
PROGRAM = Path(sys.executable).with_name("schemathesis")
UNLIMITED = {"requests_per_hour": None, "requests_per_minute": None}
REVOKE = "/keys/{key_id}"  # tried on its own: sooner or later it revokes the key that is used
UNLOAD = "/models/unload"  # after the rest: tasks of a model that is unloaded by force wait for minutes
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
    "ignored_auth",
    "use_after_free",
)


@pytest.fixture(scope="module")
def peer(peers: Peers) -> Peer:
    """With a model loaded and tasks of every kind of end, so that there is something to be found."""
    made = peers.start({"engine": {"fake": {"tokens_per_s": 200}}}, device="fake:2")
    made.await_workers(count=2)
    made.submit("a b c", wait_s=20)
    made.submit("word " * 1_000, timeout=1)
    return made


def test_the_description_holds(peer: Peer, tmp_path: Path) -> None:
    found = explore(peer, tmp_path, "--exclude-path", REVOKE, "--exclude-path", UNLOAD, key=peer.key)
    assert found.returncode == 0, report(found)
    spare = peer.post("/keys", {"owner": "spare", "scopes": ["admin"], **UNLIMITED}, 201)["key"]
    found = explore(peer, tmp_path, "--include-path", REVOKE, key=spare)
    assert found.returncode == 0, report(found)
    peer.check()
    assert peer.get("/health")["status"] == "healthy"
    assert peer.submit("still serves", wait_s=30)["status"] == "completed"
    found = explore(peer, tmp_path, "--include-path", UNLOAD, key=peer.key)
    assert found.returncode == 0, report(found)
    assert peer.get("/health")["status"] == "healthy"
    assert "Traceback" not in peer.log()
    assert not peer.log_lines("request failed")
    assert not peer.log_lines("command_failed")
    assert not peer.log_lines("connection failed")


def test_without_a_key_everything_is_refused(peer: Peer, tmp_path: Path) -> None:
    """Whatever is sent: 401, or a sentence about the request, and never what is behind it."""
    document = peer.get("/openapi.json")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            url = peer.url + path.replace("{", "x").replace("}", "x")
            answer = httpx.request(method, url)
            assert answer.status_code == (401 if operation["security"] else 200), f"{method} {path}"
    found = explore(
        peer, tmp_path, "--checks", "not_a_server_error,content_type_conformance,status_code_conformance"
    )
    assert found.returncode == 0, report(found)


def explore(peer: Peer, folder: Path, *options: str, key: str = "") -> subprocess.CompletedProcess[str]:
    document = peer.client.get("/openapi.json").json()
    file = folder / "openapi.json"
    file.write_text(json.dumps(document))
    command = [str(PROGRAM), "run", str(file), "--url", peer.url, "--no-color", "--request-timeout", "20"]
    command += ["--max-examples", str(EXAMPLES), "--seed", str(SEED), "--mode", "all"]
    command += ["--phases", "examples,coverage,fuzzing", "--generation-database", "none"]
    if key:
        command += ["-H", f"Authorization: Bearer {key}"]
    if "--checks" not in options:
        command += ["--checks", ",".join(CHECKS)]
    return subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
    )


def report(found: subprocess.CompletedProcess[str]) -> str:
    return found.stdout[-8_000:] + found.stderr[-1_000:]
