"""Matrices as the device holds them: dense, or packed integers with a scale (and a minimum) for each group of inputs.

A packed weight is `scale * integer + minimum` with the file's own integers; scale and minimum are the file's float16,
or float32 where the file has a product of two numbers. So its values are the file's, rounded once, in float32.

| kinds | integers | inputs that share a scale | minimum | scales | bytes for 32 weights |
|---|---|---|---|---|---|
| Q4_0, Q4_1 | 4 bits, 0 to 15 | 32 | yes | float16 | 20 |
| Q4_K | 4 bits, 0 to 15 | 32 | yes | float32 | 24 |
| Q5_0, Q8_0 | 8 bits, signed | 32 | no | float16 | 34 |
| Q5_1 | 8 bits, 0 to 31 | 32 | yes | float16 | 36 |
| Q5_K | 8 bits, 0 to 31 | 32 | yes | float32 | 40 |
| Q6_K | 8 bits, signed | 16 | no | float32 | 40 |

The other kinds become float16. Outputs are interleaved by `LANES`, so that a vector (or a group of GPU threads) reads
neighbours: `words` [panels, words of a row, LANES], little-endian 32-bit words of eight or four consecutive inputs'
integers in the order of GGUF's blocks; `scales` and `minimums` [panels, groups of a row, LANES]. Lanes beyond the last
output are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, Ops, UOp

from engine.files.gguf import TYPES

LANES = 16  # outputs side by side: one AVX-512 register of float32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How integers and scales are packed."""

    bits: int  # 4: unsigned; 8: signed
    group: int  # inputs that share a scale
    minimum: bool
    wide: bool  # scales and minimums are float32, not float16

    @property
    def elements(self) -> int:
        """Integers of a word."""
        return 32 // self.bits

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Of the device."""
        lines = -(-outputs // LANES) * LANES
        scales = inputs // self.group * (4 if self.wide else 2) * (2 if self.minimum else 1)
        return lines * (inputs * self.bits // 8 + scales)


_Q4, _Q4_WIDE = Layout(4, 32, True, False), Layout(4, 32, True, True)
LAYOUTS = {
    2: _Q4,
    3: _Q4,
    6: Layout(8, 32, False, False),
    7: Layout(8, 32, True, False),
    8: Layout(8, 32, False, False),
    12: _Q4_WIDE,
    13: Layout(8, 32, True, True),
    14: Layout(8, 16, False, True),
}


@dataclass(frozen=True)
class DenseForm:
    """How a kernel reads rows of plain values."""

    outputs: int
    inputs: int

    def ranges(self, first: int, axis_type: AxisType = AxisType.LOOP) -> tuple[UOp, ...]:
        """Loops over a row, numbered from `first`."""
        return (UOp.range(self.inputs, first, axis_type=axis_type),)

    def column(self, i: UOp) -> UOp:
        """The input that the loops are at."""
        return i

    def value(self, tensors: Sequence[UOp], output: UOp, i: UOp) -> UOp:
        """The weight of `output` that the loops are at, float32. `tensors` stand for those of a part."""
        return tensors[0][output, i].cast(dtypes.float32)


@dataclass(frozen=True)
class PackedForm:
    """How a kernel reads rows of packed integers."""

    outputs: int
    inputs: int
    layout: Layout

    def ranges(self, first: int, axis_type: AxisType = AxisType.LOOP) -> tuple[UOp, ...]:
        """Loops over a row's words and a word's integers, numbered from `first`."""
        words = self.inputs // self.layout.elements
        return (
            UOp.range(words, first, axis_type=axis_type),
            UOp.range(self.layout.elements, first + 1, axis_type=axis_type),
        )

    def column(self, word: UOp, element: UOp) -> UOp:
        """The input that the loops are at."""
        if self.layout.bits == 8:
            return word * 4 + element
        return word // 4 * 32 + element // 4 * 16 + word % 4 * 4 + element % 4

    def value(self, tensors: Sequence[UOp], output: UOp, word: UOp, element: UOp) -> UOp:
        """The weight of `output` that the loops are at, float32. `tensors` stand for those of a part."""
        words, scales, *minimums = tensors
        panel, lane = output // LANES, output % LANES
        # byte `element % 4`; of four bits its lower half comes first
        shift = element * 8 if self.layout.bits == 8 else element % 4 * 8 + element // 4 * 4
        integer = words[panel, word, lane].alu(Ops.SHR, shift.cast(dtypes.uint32))
        if self.layout.bits == 8:
            integer = ((integer & 255) ^ 128).cast(dtypes.int32) - 128
        else:
            integer = (integer & 15).cast(dtypes.int32)
        group = word // (self.layout.group // self.layout.elements)
        value = integer.cast(dtypes.float32) * scales[panel, group, lane].cast(dtypes.float32)
        return value + minimums[0][panel, group, lane].cast(dtypes.float32) if minimums else value


@dataclass(frozen=True)
class Part:
    """Rows of one form, and the tensors that hold them: values; or words, scales and, where they are, minimums."""

    form: DenseForm | PackedForm
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Matrix:
    """[O, I]: parts of equal width, one below the other. Most have one; a file may mix kinds in what is stacked."""

    parts: tuple[Part, ...]

    @classmethod
    def dense(cls, values: Tensor) -> Matrix:
        """Of `values` [O, I], float16 or float32."""
        outputs, inputs = values.shape
        return cls((Part(DenseForm(outputs, inputs), (values,)),))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.form.outputs for part in self.parts), self.parts[0].form.inputs

    @property
    def nbytes(self) -> int:
        """Of the device."""
        return sum(int(tensor.nbytes()) for part in self.parts for tensor in part.tensors)

    @property
    def only(self) -> Part:
        """The one part of a matrix that was loaded as one."""
        (part,) = self.parts
        return part


# ---------------------------------------------------------------- packing, by numpy


def unpack(raw: npt.NDArray[np.uint8], kind: int) -> tuple[Array, ...]:
    """GGUF blocks [O, blocks of a row, bytes of a block] -> words, scales and minimums, if any; [O, N] each."""
    integers, scales, minimums = _UNPACK[kind](raw)
    words = integers if integers.dtype == np.uint32 else integers.reshape(len(raw), -1).view(np.uint32)
    found = (words, scales) if minimums is None else (words, scales, minimums)
    return tuple(each.reshape(len(raw), -1) for each in found)


def panels(stacked: Sequence[Array]) -> Array:
    """Rows [O, N], one below the other -> [panels, N, LANES]."""
    rows = stacked[0] if len(stacked) == 1 else np.concatenate(stacked)
    outputs, count = rows.shape
    whole = outputs // LANES
    lying = np.empty((-(-outputs // LANES), count, LANES), dtype=rows.dtype)
    lying[:whole] = rows[: whole * LANES].reshape(whole, LANES, count).transpose(0, 2, 1)
    if outputs % LANES:
        lying[whole] = 0
        lying[whole, :, : outputs % LANES] = rows[whole * LANES :].T
    return lying


_Unpacked = tuple[Array, Array, Array | None]  # words or bytes in order, scales, minimums; all [O, anything]


def _halves(raw: npt.NDArray[np.uint8], at: int) -> Array:
    return raw[..., at : at + 2].view("<f2")


def _words(raw: npt.NDArray[np.uint8], at: int) -> Array:
    return raw[..., at : at + 16].view("<u4")


def _q4_0(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    scales = _halves(raw, 0)
    return _words(raw, 2), scales, scales * np.float16(-8)  # exact: a power of two


def _q4_1(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    return _words(raw, 4), _halves(raw, 0), _halves(raw, 2)


def _five(raw: npt.NDArray[np.uint8], at: int) -> npt.NDArray[np.uint8]:
    """Integers of 0 to 31: a fifth bit of each first, then four bits each."""
    high = np.unpackbits(raw[..., at : at + 4], axis=-1, bitorder="little") << 4
    low = raw[..., at + 4 : at + 20]
    integers: npt.NDArray[np.uint8] = np.concatenate([low & 15, low >> 4], axis=-1) | high
    return integers


def _q5_0(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    return _five(raw, 2).view(np.int8) - np.int8(16), _halves(raw, 0), None


def _q5_1(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    return _five(raw, 4), _halves(raw, 0), _halves(raw, 2)


def _q8_0(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    return np.ascontiguousarray(raw[..., 2:]), _halves(raw, 0), None


def _k_scales(raw: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Of eight groups of 32: six bits of scale and of minimum each, times the block's two float16."""
    packed = raw[..., 4:16]
    low, high = packed[..., :8], packed[..., 8:]
    scale = np.concatenate([low[..., :4] & 63, (high & 15) | (low[..., :4] >> 6 << 4)], axis=-1)
    least = np.concatenate([low[..., 4:] & 63, (high >> 4) | (low[..., 4:] >> 6 << 4)], axis=-1)
    factor, minimum = (_halves(raw, at).astype(np.float32) for at in (0, 2))
    return factor * scale, -(minimum * least)


