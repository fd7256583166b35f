"""What the client commands share: their options, and how they print."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from peer.cli.client import Answer

WIDTH_PIPED = 10_000  # a pipe has no width: nothing is folded


def client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --url, --key-file, --data-dir; the command gets a connected Client as its first argument."""

    @functools.wraps(command)
    def with_client(*, url: str | None, key_file: str | None, data_dir: str | None, **more: Any) -> Any:
        from peer.cli.client import Client, find

        with Client(find(url, key_file, data_dir, os.environ)) as client:
            return command(client, **more)

    return peer_options(with_client)


def peer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--data-dir", metavar="DIR", help="The peer's folder; else $BITINGLIP_DATA_DIR."),
        click.option("--key-file", metavar="FILE", help="API key; else $BITINGLIP_KEY, else DIR/admin.key."),
        click.option("--url", metavar="URL", help="The peer; else $BITINGLIP_URL, else that of DIR."),
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")


def emit(answer: Answer) -> None:
    """The API's own JSON, one line."""
    sys.stdout.write(answer.body.decode().rstrip("\n") + "\n")
    sys.stdout.flush()


def emit_object(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def console(*, stderr: bool = False) -> Console:
    """A console that writes no escape codes unless it is a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False, markup=False, emoji=False)
    return Console(
        file=stream,
        width=WIDTH_PIPED,
        force_terminal=False,
        no_color=True,
        highlight=False,
        markup=False,
        emoji=False,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str) -> None:
    """Print rows below their columns; a column whose name begins with ">" is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(shown(cell)) for cell in row] for row in rows]
    if not cells:
        print(empty)
        return
    terminal = sys.stdout.isatty()
    drawn = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in cells:
        drawn.add_row(*row)
    out = console()
    with out.capture() as captured:
        out.print(drawn)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def pairs(rows: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one pair a line."""
    shown_rows = [(name, shown(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown_rows), default=0)
    for name, value in shown_rows:
        print(f"{name:<{width}}  {value}")


def shown(value: Any) -> str:
    """A value for people: "-" for nothing, and no control characters from elsewhere."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value) or "-"
    return printable(str(value)).replace("\n", " ")


def printable(text: str) -> str:
    """Text that cannot steer the terminal: control characters other than line feed and tab are dropped."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


def poll_pause(elapsed_s: float) -> float:
    """Seconds until the next look at something slow: soon at first, and never near the key's rate limit."""
    return min(5.0, 0.4 + elapsed_s / 20)


def say(text: str) -> None:
    """A remark that is no result goes to stderr."""
    print(printable(text), file=sys.stderr, flush=True)
