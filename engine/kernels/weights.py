"""A model's tensors from a GGUF file or a safetensors folder onto the device, each used once or the load fails.

Matrices stay quantised as the file has them (`matrices` says which kinds and how they lie); they are repacked one
tensor at a time from the mapped file. Vectors become float32, and matrices of other kinds float16: those are
uploaded as they are and decoded on the device (tinygrad.llm.gguf).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.dtype import DType
from tinygrad.llm.gguf import ggml_data_to_tensor

from engine.errors import LoadError
from engine.files.gguf import TYPES, TensorInfo
from engine.kernels.matrices import (
    LAYOUTS,
    Layout,
    Matrix,
    PackedForm,
    Part,
    blocks,
    device_bytes,
    panels,
    unpack,
)

MATRIX = dtypes.float16
VECTOR = dtypes.float32
CUT = 32  # inputs: what a packed matrix may be cut into, whatever the file's blocks are
_DTYPES = {
    "float16": dtypes.float16,
    "float32": dtypes.float32,
    "int32": dtypes.int32,
    "uint32": dtypes.uint32,
}
# The other kinds look values up in tables that tinygrad makes once and keeps: captured in one graph, such a table is
# never filled for the next.
_GRAPHED_KINDS = {0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30}
Progress = Callable[[int, int], None]  # bytes done, of total


class Piece(NamedTuple):
    """A tensor, or what of it is wanted; rows and columns are half-open."""

    name: str
    shape: tuple[int, ...]  # that it must have
    rows: tuple[int, int] | None = None  # outputs; of each expert where one tensor has all experts'
    columns: tuple[int, int] | None = None  # inputs


class Checkpoint(Protocol):
    """A model's files, whose headers have been read and checked."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...


def array_dtype(dtype: DType) -> str:
    """numpy's name of a type."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def fill(tensor: Tensor, values: npt.NDArray[Any]) -> None:
    """Overwrite a realised tensor's buffer, without the scheduler."""
    tensor.uop.base.buffer.ensure_allocated().copyin(np.ascontiguousarray(values).data.cast("B"))


def upload(values: npt.NDArray[Any], device: str | None = None) -> Tensor:
    """A buffer of its own, without the scheduler; on the first device if none is named."""
    tensor = Tensor.empty(*values.shape, dtype=_DTYPES[values.dtype.name], device=device)
    fill(tensor, values)
    return tensor


