"""A model's last hidden states as captured graphs, one for each number of rows ("bucket"): what embeddings are made of.

As `engine.graphs` does it for logits. Rows that pad a bucket write to a spare position that no text reaches.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from engine.graphs import check_numbers
from engine.kernels.recording import recording
from engine.kernels.weights import fill, upload

CHUNK_ROWS_CPU = 32  # of a decoder, which takes a text in pieces
CHUNK_ROWS_GPU = 128
PACKED_ROWS_CPU = 128  # texts together; a longer one alone. 0.2 s a step with MiniLM on two cores
PACKED_ROWS_GPU = 512
_SIZES = (16, 64, 128, 512, 2048)


@dataclass(frozen=True)
class StateRow:
    """One token to compute: in which slot, at which position, and which position is its text's last one."""

    token: int
    slot: int
    position: int
    end: int


class Network(Protocol):
    """What an Encoder and a Decoder have in common here."""

    slots: int
    length: int  # positions of a slot, the spare one included
    half: int  # of a head's width
    ropes: int
    embedding: int
    whole: bool  # all of a text's rows must be in one step

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]: ...

    def states(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        ends: Tensor,
        angles: Sequence[Tensor],
        length: UOp,
    ) -> Tensor: ...


def bucket_sizes(context: int, whole: bool, on_cpu: bool) -> list[int]:
    """Rows of each bucket. Of an encoder the largest holds the longest text."""
    if not whole:
        return [CHUNK_ROWS_CPU if on_cpu else CHUNK_ROWS_GPU]
    longest = -(-max(context, PACKED_ROWS_CPU if on_cpu else PACKED_ROWS_GPU) // 16) * 16
    return [size for size in _SIZES if size < longest] + [longest]


class _Bucket:
    """Fixed input buffers and the graph that reads them."""

    def __init__(self, network: Network, rows: int) -> None:
        self._rows, self._network = rows, network
        tokens, slots, positions, ends = (upload(np.zeros(rows, dtype=np.int32)) for _ in range(4))
        self._ints = tokens, slots, positions, ends
        flat = np.zeros((2, rows, network.half), dtype=np.float32)
        self._angles = [upload(flat) for _ in range(network.ropes)]
        self._length = UOp.variable("length", 1, network.length)
        with recording() as record:
            result = network.states(tokens, slots, positions, ends, self._angles, self._length.bind(1))
        self._graph: Any = record.captured(result)

    def step(self, rows: Sequence[StateRow]) -> npt.NDArray[np.float32]:
        table = np.zeros((4, self._rows), dtype=np.int32)
        table[2:] = self._network.length - 1
        for index, row in enumerate(rows):
            table[:, index] = row.token, row.slot, row.position, row.end
        for tensor, values in zip(self._ints, table, strict=True):
            fill(tensor, values)
        for tensor, angles in zip(self._angles, self._network.angles(table[2]), strict=True):
            fill(tensor, angles)
        length = max((row.end for row in rows), default=0) + 1
        states: npt.NDArray[np.float32] = self._graph([], {self._length.expr: length}).numpy()
        return states[: len(rows)]

    def free(self) -> None:
        self._graph.free_intermediates()


class StatesModel:
    """Hidden states of rows. Texts, each in a slot of the network's, are independent of each other."""

    def __init__(self, network: Network, slots: int, context: int, on_cpu: bool) -> None:
        """`slots`: runs at once; how many texts are in a step the network knows."""
        self.slots, self.texts = slots, network.slots
        self.context, self.whole = context, network.whole
        self.embedding = network.embedding
        self.sizes = bucket_sizes(context, network.whole, on_cpu)
        self.rows_max = self.sizes[-1]
        self.rows_packed = min(self.rows_max, PACKED_ROWS_CPU if on_cpu else PACKED_ROWS_GPU)
        self._network = network
        self._buckets: dict[int, _Bucket] = {}

    def capture(self, size: int) -> None:
        """Build a bucket's graph and run it, so that its kernels are compiled and its memory taken."""
        bucket = self._buckets[size] = _Bucket(self._network, size)
        check_numbers(bucket.step([StateRow(0, 0, 0, 0)]))

    def step(self, rows: Sequence[StateRow]) -> npt.NDArray[np.float32]:
        """-> [len(rows), E]."""
        size = next(size for size in self.sizes if size >= len(rows))
        return self._buckets[size].step(rows)

    def free(self) -> None:
        """Let go of graphs, weights and caches."""
        for bucket in self._buckets.values():
            bucket.free()
        self._buckets.clear()
        del self._network
        gc.collect()
