"""Writes small ONNX models for tests: as much of ONNX's protobuf messages as a hostile model needs."""

from __future__ import annotations

from typing import Any

import numpy as np

_TYPES = {"float32": 1, "uint8": 2, "int64": 7, "bool": 9}  # TensorProto.DataType


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Fields by number: integers as varints, all else with its length."""
    found = b""
    for number, value in fields:
        if isinstance(value, int):
            found += _varint(number << 3) + _varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            found += _varint(number << 3 | 2) + _varint(len(raw)) + raw
    return found


def tensor(name: str, array: np.ndarray) -> bytes:
    dims = [(1, size) for size in array.shape]
    return message(*dims, (2, _TYPES[array.dtype.name]), (8, name), (9, array.tobytes()))


def node(op: str, inputs: list[str], outputs: list[str], **attributes: int | list[int] | bytes) -> bytes:
    """Attributes: whole numbers, lists of them, and tensors (`tensor`)."""
    fields: list[Any] = [(1, name) for name in inputs] + [(2, name) for name in outputs] + [(4, op)]
    for name, value in attributes.items():
        if isinstance(value, int):
            kept: list[Any] = [(3, value), (20, 2)]
        elif isinstance(value, bytes):
            kept = [(5, value), (20, 4)]
        else:
            kept = [*((8, each) for each in value), (20, 7)]
        fields.append((5, message((1, name), *kept)))
    return message(*fields)


def value(name: str, dtype: str, *shape: int) -> bytes:
    """An input or output of the graph."""
    dims = message(*((1, message((1, size))) for size in shape))
    return message((1, name), (2, message((1, message((1, _TYPES[dtype]), (2, dims))))))


def model(nodes: list[bytes], inputs: list[bytes], outputs: list[bytes], **arrays: np.ndarray) -> bytes:
    """`arrays` are initializers."""
    parts = [(1, each) for each in nodes] + [(2, "g")]
    parts += [(5, tensor(name, array)) for name, array in arrays.items()]
    parts += [(11, each) for each in inputs] + [(12, each) for each in outputs]
    return message((1, 10), (8, message((2, 18))), (7, message(*parts)))
