"""`install-service`, below a folder in place of a host's root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peer import installed
from peer.cli import service, service_unit
from peer.config import Config, Store
from tests.cli.conftest import Run

UNIT = "etc/systemd/system/bitinglip.service"
WANTED = "etc/systemd/system/multi-user.target.wants/bitinglip.service"
needs_systemd = pytest.mark.skipif(
    not (shutil.which("systemctl") and shutil.which("systemd-sysusers")), reason="systemd is not installed"
)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    return root


def unit_of(host: Path) -> list[str]:
    return (host / UNIT).read_text().splitlines()


@needs_systemd
@pytest.mark.skipif(os.geteuid() != 0, reason="systemd-sysusers writes the accounts as root")
def test_install_twice_and_uninstall(run: Run, host: Path) -> None:
    ran = run("install-service", "--root", str(host))
    assert ran.code == 0, ran.err
    script = Path(sys.executable).with_name("bitinglip")
    assert f"ExecStart={script} up" in unit_of(host)
    assert (host / WANTED).is_symlink()
    assert (host / "etc/bitinglip/bitinglip.yaml").read_text() == installed.find(
        "configs", "bitinglip.yaml"
    ).read_text()
    groups = dict(line.split(":", 1) for line in (host / "etc/group").read_text().splitlines())
    assert groups["render"].endswith(":bitinglip")
    assert groups["video"].endswith(":bitinglip")
    assert "bitinglip:" in (host / "etc/passwd").read_text()
    assert f"wrote: {host / UNIT}" in ran.out

    (host / "etc/bitinglip/bitinglip.yaml").write_text("drain_s: 5\n")
    again = run("install-service", "--root", str(host))
    assert again.code == 0
    assert f"unchanged: {host / UNIT}" in again.out
    assert "wrote" not in again.out
    assert (host / "etc/bitinglip/bitinglip.yaml").read_text() == "drain_s: 5\n"

    gone = run("install-service", "--root", str(host), "--uninstall")
    assert gone.code == 0, gone.err
    assert not (host / UNIT).exists()
    assert not (host / WANTED).is_symlink()
    assert (host / "etc/bitinglip/bitinglip.yaml").exists()
    assert run("install-service", "--root", str(host), "--uninstall").out == "no service is installed\n"


@needs_systemd
@pytest.mark.skipif(os.geteuid() != 0, reason="systemd-sysusers writes the accounts as root")
def test_another_user_folder_and_configuration(run: Run, host: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("data_dir: /srv/b\nmodels:\n  directory: /srv/models\n")
    ran = run("install-service", "--root", str(host), "--user", "alice", "--config", str(file), "--no-enable")
    assert ran.code == 0, ran.err
    lines = unit_of(host)
    assert any(line.startswith("ExecStart=") and line.endswith(f" up --config {file}") for line in lines)
    assert "User=alice" in lines
    assert not any(line.startswith(("Group=", "StateDirectory=")) for line in lines)
    assert "Environment=BITINGLIP_DATA_DIR=/srv/b" in lines
    assert "ReadWritePaths=/srv/b /srv/models" in lines
    assert (host / "srv/b").stat().st_mode & 0o777 == 0o700
    assert (host / "srv/models").is_dir()
    assert not (host / WANTED).is_symlink()
    assert not (host / "etc/bitinglip").exists()
    assert "alice:" in (host / "etc/passwd").read_text()


def test_print_changes_nothing(run: Run, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    before = sorted(host.rglob("*"))
    ran = run("install-service", "--root", str(host), "--print", "--data-dir", "/srv/b")
    assert ran.code == 0
    assert ran.out.startswith("# The peer as a service.")
    assert "ReadWritePaths=/srv/b\n" in ran.out
    assert sorted(host.rglob("*")) == before


def test_refused_without_root(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(service, "RUNNING", Path("/"))
    ran = run("install-service")
    assert ran.code == 2
    assert "root is needed" in ran.err
    assert "sudo" in ran.err


def test_refused_without_systemd(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(service, "RUNNING", tmp_path / "none")
    for more in ((), ("--uninstall",)):
        ran = run("install-service", *more)
        assert ran.code == 1
        assert "systemd does not run on this host" in ran.err


def test_refused_where_the_service_could_not_see_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(service, "RUNNING", tmp_path)
    monkeypatch.setattr(service_unit, "own_command", lambda: ["/home/a/.venv/bin/bitinglip"])
    monkeypatch.setattr(service, "_install", lambda *_: pytest.fail("it must not be installed"))
    ran = run("install-service")
    assert ran.code == 2
    assert "/home/a/.venv/bin/bitinglip lies in /home" in ran.err
    assert "/opt/bitinglip" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--user", "a b"], "is not a user's name"),
        (["--user", "../x"], "is not a user's name"),
        (["--root", "/does/not/exist"], "there is no folder"),
    ],
)
def test_wrong_arguments(run: Run, arguments: list[str], words: str) -> None:
    ran = run("install-service", *arguments)
    assert ran.code == 2
    assert words in ran.err


def test_a_wrong_configuration_is_told_before_anything_is_written(run: Run, host: Path) -> None:
    (host / "etc/bitinglip").mkdir()
    (host / "etc/bitinglip/bitinglip.yaml").write_text("api:\n  bnid: x\n")
    ran = run("install-service", "--root", str(host))
    assert ran.code == 2
    assert "bitinglip.yaml:2: unknown key `api.bnid`" in ran.err
    assert not (host / UNIT).exists()


def test_other_services_on_the_peers_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    def enabled(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 0 if command[-2:] == ["is-enabled", "etcd.service"] else 1, "", ""
        )

    monkeypatch.setattr(service, "_run", enabled)
    here = service.Host(Path("/"))
    (warning,) = service.rivals(here, Config())
    assert warning.startswith("etcd.service has ports")
    assert "2380" in warning
    assert list(service.rivals(here, Config(store=Store(bind="0.0.0.0:12380")))) == []
    assert list(service.rivals(service.Host(Path("/srv")), Config())) == []
