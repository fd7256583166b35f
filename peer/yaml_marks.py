"""YAML read with its places, safely: no tags but YAML's own, no duplicate keys, mistakes named by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from peer.errors import ConfigError


class _Places(yaml.SafeLoader):
    """A SafeLoader whose nodes are walked instead of being turned into objects at once."""


def read_yaml(
    name: str, data: bytes, sections: frozenset[str], mistakes: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """(path, value, "NAME:LINE") of every key below `sections`, in the file's order.

    `sections` are the paths whose values are mappings of further keys; an empty section is allowed. Duplicate
    keys and keys that are not plain words go to `mistakes`. Raises ConfigError where the text is not YAML.
    """
    loader = None
    try:
        loader = _Places(data)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{_place(name, root)}: expected keys and values, like `api:`")
        yield from _walk(loader, root, "", name, sections, mistakes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise ConfigError(f"{name}: not YAML: {reason}") from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()  # type: ignore[no-untyped-call]


def _walk(
    loader: _Places,
    mapping: yaml.MappingNode,
    prefix: str,
    name: str,
    sections: frozenset[str],
    mistakes: list[str],
) -> Iterator[tuple[str, Any, str]]:
    seen: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        place = _place(name, key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append(f"{place}: a key must be a plain word")
            continue
        path = f"{prefix}{key_node.value}"
        if "." in key_node.value:
            mistakes.append(f"{place}: `{path}`: write the parts as sections, each below the other, indented")
            continue
        if key_node.value in seen:
            mistakes.append(f"{place}: duplicate key `{path}`, first on line {seen[key_node.value]}")
            continue
        seen[key_node.value] = key_node.start_mark.line + 1
        if path not in sections:
            yield path, _value(loader, value_node, place), place
        elif isinstance(value_node, yaml.MappingNode):
            yield from _walk(loader, value_node, f"{path}.", name, sections, mistakes)
        elif _value(loader, value_node, place) is not None:
            mistakes.append(f"{place}: `{path}` is a section: its keys go on the lines below it, indented")


def _value(loader: _Places, node: yaml.Node, place: str) -> Any:
    """A scalar or a list of scalars as Python has it; anything deeper stays a dict, which no key takes."""
    if isinstance(node, yaml.MappingNode):
        return {}
    if isinstance(node, yaml.SequenceNode):
        scalar = yaml.ScalarNode
        return [_value(loader, item, place) if isinstance(item, scalar) else {} for item in node.value]
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    except ValueError as error:  # 2001-99-99, 0b2
        raise ConfigError(f"{place}: {error}") from None


def _place(name: str, node: yaml.Node) -> str:
    return f"{name}:{node.start_mark.line + 1}"
