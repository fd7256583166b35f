"""`init`, `token`, `join`, `host`; joining goes to a real listener."""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from peer import identity
from peer.adapters.clock import SystemClock
from peer.adapters.links import certificates, own_addresses
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.links.enrolment import EnrolmentServer
from peer.adapters.links.tls_network import PORT_DEFAULT, TlsNetwork
from peer.cli import cluster_join
from peer.cli.exits import CliError, Exit
from peer.errors import Unauthorized
from peer.ports import Connection
from peer.state import enrol as records
from peer.state.enrol import CERTIFICATE_S, Enrol, Enrolled, Grant
from tests.cli.conftest import Run
from tests.cli.stub import Stub, error

ID, SECRET = "0123456789ab", "ab" * 16


# ---------------------------------------------------------------- init


def test_init_makes_a_cluster(run: Run, tmp_path: Path) -> None:
    ran = run("init", "--cluster", "my gpus", "--advertise", "gpu-1", "--json")
    assert ran.code == 0, ran.err
    directory = tmp_path / "data"
    assert ran.json == {
        "peer_id": identity.peer_id(directory),
        "cluster": "my gpus",
        "data_dir": str(directory),
    }
    files = ClusterFiles(directory)
    belonging = files.belonging()
    assert belonging is not None
    assert belonging.cluster == "my gpus"
    assert files.authority() is not None
    assert files.credentials().addresses == ("gpu-1",)
    again = run("init", "--cluster", "other")
    assert (again.code, again.out) == (Exit.CONFLICT, "")
    assert "already" in again.err


def test_init_finds_out_this_hosts_address(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        own_addresses, "_OUTSIDE", ((socket.AF_INET, "127.0.0.77"),)
    )  # by way of the loopback
    monkeypatch.setattr(socket, "gethostname", lambda: "ip6-localhost.invalid")
    ran = run("init", "--cluster", "c")
    assert ran.code == 0
    assert ClusterFiles(tmp_path / "data").credentials().addresses == (own_addresses.own_address(),)
    assert own_addresses.own_address().startswith("127.")
    assert "warning" in ran.err
    assert "--advertise" in ran.err


def test_init_does_not_warn_of_an_address_that_others_reach(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_addresses, "own_address", lambda: "10.0.0.7")
    assert "warning" not in run("init", "--cluster", "c").err
    asked = run("init", "--cluster", "c", "--advertise", "127.0.0.1", "--data-dir", str(tmp_path / "asked"))
    assert (asked.code, "warning" in asked.err) == (0, False)


def test_this_hosts_address_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ipaddress.ip_address(own_addresses.own_address())
    monkeypatch.setattr(own_addresses, "_OUTSIDE", ((socket.AF_INET, "not an address"),))
    assert own_addresses.own_address() == "127.0.0.1"

    async def resolve(name: str, _: object) -> list[object]:
        if name != "gpu-1":
            raise socket.gaierror("it does not resolve")
        return []

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    for name, names in (("gpu-1", ("gpu-1",)), ("gpu-2", ()), ("localhost", ()), ("a b", ())):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert trio.run(own_addresses.own_names) == names


def test_init_of_a_single_host(run: Run, tmp_path: Path) -> None:
    ran = run("init", "--single", "--data-dir", str(tmp_path / "x"))
    assert ran.code == 0, ran.err
    assert f"bitinglip up --data-dir {tmp_path / 'x'}" in ran.err
    assert ClusterFiles(tmp_path / "x").belonging() is None


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--single", "--cluster", "c"),
        ("--cluster", " "),
        ("--cluster", "x" * 129),
        ("--cluster", "a\nb"),
        ("--cluster", "c", "--advertise", "1.2.3.4:80"),
        ("--cluster", "c", *("--advertise", "a") * 9),
    ],
)
def test_init_says_what_is_wrong(run: Run, arguments: tuple[str, ...]) -> None:
    assert run("init", *arguments).code == Exit.USAGE


