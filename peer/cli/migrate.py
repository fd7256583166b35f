"""`bitinglip migrate`: a single node's store becomes a cluster's. `bitinglip takeover`: a host goes on alone."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import msgspec
import trio

from peer.cli.common import emit_object, json_option, say, shown
from peer.cli.exits import CliError, Exit, guarded
from peer.config import Config
from peer.errors import ConfigError, Conflict, NotFound
from peer.settings import split_bind

if TYPE_CHECKING:
    from peer.adapters.stores.etcd_voting import EtcdVoting
    from peer.adapters.stores.migration import MakeVoting, Marker
    from peer.adapters.stores.store_copy import Progress
    from peer.adapters.stores.takeover import Lost

    Work = Callable[[Path, MakeVoting, Progress], Awaitable[Marker | None]]

PROGRESS_S = 1.0
T = TypeVar("T")

config_option = click.option(
    "--config", "config_file", metavar="FILE", help="YAML file; else $BITINGLIP_CONFIG."
)
data_dir_option = click.option(
    "--data-dir", metavar="DIR", help="The peer's folder; else $BITINGLIP_DATA_DIR, else the configured one."
)


@click.command()
@click.option("--back", "direction", flag_value="back", help="Make this host a single node again.")
@click.option(
    "--confirm", "direction", flag_value="confirm", help="Remove the old store: no way back from then on."
)
@config_option
@data_dir_option
@json_option
def migrate(direction: str | None, config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Take this single node's records into the store of the cluster that `bitinglip init --cluster` made here.

    The peer must be stopped. Every record is compared afterwards, and the old store is kept until --confirm. May be
    interrupted at any moment and run again.
    """
    from peer.adapters.stores import migration

    config = _config(config_file, data_dir)
    directory = Path(config.data_dir)
    if direction == "confirm":
        marker = guarded(directory, lambda: migration.confirm(directory))
        _tell(marker, "confirmed", f"the cluster's store counts; {migration.KEPT} is removed", as_json)
        return
    work: Work = migration.back if direction == "back" else migration.migrate
    done = guarded(directory, lambda: _run(config, work))
    if direction is None:
        _tell(done, "migrated", f"the old store is kept as {migration.KEPT}", as_json)
        say("start the peer: bitinglip up; when all is well: bitinglip migrate --confirm")
        say("to take it back: bitinglip migrate --back")
    else:
        _tell(done, "single", "this host is a single node again", as_json)
        say("start it: bitinglip up")


@click.command()
@click.option("--yes", is_flag=True, help="Do it.")
@click.option("--force", is_flag=True, help="Also if a lost host takes connections.")
@config_option
@data_dir_option
@json_option
def takeover(yes: bool, force: bool, config_file: str | None, data_dir: str | None, as_json: bool) -> None:
    """Go on alone with what this host has, when the voters of its cluster are lost for ever.

    For two hosts: one votes, the other learns from it. The peer must be stopped. May be interrupted and run again.
    """
    from peer.adapters.stores import migration
    from peer.adapters.stores import takeover as taking

    config = _config(config_file, data_dir)
    directory = Path(config.data_dir)

    def look() -> tuple[taking.Lost, ...]:
        if migration.read_marker(directory, migration.TAKEOVER) is not None:
            return ()  # it was asked and begun before
        return taking.lost_members(directory)

    lost = guarded(directory, look)
    if lost:
        _ask(lost, yes)
        ports = {split_bind(bind)[1] for bind in (config.link.bind, config.store.bind)}
        answering = guarded(directory, lambda: trio.run(taking.reachable, lost, sorted(ports)))
        if answering and not force:
            raise CliError(
                f"{', '.join(answering)} takes connections: that host is not lost",
                Exit.CONFLICT,
                "switch it off for good first; --force if something else answers there",
            )
    done = guarded(directory, lambda: _run(config, taking.take_over))
    _tell(done, "alone", "this host is the only voter of its cluster", as_json)
    say("start it: bitinglip up; a lost host must not come back with its old data directory")


def _ask(lost: tuple[Lost, ...], yes: bool) -> None:
    names = ", ".join(shown(each.name) for each in lost)
    say(f"lost, and never to come back: {names}")
    say(
        "this host's records become the cluster's. What the lost hosts acknowledged and had not sent here yet is gone:"
    )
    say("usually the last fraction of a second before the loss, but how much it was cannot be known here.")
    say("If one of them is alive, both would lead from now on and answer clients differently (split brain).")
    if not yes:
        raise CliError(
            "nothing was changed",
            Exit.USAGE,
            f"if {names} will never come back, say so: bitinglip takeover --yes",
        )


# ------------------------------------------------------------------------------------------------ running


def _config(config_file: str | None, data_dir: str | None) -> Config:
    from peer import settings

    try:
        return settings.load(flags={"data_dir": data_dir}, file=settings.find_file(config_file, os.environ))
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def _run(config: Config, work: Work) -> Marker | None:
    """Carry it out alone on the folder. Raises what it raises, and Conflict while a peer runs there."""
    from peer import identity, logs

    logs.setup("error", config.log.format)
    directory = Path(config.data_dir)
    if not directory.is_dir():
        raise NotFound(f"there is no peer's data in {directory}")
    with identity.exclusive(directory):
        return trio.run(work, directory, _make_voting(config, directory), _Told())


def _make_voting(config: Config, directory: Path) -> MakeVoting:
    """This host's member of the store, as `bitinglip up` runs it, in the folder given."""

    def make(folder: Path) -> EtcdVoting:
        from peer import cluster_host
        from peer.adapters.links.cluster_files import ClusterFiles
        from peer.adapters.stores.etcd_voting import EtcdVoting

        files = ClusterFiles(directory)
        belonging = files.belonging()
        assert belonging is not None
        addresses = cluster_host.Addresses(config, files.credentials().addresses)
        begun = msgspec.structs.replace(belonging, founder=False)  # whether it is, is settled here
        voting = cluster_host.voting_of(config, folder.parent, files, begun, addresses)
        if not isinstance(voting, EtcdVoting):
            raise Conflict("store.member is set: the store is run by others, and their tools copy it")
        if not voting.address:
            raise Conflict(f"{belonging.peer_id} is not to have a member of the store (cluster.voters)")
        return voting

    return make


class _Told:
    """Progress on stderr: each kind of step when it begins, and once a second."""

    def __init__(self) -> None:
        self._what = ""
        self._at = 0.0

    def __call__(self, what: str, records: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._at >= PROGRESS_S:
            self._what, self._at = what, now
            say(f"{what}: {records} records")


def _tell(done: Marker | None, state: str, text: str, as_json: bool) -> None:
    if as_json:
        figures = {"records": done.records, "bytes": done.nbytes, "sha256": done.digest} if done else {}
        emit_object({"state": state, **figures})
        return
    if done is not None:
        print(f"{done.records} records, {done.nbytes} bytes, compared one by one; SHA-256 {done.digest}")
    print(text)
