"""tinygrad's search for faster kernels ("BEAM"), made fit for an engine that serves.

By default tinygrad chooses a kernel's loops by rules of thumb. A search tries many and times each on the device: it
begins with the loops as they are written, changes them in every way that tinygrad knows, keeps the `width` fastest and
goes on from those until nothing gets faster. Kernels that state their own loops are never searched.

`install` puts this loop in place of tinygrad's, which compiles in a pool of as many processes as there are cores and
without our compilers, keeps every candidate in memory and in the cache file, fails where a kernel leaves a buffer
unread, times on the first card whichever it is for, and takes what it found even if the rules of thumb did better.
Here a kernel gets at most `KERNEL_S_MAX`, others are told between candidates, what was found must be faster than by the
rules and compute the same, and a kernel in whose search the engine died twice is left to the rules. What was found is
kept as every compiled program is (`engine.compilers.programs`).
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Device, codegen
from tinygrad.codegen.opt import search
from tinygrad.codegen.opt.heuristic import hand_coded_optimizations
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.device import Buffer, CompileError
from tinygrad.dtype import DType, _to_np_dtype, dtypes
from tinygrad.engine.realize import time_call
from tinygrad.helpers import Context, diskcache_get, diskcache_put
from tinygrad.uop.ops import Ops, UOp, sym_infer

from engine.process import log

KERNEL_S_MAX = 60.0
FAST_S = 5e-6  # a kernel that takes no longer is not worth it
BYTES_MAX = 2 * 1024**3  # of a kernel's buffers, which a search needs beside the model's own
BLOCK = 1024**2  # numbers made, and compared, at once
BEGINNINGS_MAX = 2  # of a search that never came to its end
ROUNDS = 5  # of timing what was found beside what the rules give
GAIN_MIN = 0.01  # of a round over the one before, and of what was found over the rules of thumb
WORK_MAX = 1000  # times the least operations of a candidate: it would only cost time
DIFFERENCE_MAX = 5e-3  # of the largest number: sums are added in another order
TABLE = "bitinglip_searches"

# tinygrad's own faults among them: a kernel that it lowers wrongly says nothing of the others
_CANNOT_RUN = (
    *(RuntimeError, CompileError, AssertionError, LookupError, TypeError, ValueError, ArithmeticError),
    *(MemoryError, OSError),
)

Array = npt.NDArray[Any]
_Told = Callable[[int], None]

_told: _Told = lambda searched: None  # noqa: E731
_made_for = ""
_searched = 0


def install(made_for: str) -> None:
    """Put `_search` in place of tinygrad's. Nothing is searched outside of `searching`."""
    global _made_for
    _made_for = made_for
    search.beam_search = _search


@contextmanager
def searching(width: int, tell: _Told) -> Iterator[None]:
    """Inside, kernels that tinygrad lowers are searched; 0: none. On the process's main thread only.

    `tell` is called between candidates with how many kernels this process has searched, and may run other graphs.
    """
    global _told
    before, _told = _told, tell
    try:
        with Context(BEAM=width):
            yield
    finally:
        _told = before


def searched() -> int:
    """How many kernels this process has searched."""
    return _searched


def _search(kernel: Scheduler, given: list[Buffer], width: int, *_: object) -> Scheduler:
    """tinygrad's `beam_search`: the loops to use. `given` are buffers that need not be all, nor on our device."""
    global _searched
    usual = kernel.copy()
    if not any(uop.op is Ops.STAGE for uop in kernel.ast.backward_slice):  # as tinygrad's own condition
        usual = hand_coded_optimizations(usual)
    name, began = kernel.ast.arg.name, time.monotonic()
    key = _key(kernel, width)
    if (size := sum(buffer.nbytes for buffer in given)) > BYTES_MAX:
        log("search_left_out", kernel=name, why=f"its buffers have {size} bytes")
        return usual
    if not _may_begin(key):
        log("search_left_out", kernel=name, why=f"the engine ended in {BEGINNINGS_MAX} searches of it")
        return usual
    _searched += 1
    try:
        attempt = _Search(kernel, usual, width)
    except (MemoryError, OSError):  # the CPU device's is an OSError
        found, said = usual, {"error": "no memory for its buffers"}
    else:
        found, said = attempt.run(), attempt.said
        del attempt
    gc.collect()  # collecting is off while graphs are built
    diskcache_put(TABLE, key, 0)
    took_s = round(time.monotonic() - began, 1)
    log("searched", kernel=name, took_s=took_s, loops=str(found.applied_opts), **said)
    return found


