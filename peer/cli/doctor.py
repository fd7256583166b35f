"""`bitinglip doctor`: whether this host has what a peer needs, and what to do where it has not."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peer.cli.common import emit_object, json_option, printable
from peer.cli.exits import CliError, Exit
from peer.cli.findings import Finding, fail, ok, warn

if TYPE_CHECKING:
    from peer.config import Config

PYTHON_MIN = (3, 11)
DISK_FAIL_BYTES = 1_000_000_000
DISK_WARN_BYTES = 20_000_000_000
FILES_MIN = 4_096
YEAR_MIN = 2025
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)")
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--config", "config_file", metavar="FILE", help="YAML file; else $BITINGLIP_CONFIG.")
@click.option("--data-dir", metavar="DIR")
@click.option("--api", metavar="HOST:PORT")
@click.option("--device", "devices", multiple=True, metavar="DEVICE", help="As for `bitinglip up`.")
@json_option
def doctor(
    config_file: str | None, data_dir: str | None, api: str | None, devices: tuple[str, ...], as_json: bool
) -> int:
    """Check this host for what a peer needs, as `bitinglip up` with the same options would."""
    from peer import settings
    from peer.errors import ConfigError

    flags = {"data_dir": data_dir, "api.bind": api, "engine.devices": devices}
    try:
        config = settings.load(flags=flags, file=settings.find_file(config_file, os.environ))
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None
    findings = list(examine(config))
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        emit_object({"ok": not failed, "checks": [finding._asdict() for finding in findings]})
    else:
        show(findings)
    return Exit.FAILED if failed else Exit.OK


def examine(config: Config, root: Path = Path("/")) -> Iterator[Finding]:
    """Every check, in the order in which a newcomer would mend things."""
    yield python()
    yield packages(CONSTRAINTS)
    yield compiler()
    data_dir = Path(config.data_dir)
    yield data_directory(data_dir)
    yield disk(data_dir)
    yield catalogue(config.models.catalogue)
    yield port(config)
    yield open_files()
    yield clock()
    if any(device == "auto" or device.startswith("AMD") for device in config.engine.devices):
        from peer.cli.doctor_gpu import gpu_findings, libraries

        yield from gpu_findings(root)
        yield libraries()
    else:
        yield ok("GPU", f"not needed for {', '.join(config.engine.devices)}")


def show(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = click.style(MARKS[finding.status], fg=COLOURS[finding.status])
        click.echo(f"{mark}  {finding.name:<{width}}  {printable(finding.message)}")
        if finding.advice:
            click.echo(f"{'':<{width + 8}}{printable(finding.advice)}")


def python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < PYTHON_MIN:
        return fail("Python", version, "install Python 3.11 or newer")
    return ok("Python", f"{version} on {platform.machine()}")


def packages(constraints: Path) -> Finding:
    """Whether what is installed is what was tested."""
    name = "packages"
    try:
        pinned = {
            match[1]: match[2]
            for line in constraints.read_text().splitlines()
            if (match := REQUIREMENT.match(line))
        }
    except OSError:
        return warn(name, "constraints.txt is not here to compare with", "nothing to do")
    required = _required()
    missing = [each for each in required if _version(each) is None]
    if missing:
        return fail(
            name, f"missing: {', '.join(missing)}", "install with `pip install -c constraints.txt -e .`"
        )
    names = {_normal(pin): (pin, version) for pin, version in pinned.items()}
    other = [
        f"{pin} {_version(pin)} (tested: {version})"
        for key, (pin, version) in names.items()
        if key in {_normal(each) for each in required} and _version(pin) != version
    ]
    if other:
        return warn(
            name, "; ".join(other), "install the tested versions: `pip install -c constraints.txt -e .`"
        )
    return ok(name, f"{len(required)} packages as tested")


def _required() -> list[str]:
    """The distribution's own requirements, without those of its extras."""
    lines = metadata.requires("bitinglip") or []
    return [re.split(r"[\s;<>=!~\[(]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> Finding:
    """The engine compiles its kernels with llvmlite's LLVM."""
    name = "llvmlite"
    try:
        import llvmlite.binding as llvm

        targets = {"x86_64": "x86_64-none-unknown-elf", "AMDGPU": "amdgcn-amd-amdhsa"}
        llvm.initialize_all_targets()
        for triple in targets.values():
            llvm.Target.from_triple(triple)
    except (ImportError, OSError, RuntimeError) as error:
        return fail(
            name, f"cannot compile: {error}", "install it anew: `pip install -c constraints.txt llvmlite`"
        )
    version = ".".join(str(part) for part in llvm.llvm_version_info)
    return ok(name, f"LLVM {version} for {' and '.join(targets)}")


def data_directory(directory: Path) -> Finding:
    name = "data directory"
    if not directory.exists():
        above = next(parent for parent in directory.parents if parent.exists())
        if os.access(above, os.W_OK | os.X_OK):
            return ok(name, f"{directory} will be made")
        return fail(
            name, f"{directory} cannot be made: {above} is not writable", "choose another with --data-dir DIR"
        )
    if not directory.is_dir():
        return fail(name, f"{directory} is not a folder", "choose another with --data-dir DIR")
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return fail(
            name, f"{directory} is not yours", f"`sudo chown -R $USER {directory}`, or --data-dir DIR"
        )
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o077:
        return warn(name, f"{directory} is open to others ({mode:04o})", f"`chmod 700 {directory}`")
    return ok(name, str(directory))


def disk(directory: Path) -> Finding:
    name = "disk"
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    message = f"{free / 1e9:.0f} GB free at {existing}"
    if free < DISK_FAIL_BYTES:
        return fail(name, message, "make room: tasks could no longer be recorded")
    if free < DISK_WARN_BYTES:
        return warn(name, message, "a 7B model alone takes 4 to 14 GB")
    return ok(name, message)


def catalogue(configured: str) -> Finding:
    name = "catalogue"
    from peer.adapters.models.catalogue import read_catalogue
    from peer.errors import ConfigError

    try:
        models = read_catalogue(configured)
    except ConfigError as error:
        return fail(name, str(error).splitlines()[0], "mend it, or name another in `models.catalogue`")
    where = configured or "the installed catalogue"
    if not models:
        return warn(name, f"{where} names no model", "add models to it")
    return ok(name, f"{len(models)} models in {where}")


def port(config: Config) -> Finding:
    """Whether the API's port is free, or taken by a running peer of this data directory."""
    from peer import settings

    bind = config.api.bind
    host, number = settings.split_bind(bind)
    if number == 0:
        return ok("port", "any free one")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if _served_by_us(config):
            return ok("port", f"{bind} is served by the peer of {config.data_dir}")
        return fail("port", f"{bind}: {error.strerror}", "choose another with --api HOST:PORT")
    return ok("port", f"{bind} is free")


def _served_by_us(config: Config) -> bool:
    import fcntl

    try:
        with open(Path(config.data_dir) / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = "open files"
    if soft != resource.RLIM_INFINITY and soft < FILES_MIN:
        return warn(
            name,
            f"at most {soft}",
            f"raise it: `ulimit -n {FILES_MIN}` (systemd: LimitNOFILE), possible: {hard}",
        )
    return ok(name, f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")


def clock() -> Finding:
    """A clock that is plainly wrong makes keys and certificates look expired or not yet valid."""
    now = time.gmtime()
    shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    if now.tm_year < YEAR_MIN:
        return fail("clock", f"says {shown}", "set it: `sudo timedatectl set-ntp true`")
    return ok("clock", shown)
