"""YAML read key by key: every mistake is named with its file, line and key, and with the nearest right one.

A parser takes a node and the path of its key, and gives a value or raises ValueError that says what was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from peer.errors import ConfigError
from peer.settings import nearest
from peer.units import parse_bytes, parse_seconds

FILE_BYTES_MAX = 1_000_000
_TIME_OF_DAY = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Parse = Callable[["Reader", yaml.Node, str], Any]


class Reader:
    """Collects the mistakes of one file; `end` raises them all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mistakes: list[str] = []

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def mistake(self, node: yaml.Node, path: str, text: str) -> None:
        self.mistakes.append(f"{self.place(node)}: `{path}`: {text}")

    def end(self) -> None:
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))

    def root(self, data: bytes) -> yaml.MappingNode:
        try:
            node = yaml.compose(data, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            raise ConfigError(f"{self.name}{line}: not YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"{self.name}: not YAML: {str(error).splitlines()[0]}") from None
        except RecursionError:
            raise ConfigError(f"{self.name}: is nested too deeply") from None
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{self.name}: expected keys and values, like `hosts: 3`")
        return node

    def fields(
        self, node: yaml.Node, path: str, known: Mapping[str, Parse], needed: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The values of a mapping's keys; what is unknown, wrong, given twice or lacking is a mistake."""
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, path, f"expected keys below it: {', '.join(known)}")
            return {}
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            full = f"{path}.{key}" if path else key
            if not key:
                self.mistakes.append(f"{self.place(key_node)}: a key must be a plain word")
            elif key in lines:
                first = lines[key]
                self.mistakes.append(f"{self.place(key_node)}: duplicate key `{full}`, first on line {first}")
            elif key not in known:
                hint = nearest(key, known)
                self.mistakes.append(f"{self.place(key_node)}: unknown key `{full}`{hint}")
            else:
                try:
                    found[key] = known[key](self, value_node, full)
                except ValueError as error:
                    self.mistake(key_node, full, str(error))
            lines.setdefault(key, key_node.start_mark.line + 1)
        for key in needed:
            if key not in lines:
                self.mistakes.append(f"{self.place(node)}: `{path or self.name}` needs `{key}`")
        return found


def read_file(path: Path, kind: str) -> bytes:
    """Raises ConfigError where it cannot be read or is no such file by its size."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"the {kind} {path} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {FILE_BYTES_MAX} bytes: not a {kind}")
    return data


# ------------------------------------------------------------------------------------------------ parsers


def scalar(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ValueError("expected one value")
    value: str = node.value
    return value


def seconds(low: float = 0.0, high: float = math.inf) -> Parse:
    def parse(reader: Reader, node: yaml.Node, path: str) -> float:
        return _within(parse_seconds(scalar(node)), low, high, "s")

    return parse


def sizes(reader: Reader, node: yaml.Node, path: str) -> int:
    return parse_bytes(scalar(node))


def number(low: float, high: float) -> Parse:
    def parse(reader: Reader, node: yaml.Node, path: str) -> float:
        text = scalar(node)
        if not re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", text):
            raise ValueError(f"expected a number, not `{text}`")
        return _within(float(text), low, high)

    return parse


def whole(low: int, high: int) -> Parse:
    def parse(reader: Reader, node: yaml.Node, path: str) -> int:
        text = scalar(node)
        if not re.fullmatch(r"-?[0-9]{1,15}", text):
            raise ValueError(f"expected a whole number, not `{text}`")
        return int(_within(int(text), low, high))

    return parse


def one_of(choices: Iterable[str]) -> Parse:
    right = list(choices)

    def parse(reader: Reader, node: yaml.Node, path: str) -> str:
        text = scalar(node)
        if text not in right:
            raise ValueError(f"expected one of {', '.join(right)}, not `{text}`{nearest(text, right)}")
        return text

    return parse


def text(reader: Reader, node: yaml.Node, path: str) -> str:
    value = scalar(node)
    if not value.isprintable():
        raise ValueError("contains a control character")
    return value


def name(reader: Reader, node: yaml.Node, path: str) -> str:
    value = scalar(node)
    if not _NAME.fullmatch(value):
        raise ValueError(f"`{value}` is no name: letters, digits, `.`, `_` and `-`")
    return value


def list_of(item: Parse, count_max: int) -> Parse:
    """A list, or one item alone. Each item's path is KEY[N], from 1."""

    def parse(reader: Reader, node: yaml.Node, path: str) -> tuple[Any, ...]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if len(nodes) > count_max:
            raise ValueError(f"has {len(nodes)} items, at most {count_max} are allowed")
        found = []
        for i, each in enumerate(nodes, 1):
            try:
                found.append(item(reader, each, f"{path}[{i}]"))
            except ValueError as error:
                reader.mistake(each, f"{path}[{i}]", str(error))
        return tuple(found)

    return parse


def by_name(item: Parse, count_max: int) -> Parse:
    """A mapping whose keys are names."""

    def parse(reader: Reader, node: yaml.Node, path: str) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("expected names, each with what belongs to it")
        if len(node.value) > count_max:
            raise ValueError(f"has {len(node.value)} entries, at most {count_max} are allowed")
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in names:
            if not _NAME.fullmatch(key):
                raise ValueError(f"`{key}` is no name: letters, digits, `.`, `_` and `-`")
        return reader.fields(node, path, dict.fromkeys(names, item))

    return parse


def time_of_day(reader: Reader, node: yaml.Node, path: str) -> float:
    """Seconds since midnight of "12:00" or "12:00:30"."""
    value = scalar(node)
    found = _TIME_OF_DAY.fullmatch(value)
    if found is None:
        raise ValueError(f"`{value}` is not a time of day like 12:00")
    hours, minutes, secs = (int(part or 0) for part in found.groups())
    return _within(float(hours * 3600 + minutes * 60 + secs), 0.0, 86_400.0)


def _within(value: float, low: float, high: float, unit: str = "") -> float:
    if not low <= value <= high:
        most = "" if high == math.inf else f" to {high:g}{unit}"
        raise ValueError(f"{value:g}{unit} is out of range: {low:g}{unit}{most or ' or more'}")
    return value
