"""Copying the beginning of one slot's cache into another's, in all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinygrad import Device, Tensor
from tinygrad.uop.ops import KernelInfo, UOp

from engine.kernels.cpu_attention import BLOCK
from engine.kernels.recording import call, copied, recording
from engine.kernels.transformer import as_written, held
from engine.kernels.weights import fill, upload


class SlotCopy:
    """A captured graph of one kernel for each cache [2, S, G, C, D]."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        self._pair = upload(np.zeros(2, dtype=np.int32))
        self._length = UOp.variable("length", 1, caches[0].shape[3])
        self._devices = devices = dict.fromkeys(str(cache.device) for cache in caches)
        with recording() as record:
            pairs = {device: copied(self._pair, device) for device in devices}
            for cache in caches:
                last = copy_positions(cache, pairs[str(cache.device)], self._length.bind(1))
        self._graph = record.captured(last)

    def run(self, source: int, target: int, length: int) -> None:
        """Positions 0 to `length` - 1 of slot `source`, and perhaps some after, into slot `target`."""
        length = (
            -(-length // BLOCK) * BLOCK
        )  # keys may lie in blocks; nobody reads a position before it is written
        fill(self._pair, np.array([source, target], dtype=np.int32))
        self._graph([], {self._length.expr: length})
        for device in self._devices:  # the next `fill` would overtake it
            Device[device].synchronize()

    def free(self) -> None:
        self._graph.free_intermediates()


def copy_positions(cache: Tensor, pair: Tensor, length: UOp) -> Tensor:
    """Store the first `length` (bound) positions of slot pair[0] at slot pair[1]. Returns the cache."""
    _, slots, groups, _, width = cache.shape
    opts = as_written(cache)

    def kernel(cache: UOp, pair: UOp) -> UOp:
        part, g = UOp.range(2, 0), UOp.range(groups, 1)
        n, d = UOp.range(length.unbind()[0], 2), UOp.range(width, 3)
        source, target = held(pair[0], slots), held(pair[1], slots)
        store = cache[part, target, g, n, d].store(cache[part, source, g, n, d])
        info = KernelInfo(name="copy_positions", opts_to_apply=opts)
        return store.end(part, g, n, d).sink(arg=info)

    return call(kernel, cache, pair, bound=(length,))
