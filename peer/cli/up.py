"""`bitinglip up`: the peer in the foreground."""

from __future__ import annotations

import errno
import os
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from peer.cli.exits import CliError, Exit, foreseen
from peer.config import Config
from peer.errors import BitinglipError, ConfigError

if TYPE_CHECKING:
    from peer.node import NodeInfo

LEVELS = ("debug", "info", "warning", "error")


@click.command()
@click.option("--config", "config_file", metavar="FILE", help="YAML file; else $BITINGLIP_CONFIG.")
@click.option("--data-dir", metavar="DIR", help="Identity, keys, tasks and models of this peer.")
@click.option("--api", "api", metavar="HOST:PORT", help="Where to serve; port 0 picks a free one.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="auto (every AMD GPU), AMD, AMD:0,2, AMD:0+1 (one worker of two), CPU, fake (a stand-in without any model). "
    "May be repeated.",
)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Load this model now. May be repeated."
)
@click.option("--log-level", type=click.Choice(LEVELS), help="How much is logged.")
def up(
    config_file: str | None,
    data_dir: str | None,
    api: str | None,
    devices: tuple[str, ...],
    models: tuple[str, ...],
    log_level: str | None,
) -> int:
    """Start a peer and serve until it is told to stop (Ctrl-C or SIGTERM: it drains first).

    SIGHUP reads the configuration again.
    """
    from peer import settings

    flags = {"data_dir": data_dir, "api.bind": api, "engine.devices": devices, "log.level": log_level}

    def read() -> Config:
        return settings.load(flags=flags, file=settings.find_file(config_file, os.environ))

    try:
        config = read()
    except ConfigError as error:
        raise CliError(str(error), Exit.USAGE) from None

    import trio

    from peer.node import run_node

    serve = partial(
        run_node,
        config,
        preload=models,
        on_ready=partial(announce, model=next(iter((*models, *config.models.preload)), "")),
        reload=read,
    )
    try:
        code: int = trio.run(serve)
    except (ConfigError, BitinglipError, OSError, ExceptionGroup) as error:
        known = foreseen(error, (ConfigError, BitinglipError, OSError))
        if known is None:
            raise
        raise explain(known, config) from None
    return code


def announce(node: NodeInfo, *, model: str) -> None:
    """Say that the peer serves, where its key is and how to try it."""
    authorization = f'-H "Authorization: Bearer $(cat {_quoted(str(node.admin_key_path))})"'
    if model:
        body = (
            f'{{"task_type":"text_generation","model_name":"{model}",'
            '"parameters":{"prompt":"Once upon a time","max_tokens":40}}'
        )
        call = (
            f"curl {authorization} -H 'Content-Type: application/json' '{node.url}/tasks?wait=60' -d '{body}'"
        )
    else:
        call = f"curl {authorization} {node.url}/cluster/status"
    print(
        f"bitinglip serves at {node.url}\nadmin key: {node.admin_key_path}\ntry: {call}",
        file=sys.stdout,
        flush=True,
    )


def explain(error: BaseException, config: Config) -> CliError:
    """The start's failure in words, and what to do."""
    bind = config.api.bind
    if isinstance(error, ConfigError):
        below = error.__cause__ or error.__context__
        if isinstance(below, OSError) and str(error).startswith("api.bind"):
            return explain(below, config)
        return CliError(str(error), Exit.USAGE)
    if isinstance(error, BitinglipError):
        return CliError(error.message, Exit.CONFLICT if error.status == 409 else Exit.FAILED)
    assert isinstance(error, OSError)
    if error.errno == errno.EADDRINUSE:
        return CliError(
            f"{bind} is in use by another program",
            Exit.CONFLICT,
            "stop that program, or choose another address: --api HOST:PORT (port 0 picks a free one)",
        )
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return CliError(f"{bind} is not an address of this host", Exit.USAGE, "choose one: --api HOST:PORT")
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{error.strerror or error}"
    if isinstance(error, PermissionError):
        hint = f"the peer must own {config.data_dir}, or be given another folder: --data-dir DIR"
        if error.filename is None:
            hint = f"ports below 1024 need a privilege: choose another than {bind} with --api HOST:PORT"
        return CliError(text, Exit.USAGE, hint)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return CliError(text, Exit.FAILED, "make room, or give another folder: --data-dir DIR")
    return CliError(text, Exit.FAILED)


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)
