"""A Hugging Face model folder: config.json, model*.safetensors with or without an index, tokenizer.json.

Format: https://huggingface.co/docs/safetensors. Everything is checked before it is believed: a file that lies about
lengths, offsets, shapes or names raises `LoadError` code `bad_model_file` and makes nothing big. Weights are mapped by
`engine.kernels.weights`, never read here. Pickled weights are not looked at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from engine.errors import LoadError
from engine.files.gguf import DIMENSIONS_MAX, ELEMENTS_MAX, TENSORS_MAX, TensorInfo, bad_file

HEADER_BYTES_MAX = 8 * 1024 * 1024
JSON_BYTES_MAX = 8 * 1024 * 1024  # of config.json and the index
TOKENIZER_BYTES_MAX = 64 * 1024 * 1024
FILES_MAX = 1024
INTEGER_MAX = 1 << 62  # of config.json: JSON has no bound, and what is computed with them has
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# type -> (ggml type, bytes), so that the same code decodes both formats
TYPES = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}
# 0, 1, 2, ... as integers, which old files have and nobody reads
POSITION_NUMBERS = "embeddings.position_ids"
_I64 = 27

_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


_header = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)
_index = msgspec.json.Decoder(_Index)
_object = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True)
class Folder:
    """A folder's configuration and its tensors' places."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def file_size(self) -> int:
        return sum(info.size for info in self.tensors.values())

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer. Raises LoadError when it is absent (or null) without a default or is none."""
        return int(self._value(key, int, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises LoadError when it is absent (or null) without a default or is none."""
        return float(self._value(key, (int, float), default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises LoadError when it is something else."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise bad_file(self.path, f"{key} in config.json is {value!r}")
        return default if value is None else value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, empty when it is absent or null. Raises LoadError when it is something else."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            raise bad_file(self.path, f"{key} in config.json is no object")
        return value or {}

    def _value(self, key: str, kind: type | tuple[type, ...], default: float | None) -> Any:
        given: Any = self.config.get(key)
        value: Any = default if given is None else given
        if value is None:
            raise bad_file(self.path, f"config.json has no {key}")
        long = isinstance(value, int) and abs(value) > INTEGER_MAX
        if not isinstance(value, kind) or isinstance(value, bool) or long:
            raise bad_file(self.path, f"{key} in config.json is {str(value)[:40]!r}")
        return value


def read(path: str | Path) -> Folder:
    """Read and check all headers. Raises LoadError (`bad_model_file`), also when a file cannot be opened."""
    path = Path(path)
    tensors: dict[str, TensorInfo] = {}
    config = read_object(path / "config.json")
    expected = _weight_map(path)
    names = sorted(set(expected.values())) if expected else [SINGLE]
    for name in names:
        for info in read_file(path / name):
            if info.name in tensors:
                raise bad_file(path, f"two files have a tensor {info.name!r}")
            tensors[info.name] = info
    for name, file in expected.items():
        if name.endswith(POSITION_NUMBERS):
            continue
        if name not in tensors or tensors[name].file.name != file:
            raise bad_file(path, f"its index says that {name!r} is in {file!r}, and it is not")
    if len(tensors) > TENSORS_MAX:
        raise bad_file(path, f"it has {len(tensors)} tensors")
    return Folder(path, config, tensors)


def read_object(path: Path, most: int = JSON_BYTES_MAX) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises LoadError."""
    try:
        return _object.decode(_bounded(path, most))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_file(path, f"it is no JSON object ({error})") from None


def _bounded(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise bad_file(path, error.strerror or str(error)) from error
    if len(data) > most:
        raise bad_file(path, f"it has more than {most} bytes")
    return data


def read_text(path: Path, most: int = JSON_BYTES_MAX) -> str:
    """A text file of bounded size. Raises LoadError."""
    try:
        return _bounded(path, most).decode()
    except UnicodeDecodeError as error:
        raise bad_file(path, f"it is not UTF-8 ({error.reason})") from None


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, by the index; empty without one."""
    if not (path / INDEX).exists():
        return {}
    try:
        found = _index.decode(_bounded(path / INDEX, JSON_BYTES_MAX)).weight_map
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_file(path / INDEX, f"it is no index ({error})") from None
    names = set(found.values())
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors") or "\0" in name:
            raise bad_file(path / INDEX, f"it names the file {name[:80]!r}")
    if not 1 <= len(names) <= FILES_MAX:
        raise bad_file(path / INDEX, f"it names {len(names)} files")
    return found


def read_file(path: Path) -> list[TensorInfo]:
    """One file's tensors: inside it, not overlapping, with no gaps. Raises LoadError."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES_MAX):
                raise bad_file(path, f"it has {size} bytes and announces a header of {length}")
            raw = file.read(length)
    except OSError as error:
        raise bad_file(path, error.strerror or str(error)) from error
    if len(raw) != length:
        raise bad_file(path, "it ends inside its header")
    try:
        entries = _header.decode(raw)
        entries.pop("__metadata__", None)
        if len(entries) > TENSORS_MAX:
            raise bad_file(path, f"its header has {len(entries)} tensors")
        decoded = {name: _entry.decode(entry) for name, entry in entries.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_file(path, f"its header is no safetensors header ({error})") from None
    infos = [_place(path, name, entry, 8 + length) for name, entry in decoded.items()]
    infos.sort(key=lambda info: (info.offset, info.size))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise bad_file(
                path, f"tensor {info.name!r} begins at byte {info.offset}, and the one before ends at {end}"
            )
        end += info.size
    if end != size:
        raise bad_file(path, f"its tensors end at byte {end} and the file at {size}")
    return [info for info in infos if info.kind != _I64]


def _place(path: Path, name: str, entry: _Entry, start: int) -> TensorInfo:
    numbering = entry.dtype == "I64" and name.endswith(POSITION_NUMBERS)
    if entry.dtype not in TYPES and not numbering:
        known = ", ".join(TYPES)
        text = f"{path}: tensor {name[:80]!r} is {entry.dtype[:20]!r}; usable are {known}"
        raise LoadError("unsupported_quantisation", text)
    kind, width = (_I64, 8) if numbering else TYPES[entry.dtype]
    elements = math.prod(entry.shape) if len(entry.shape) <= DIMENSIONS_MAX else -1
    if not len(entry.shape) >= 1 or not 1 <= elements <= ELEMENTS_MAX:
        raise bad_file(path, f"tensor {name[:80]!r} has the impossible shape {entry.shape[:8]}")
    first, last = entry.data_offsets
    if last - first != elements * width:
        text = (
            f"tensor {name[:80]!r} of shape {entry.shape} takes {elements * width} bytes, not {last - first}"
        )
        raise bad_file(path, text)
    return TensorInfo(name, tuple(entry.shape), kind, start + first, last - first, path)