class _Decoder:
    """Decodes tensors of the same kinds and shapes, one below the other; scheduled once, then replayed."""

    def __init__(self, parts: list[tuple[int, tuple[int, ...]]], dtype: DType, device: str | None) -> None:
        """`parts` are kinds and shapes."""
        self._dtype, self._device = dtype, device
        sizes = [math.prod(shape) // TYPES[kind][1] * TYPES[kind][2] for kind, shape in parts]
        self._raw = [Tensor.empty(size, dtype=dtypes.uint8, device=device) for size in sizes]
        self._shape = (sum(shape[0] for _, shape in parts), *parts[0][1][1:])

        def decode(out: Tensor, raw: list[Tensor]) -> None:
            stores, top = [], 0
            for (kind, shape), stored in zip(parts, raw, strict=True):
                values = ggml_data_to_tensor(stored, math.prod(shape), kind).reshape(*shape)
                stores.append(out[top : top + shape[0]].assign(values.cast(dtypes.float32).cast(dtype)))
                top += shape[0]
            Tensor.realize(*stores)

        self._decode: Any = decode
        if _GRAPHED_KINDS.issuperset(kind for kind, _ in parts):
            self._decode = TinyJit(decode)
            self._decode.cnt = 1  # capture in the first call: every input is a buffer already

    def __call__(self, raw: list[npt.NDArray[np.uint8]]) -> Tensor:
        for tensor, values in zip(self._raw, raw, strict=True):
            fill(tensor, values)
        out = Tensor.empty(*self._shape, dtype=self._dtype, device=self._device)
        out.uop.base.buffer.ensure_allocated()
        self._decode(out, self._raw)
        return out

    def free(self) -> None:
        if isinstance(self._decode, TinyJit) and self._decode.captured is not None:
            self._decode.captured.free_intermediates()


class _Read(NamedTuple):
    """What is wanted of a tensor: its kind, shape [O, I] or [I], and bytes, as blocks [O, blocks of a row, bytes].

    Of the I inputs that whole blocks have, those from `cut[0]` to `cut[1]` are wanted.
    """

    kind: int
    shape: tuple[int, ...]
    blocks: npt.NDArray[np.uint8]
    cut: tuple[int, int]

    @property
    def layout(self) -> Layout | None:
        """How it can be packed; None: it becomes dense."""
        return None if self.cut[0] % CUT or self.cut[1] % CUT else LAYOUTS.get(self.kind)


class Weights:
    """Hands out tensors by name, counting what was used. A context manager: it maps the files.

    They come to `device`, which may be changed between two of them; None is the first. A tensor may be asked for
    again, for another device's share of it: only what is wanted of it is read and uploaded.
    Names are GGUF's; `spelled` gives the file's own where that is another format's. With `matrices` float32 every
    matrix is decoded to that: for comparisons.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        progress: Progress,
        spelled: Callable[[str], str] = str,
        matrices: DType = MATRIX,
    ) -> None:
        self.matrices = matrices
        self._path = checkpoint.path
        self._spelled = spelled
        self._progress = progress
        self.device: str | None = None
        self._tensors = dict(checkpoint.tensors)
        self._left = set(checkpoint.tensors)
        self._done = 0
        self._decoders: dict[Any, _Decoder] = {}
        self._total = sum(info.size for info in self._tensors.values())
        self._maps: dict[Path, mmap.mmap] = {}
        for path in {info.file for info in self._tensors.values()}:
            with path.open("rb") as file:
                # private, because tinygrad copies from writable memory only
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()  # not closed: a failure's traceback may hold a view of one
        for decoder in self._decoders.values():
            decoder.free()
        self._decoders.clear()

    def has(self, name: str) -> bool:
        return self._spelled(name) in self._tensors

    def consume(self, names: Iterable[str]) -> None:
        """These, as the file spells them, need not be used."""
        self._left.difference_update(names)

    def block(self, name: str) -> int:
        """Where a matrix that stays quantised can be cut along its inputs; cut elsewhere it becomes float16."""
        packed = self.matrices == MATRIX and self._info(name).kind in LAYOUTS
        return CUT if packed else 1

    def vector(self, name: str, *shape: int) -> Tensor:
        """A tensor as float32."""
        return self._decoded([self._read(Piece(name, shape))], VECTOR)

    def precise(self, name: str, *shape: int) -> Matrix:
        """A matrix as float32."""
        return Matrix.dense(self._decoded([self._read(Piece(name, shape))], VECTOR))

    def matrix(
        self,
        name: str,
        *shape: int,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Matrix:
        """A matrix, or these rows and columns of it; of several experts' one tensor, one below the other."""
        return self.stacked([Piece(name, shape, rows, columns)])

    def stacked(self, parts: Sequence[Piece | tuple[str, tuple[int, ...]]]) -> Matrix:
        """Several matrices of equal width as one, one below the other; neighbours of one layout become one part."""
        read = [self._read(Piece(*part)) for part in parts]
        packable = self.matrices == MATRIX
        runs = groupby(read, lambda each: (each.layout if packable else None, each.cut, each.shape[-1]))
        return Matrix(tuple(self._loaded(list(run)) for _, run in runs))

    def finish(self) -> None:
        """Raises LoadError when the file has tensors that the model did not use."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise LoadError(
                "unsupported_architecture",
                f"{self._path} has {len(self._left)} tensors that this architecture does not use ({some}): "
                "running without them would give wrong answers",
            )

    def _loaded(self, read: list[_Read]) -> Part:
        """Tensors of one layout as one part."""
        layout = read[0].layout if self.matrices == MATRIX else None
        (first, last), whole = read[0].cut, read[0].shape[-1]
        if layout is None:
            values = self._decoded(read, self.matrices)
            cut = values if last - first == whole else values[:, first:last].contiguous().realize()
            return Matrix.dense(cut).only
        found = [unpack(each.blocks, each.kind) for each in read]
        tensors = []
        for rows in zip(
            *found, strict=True
        ):  # words, scales, minimums: as many of each as belong to the inputs
            wide = rows[0].shape[1]
            tensors.append(
                upload(
                    panels([row[:, first * wide // whole : last * wide // whole] for row in rows]),
                    self.device,
                )
            )
        outputs = sum(len(each.blocks) for each in read)
        return Part(PackedForm(outputs, last - first, layout), tuple(tensors))

    def _decoded(self, read: list[_Read], dtype: DType) -> Tensor:
        key = (self.device, dtype, *((each.kind, each.shape) for each in read))
        if key not in self._decoders:
            self._decoders[key] = _Decoder([(each.kind, each.shape) for each in read], dtype, self.device)
        return self._decoders[key]([each.blocks.reshape(-1) for each in read])

    def _read(self, part: Piece) -> _Read:
        """What is wanted of a tensor, still in the mapped file."""
        info = self._take(part.name, part.shape)
        raw = np.frombuffer(self._maps[info.file], dtype=np.uint8, count=info.size, offset=info.offset)
        if len(part.shape) == 1:
            return _Read(info.kind, part.shape, self._counted(raw), (0, part.shape[0]))
        block = TYPES[info.kind][1]
        height, width = part.shape[-2:]
        top, bottom = part.rows or (0, height)
        first, last = part.columns or (0, width)
        left, right = first // block, -(-last // block)
        lines = blocks(raw, info.kind, info.elements // width)
        found = lines.reshape(-1, height, *lines.shape[1:])[:, top:bottom, left:right]
        found = self._counted(found.reshape(-1, *found.shape[2:]))
        cut = (first - left * block, last - left * block)
        return _Read(info.kind, (len(found), (right - left) * block), found, cut)

    def _counted(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        self._done = min(
            self._done + raw.nbytes, self._total
        )  # what each device has whole is read more than once
        self._progress(self._done, self._total)
        return raw

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._info(name)
        self._left.discard(info.name)
        if info.shape != shape:
            text = f"{self._path}: tensor {info.name!r} has shape {info.shape} and should have {shape}"
            raise LoadError("bad_model_file", text)
        return info

    def _info(self, name: str) -> TensorInfo:
        name = self._spelled(name)
        info = self._tensors.get(name)
        if info is None:
            raise LoadError("bad_model_file", f"{self._path} has no tensor {name!r}")
        return info


def weights_bytes(checkpoint: Checkpoint) -> int:
    """Of the device, for all tensors."""
    return sum(device_bytes(info.kind, info.shape) for info in checkpoint.tensors.values())
