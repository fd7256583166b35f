"""Attention on the CPU as one kernel: scores, softmax and weighted values of a row and the heads that share keys.

Positions are taken 16 at a time and the softmax is carried along (its highest score and sum so far), so nothing of the
context's length is stored. A row looks at its own positions only, and what is computed for it does not depend on the
rows beside it: alone or in a batch it gives the same bits.
"""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine.kernels.recording import call
from engine.kernels.vectors import FAST, Code, exponential, highest, program

STEP = 16  # positions
_FLOATS = "<16 x float>"


def fits(queries: Tensor, cache: Tensor) -> bool:
    """Whether heads and cache come in whole vectors."""
    return int(queries.shape[2]) % 16 == 0 and int(cache.shape[3]) % STEP == 0


def attention(
    queries: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    length: UOp,
    window: int,
    threads: int,
) -> Tensor:
    """As `engine.kernels.transformer.attention`."""
    rows, heads, width = queries.shape
    groups = cache.shape[2]
    share = heads // groups
    together = share if rows > 1 else 1  # one row's heads are spread over the threads
    units = rows * heads // together
    threads = min(threads, units)
    unbound = length.unbind()[0]

    def kernel(*buffers: UOp) -> UOp:
        code = Code()
        names = ["out", "queries", "cache", "slots", "positions"]
        with code.loop(*code.share(units, threads)) as unit:
            row = code(f"udiv i64 {unit}, {heads // together}")
            first = code(f"mul i64 {code(f'urem i64 {unit}, {heads // together}')}, {together}")
            _Heads(code, cache, width, window, row, first, together, heads).write()
        kind = "f" if cache.dtype == dtypes.float32 else "h"
        name = f"attention_{rows}_{heads}_{groups}_{width}_{window}_{kind}"
        return program(code, name, names, buffers, threads, unbound)

    out = Tensor.empty(rows, heads * width, dtype=dtypes.float32, device=queries.device)
    return call(kernel, out, queries, cache, slots, positions, bound=(length,))