def _key(kernel: Scheduler, width: int) -> str:
    return f"{_made_for}:{kernel.ast.key.hex()}:{width}"


def _may_begin(key: str) -> bool:
    """Count a beginning, which the end takes back: what kills the engine must not do so for ever."""
    begun = diskcache_get(TABLE, key) or 0
    if begun >= BEGINNINGS_MAX:
        return False
    diskcache_put(TABLE, key, begun + 1)
    return True


class _Search:
    """One kernel's. `said`: what the log says of it."""

    def __init__(self, kernel: Scheduler, usual: Scheduler, width: int) -> None:
        """Raises MemoryError, OSError."""
        self._kernel, self._usual, self._width = kernel, usual, width
        self._until = time.monotonic() + KERNEL_S_MAX
        self._variables = {each.expr: int(each.vmin + each.vmax) // 2 for each in kernel.ast.variables()}
        self._cold = hasattr(Device[Device.DEFAULT], "invalidate_caches")
        self._seen: set[bytes] = set()
        self._least_work = math.inf
        self._buffers = _buffers(kernel.ast)
        fill(self._buffers)
        self.said: dict[str, Any] = {"tried": 0, "failed": 0}

    def run(self) -> Scheduler:
        usual = self._compiled(self._usual)
        if usual is None:
            return self._usual
        usual_s = self._timed(usual)
        self.said["rules_us"] = round(usual_s * 1e6, 1)
        if usual_s <= FAST_S:
            return self._usual
        beam, best, best_s = [self._kernel], self._usual, math.inf
        while True:
            timed: list[tuple[float, int, Scheduler]] = []
            for candidate in self._candidates(beam):
                program = self._compiled(candidate)
                if program is not None and not self._known(program):
                    timed.append((self._timed(program, best_s), len(timed), candidate))
            timed.sort(key=lambda each: each[:2])
            if not timed or not timed[0][0] < best_s * (1 - GAIN_MIN):
                break
            best_s, _, best = timed[0]
            beam = [candidate for _, _, candidate in timed[: self._width]]
        found = self._compiled(best)
        if best is self._usual or found is None:
            return self._usual
        best_s = usual_s = math.inf  # the best of many was perhaps only lucky
        for _ in range(ROUNDS):  # in turns, for what else the device and its host do
            best_s, usual_s = min(best_s, self._timed(found)), min(usual_s, self._timed(usual))
        self.said |= {"rules_us": round(usual_s * 1e6, 1), "found_us": round(best_s * 1e6, 1)}
        if not best_s < usual_s * (1 - GAIN_MIN):
            return self._usual
        if not self._agree(usual, found):
            self.said |= {"wrong": str(best.applied_opts)}
            return self._usual
        return best

    def _candidates(self, beam: list[Scheduler]) -> Iterator[Scheduler]:
        """Until the time is over."""
        for kernel in beam:
            for candidate in search.get_kernel_actions(kernel, include_0=False).values():
                with Context(BEAM=0):
                    _told(_searched)
                if time.monotonic() >= self._until:
                    return
                yield candidate

    def _compiled(self, kernel: Scheduler) -> UOp | None:
        """None: it cannot be, or takes longer or becomes larger than tinygrad's limits (10 s, 3000 instructions)."""
        self._count("tried")
        with Context(CACHELEVEL=0):
            done = search._try_compile((0, kernel))[1]
        codegen.to_program_cache.clear()  # it would have every candidate
        if done is None:
            self._count("failed")
            return None
        program: UOp = done[0]
        return program

    def _known(self, program: UOp) -> bool:
        """Whether the same was timed already, or it has far more to do than another."""
        digest = hashlib.sha256(program.src[4].arg).digest()
        if digest in self._seen:
            return True
        estimates = program.src[0].arg.estimates
        work = sym_infer(estimates.ops, self._variables) if estimates is not None else 0
        self._least_work = min(self._least_work, work)
        if work > WORK_MAX * self._least_work:
            return True
        self._seen.add(digest)
        return False

    def _timed(self, program: UOp, best_s: float = math.inf) -> float:
        """Best of three, in seconds. Infinite where it cannot run: that says nothing of other candidates, and a device
        that broke fails the next kernel that is none."""
        try:
            with Context(CACHELEVEL=0):
                times = search._time_program(
                    program,
                    self._variables,
                    self._buffers,
                    early_stop=best_s * 3,
                    clear_l2=self._cold,
                    dev_timeout=True,
                )
            return float(min(times))
        except _CANNOT_RUN:
            self._count("failed")
            return math.inf

    def _count(self, what: str) -> None:
        self.said[what] = self.said[what] + 1

    def _agree(self, usual: UOp, found: UOp) -> bool:
        """Whether both compute the same of the same numbers."""
        results = []
        try:
            for program in (usual, found):
                fill(self._buffers)
                with Context(CACHELEVEL=0):
                    time_call(program.call(*map(UOp.from_buffer, self._buffers)), self._variables)
                results.append([read(self._buffers[out]) for out in program.arg.outs])
        except _CANNOT_RUN:
            return False
        kinds = [self._buffers[out].dtype.base == dtypes.bfloat16 for out in usual.arg.outs]
        return all(map(agree, *results, kinds))


# ---------------------------------------------------------------- numbers to compute with


def _buffers(ast: UOp) -> list[Buffer]:
    """One for each number of a buffer, also those that the kernel leaves unread. Raises MemoryError, OSError."""
    wanted = {uop.arg: uop.ptrdtype for uop in ast.backward_slice if uop.op is Ops.PARAM}
    return [
        Buffer(Device.DEFAULT, wanted[number].size, wanted[number].base)
        if number in wanted
        else Buffer(Device.DEFAULT, 1, dtypes.uint8)
        for number in range(max(wanted, default=-1) + 1)
    ]


def fill(buffers: list[Buffer]) -> None:
    """Numbers as kernels may meet them: none that a sum loses its digits by, and indices that differ."""
    for seed, buffer in enumerate(buffers):
        block = numbers(min(buffer.size, BLOCK), buffer.dtype.base, np.random.default_rng(seed))
        buffer.ensure_allocated().copyin(np.resize(block, buffer.size).view(np.uint8).data)


def numbers(size: int, dtype: DType, random: np.random.Generator) -> Array:
    """[size]: fractions between 1/2 and 1, signed integers in their order, any bits of unsigned ones."""
    name = _to_np_dtype(dtype)
    if name is None:  # bfloat16 and 8-bit floats: their bits
        word, low, high = ("u2", 0x3F00, 0x3F80) if dtype == dtypes.bfloat16 else ("u1", 0x28, 0x30)
        return random.integers(low, high, size).astype(word)
    kind = np.dtype(name)
    if dtypes.is_float(dtype):
        return (random.random(size, dtype=np.float32) / 2 + 0.5).astype(kind)
    if dtype == dtypes.bool:
        return random.integers(0, 2, size).astype(kind)
    if dtypes.is_unsigned(dtype):
        return np.frombuffer(random.bytes(size * dtype.itemsize), dtype=kind)
    counted = np.arange(size, dtype=np.int64) % (2**7 if dtype.itemsize == 1 else 2**15)
    return counted.astype(kind)


def read(buffer: Buffer) -> Array:
    """[size], a bfloat16 as its 16 bits and the bit pattern of other types that numpy has not."""
    kind = _to_np_dtype(buffer.dtype.base) or np.dtype(f"u{buffer.dtype.base.itemsize}")
    return np.frombuffer(bytearray(buffer.as_memoryview()), dtype=kind)


def agree(one: Array, other: Array, bits: bool = False) -> bool:
    """Whether they are the same but for rounding. `bits`: they are bfloat16's."""
    for start in range(0, len(one), BLOCK):
        left, right = (_wide(each[start : start + BLOCK], bits) for each in (one, other))
        finite = np.isfinite(left)
        if not np.array_equal(left[~finite], right[~finite], equal_nan=True):
            return False
        left, right = left[finite], right[finite]
        if not np.all(np.abs(left - right) <= DIFFERENCE_MAX * np.abs(left).max(initial=0.0)):
            return False
    return True


def _wide(values: Array, bits: bool) -> Array:
    values = (values.astype(np.uint32) << 16).view(np.float32) if bits else values
    return values.astype(np.float64)
