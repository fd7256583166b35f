"""`bitinglip install-service`: the peer as a systemd service of this host, and its removal."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from peer import installed
from peer.cli import service_unit
from peer.cli.common import say
from peer.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from peer.config import Config

UNIT: Final = Path("etc/systemd/system/bitinglip.service")
SYSUSERS: Final = Path("etc/sysusers.d/bitinglip.conf")
CONFIG: Final = Path("etc/bitinglip/bitinglip.yaml")
RUNNING: Final = Path("/run/systemd/system")  # sd_booted(3)
PROGRAM_S_MAX: Final = 60.0
# Debian's packages start these; by default they have the ports that the peer gives to its own serf and etcd.
RIVALS: Final = {"serf": {7946, 7373}, "etcd": {2379, 2380}}


@dataclass(frozen=True, slots=True)
class Host:
    """The system that is changed: this one, or the tree below `root`."""

    root: Path

    @property
    def here(self) -> bool:
        return self.root == Path("/")

    def write(self, path: Path, content: str) -> bool:
        """Put the file in place at once, readable by all. False if it is so already."""
        target = self.root / path
        if target.is_file() and target.read_text() == content:
            print(f"unchanged: {target}")
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(content)
        temporary.chmod(0o644)
        temporary.replace(target)
        print(f"wrote: {target}")
        return True

    def remove(self, path: Path) -> bool:
        target = self.root / path
        if not target.exists():
            return False
        target.unlink()
        print(f"removed: {target}")
        return True

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of systemd's. Raises CliError with what it said."""
        where = [] if self.here else [f"--root={self.root}"]
        command = [program, *where, *arguments]
        print(f"run: {' '.join(command)}")
        done = _run(command)
        if done.returncode:
            raise CliError(
                f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}", Exit.FAILED
            )

    def asks(self, *question: str) -> bool:
        return self.here and _run(["systemctl", "--quiet", *question]).returncode == 0


@click.command("install-service")
@click.option(
    "--config", "config_file", metavar="FILE", help="The service's; else /etc/bitinglip/bitinglip.yaml."
)
@click.option("--data-dir", metavar="DIR", help="Else the configured one, else /var/lib/bitinglip.")
@click.option(
    "--user", metavar="NAME", default=service_unit.USER, show_default=True, help="Made if there is none."
)
@click.option("--print", "only_print", is_flag=True, help="Print the unit and change nothing.")
@click.option("--enable/--no-enable", default=True, help="Whether it starts with the host.")
@click.option("--uninstall", is_flag=True, help="Stop and remove the service; configuration and data stay.")
@click.option("--root", metavar="DIR", default="/", help="Write below DIR, as for an image of a system.")
def install_service(
    config_file: str | None,
    data_dir: str | None,
    user: str,
    only_print: bool,
    enable: bool,
    uninstall: bool,
    root: str,
) -> None:
    """Run the peer as a service: user, unit and a first configuration. May be repeated.

    It does not start the service. What was changed by `systemctl edit bitinglip` stays.
    """
    host = Host(Path(root).absolute())
    if uninstall:
        _require_systemd(host)
        _told(lambda: _uninstall(host))
        return
    if not service_unit.is_user_name(user):
        raise CliError(f"--user: `{user}` is not a user's name", Exit.USAGE)
    command = [*service_unit.own_command(), "up"]
    if config_file is not None:
        command += ["--config", str(Path(config_file).absolute())]
    config = _config(host, config_file)
    chosen = Path(data_dir).absolute() if data_dir else Path(config.data_dir)
    writable = [Path(folder) for folder in (config.models.directory,) if folder]
    writable = [folder for folder in writable if not folder.is_relative_to(chosen)]
    try:
        unit = service_unit.render(
            _packaged("systemd", "bitinglip.service"), command, user=user, data_dir=chosen, writable=writable
        )
        users = service_unit.render_user(
            _packaged("systemd", "bitinglip.sysusers"), user=user, data_dir=chosen
        )
    except ValueError as error:
        raise CliError(str(error), Exit.FAILED) from None
    if only_print:
        print(unit, end="")
        return
    _require_systemd(host)
    if host.here:
        _require_visible(
            [command[0], sys.executable], [config_file] if config_file else [], [chosen, *writable]
        )
    _told(lambda: _install(host, unit, users, config_file is None, user, [chosen, *writable], enable))
    for warning in rivals(host, config):
        say(f"warning: {warning}")
    say("start it: systemctl start bitinglip     (after a change: systemctl restart bitinglip)")
    say("its log:  journalctl -u bitinglip -f")