def test_init_while_a_peer_runs(run: Run, tmp_path: Path) -> None:
    identity.make_folder(tmp_path / "data")
    with identity.exclusive(tmp_path / "data"):
        assert run("init", "--cluster", "c").code == Exit.CONFLICT


# ---------------------------------------------------------------- token, host


def test_a_token_is_asked_of_a_peer(run: Run, stub: Stub) -> None:
    stub.replies["POST /cluster/tokens"] = (201, {"token": "blj_x", "expires_at": "2027-01-01T00:00:00Z"})
    ran = run("token", "--expires", "2h", "--no-voter")
    assert (ran.code, ran.out) == (0, "blj_x\n")
    assert "2027-01-01" in ran.err
    assert stub.requests == [("POST", "/cluster/tokens", {"ttl_s": 7200.0, "voter": False})]
    assert json.loads(run("token", "--json").out)["token"] == "blj_x"


@pytest.mark.parametrize("expires", ["1s", "8d", "soon"])
def test_a_tokens_life_is_bounded(run: Run, stub: Stub, expires: str) -> None:
    assert run("token", "--expires", expires).code == Exit.USAGE
    assert stub.requests == []


def test_a_host_is_revoked(run: Run, stub: Stub) -> None:
    stub.replies["DELETE /cluster/hosts/gpu-1-ab12cd"] = (200, {"peer_id": "gpu-1-ab12cd"})
    ran = run("host", "revoke", "gpu-1-ab12cd")
    assert (ran.code, ran.out) == (0, "gpu-1-ab12cd is revoked\n")
    assert run("host", "revoke", "gpu-1-ab12cd", "--json").json == {"peer_id": "gpu-1-ab12cd"}
    stub.replies["DELETE /cluster/hosts/x"] = error(404, "there is no host `x`")
    assert run("host", "revoke", "x").code == Exit.NOT_FOUND


def test_hosts_are_listed(run: Run, stub: Stub) -> None:
    known = {
        "peer_id": "gpu-1-ab12cd",
        "status": "online",
        "voter": True,
        "addresses": ["10.0.0.1", "gpu-1"],
        "enrolled_at": "2026-01-01T00:00:00Z",
        "certificate_expires_at": "2026-01-31T00:00:00Z",
        "revoked_at": None,
        "draining": False,
        "models": 1,
        "tasks": 2,
    }
    emptied = {**known, "peer_id": "gpu-3-ab12cd", "draining": True, "voter": False}
    revoked = {
        "peer_id": "gpu-2-ab12cd",
        "status": "revoked",
        "voter": None,
        "addresses": [],
        "enrolled_at": None,
        "certificate_expires_at": None,
        "revoked_at": "2026-01-02T00:00:00Z",
        "draining": False,
        "models": 0,
        "tasks": 0,
    }
    stub.replies["GET /cluster/hosts"] = (200, {"hosts": [known, revoked, emptied], "total": 3})
    lines = run("host", "list").out.splitlines()
    assert lines[0].split() == [
        "HOST", "STATUS", "MAY", "LEAD", "MODELS/TASKS", "ADDRESSES", "EXPIRES", "OR", "REVOKED",
    ]  # fmt: skip
    assert lines[1].split() == [
        "gpu-1-ab12cd", "online", "yes", "1/2", "10.0.0.1,", "gpu-1", "2026-01-31T00:00:00Z",
    ]  # fmt: skip
    assert lines[2].split() == ["gpu-2-ab12cd", "revoked", "-", "0/0", "-", "2026-01-02T00:00:00Z"]
    assert lines[3].split()[:4] == ["gpu-3-ab12cd", "draining", "no", "1/2"]
    assert run("host", "list", "--json").json["total"] == 3
    stub.replies["GET /cluster/hosts"] = (200, {"hosts": [], "total": 0})
    assert run("host", "list").out == "this host is in no cluster\n"


