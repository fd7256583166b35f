"""The model catalogue, a YAML file: read as a whole or not at all, every mistake named by line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from peer import installed, limits
from peer.adapters.models.sources import FileSource, SourceError, check_folder_file, is_folder, parse_source
from peer.errors import ConfigError
from peer.state.model import Model, ModelFile
from peer.units import parse_bytes

FILE_BYTES_MAX: Final = 1_000_000
MODELS_MAX: Final = 1_000
CONTEXT_MAX: Final = 1_048_576
SLOTS_MAX: Final = 256
FOLDER_FILES_MAX: Final = 1_024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_TASK_TYPES: Final = frozenset({"embedding", "tensor", "text_generation"})
_ONLY: Final = {"bert": "embedding", "onnx": "tensor"}  # what families serve that generate no text
_STAND_IN: Final = "echo"  # its family; a stand-in serves every type at once

Kind = Literal["text", "bytes", "count", "list", "files"]
KEYS: Final[Mapping[str, Kind]] = {
    "source": "text",
    "family": "text",
    "size_bytes": "bytes",
    "sha256": "text",
    "files": "files",
    "context": "count",
    "slots": "count",
    "memory_bytes": "bytes",
    "task_types": "list",
    "description": "text",
    "license": "text",
}
_REQUIRED: Final = ("source", "family")
_COUNT_MAX: Final = {"context": CONTEXT_MAX, "slots": SLOTS_MAX}


def default_catalogue() -> Path:
    """The one that comes with bitinglip."""
    return installed.find("configs", "models.yaml")


def read_catalogue(configured: str = "") -> Mapping[str, Model]:
    """The models by name, in the file's order; "" is the default one. Raises ConfigError, a line per mistake."""
    path = Path(configured).expanduser() if configured else default_catalogue()
    try:
        with open(path, "rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"the model catalogue {path} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {FILE_BYTES_MAX} bytes: not a model catalogue")
    return parse_catalogue(data, str(path))


def parse_catalogue(data: bytes, name: str) -> Mapping[str, Model]:
    """As read_catalogue, from the file's bytes."""
    root = _compose(data, name)
    mistakes: list[str] = []
    models: dict[str, Model] = {}
    for key, value in _pairs(root, name, "", mistakes):
        if key.value != "models":
            mistakes.append(
                f"{_place(name, key)}: unknown key `{key.value}`{_nearest(key.value, ['models'])}"
            )
        elif not isinstance(value, yaml.MappingNode):
            mistakes.append(f"{_place(name, key)}: `models` needs models by name below it")
        else:
            for model_key, fields in _pairs(value, name, "models.", mistakes):
                model = _model(model_key, fields, name, mistakes)
                if model is not None:
                    models[model.name] = model
    if len(models) > MODELS_MAX:
        mistakes.append(f"{name}: {len(models)} models are over the limit of {MODELS_MAX}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return models


def _compose(data: bytes, name: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}: expected `models:` with models by name below it")
    return root


def _pairs(
    node: yaml.MappingNode, name: str, prefix: str, mistakes: list[str]
) -> Iterable[tuple[yaml.ScalarNode, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            mistakes.append(f"{_place(name, key)}: a key must be a plain word")
        elif key.value in seen:
            first = seen[key.value]
            mistakes.append(
                f"{_place(name, key)}: duplicate key `{prefix}{key.value}`, first on line {first}"
            )
        else:
            seen[key.value] = key.start_mark.line + 1
            yield key, value


def _model(key: yaml.ScalarNode, node: yaml.Node, name: str, mistakes: list[str]) -> Model | None:
    place, label = _place(name, key), f"models.{key.value}"
    if not _NAME.match(key.value) or len(key.value) > limits.NAME_CHARS_MAX:
        mistakes.append(f"{place}: `{key.value}` is no model name: letters, digits, `.`, `_` and `-`")
        return None
    if not isinstance(node, yaml.MappingNode):
        mistakes.append(f"{place}: `{label}` needs {' and '.join(_REQUIRED)} below it")
        return None
    before = len(mistakes)
    fields: dict[str, Any] = {}
    for field, value in _pairs(node, name, f"{label}.", mistakes):
        if field.value not in KEYS:
            hint = _nearest(field.value, KEYS)
            mistakes.append(f"{_place(name, field)}: unknown key `{label}.{field.value}`{hint}")
            continue
        try:
            fields[field.value] = _value(field.value, value)
        except (ValueError, SourceError) as error:
            mistakes.append(f"{_place(name, field)}: `{label}.{field.value}`: {error}")
    for required in _REQUIRED:
        if required not in fields and len(mistakes) == before:
            mistakes.append(f"{place}: `{label}` needs `{required}`")
    if len(mistakes) == before:
        mistakes.extend(f"{place}: `{label}` {text}" for text in _disagreements(fields))
        mistakes.extend(f"{place}: `{label}` {text}" for text in _wrong_task_types(fields))
    return Model(name=key.value, **fields) if len(mistakes) == before else None


def _wrong_task_types(fields: dict[str, Any]) -> Iterable[str]:
    """Which types of tasks the family cannot serve; fills in the one that it serves."""
    family = fields["family"]
    only = _ONLY.get(family)
    found = fields.setdefault("task_types", (only or "text_generation",))
    if family == _STAND_IN:
        return
    if only is not None and found != (only,):
        yield f"is of family `{family}`, which serves `{only}` only"
    elif only is None and "tensor" in found:
        yield f"is of family `{family}`, which serves no `tensor`"
    elif len(found) > 1:
        yield "serves one type of task at a time: make an entry for each of its `task_types`"


def _disagreements(fields: dict[str, Any]) -> Iterable[str]:
    """What is wrong between fields that are right by themselves; fills in the size of a folder."""
    source, files = parse_source(fields["source"]), fields.get("files", ())
    if not files:
        if is_folder(source):
            yield "is a folder: it needs `files`, each with its sha256"
        return
    if not is_folder(source) and not isinstance(source, FileSource):
        yield "has `files` and a source that is one file; a folder's ends in / (of Hugging Face: without #PATH)"
    if "sha256" in fields:
        yield "has `files`, each with its sha256, and cannot have one of its own"
    if all(file.size_bytes for file in files):
        total = sum(file.size_bytes for file in files)
        if fields.setdefault("size_bytes", total) != total:
            yield f"has files of {total} bytes, and `size_bytes` says {fields['size_bytes']}"


def _value(field: str, node: yaml.Node) -> Any:
    """In the record's type. Raises ValueError that says what is expected."""
    kind = KEYS[field]
    if kind == "list":
        return _task_types(node)
    if kind == "files":
        return _files(node)
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ValueError("expected one value")
    text: str = node.value
    if kind == "bytes":
        return parse_bytes(text)
    if kind == "count":
        most = _COUNT_MAX[field]
        if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= most:
            raise ValueError(f"expected a whole number from 1 to {most}, not `{text}`")
        return int(text)
    if field == "sha256":
        return _sha256(text)
    if field == "source":
        parse_source(text)
    return text


def _sha256(text: str) -> str:
    if not _SHA256.match(text):
        raise ValueError("expected 64 hexadecimal digits in lower case, as `sha256sum FILE` prints them")
    return text


def _files(node: yaml.Node) -> tuple[ModelFile, ...]:
    """`NAME: SHA256` or `NAME: {sha256: SHA256, size_bytes: SIZE}`, each."""
    if not isinstance(node, yaml.MappingNode) or not 1 <= len(node.value) <= FOLDER_FILES_MAX:
        raise ValueError(f"expected 1 to {FOLDER_FILES_MAX} names of files, each with its sha256")
    found: dict[str, ModelFile] = {}
    for key, value in node.value:
        name = str(key.value)
        check_folder_file(name)
        if name in found:
            raise ValueError(f"`{name}` is there twice")
        found[name] = ModelFile(name=name, **_file_fields(name, value))
    safetensors = "config.json" in found and any(name.endswith(".safetensors") for name in found)
    if not safetensors and not {"model.onnx", "test.npz"} <= found.keys():
        raise ValueError(
            "expected config.json and a .safetensors file among them, or model.onnx and test.npz"
        )
    return tuple(found.values())


def _file_fields(name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        pairs = {"sha256": node.value}
    elif isinstance(node, yaml.MappingNode):
        pairs = {str(key.value): str(value.value) for key, value in node.value}
    else:
        pairs = {}
    if not {"sha256"} <= pairs.keys() <= {"sha256", "size_bytes"}:
        raise ValueError(
            f"`{name}` needs a sha256, and may have a size_bytes: {{sha256: ..., size_bytes: ...}}"
        )
    fields: dict[str, Any] = {"sha256": _sha256(pairs["sha256"])}
    if "size_bytes" in pairs:
        fields["size_bytes"] = parse_bytes(pairs["size_bytes"])
    return fields


def _task_types(node: yaml.Node) -> tuple[str, ...]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ValueError(f"expected a list of {', '.join(sorted(_TASK_TYPES))}")
    for item in node.value:
        if item.value not in _TASK_TYPES:
            raise ValueError(f"`{item.value}` is no task type; known: {', '.join(sorted(_TASK_TYPES))}")
    return tuple(str(item.value) for item in node.value)


def _nearest(wrong: str, right: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _place(name: str, node: yaml.Node) -> str:
    return f"{name}:{node.start_mark.line + 1}"
