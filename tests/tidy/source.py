"""The repository's own Python, parsed once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("peer", "api", "engine", "simulations")


class Source(NamedTuple):
    path: str  # from the repository's root
    module: str
    text: str
    tree: ast.Module


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    return tuple(_read(folders))


def _read(folders: tuple[str, ...]) -> Iterator[Source]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = str(file.relative_to(ROOT))
            text = file.read_text()
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield Source(path, module, text, ast.parse(text, path))


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, module) of every import wherever it stands, except those for the type checker only."""
    checked_only = {
        inner
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(source.tree):
        if node in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def report(offenders: list[str]) -> None:
    """Fail with every offender, one a line."""
    assert not offenders, "\n" + "\n".join(sorted(offenders))
