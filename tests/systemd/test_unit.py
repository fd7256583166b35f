"""The unit as systemd itself judges it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peer.cli import service_unit
from tests.tidy.source import ROOT

UNIT = ROOT / "systemd" / "bitinglip.service"
EXPOSURE_MAX = 2.0

needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


def rendered(folder: Path, user: str = "bitinglip", data_dir: Path = service_unit.STATE) -> Path:
    file = folder / UNIT.name
    file.write_text(service_unit.render(UNIT.read_text(), ["/bin/true", "up"], user=user, data_dir=data_dir))
    return file


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def exposure(unit: Path) -> float:
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])


@needs_analyze
def test_exposure(tmp_path: Path) -> None:
    assert exposure(UNIT) <= EXPOSURE_MAX
    assert exposure(rendered(tmp_path, "alice", Path("/srv/b"))) <= EXPOSURE_MAX


@needs_analyze
def test_the_measure_notices_a_directive_that_is_gone(tmp_path: Path) -> None:
    file = rendered(tmp_path)
    file.write_text(re.sub(r"(?m)^(CapabilityBoundingSet|SystemCallFilter)=.*\n", "", file.read_text()))
    assert exposure(file) > EXPOSURE_MAX


@needs_analyze
@pytest.mark.parametrize(
    ("user", "data_dir"), [("bitinglip", service_unit.STATE), ("root", Path("/srv/with space/100%"))]
)
def test_systemd_understands_every_line(tmp_path: Path, user: str, data_dir: Path) -> None:
    done = analyze("verify", "--man=no", str(rendered(tmp_path, user, data_dir)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_analyze
def test_what_is_left_open_is_what_the_documentation_says(tmp_path: Path) -> None:
    done = analyze("security", "--offline=true", "--no-pager", "--json=short", str(UNIT))
    open_ = {each["name"].partition("=")[0] for each in json.loads(done.stdout) if each["set"] is False}
    text = (ROOT / "docs" / "service.md").read_text()
    assert {name for name in open_ if f"`{name}" not in text} == set()


def test_the_stop_has_time_for_the_default_drain() -> None:
    from peer.adapters.processes.service_manager import STOP_MARGIN_S
    from peer.config import Config

    found = re.search(r"(?m)^TimeoutStopSec=(\d+)s$", UNIT.read_text())
    assert found
    assert int(found[1]) >= Config().drain_s + STOP_MARGIN_S


def test_a_template_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="ExecStart"):
        service_unit.render("[Service]\n", ["/x"], user="bitinglip", data_dir=service_unit.STATE)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/opt/b/bin/b", "/opt/b/bin/b"),
        ("a b", '"a b"'),
        ("100%", "100%%"),
        ("$HOME", "$$HOME"),
        ('"', '"\\""'),
    ],
)
def test_words_of_a_command_line(text: str, wanted: str) -> None:
    assert service_unit.quoted(text) == wanted


def test_what_the_service_cannot_see(tmp_path: Path) -> None:
    assert service_unit.hidden(Path("/usr/bin/env")) == ""
    assert "/home" in service_unit.hidden(Path("/home/a/b"))
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert service_unit.hidden(private / "x")