class _Heads:
    """Writes one row's heads that read the same keys."""

    def __init__(
        self, code: Code, cache: Tensor, width: int, window: int, row: str, first: str, count: int, heads: int
    ) -> None:
        _, self.slots, self.groups, self.length, _ = cache.shape
        self.half = cache.dtype == dtypes.float16
        self.code, self.width, self.window, self.heads, self.count = code, width, window, heads, count
        self.row, self.first = row, first
        self.vectors = width // 16
        self.best = code.array("float", count)
        self.total = code.array("float", count)
        self.sums = code.array("float", count * width)
        self.keys = code.array("float", STEP * width)
        self.values = code.array("float", STEP * width)

    def write(self) -> None:
        code = self.code
        own = self._index("%positions", self.length)
        slot = self._index("%slots", self.slots)
        group = code(f"udiv i64 {self.first}, {self.heads // self.groups}")
        line = code(f"add i64 {code(f'mul i64 {slot}, {self.groups}')}, {group}")
        size = 2 if self.half else 4
        keys = code.at("%cache", line, self.length * self.width * size)
        values = code.beyond(keys, self.slots * self.groups * self.length * self.width * size)
        most = code("zext i32 %length to i64")
        stop = code.call("i64", "llvm.umin.i64", f"i64 {code(f'add i64 {own}, 1')}", f"i64 {most}")
        begin = "0"
        if self.window:
            far = code(f"sub i64 {own}, {self.window - 1}")
            begin = code.call("i64", "llvm.smax.i64", f"i64 {far}", "i64 0")
        with code.loop("0", str(self.count)) as head:
            code.store("float", "0xFFF0000000000000", code.at(self.best, head, 4))
            code.store("float", "0.0", code.at(self.total, head, 4))
            with code.loop("0", str(self.vectors)) as part:
                at = code(f"add i64 {code(f'mul i64 {head}, {self.vectors}')}, {part}")
                code.store(_FLOATS, "zeroinitializer", code.at(self.sums, at, 64))
        last = code(f"udiv i64 {code(f'add i64 {stop}, {STEP - 1}')}, {STEP}")
        with code.loop(code(f"udiv i64 {begin}, {STEP}"), last) as step:
            self._convert(code.at(keys, step, STEP * self.width * size), self.keys)
            self._convert(code.at(values, step, STEP * self.width * size), self.values)
            seen = self._seen(step, begin, stop)
            with code.loop("0", str(self.count)) as head:
                self._step(head, seen)
        with code.loop("0", str(self.count)) as head:
            self._finish(head)

    def _index(self, name: str, size: int) -> str:
        """A loaded index, held to [0, size)."""
        code = self.code
        value = code(f"sext i32 {code.load('i32', code.at(name, self.row, 4))} to i64")
        value = code.call("i64", "llvm.smax.i64", f"i64 {value}", "i64 0")
        return code.call("i64", "llvm.smin.i64", f"i64 {value}", f"i64 {size - 1}")

    def _convert(self, source: str, target: str) -> None:
        """STEP positions' elements as float32, for all heads."""
        code = self.code
        with code.loop("0", str(STEP * self.vectors)) as part:
            if self.half:
                found = code.load("<16 x half>", code.at(source, part, 32))
                value = code(f"fpext <16 x half> {found} to {_FLOATS}")
            else:
                value = code.load(_FLOATS, code.at(source, part, 64))
            code.store(_FLOATS, value, code.at(target, part, 64))

    def _seen(self, step: str, begin: str, stop: str) -> str:
        """Which of a step's positions count."""
        code = self.code
        lanes = ", ".join(f"i64 {lane}" for lane in range(STEP))
        first = code.splat("i64", code(f"mul i64 {step}, {STEP}"), STEP)
        positions = code(f"add <16 x i64> {first}, <{lanes}>")
        before = code(f"icmp ult <16 x i64> {positions}, {code.splat('i64', stop, STEP)}")
        if not self.window:
            return before
        after = code(f"icmp uge <16 x i64> {positions}, {code.splat('i64', begin, STEP)}")
        return code(f"and <16 x i1> {before}, {after}")

    def _step(self, head: str, seen: str) -> None:
        """Carry a head's softmax and weighted values over a step's positions."""
        code = self.code
        scores = self._scores(head)
        lowest = "splat (float 0xFFF0000000000000)"
        scores = code(f"select <16 x i1> {seen}, {_FLOATS} {scores}, {_FLOATS} {lowest}")
        best_at, total_at = code.at(self.best, head, 4), code.at(self.total, head, 4)
        best, total = code.load("float", best_at), code.load("float", total_at)
        over = highest(code, scores)
        higher = code(f"select i1 {code(f'fcmp ogt float {over}, {best}')}, float {over}, float {best}")
        wide = code.splat("float", higher, 16)
        weights = exponential(code, code(f"fsub {_FLOATS} {scores}, {wide}"))
        weights = code(f"select <16 x i1> {seen}, {_FLOATS} {weights}, {_FLOATS} zeroinitializer")
        fallen = exponential(code, code.splat("float", code(f"fsub float {best}, {higher}"), 16))
        less = code(f"extractelement {_FLOATS} {fallen}, i32 0")
        sum_of = code.call(
            "float", "llvm.vector.reduce.fadd.v16f32", "float 0.0", f"{_FLOATS} {weights}", fast=True
        )
        code.store("float", higher, best_at)
        code.store("float", code(f"fadd float {code(f'fmul float {total}, {less}')}, {sum_of}"), total_at)
        at = code.at(self.sums, head, 4 * self.width)
        sums = [
            code(f"fmul {_FLOATS} {code.load(_FLOATS, code.beyond(at, 64 * part))}, {fallen}")
            for part in range(self.vectors)
        ]
        for position in range(STEP):
            share = code.shuffle(_FLOATS, weights, "poison", [position] * 16)
            for part in range(self.vectors):
                value = code.load(_FLOATS, code.beyond(self.values, 64 * (position * self.vectors + part)))
                sums[part] = code(
                    f"fadd {FAST} {_FLOATS} {sums[part]}, {code(f'fmul {FAST} {_FLOATS} {value}, {share}')}"
                )
        for part, value in enumerate(sums):
            code.store(_FLOATS, value, code.beyond(at, 64 * part))

    def _scores(self, head: str) -> str:
        """A head's products with the step's keys."""
        code = self.code
        index = code(
            f"add i64 {code(f'mul i64 {self.row}, {self.heads}')}, {code(f'add i64 {self.first}, {head}')}"
        )
        at = code.at("%queries", index, 4 * self.width)
        query = [code.load(_FLOATS, code.beyond(at, 64 * part)) for part in range(self.vectors)]
        return self._line(query, 0, STEP)

    def _line(self, query: list[str], first: int, count: int) -> str:
        """Sums of `count` positions' products, each in 16 / `count` neighbouring lanes; few vectors live at once."""
        code = self.code
        if count > 1:
            half = count // 2
            a, b = self._line(query, first, half), self._line(query, first + half, half)
            even, odd = (code.shuffle(_FLOATS, a, b, range(start, 32, 2)) for start in (0, 1))
            return code(f"fadd {FAST} {_FLOATS} {even}, {odd}")
        value = ""
        for part in range(self.vectors):
            key = code.load(_FLOATS, code.beyond(self.keys, 64 * (first * self.vectors + part)))
            term = code(f"fmul {FAST} {_FLOATS} {key}, {query[part]}")
            value = code(f"fadd {FAST} {_FLOATS} {value}, {term}") if value else term
        return value

    def _finish(self, head: str) -> None:
        code = self.code
        total = code.load("float", code.at(self.total, head, 4))
        some = code(f"fcmp une float {total}, 0.0")  # a padding row may see nothing
        inverse = code(f"select i1 {some}, float {code(f'fdiv float 1.0, {total}')}, float 0.0")
        wide = code.splat("float", inverse, 16)
        index = code(
            f"add i64 {code(f'mul i64 {self.row}, {self.heads}')}, {code(f'add i64 {self.first}, {head}')}"
        )
        target = code.at("%out", index, 4 * self.width)
        source = code.at(self.sums, head, 4 * self.width)
        for part in range(self.vectors):
            value = code.load(_FLOATS, code.beyond(source, 64 * part))
            code.store(_FLOATS, code(f"fmul {_FLOATS} {value}, {wide}"), code.beyond(target, 64 * part))
