"""A model's tensors from a GGUF file or a safetensors folder onto the device, each used once or the load fails.

Quantised blocks are uploaded as they are and decoded on the device (tinygrad.llm.gguf). Matrices are kept as float16:
half the memory traffic of float32, which bounds decoding, and exact to 2^-11 of each weight. Measured on two CPU
cores through LLVM 22: decoding Q4_1 in every step costs more than its saved traffic, float32 is 1.5 times slower.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.dtype import DType
from tinygrad.llm.gguf import ggml_data_to_tensor

from engine.errors import LoadError
from engine.gguf import TensorInfo

MATRIX = dtypes.float16
VECTOR = dtypes.float32
_DTYPES = {"float16": dtypes.float16, "float32": dtypes.float32, "int32": dtypes.int32}
# The other kinds look values up in tables that tinygrad makes once and keeps: captured in one graph, such a table is
# never filled for the next.
_GRAPHED_KINDS = {0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30}
Progress = Callable[[int, int], None]  # bytes done, of total
Part = tuple[str, tuple[int, ...]]  # a tensor's name and the shape that it must have


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


def upload(values: npt.NDArray[Any]) -> Tensor:
    """A buffer of its own, without the scheduler."""
    tensor = Tensor.empty(*values.shape, dtype=_DTYPES[values.dtype.name])
    fill(tensor, values)
    return tensor


class _Decoder:
    """Decodes tensors of the same kinds and shapes, one below the other; scheduled once, then replayed."""

    def __init__(self, parts: list[TensorInfo], dtype: DType) -> None:
        self._dtype = dtype
        self._raw = [Tensor.empty(part.size, dtype=dtypes.uint8) for part in parts]
        heights = [part.shape[0] for part in parts]
        self._shape = (sum(heights), *parts[0].shape[1:])

        def decode(out: Tensor, raw: list[Tensor], *columns: Tensor) -> None:
            stores, top = [], 0
            for part, blocks in zip(parts, raw, strict=True):
                values = ggml_data_to_tensor(blocks, part.elements, part.kind).reshape(*part.shape)
                values = values.cast(dtypes.float32)
                for factors in columns:
                    values = values * factors
                stores.append(out[top : top + part.shape[0]].assign(values.cast(dtype)))
                top += part.shape[0]
            Tensor.realize(*stores)

        self._decode: Any = decode
        if _GRAPHED_KINDS.issuperset(part.kind for part in parts):
            self._decode = TinyJit(decode)
            self._decode.cnt = 1  # capture in the first call: every input is a buffer already

    def __call__(self, raw: list[npt.NDArray[np.uint8]], columns: Tensor | None) -> Tensor:
        for tensor, values in zip(self._raw, raw, strict=True):
            fill(tensor, values)
        out = Tensor.empty(*self._shape, dtype=self._dtype)
        out.uop.base.buffer.ensure_allocated()
        self._decode(out, self._raw, *([] if columns is None else [columns]))
        return out

    def free(self) -> None:
        if isinstance(self._decode, TinyJit) and self._decode.captured is not None:
            self._decode.captured.free_intermediates()


class Weights:
    """Hands out tensors by name, counting what was used. A context manager: it maps the files.

    Names are GGUF's; `spelled` gives the file's own where that is another format's.
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
        self._left = dict(checkpoint.tensors)
        self._done = 0
        self._decoders: dict[Any, _Decoder] = {}
        self._total = sum(info.size for info in self._left.values())
        self._maps: dict[Path, mmap.mmap] = {}
        for path in {info.file for info in self._left.values()}:
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
        return self._spelled(name) in self._left

    def consume(self, names: Iterable[str]) -> None:
        """These, as the file spells them, need not be used."""
        for name in names:
            self._left.pop(name, None)

    def vector(self, name: str, *shape: int) -> Tensor:
        """A tensor as float32."""
        return self._decoded([(name, shape)], VECTOR, None)

    def precise(self, name: str, *shape: int, columns: Tensor) -> Tensor:
        """A matrix as float32, its columns multiplied by `columns`."""
        return self._decoded([(name, shape)], VECTOR, columns)

    def matrix(self, name: str, *shape: int, by: Tensor | None = None) -> Tensor:
        """A tensor as `matrices`, its last axis multiplied by `by` before rounding."""
        return self.stacked([(name, shape)], columns=by)

    def stacked(self, parts: Sequence[Part], columns: Tensor | None = None) -> Tensor:
        """Several matrices of equal width as one, one below the other."""
        return self._decoded(parts, self.matrices, columns)

    def finish(self) -> None:
        """Raises LoadError when the file has tensors that the model did not use."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise LoadError(
                "unsupported_architecture",
                f"{self._path} has {len(self._left)} tensors that this architecture does not use ({some}): "
                "running without them would give wrong answers",
            )

    def _decoded(self, parts: Sequence[Part], dtype: DType, columns: Tensor | None) -> Tensor:
        infos = [self._take(name, shape) for name, shape in parts]
        key = (dtype, columns is not None, *((info.kind, info.shape) for info in infos))
        if key not in self._decoders:
            self._decoders[key] = _Decoder(infos, dtype)
        raw = [
            np.frombuffer(self._maps[info.file], dtype=np.uint8, count=info.size, offset=info.offset)
            for info in infos
        ]
        decoded = self._decoders[key](raw, columns)
        self._done += sum(info.size for info in infos)
        self._progress(self._done, self._total)
        return decoded

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        name = self._spelled(name)
        info = self._left.pop(name, None)
        if info is None:
            raise LoadError("bad_model_file", f"{self._path} has no tensor {name!r}")
        if info.shape != shape:
            text = f"{self._path}: tensor {name!r} has shape {info.shape} and should have {shape}"
            raise LoadError("bad_model_file", text)
        return info
