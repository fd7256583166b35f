"""systemd as process 1 of namespaces of its own, over a copy of this system that is thrown away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from peer.cli import service_unit
from tests.tidy.source import ROOT

BOOT_S_MAX: Final = 90.0
SYSTEMD: Final = Path("/lib/systemd/systemd")
PYTHON: Final = Path("/usr/bin/python3")  # the service does not see one in somebody's home

# $1: a folder of this machine, which becomes /mnt. Nothing here reaches beyond the namespaces but that folder.
_BOOT: Final = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$1/tree"
cd "$1/tree"; mkdir upper work root
mount -t overlay overlay -o "lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work" root
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount --rbind /dev dev
mount --bind "$1" mnt
mount -t tmpfs tmpfs tmp
mkdir -p "run/source" "run/systemd/system" old
mount --bind "$2" run/source
cp mnt/units/* run/systemd/system/
pivot_root . old
umount -l /old
mount --make-rshared /
ip link set lo up
export container=test
exec /lib/systemd/systemd --system --unit=probe.target --show-status=no --log-level=warning --log-target=console
"""
_TARGET: Final = """[Unit]
DefaultDependencies=no
Wants=systemd-journald.service probe.service
"""
_PROBE: Final = """[Unit]
DefaultDependencies=no
After=systemd-journald.service
[Service]
Type=oneshot
ExecStart=/bin/bash /mnt/probe.sh
StandardOutput=file:/mnt/output
StandardError=file:/mnt/output
ExecStopPost=/bin/touch /mnt/done
TimeoutStartSec=80
"""


def missing() -> str:
    """Why it cannot be done on this machine, "" if it can."""
    if os.geteuid() != 0:
        return "only root may make these namespaces"
    for program in ("unshare", "ip", "journalctl"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not SYSTEMD.exists() or not PYTHON.exists():
        return "systemd or the system's Python is not installed"
    asked = subprocess.run(
        [PYTHON, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    if asked.stdout.strip() != "%d.%d" % sys.version_info[:2]:  # noqa: UP031
        return "the system's Python is another version than the tests'"
    if _cgroups() is None or "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no cgroup2 mounted, or no overlay file system"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--cgroup", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True, timeout=20, check=False,
    )  # fmt: skip
    return "" if tried.returncode == 0 else "this machine does not let root make namespaces and mounts"


def run(folder: Path, script: str) -> str:
    """Boot, run the script as root in there, and give back what it printed."""
    (folder / "tree").mkdir()
    (folder / "units").mkdir()
    (folder / "units" / "probe.target").write_text(_TARGET)
    (folder / "units" / "probe.service").write_text(_PROBE)
    (folder / "probe.sh").write_text(script)
    with _cgroup() as group, (folder / "console").open("wb") as console:
        namespaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net"]
        process = subprocess.Popen(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", "unshare", *namespaces, "--fork",
             "--kill-child", "bash", "-c", _BOOT, "boot", str(folder), str(ROOT)],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + BOOT_S_MAX
            while not (folder / "done").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            process.kill()  # its process 1 dies with it, and everything there with that
            process.wait(20)
    output = folder / "output"
    printed = output.read_text(errors="replace") if output.exists() else ""
    assert (folder / "done").exists(), printed + (folder / "console").read_text(errors="replace")[-4000:]
    return printed


def _cgroups() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    return None


@contextmanager
def _cgroup() -> Iterator[Path]:
    base = _cgroups()
    assert base is not None
    group = base / f"bitinglip-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """A cgroup is gone when its last process is."""
    for _ in range(100):
        for each in sorted(group.rglob("*/"), reverse=True):
            with suppress(OSError):
                each.rmdir()
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)
    raise AssertionError(f"{group} still has processes")


def site_packages() -> str:
    import structlog

    return str(Path(structlog.__file__).parents[1])


def unseen() -> str:
    """Why the service's user could not read this checkout or its packages, "" if it can."""
    return service_unit.hidden(ROOT / "peer") or service_unit.hidden(Path(site_packages()))
