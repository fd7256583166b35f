"""What needs no running peer: `up`'s complaints, `config check`, `doctor`, key arguments."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peer.cli import up
from peer.cli.doctor import examine
from peer.cli.doctor_gpu import gfx_name, gpu_findings
from peer.cli.exits import CliError
from peer.cli.keys import parse_expiry, parse_rate
from peer.config import Config
from peer.errors import Conflict
from tests.cli.conftest import Run


def test_up_refuses_a_bad_configuration(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text("api:\n  bnid: x\n")
    ran = run("up", "--config", str(file))
    assert ran.code == 2
    assert ran.err == f"bitinglip: {file}:2: unknown key `api.bnid`; did you mean `api.bind`?\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EADDRINUSE, "in use"), 6, "--api HOST:PORT"),
        (OSError(errno.EADDRNOTAVAIL, "not here"), 2, "not an address of this host"),
        (PermissionError(errno.EACCES, "denied", "/d/lock"), 2, "--data-dir"),
        (PermissionError(errno.EACCES, "denied"), 2, "below 1024"),
        (OSError(errno.ENOSPC, "full", "/d"), 1, "make room"),
        (Conflict("another peer has it"), 6, "another peer has it"),
    ],
)
def test_failures_of_the_start_say_what_to_do(error: Exception, code: int, words: str) -> None:
    found = up.explain(error, Config())
    assert found.code == code
    assert words in f"{found.message} {found.hint}"


def test_a_port_in_use_says_what_to_do(run: Run, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "peer", "up", "--data-dir", str(tmp_path / "d"), "--api", bind]
        done = subprocess.run([*command, "--device", "fake"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 6
    assert f"{bind} is in use by another program" in done.stderr
    assert "--api HOST:PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_without_a_peer(run: Run, tmp_path: Path) -> None:
    """Made, listed and revoked in the store itself, also before the peer's first start."""
    where = ("--data-dir", str(tmp_path / "new"), "--json")
    made = run("key", "create", "--owner", "ci", "--scope", "submit", "--rate-limit", "none", *where).json
    assert made["key"].startswith(f"blk_{made['key_id']}_")
    assert made["requests_per_hour"] is None
    assert [item["owner"] for item in run("key", "list", *where).json["keys"]] == ["ci"]
    assert run("key", "revoke", made["key_id"], *where).json["revoked_at"] is not None
    assert run("key", "revoke", "nobody", *where).code == 5
    secret = made["key"].split("_", 2)[2]
    stored = [path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in stored)


def test_config_check(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "b.yaml"
    file.write_text("engine:\n  slots: 3\n")
    assert run("config", "check", str(file)).out == f"{file}: ok\n"
    assert run("config", "check", str(file), "--json").json["settings"]["engine"]["slots"] == 3
    file.write_text("engine:\n  slotz: 3\n  slots: 0\n")
    ran = run("config", "check", str(file))
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 2
    assert len(run("config", "check", str(file), "--json").json["mistakes"]) == 2


def test_doctor_in_json(run: Run, tmp_path: Path) -> None:
    ran = run(
        "doctor", "--device", "CPU", "--data-dir", str(tmp_path / "d"), "--api", "127.0.0.1:0", "--json"
    )
    checks = {check["name"]: check for check in ran.json["checks"]}
    assert checks["Python"]["status"] == "ok"
    assert checks["llvmlite"]["status"] == "ok"
    assert checks["GPU"]["message"] == "not needed for CPU"
    assert ran.code == (0 if ran.json["ok"] else 1)
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")


def test_doctor_for_people(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir(mode=0o755)
    ran = run("doctor", "--device", "CPU", "--data-dir", str(directory), "--api", "127.0.0.1:0")
    assert f"`chmod 700 {directory}`" in ran.out


def test_doctor_sees_a_port_in_use(tmp_path: Path) -> None:
    import socket

    import msgspec

    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        config = Config(data_dir=str(tmp_path), api=msgspec.structs.replace(Config().api, bind=bind))
        (found,) = [each for each in examine(config, tmp_path) if each.name == "port"]
    assert found.status == "fail"


def _gpu_host(root: Path, versions: tuple[int, ...]) -> None:
    (root / "sys/module/amdgpu").mkdir(parents=True)
    (root / "dev/dri").mkdir(parents=True)
    (root / "dev/kfd").touch()
    for number, version in enumerate((0, *versions)):
        node = root / f"sys/class/kfd/kfd/topology/nodes/{number}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\n")
    for number in range(len(versions)):
        (root / f"dev/dri/renderD{128 + number}").touch()


def test_doctor_knows_supported_cards(tmp_path: Path) -> None:
    _gpu_host(tmp_path, (110000, 90402, 100300))
    found = {each.name: each for each in gpu_findings(tmp_path)}
    assert found["GPU 0"].status == found["GPU 1"].status == "ok"
    assert found["GPU 2"].status == "fail"
    assert "gfx1030 is not supported" in found["GPU 2"].message
    assert found["/dev/kfd"].status == "ok"
    assert "2 render" not in found["/dev/dri"].message


def test_doctor_without_any_card(tmp_path: Path) -> None:
    assert {each.status for each in gpu_findings(tmp_path)} == {"fail"}


@pytest.mark.parametrize(
    ("version", "name"), [(110000, "gfx1100"), (90402, "gfx942"), (120001, "gfx1201"), (90010, "gfx90a")]
)
def test_names_of_architectures(version: int, name: str) -> None:
    assert gfx_name(version) == name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", (None, None)),
        ("1000/hour", (1000, 100)),
        ("60/hour", (60, 60)),
        ("36000/h", (36000, 3600)),
    ],
)
def test_rates(text: str, wanted: tuple[int | None, int | None]) -> None:
    assert parse_rate(text) == wanted


@pytest.mark.parametrize("text", ["", "0/hour", "5", "5/minute", "-5/hour", "None"])
def test_wrong_rates(text: str) -> None:
    with pytest.raises(CliError, match="--rate-limit"):
        parse_rate(text)


def test_expiry() -> None:
    now = 1_700_000_000.0
    assert parse_expiry("30d", now) == now + 30 * 86_400
    assert parse_expiry("2027-01-31", now) == 1_801_353_600
    assert parse_expiry("2027-01-31T02:00:00+02:00", now) == 1_801_353_600
    for wrong in ("2001-01-01", "soon", "0s", "9999-01-01"):
        with pytest.raises(CliError, match="--expires"):
            parse_expiry(wrong, now)


def test_keys_of_a_peer_that_never_was(run: Run) -> None:
    ran = run("key", "list")
    assert ran.code == 5
    assert "--data-dir" in ran.err


def test_up_loads_little() -> None:
    """The command itself must not cost the peer memory and time: no HTTP client, no tables."""
    script = (
        "import sys, peer.cli, peer.cli.up, peer.settings; "
        "print([name for name in ('rich', 'httpx', 'websockets', 'yaml', 'api', 'numpy') if name in sys.modules])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name.startswith("PY") or name == "PATH"
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"