# ---------------------------------------------------------------- join


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, str]]:
    """The address of a host that lets hosts in, and a token for it."""
    folder.mkdir()
    files = ClusterFiles(folder)
    files.found("c1", "h1", (), time.time())
    authority = files.authority()
    assert authority is not None

    async def admit(command: Enrol) -> Enrolled:
        if command.token_id != ID:
            raise Unauthorized("this join token is not known here")
        now = time.time()
        grant = Grant(
            cluster="c1",
            peer_id=command.peer_id,
            serial="2",
            key_sha256=command.key_sha256,
            not_before=now - 60,
            not_after=now + CERTIFICATE_S,
            voter=True,
            addresses=command.addresses,
        )
        return Enrolled(
            cluster="c1",
            peer_id=command.peer_id,
            certificate=authority.sign(command.csr, grant),
            ca=files.ca_pem(),
            voter=True,
            seeds=("10.0.0.1:8001",),
            gossip_key="a2V5",
        )

    server = EnrolmentServer(files.ca_pem(), admit, SystemClock())
    network = TlsNetwork("127.0.0.1:0", files.credentials(), enrol=server.serve)
    ready = threading.Event()
    stop = trio.CancelScope()

    async def accept(_: Connection) -> None:
        raise AssertionError("nobody links")

    async def main() -> None:
        nonlocal trio_token
        trio_token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            with stop:
                await nursery.start(network.listen, accept)
                ready.set()
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    trio_token: trio.lowlevel.TrioToken | None = None
    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(10)
        with capture_logs():  # the listener's, which would stand between the command's output
            yield network.address, records.token_text(ID, SECRET, certificates.ca_sha256(files.ca_pem()))
    finally:
        assert trio_token is not None
        trio_token.run_sync_soon(stop.cancel)
        thread.join(10)


def test_a_host_joins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(tmp_path / "h1") as (address, token):
        assert run("join", address).code == Exit.USAGE
        wrong = run("join", address, "--token", token[:-64] + "0" * 64)
        assert wrong.code == Exit.UNAUTHORIZED
        assert "secret was not sent" in wrong.err
        unknown = run("join", address, "--token", token.replace(ID, "0" * 12))
        assert unknown.code == Exit.UNAUTHORIZED
        assert run("join", address, "--token", "nonsense").code == Exit.USAGE
        monkeypatch.setenv("BITINGLIP_TOKEN", token)
        ran = run("join", address, "--advertise", "gpu-2", "--json")
        assert ran.code == 0, ran.err
        files = ClusterFiles(tmp_path / "data")
        assert ran.json == {
            "cluster": "c1",
            "peer_id": identity.peer_id(tmp_path / "data"),
            "voter": True,
            "seeds": ["10.0.0.1:8001"],
        }
        assert files.credentials().addresses == ("gpu-2",)
        assert run("join", address).code == Exit.CONFLICT
        monkeypatch.delenv("BITINGLIP_TOKEN")
        (tmp_path / "join.token").write_text(f"{token}\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))  # as systemd does
        other = run("join", address, "--data-dir", str(tmp_path / "other"))
        assert (other.code, other.out.splitlines()[0]) == (0, "cluster   c1")
    assert run("join", address, "--data-dir", str(tmp_path / "third")).code == Exit.UNREACHABLE


def test_a_hosts_address_and_port() -> None:
    for text, host, port in (
        ("gpu-1", "gpu-1", PORT_DEFAULT),
        ("gpu-1:9", "gpu-1", 9),
        ("10.0.0.1", "10.0.0.1", PORT_DEFAULT),
        ("::1", "::1", PORT_DEFAULT),
        ("[::1]", "::1", PORT_DEFAULT),
        ("[::1]:9", "::1", 9),
    ):
        assert cluster_join.parse_host(text) == (host, port)
    for wrong in ("", "a:b", "a b", "http://x", "1:2:3"):
        with pytest.raises(CliError):
            cluster_join.parse_host(wrong)
