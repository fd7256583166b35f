"""A model's tensors from a GGUF file onto the device, each used once or the load fails.

Quantised blocks are uploaded as they are and decoded on the device (tinygrad.llm.gguf). Matrices are kept as float16:
half the memory traffic of float32, which bounds decoding, and exact to 2^-11 of each weight. Measured on two CPU
cores through LLVM 22: decoding Q4_1 in every step costs more than its saved traffic, float32 is 1.5 times slower.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.llm.gguf import ggml_data_to_tensor

from engine.errors import LoadError
from engine.gguf import Gguf, TensorInfo

MATRIX = dtypes.float16
VECTOR = dtypes.float32
Progress = Callable[[int, int], None]  # bytes done, of total


class Weights:
    """Hands out a file's tensors by name, counting what was used. A context manager: it maps the file."""

    def __init__(self, gguf: Gguf, progress: Progress) -> None:
        self._gguf = gguf
        self._progress = progress
        self._left = dict(gguf.tensors)
        self._done = 0
        self._total = sum(info.size for info in gguf.tensors.values())
        with gguf.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def has(self, name: str) -> bool:
        return name in self._left

    def vector(self, name: str, *shape: int) -> Tensor:
        """A tensor as float32."""
        return self._decoded(name, shape).cast(VECTOR).contiguous().realize()

    def matrix(self, name: str, *shape: int, columns: Tensor | None = None) -> Tensor:
        """A tensor as float16, its columns multiplied by `columns` before rounding."""
        return self.stacked([(name, shape)], columns=columns)

    def stacked(self, parts: list[tuple[str, tuple[int, ...]]], columns: Tensor | None = None) -> Tensor:
        """Several matrices of equal width as one, one below the other."""
        decoded = [self._decoded(name, shape) for name, shape in parts]
        if columns is not None:
            decoded = [tensor * columns for tensor in decoded]
        halves = [tensor.cast(MATRIX).contiguous().realize() for tensor in decoded]
        if len(halves) == 1:
            return halves[0]
        return halves[0].cat(*halves[1:]).contiguous().realize()

    def finish(self) -> None:
        """Raises LoadError when the file has tensors that the model did not use."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise LoadError(
                "unsupported_architecture",
                f"{self._gguf.path} has {len(self._left)} tensors that this architecture does not use ({some}): "
                "running without them would give wrong answers",
            )

    def _decoded(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float32, not yet realised."""
        info = self._take(name, shape)
        raw = np.frombuffer(self._map, dtype=np.uint8, count=info.size, offset=info.offset)
        blocks = Tensor(raw.copy()).realize()
        self._done += info.size
        self._progress(self._done, self._total)
        return ggml_data_to_tensor(blocks, info.elements, info.kind).reshape(*info.shape).cast(dtypes.float32)

    def _take(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._left.pop(name, None)
        if info is None:
            raise LoadError("bad_model_file", f"{self._gguf.path} has no tensor {name!r}")
        if info.shape != shape:
            text = f"{self._gguf.path}: tensor {name!r} has shape {info.shape} and should have {shape}"
            raise LoadError("bad_model_file", text)
        return info