def _install(
    host: Host, unit: str, users: str, first_config: bool, user: str, folders: list[Path], enable: bool
) -> None:
    host.write(SYSUSERS, users)
    host.run("systemd-sysusers", SYSUSERS.name)
    if first_config and not (host.root / CONFIG).exists():
        host.write(CONFIG, _packaged("configs", "bitinglip.yaml"))
    for folder in folders:
        _make_folder(host, folder, user)
    changed = host.write(UNIT, unit)
    if changed and host.here:
        host.run("systemctl", "daemon-reload")
    if enable:
        host.run("systemctl", "enable", UNIT.name)


def _uninstall(host: Host) -> None:
    if not (host.root / UNIT).exists():
        print("no service is installed")
        return
    host.run("systemctl", "disable", *(("--now",) if host.here else ()), UNIT.name)
    host.remove(UNIT)
    host.remove(SYSUSERS)
    if host.here:
        host.run("systemctl", "daemon-reload")
    say("kept: the user, the configuration and the data directory")


def _make_folder(host: Host, folder: Path, user: str) -> None:
    """Before the first start, for `init` and `join` as that user; one that is there stays as it is."""
    target = host.root / folder.relative_to("/")
    if target.is_dir():
        return
    target.mkdir(parents=True)
    target.chmod(0o700)
    print(f"made: {target}")
    if host.here:
        shutil.chown(target, user, pwd.getpwnam(user).pw_gid)


def _config(host: Host, named: str | None) -> Config:
    """The settings that the service will have: of the file alone, not of this user's environment. Raises CliError."""
    from peer import settings
    from peer.errors import ConfigError

    system = host.root / CONFIG
    file = Path(named) if named is not None else system if system.is_file() else None
    try:
        return settings.load(file=file, environ={"XDG_STATE_HOME": str(service_unit.STATE.parent)})
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def _packaged(folder: str, name: str) -> str:
    """A file that comes with bitinglip. Raises CliError."""
    path = installed.find(folder, name)
    try:
        return path.read_text()
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}; is bitinglip installed completely?", Exit.FAILED) from None


def _require_systemd(host: Host) -> None:
    """Raises CliError unless services can be installed: systemd runs, by root; below --root it need not."""
    if not host.here:
        if not host.root.is_dir():
            raise CliError(f"--root: there is no folder {host.root}", Exit.USAGE)
        return
    if not RUNNING.is_dir():
        raise CliError(
            "systemd does not run on this host",
            Exit.FAILED,
            "`bitinglip up` serves without it; --root DIR writes the files for another system",
        )
    if os.geteuid() != 0:
        again = " ".join(service_unit.own_command())
        raise CliError(
            "root is needed", Exit.USAGE, f"sudo {again} install-service ...; --print only shows the unit"
        )


def _require_visible(programs: list[str], files: list[str], folders: list[Path]) -> None:
    """Raises CliError if the service, sandboxed and another user, could not see what it needs."""
    for program in dict.fromkeys((*programs, str(installed.PACKAGE))):
        if why := service_unit.hidden(Path(program)):
            raise CliError(
                f"bitinglip is installed where a service cannot use it: {why}",
                Exit.USAGE,
                "install it for all: python3 -m venv /opt/bitinglip && /opt/bitinglip/bin/pip install bitinglip",
            )
    for path in (*map(Path, files), *folders):
        if why := service_unit.hidden(path):
            raise CliError(f"{why}; choose another place", Exit.USAGE)


def rivals(host: Host, config: Config) -> Iterator[str]:
    """Services of Debian's packages that have ports of this peer."""
    ours = {
        "serf": {_port(config.gossip.bind), _port(config.gossip.rpc)},
        "etcd": {_port(config.store.bind)},
    }
    for name, ports in RIVALS.items():
        taken = sorted(ports & ours[name])
        if taken and (
            host.asks("is-enabled", f"{name}.service") or host.asks("is-active", f"{name}.service")
        ):
            yield (
                f"{name}.service has ports that this peer gives to its own {name} in a cluster "
                f"({', '.join(map(str, taken))}): `systemctl disable --now {name}`, or configure other ports"
            )


def _port(bind: str) -> int:
    """The port of HOST:PORT."""
    return int(bind.rpartition(":")[2])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Raises CliError if it is missing or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S_MAX, check=False)
    except FileNotFoundError:
        raise CliError(f"{command[0]} is missing", Exit.FAILED, "it comes with systemd") from None
    except subprocess.TimeoutExpired:
        raise CliError(f"`{' '.join(command)}` took longer than {PROGRAM_S_MAX:g} s", Exit.FAILED) from None


def _told(work: Callable[[], None]) -> None:
    """Files that cannot be written, in words. Raises CliError."""
    try:
        work()
    except OSError as error:
        raise CliError(f"{error.filename}: {error.strerror}", Exit.FAILED) from None
