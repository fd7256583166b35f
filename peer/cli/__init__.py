"""The command line. Each command is imported when it is called, so that `bitinglip up` loads little else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from peer.cli.exits import CliError, Exit
from peer.version import VERSION

# name: (module, attribute, what `bitinglip --help` says of it)
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("peer.cli.up", "Start a peer and serve."),
    "submit": ("peer.cli.tasks", "Submit a text generation task."),
    "embed": ("peer.cli.embed", "Compute vectors of texts."),
    "tasks": ("peer.cli.tasks", "List tasks, or show one."),
    "cancel": ("peer.cli.tasks", "Cancel a task."),
    "status": ("peer.cli.cluster", "Show the cluster's status."),
    "workers": ("peer.cli.cluster", "List workers, or show one."),
    "restart": ("peer.cli.cluster", "Restart a worker's engine."),
    "metrics": ("peer.cli.cluster", "Show measured performance."),
    "rebalance": ("peer.cli.cluster", "Move models to where they serve best."),
    "drain": ("peer.cli.drain", "Empty a host, or take it back into use."),
    "events": ("peer.cli.events", "Follow the cluster's events."),
    "models": ("peer.cli.models", "List the catalogue and where its models are."),
    "load": ("peer.cli.models", "Load a model on workers."),
    "unload": ("peer.cli.models", "Unload a model from workers."),
    "key": ("peer.cli.keys", "Make, list and revoke API keys."),
    "init": ("peer.cli.cluster_join", "Prepare this host, as the first of a cluster or alone."),
    "token": ("peer.cli.cluster_join", "Make a one-time token that lets a host join."),
    "join": ("peer.cli.cluster_join", "Join a cluster."),
    "host": ("peer.cli.cluster_join", "List hosts, and put one out."),
    "leadership": ("peer.cli.operations", "Hand the leadership over."),
    "gossip-key": ("peer.cli.operations", "Give gossip a new key."),
    "drill": ("peer.cli.drill", "Measure a failover on this cluster."),
    "engine-cache": ("peer.cli.engine_cache", "Take compiled kernels to another host."),
    "config": ("peer.cli.check", "Check a configuration file."),
    "migrate": ("peer.cli.migrate", "Take a single node's store into a cluster's, or back."),
    "takeover": ("peer.cli.migrate", "Go on alone when the cluster's voters are lost."),
    "simulate": ("peer.cli.simulate", "Run a cluster through bad days in virtual time."),
    "install-service": ("peer.cli.service", "Run the peer as a systemd service of this host."),
    "doctor": ("peer.cli.doctor", "Check this host for what a peer needs."),
    "demo": ("peer.cli.demo", "Start a peer, generate a text, stop it."),
    "cluster": ("peer.cli.local_cluster", "Run three peers on this machine."),
}
HIDDEN = frozenset({"demo", "cluster"})


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if name not in HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        from peer.settings import nearest

        raise click.UsageError(f"There is no command `{name}`{nearest(name, self.list_commands(ctx))}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="bitinglip", message="%(prog)s %(version)s")
def cli() -> None:
    """Durable inference tasks on a cluster of AMD GPU hosts.

    \b
    bitinglip up --device CPU --model smollm2-135m
    bitinglip submit smollm2-135m "Tell me a story" --stream
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit codes are those of `peer.cli.exits`."""
    try:
        result: Any = cli.main(
            args=None if arguments is None else list(arguments), prog_name="bitinglip", standalone_mode=False
        )
    except CliError as error:
        error.show()
        return error.code
    except click.ClickException as error:
        error.show()
        return Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    return result if isinstance(result, int) else Exit.OK
