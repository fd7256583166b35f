"""A GGUF file's header, read with every length checked before it is believed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). A corrupt or
truncated file raises `LoadError` code `bad_model_file`; nothing is allocated by a size that the file only claims.
Only the header is read, so that a prompt's tokens can be counted without loading the model.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import LoadError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TENSORS_MAX = 65_536
KEYS_MAX = 65_536
DIMENSIONS_MAX = 4
ARRAY_NESTING_MAX = 2
ELEMENTS_MAX = 1 << 40
HEADER_BYTES_MAX = 128 * 1024 * 1024  # a vocabulary of 262144 tokens and its merges take 12
VALUES_MAX = 8 * 1024 * 1024  # in all arrays together: each becomes a Python object
SMALL_MAX = 4096  # elements

_SCALARS = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

# ggml type -> (name, elements per block, bytes per block); what tinygrad.llm.gguf can decode
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    18: ("IQ3_XXS", 256, 98),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in row-major order (a GGUF file has it reversed)."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml type
    offset: int  # from the start of the file
    size: int  # bytes
    file: Path

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Gguf:
    """A file's header."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_size: int = field(default=0)

    def text(self, key: str, default: str | None = None) -> str:
        """A string value. Raises LoadError when it is absent without a default or is no string."""
        return str(self._value(key, str, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises LoadError when it is absent without a default or is none."""
        return float(self._value(key, (int, float), default))

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer. Raises LoadError when it is absent without a default or is none."""
        return int(self._value(key, int, default))

    def floats(self, name: str) -> tuple[float, ...]:
        """A small tensor's values, such as rotary factors. Raises LoadError unless it is a short row of float32."""
        info = self.tensors[name]
        if info.kind != 0 or len(info.shape) != 1 or info.elements > SMALL_MAX:
            raise bad_file(self.path, f"tensor {name!r} is no short row of F32")
        with self.path.open("rb") as file:
            file.seek(info.offset)
            return struct.unpack(f"<{info.elements}f", file.read(info.size))

    def _value(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise bad_file(self.path, f"it has no {key}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise bad_file(self.path, f"{key} has the wrong type ({type(value).__name__})")
        return value


def bad_file(path: Path | str, what: str) -> LoadError:
    """The error of a file that cannot be right."""
    return LoadError("bad_model_file", f"{path} cannot be used: {what}; fetch it again or check its source")


class _Reader:
    """A cursor over the mapped file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.values_left = VALUES_MAX

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise bad_file(self.path, f"it ends at byte {self.size}, inside its header")
        if self.at + count > HEADER_BYTES_MAX:
            raise bad_file(self.path, f"its header has more than {HEADER_BYTES_MAX} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < ARRAY_NESTING_MAX:
            return self.array(depth)
        raise bad_file(self.path, f"its header has an unknown value type {kind}")

    def array(self, depth: int) -> list[Any]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        self.values_left -= count
        if self.values_left < 0:
            raise bad_file(self.path, f"its header announces arrays of more than {VALUES_MAX} values")
        if kind in _SCALARS:
            code = _SCALARS[kind].removeprefix("<")
            raw = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{count}{code}", raw))
        if count * 8 > self.size - self.at:  # each string has at least its length
            raise bad_file(
                self.path, f"its header announces an array of {count} values, more than it can hold"
            )
        return [self.value(kind, depth + 1) for _ in range(count)]


def read(path: str | Path) -> Gguf:
    """Read and check the header. Raises LoadError (`bad_model_file`), also when the file cannot be opened."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise bad_file(path, f"it has only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Reader(path, data, size))
    except OSError as error:
        raise bad_file(path, error.strerror or str(error)) from error


def _parse(reader: _Reader) -> Gguf:
    if reader.take(4) != MAGIC:
        raise bad_file(reader.path, "it does not begin with GGUF")
    version, tensors, keys = reader.scalar("<I"), reader.scalar("<Q"), reader.scalar("<Q")
    if version not in VERSIONS:
        raise bad_file(reader.path, f"it is GGUF version {version}, and only 2 and 3 are known")
    if tensors > TENSORS_MAX or keys > KEYS_MAX:
        raise bad_file(reader.path, f"its header announces {tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("<I"))
    if metadata.get("split.count", 1) not in (0, 1):
        raise bad_file(reader.path, "it is one part of several; join them with llama-gguf-split --merge")
    infos = [_tensor_info(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 65_536:
        raise bad_file(reader.path, f"its alignment is {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    placed = [_place(reader, info, start) for info in infos]
    found = {info.name: info for info in placed}
    if len(found) != len(placed):
        raise bad_file(reader.path, "it names a tensor twice")
    return Gguf(reader.path, metadata, found, reader.size)


def _tensor_info(reader: _Reader) -> TensorInfo:
    name, dimensions = reader.string(), reader.scalar("<I")
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise bad_file(reader.path, f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reader.scalar("<Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.scalar("<I"), reader.scalar("<Q")
    return TensorInfo(name, shape, kind, offset, 0, reader.path)


def _place(reader: _Reader, info: TensorInfo, start: int) -> TensorInfo:
    """The same with its place in the file, which must lie inside it."""
    if info.kind not in TYPES:
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise LoadError(
            "unsupported_quantisation",
            f"{reader.path}: tensor {info.name!r} has ggml type {info.kind}; usable are {known}",
        )
    _, block, block_bytes = TYPES[info.kind]
    if not 1 <= info.elements <= ELEMENTS_MAX or info.shape[-1] % block:
        raise bad_file(reader.path, f"tensor {info.name!r} has the impossible shape {info.shape}")
    size = info.elements // block * block_bytes
    if start + info.offset + size > reader.size:
        end = start + info.offset + size
        what = f"tensor {info.name!r} ends at byte {end} and the file at {reader.size}: it is truncated"
        raise bad_file(reader.path, what)
    return replace(info, offset=start + info.offset, size=size)
