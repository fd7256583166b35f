"""`bitinglip engine-cache`: take the kernels that this host's engines have compiled to hosts with equal devices."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import emit_object, json_option, say, table
from peer.cli.exits import CliError, Exit, guarded
from peer.errors import BadRequest, ConfigError, Unauthorized

if TYPE_CHECKING:
    from peer.adapters.devices.engine_cache import MadeFor
    from peer.config import Config


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--data-dir", metavar="DIR", help="The peer's folder; else $BITINGLIP_DATA_DIR."),
        click.option("--config", "config_file", metavar="FILE", help="YAML file; else $BITINGLIP_CONFIG."),
        click.option(
            "--device", "devices", multiple=True, metavar="D", help="As `up`; else the configured ones."
        ),
    ):
        command = option(command)
    return command


@click.group()
def engine_cache() -> None:
    """Take compiled kernels to another host, whose models then load without compiling."""


@engine_cache.command()
@click.argument("file", type=click.Path(path_type=Path))
@options
@json_option
def export(
    file: Path, devices: tuple[str, ...], config_file: str | None, data_dir: str | None, as_json: bool
) -> None:
    """Write this host's kernels to FILE, signed: in a cluster with this host's certificate, else with a key of yours.

    The peer may run. Devices must be of one kind: name one with --device where they are not.
    """
    from peer.adapters.devices import engine_cache as cache

    config = _config(config_file, data_dir, devices)
    directory = Path(config.data_dir)

    def work() -> tuple[int, str]:
        kinds = _kinds(config)
        if len(kinds) > 1:
            raise BadRequest("the devices here are of several kinds: name one with --device")
        made_for, labels = kinds[0]
        return cache.export(directory, labels, made_for, file.absolute(), time.time())

    kernels, signer = guarded(directory, work)
    if as_json:
        emit_object({"kernels": kernels, "bytes": file.stat().st_size, "signer": signer})
        return
    print(f"{kernels} kernels, {file.stat().st_size} bytes, signed by {signer}")
    if signer.startswith("ed25519:"):
        say(f"on the other host: bitinglip engine-cache import {file.name} --trust {signer}")


@engine_cache.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--trust", "trusted", multiple=True, metavar="KEY", help="A key that `export` printed elsewhere."
)
@options
@json_option
def import_(
    file: Path,
    trusted: tuple[str, ...],
    devices: tuple[str, ...],
    config_file: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Take the kernels in FILE into the caches of this host's devices; what is there already stays as it is.

    Only what a host of this host's cluster has signed, or a key named with --trust: a cache runs as the peer. The peer
    may run; its engines find the kernels at their next load.
    """
    from peer.adapters.devices import engine_cache as cache

    config = _config(config_file, data_dir, devices)
    directory = Path(config.data_dir)

    def work() -> tuple[str, int, list[tuple[str, int]]]:
        for key in trusted:
            cache.parse_public(key)
        signer, manifest, rows = cache.read(file, directory, trusted, time.time())
        _check_not_revoked(signer, directory)
        added = []
        for made_for, labels in _fitting(_kinds(config), lambda kind: cache.check_made_for(manifest, kind)):
            for label in labels:
                count = cache.merge(rows, made_for, directory / cache.CACHE_FOLDER / label)
                added.append((label, count))
        return signer, len(rows), added

    signer, kernels, added = guarded(directory, work)
    if as_json:
        emit_object({"kernels": kernels, "signer": signer, "added": dict(added)})
        return
    print(f"{kernels} kernels signed by {signer}")
    table(("DEVICE", ">NEW", ">KNOWN"), ((label, new, kernels - new) for label, new in added), empty="")


def _config(config_file: str | None, data_dir: str | None, devices: Iterable[str]) -> Config:
    from peer import settings

    flags = {"data_dir": data_dir, "engine.devices": list(devices) or None}
    try:
        return settings.load(flags=flags, file=settings.find_file(config_file, os.environ))
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None


def _kinds(config: Config) -> list[tuple[MadeFor, list[str]]]:
    """The devices' labels by what their kernels depend on. Raises ConfigError."""
    from peer.adapters.devices.devices import find_devices
    from peer.adapters.devices.engine_cache import made_for

    kinds: dict[str, tuple[MadeFor, list[str]]] = {}
    for device in find_devices(config.engine.devices):
        if device.stand_in or device.problem:
            continue
        found = made_for(device.device)
        kinds.setdefault(found.digest, (found, []))[1].append(device.label)
    if not kinds:
        raise ConfigError("none of the devices here compiles kernels: name one with --device")
    return list(kinds.values())


def _fitting(
    kinds: list[tuple[MadeFor, list[str]]], check: Callable[[MadeFor], None]
) -> list[tuple[MadeFor, list[str]]]:
    """Those that pass. Raises the last one's error where none does."""
    from peer.errors import Conflict

    fitting, error = [], None
    for kind in kinds:
        try:
            check(kind[0])
            fitting.append(kind)
        except Conflict as trouble:
            error = trouble
    if not fitting and error is not None:
        raise error
    return fitting


def _check_not_revoked(signer: str, directory: Path) -> None:
    """Ask the peer here, where one runs: a certificate does not tell that its host was put out. Raises Unauthorized."""
    from peer.adapters.links.cluster_files import ClusterFiles
    from peer.cli.client import Client, find

    if signer.startswith("ed25519:") or ClusterFiles(directory).belonging() is None:
        return
    try:
        with Client(find(None, None, str(directory), {})) as client:
            hosts = client.get("/cluster/hosts").data["hosts"]
    except CliError as error:
        say(f"no peer here could say whether {signer} has been revoked: {error.message}")
        return
    if any(host["peer_id"] == signer and host["status"] == "revoked" for host in hosts):
        raise Unauthorized(f"it is signed by {signer}, which has been revoked")
