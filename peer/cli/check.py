"""`bitinglip config check`: whether a file would be taken, before a peer is restarted with it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from peer.cli.common import emit_object, json_option
from peer.cli.exits import CliError, Exit


@click.group()
def config() -> None:
    """Check a configuration file."""


@config.command()
@click.argument("file", required=False)
@json_option
def check(file: str | None, as_json: bool) -> int:
    """Check FILE, or what `bitinglip up` would read, and the catalogue it names.

    --json prints the settings in force.
    """
    import msgspec

    from peer import settings
    from peer.adapters.models.catalogue import read_catalogue
    from peer.errors import ConfigError

    path = Path(file) if file is not None else settings.find_file(None, os.environ)
    try:
        found = settings.load(file=path, environ={} if file is not None else os.environ)
        read_catalogue(found.models.catalogue)
    except ConfigError as error:
        mistakes = str(error).splitlines()
        if as_json:
            emit_object({"file": str(path or ""), "ok": False, "mistakes": mistakes})
            return Exit.USAGE
        raise CliError("\n".join(mistakes), Exit.USAGE) from None
    if as_json:
        emit_object({"file": str(path or ""), "ok": True, "settings": msgspec.to_builtins(found)})
    else:
        print(f"{path}: ok" if path is not None else "no file: the defaults are in force")
    return Exit.OK