def _q4_k(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    """Each 32 bytes hold two groups, one in the lower halves; here a group's own halves share its bytes."""
    first, second = (raw[..., 16:].reshape(*raw.shape[:-1], 4, 2, 16)[..., half, :] for half in (0, 1))
    groups = np.stack([(first & 15) | (second << 4), (first >> 4) | (second & 240)], axis=-2)
    return groups, *_k_scales(raw)


def _q5_k(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    low = raw[..., 48:].reshape(*raw.shape[:-1], 4, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*raw.shape[:-1], 8, 32)
    high = raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return four | (high << 4), *_k_scales(raw)


def _q6_k(raw: npt.NDArray[np.uint8]) -> _Unpacked:
    low = raw[..., :128].reshape(*raw.shape[:-1], 2, 1, 64)
    four = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*raw.shape[:-1], 2, 4, 32)
    pairs = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32)
    high = pairs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    integers = (four | (high << 4)).view(np.int8) - np.int8(32)
    scales = raw[..., 192:208].view(np.int8).astype(np.float32) * _halves(raw, 208).astype(np.float32)
    return integers, scales, None


_UNPACK = {2: _q4_0, 3: _q4_1, 6: _q5_0, 7: _q5_1, 8: _q8_0, 12: _q4_k, 13: _q5_k, 14: _q6_k}


def device_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """Of the device, for a tensor of this kind and shape: vectors are float32."""
    elements = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 1:
        return 4 * elements
    if kind in LAYOUTS:
        return LAYOUTS[kind].nbytes(elements // shape[-1], shape[-1])
    return 2 * elements


def blocks(raw: npt.NDArray[np.uint8], kind: int, outputs: int) -> npt.NDArray[np.uint8]:
    """A tensor's bytes as blocks, [O, blocks of a row, bytes of a block]: rows and blocks can be taken from it."""
    return raw.reshape(outputs, -1, TYPES[kind][2])
