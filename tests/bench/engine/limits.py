"""What the machine itself can do in this run: reading memory and multiplying, by numpy on all cores.

They bound any program: a decoding step reads every weight once, and a prompt's token costs two operations a weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine.files.gguf import Gguf
from tests.bench.processes import CORES

LARGE_BYTES = 1 << 30  # far beyond most caches
SIDE = 2048  # of the matrices
REPEATS = 5
PIECES = 200
PIECE_SIDE = 640  # some milliseconds, as a step


@dataclass(frozen=True)
class Limits:
    """Bytes and operations a second."""

    large_bytes_s: float  # reading a gibibyte
    model_bytes_s: float  # reading as much as the model's file, again and again: a large cache may hold it
    float32_s: float  # a product of matrices: what float32 kernels can come near to


@dataclass(frozen=True)
class Work:
    """What one token costs at least, with the weights as the file has them."""

    decode_bytes: int
    prefill_operations: int

    def rate_max(self, limits: Limits, at_once: int) -> tuple[float, str]:
        """Tokens a second of `at_once` sequences decoded together, and what binds: "memory" or "arithmetic"."""
        memory_s = self.decode_bytes / limits.model_bytes_s
        arithmetic_s = at_once * self.prefill_operations / limits.float32_s
        return at_once / max(memory_s, arithmetic_s), "memory" if memory_s > arithmetic_s else "arithmetic"


def work(header: Gguf) -> Work:
    """Of a dense model. Its matrix of logits is read for every decoded token, and multiplied for no prompt's but the
    last; a table of embeddings beside it is only looked into."""
    spare = "token_embd.weight" if "output.weight" in header.tensors else ""
    blocks = [
        info for name, info in header.tensors.items() if name.startswith("blk.") and len(info.shape) == 2
    ]
    return Work(
        sum(info.size for name, info in header.tensors.items() if name != spare),
        2 * sum(info.elements for info in blocks),
    )


def measure(model_bytes: int) -> Limits:
    """Best of a few: whatever else runs only takes away."""
    return Limits(_reading(LARGE_BYTES), _reading(model_bytes), _multiplying())


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _reading(size: int) -> float:
    """A thread a core looks for the largest of its part: vectors, and the interpreter's lock let go."""
    parts = np.array_split(np.ones(size // 4, dtype=np.float32), len(CORES))

    with ThreadPoolExecutor(len(CORES)) as pool:
        return size / _best(lambda: list(pool.map(np.max, parts)))


def _multiplying() -> float:
    left, right = np.ones((2, SIDE, SIDE), dtype=np.float32)
    return 2 * SIDE**3 / _best(lambda: left @ right)


def pieces() -> list[float]:
    """Seconds of equal products, one after the other: how much the machine itself varies, whoever works on it."""
    left, right = np.ones((2, PIECE_SIDE, PIECE_SIDE), dtype=np.float32)
    times = []
    for _ in range(PIECES):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return times
