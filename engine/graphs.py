"""A model's step as captured graphs, one for each number of rows ("bucket"); a step takes the smallest that fits.

Rows that pad a bucket write to a spare position behind every context, which no row ever reads.

Every bucket is built during the load, 0.3 s each when its kernels are cached: none is left to stall a stream later.
It is timed then, too: `pacing` and `speculation` in engine/batching choose among the sizes by what they take.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tinygrad.uop.ops import UOp

from engine.batching.batcher import Row
from engine.batching.pacing import Bucket
from engine.batching.speculation import PROPOSED_MAX
from engine.errors import LoadError
from engine.kernels.recording import recording
from engine.kernels.slot_copy import SlotCopy
from engine.kernels.weights import fill, upload
from engine.models.decoder import Decoder

# for decoding, and for prompts beside it; a CPU takes nearly twice as long for twice the rows
DECODE_ROWS_CPU = (1, 2, 3, 4, 8, 10, 12, 16, 32, 64)
DECODE_ROWS_GPU = (1, 4, 8, 16, 32, 64)
# those of these that are larger: for prompts beside streams, and for prompts alone
PROMPT_ROWS_CPU = (10, 12, 16, 32)
PROMPT_ROWS_GPU = (32, 128)
# A size is timed so often, near and far, or for so long: the first steps are slower than any later.
TIMED_MAX = 6
TIMED_S = 0.03
TIMED_ONCE_S = 0.5  # of so long ones the first will do


def bucket_sizes(slots: int, on_cpu: bool) -> list[int]:
    """Buckets up to the number of slots and of what one run may decode at once, and some for prompts."""
    most = _decoding_max(slots)
    sizes = DECODE_ROWS_CPU if on_cpu else DECODE_ROWS_GPU
    prompt = PROMPT_ROWS_CPU if on_cpu else PROMPT_ROWS_GPU
    decode = [size for size in sizes if size < most] + [next((s for s in sizes if s >= most), most)]
    return sorted({*decode, *(size for size in prompt if size > decode[-1])})


def logits_rows(size: int, slots: int) -> int:
    """L: of how many rows a bucket gives logits. Of one per run, and of proposed tokens where it is for decoding."""
    most = _decoding_max(slots)
    return min(size, most if size < 2 * most else slots)


def _decoding_max(slots: int) -> int:
    return max(slots, 1 + PROPOSED_MAX)


def cache_length(context: int) -> int:
    """C: the context and the spare position, in whole vectors."""
    return -(-(context + 1) // 32) * 32


def check_numbers(computed: npt.NDArray[np.float32]) -> None:
    """Raises LoadError if what a model's first steps give is not finite: a run would take it for the device's fault."""
    if not np.isfinite(computed).all():
        raise LoadError("bad_model_file", "what the file's weights give is not all finite numbers")


class _Bucket:
    """Fixed input buffers and the graph that reads them. R rows, logits of L of them."""

    def __init__(self, model: Decoder, rows: int, wanted: int) -> None:
        self._rows, self._wanted = rows, wanted
        self._spare = model.length - 1
        half = model.config.width // 2
        tokens, slots, positions = (upload(np.zeros(rows, dtype=np.int32)) for _ in range(3))
        self._ints = tokens, slots, positions
        self._angles = [upload(np.zeros((2, rows, half), dtype=np.float32)) for _ in model.config.ropes]
        self._want = upload(np.zeros(wanted, dtype=np.int32))
        self._model = model
        self._length = UOp.variable("length", 1, model.length)
        with recording() as record:
            logits = model.forward(tokens, slots, positions, self._angles, self._want, self._length.bind(1))
        self._graph = record.captured(logits)

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        table = np.zeros((3, self._rows), dtype=np.int32)
        table[2] = self._spare
        for index, row in enumerate(rows):
            table[:, index] = row.token, row.slot, row.position
        want = np.zeros(self._wanted, dtype=np.int32)
        want[: len(wanted)] = wanted
        for tensor, values in zip(self._ints, table, strict=True):
            fill(tensor, values)
        for tensor, angles in zip(self._angles, self._model.angles(table[2]), strict=True):
            fill(tensor, angles)
        fill(self._want, want)
        length = max((1, *(row.position + 1 for row in rows)))
        logits: npt.NDArray[np.float32] = self._graph([], {self._length.expr: length}).numpy()
        return logits[: len(wanted)]

    def free(self) -> None:
        self._graph.free_intermediates()


class GraphedModel:
    """A `StepModel` over captured graphs."""

    def __init__(self, model: Decoder, slots: int, context: int, on_cpu: bool) -> None:
        self.slots, self.context = slots, context
        self._model = model
        self.sizes = bucket_sizes(slots, on_cpu)
        self.buckets: list[Bucket] = []
        self._graphs: dict[int, _Bucket] = {}
        self._copy = SlotCopy(model.caches)

    def capture(self, size: int) -> None:
        """Build a bucket's graph and run it, so that its kernels are compiled, its memory taken, its time known.

        Raises LoadError on a model that gives no numbers.
        """
        logits = logits_rows(size, self.slots)
        graph = self._graphs[size] = _Bucket(self._model, size, logits)
        far = max(1, self.context // 4)
        near_s = far_s = math.inf
        began = time.monotonic()
        for turn in range(TIMED_MAX):
            if turn and time.monotonic() - began > (TIMED_ONCE_S if turn == 1 else TIMED_S):
                break
            near_s = min(near_s, self._timed(graph, size, 0))
            far_s = min(far_s, self._timed(graph, size, far))
        self.buckets.append(Bucket(size, logits, near_s, max(0.0, far_s - near_s) / (size * far)))

    def _timed(self, graph: _Bucket, size: int, position: int) -> float:
        """Seconds of a step whose rows are those of a prompt from `position` on, behind one of another run, as they
        come where their time matters."""
        rows = [
            Row(0, self.slots - 1 if at == 0 else 0, min(position + at, self.context - 1))
            for at in range(size)
        ]
        began = time.monotonic()
        found = graph.step(rows, [size - 1])
        took_s = time.monotonic() - began
        check_numbers(found)
        return took_s

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> npt.NDArray[np.float32]:
        size = next(size for size in self.sizes if size >= len(rows))
        return self._graphs[size].step(rows, wanted)

    def copy(self, source: int, target: int, length: int) -> None:
        self._copy.run(source, target, length)

    def free(self) -> None:
        """Let go of graphs, weights and caches."""
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._copy.free()
        del self._model, self._copy
        gc.collect()
