"""Attention on the CPU as one kernel: scores, softmax and weighted values of rows and the heads that share keys.

Positions are taken STEP at a time and the softmax is carried along (its highest score and sum so far), so nothing of
the context's length is stored. Keys lie with BLOCK positions side by side, so that a score is a sum down a vector's
lane and none is added up across lanes. Neighbouring rows of one prompt are computed together: each key and value is
made a float32 once for all of them. What is computed for a row does not depend on the rows beside it: alone, in a batch
or with its prompt it gives the same bits.
"""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine.kernels.recording import call
from engine.kernels.vectors import FAST, Code, exponential, highest, larger, program

LANES = 16  # of a vector
BLOCK = 16  # positions whose keys lie side by side
STEP = 2 * BLOCK
TOGETHER_MAX = 12  # heads of rows whose scores, two vectors each, are in registers at once
SUMS_MAX = 24  # vectors of weighted values that are in registers at once
_FLOATS = "<16 x float>"
_LOWEST = "0xC7EFFFFFE0000000"  # the lowest finite float32: minus itself it is 0, and minus infinity is not


def fits(cache: Tensor) -> bool:
    """Whether positions and elements of a cache [2, S, G, C, D] come in whole vectors."""
    return int(cache.shape[3]) % STEP == 0 and int(cache.shape[4]) % LANES == 0


def key_place(position: UOp, element: UOp, width: int) -> tuple[UOp, UOp]:
    """Where in the last two axes, C and D, an element of a position's key is: BLOCK positions' elements, one by one."""
    lines = width // BLOCK  # elements of which a position's place has room for those of BLOCK positions
    return position // BLOCK * BLOCK + element // lines, element % lines * BLOCK + position % BLOCK


def attention(
    queries: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    length: UOp,
    window: int,
    threads: int,
) -> Tensor:
    """As `transformer.attention`, of keys that lie as `key_place` says.

    A row at the cache's last position is padding and sees nothing.
    """
    rows, heads, width = queries.shape
    groups = cache.shape[2]
    together, some = _tile(rows, groups, heads // groups, threads)
    parts = heads // some  # units of a block of rows
    units = rows // together * parts
    threads = min(threads, units)
    unbound = length.unbind()[0]

    def kernel(*buffers: UOp) -> UOp:
        code = Code()
        names = ["out", "queries", "cache", "slots", "positions"]
        # taken in turns: a prompt's rows, which look back at more, stand together
        first = code.core() if threads > 1 else "0"
        with code.loop(first, str(units), by=threads) as unit:
            row = code(f"mul i64 {code(f'udiv i64 {unit}, {parts}')}, {together}")
            head = code(f"mul i64 {code(f'urem i64 {unit}, {parts}')}, {some}")
            _write(code, queries, cache, window, row, together, head, some)
        kind = "f" if cache.dtype == dtypes.float32 else "h"
        name = f"attention_{rows}_{heads}_{groups}_{width}_{window}_{kind}"
        return program(code, name, names, buffers, threads, unbound)

    out = Tensor.empty(rows, heads * width, dtype=dtypes.float32, device=queries.device)
    return call(kernel, out, queries, cache, slots, positions, bound=(length,))


def _tile(rows: int, groups: int, share: int, threads: int) -> tuple[int, int]:
    """Rows that are computed together where they are of one prompt, and heads of a group: work for every thread."""
    together = max(
        (
            count
            for count in (1, 2, 4, 8)
            if rows % count == 0 and count * share <= TOGETHER_MAX and rows // count * groups >= 2 * threads
        ),
        default=1,
    )
    parts = (part for part in range(1, share + 1) if share % part == 0)
    part = next((part for part in parts if rows // together * groups * part >= threads), share)
    return together, share // part


def _write(
    code: Code, queries: Tensor, cache: Tensor, window: int, row: str, rows: int, head: str, heads: int
) -> None:
    """The heads from `head` on of `rows` rows: together if all are in one slot, else row by row."""
    if rows == 1:
        _Rows(code, queries, cache, window, row, 1, head, heads).write()
        return
    slot = code.load("i32", code.at("%slots", row, 4))
    same = "true"
    for other in range(1, rows):
        its = code.load("i32", code.beyond(code.at("%slots", row, 4), 4 * other))
        same = code(f"and i1 {same}, {code(f'icmp eq i32 {slot}, {its}')}")
    with code.when(same):
        _Rows(code, queries, cache, window, row, rows, head, heads).write()
    with code.when(code(f"xor i1 {same}, true")), code.loop("0", str(rows)) as index:
        _Rows(code, queries, cache, window, code(f"add i64 {row}, {index}"), 1, head, heads).write()


class _Rows:
    """Writes the attention of rows of one slot and of heads that read the same keys. A line is one row's head."""

    def __init__(
        self,
        code: Code,
        queries: Tensor,
        cache: Tensor,
        window: int,
        row: str,
        rows: int,
        head: str,
        heads: int,
    ) -> None:
        _, self.slots, self.groups, self.length, self.width = (int(size) for size in cache.shape)
        self.all_heads = int(queries.shape[1])
        self.half = cache.dtype == dtypes.float16
        self.size = 2 if self.half else 4  # bytes of an element
        self.code, self.window, self.row, self.head = code, window, row, head
        self.rows, self.heads, self.lines = rows, heads, rows * heads
        self.vectors = self.width // LANES
        index = code(f"add i64 {code(f'mul i64 {row}, {self.all_heads}')}, {head}")
        self.queries, self.out = (code.at(name, index, 4 * self.width) for name in ("%queries", "%out"))
        padded = -(-self.lines // LANES) * LANES
        self.begins, self.stops = code.array("i32", rows), code.array("i32", rows)
        self.best, self.fallen = code.array("float", padded), code.array("float", padded)
        self.totals = code.array("float", self.lines * LANES)
        self.weights = code.array("float", self.lines * STEP)  # scores at first
        self.sums = code.array("float", self.lines * self.width)

    def write(self) -> None:
        code = self.code
        group = code(f"udiv i64 {self.head}, {self.all_heads // self.groups}")
        slot = self._held("%slots", self.row, self.slots)
        line = code(f"add i64 {code(f'mul i64 {slot}, {self.groups}')}, {group}")
        values_at = self.slots * self.groups * self.length * self.width * self.size
        keys = code.at("%cache", line, self.length * self.width * self.size)
        values = code.beyond(keys, values_at)
        begin, stop = self._range()
        with code.loop("0", str(self.lines)) as index:
            code.store("float", _LOWEST, code.at(self.best, index, 4))
            code.store(_FLOATS, "zeroinitializer", code.at(self.totals, index, 64))
        with code.loop("0", str(self.lines * self.vectors)) as index:
            code.store(_FLOATS, "zeroinitializer", code.at(self.sums, index, 64), kept=True)
        last = code(f"udiv i64 {code(f'add i64 {stop}, {STEP - 1}')}, {STEP}")
        with code.loop(code(f"udiv i64 {begin}, {STEP}"), last) as step:
            step_bytes = STEP * self.width * self.size
            offset = code(f"mul i64 {step}, {step_bytes}")
            first = code(f"mul i64 {step}, {STEP}")
            keys_here, values_here = code.at(keys, offset, 1), code.at(values, offset, 1)
            self._scores(keys_here, coming=values_here)
            self._softmax(first)
            here = code.call("i64", "llvm.umin.i64", f"i64 {code(f'sub i64 {stop}, {first}')}", f"i64 {STEP}")
            self._values(values_here, here, coming=code.beyond(keys_here, step_bytes))
        self._finish()

    def _held(self, name: str, index: str, size: int) -> str:
        """A loaded index, held to [0, size)."""
        code = self.code
        value = code(f"sext i32 {code.load('i32', code.at(name, index, 4))} to i64")
        value = code.call("i64", "llvm.smax.i64", f"i64 {value}", "i64 0")
        return code.call("i64", "llvm.smin.i64", f"i64 {value}", f"i64 {size - 1}")

    def _range(self) -> tuple[str, str]:
        """Each row's positions, stored; and those that any row sees: from, to."""
        code = self.code
        most = code("zext i32 %length to i64")
        begin, stop = code.slot("i64", str(self.length)), code.slot("i64", "0")
        with code.loop("0", str(self.rows)) as index:
            own = self._held("%positions", code(f"add i64 {self.row}, {index}"), self.length)
            after = code.call("i64", "llvm.umin.i64", f"i64 {code(f'add i64 {own}, 1')}", f"i64 {most}")
            padding = code(f"icmp eq i64 {own}, {self.length - 1}")
            after = code(f"select i1 {padding}, i64 0, i64 {after}")
            from_ = "0"
            if self.window:
                far = code(f"sub i64 {own}, {self.window - 1}")
                from_ = code.call("i64", "llvm.smax.i64", f"i64 {far}", "i64 0")
            for array, value in ((self.begins, from_), (self.stops, after)):
                code.store("i32", code(f"trunc i64 {value} to i32"), code.at(array, index, 4))
            code.set(
                "i64",
                code.call("i64", "llvm.umin.i64", f"i64 {code.get('i64', begin)}", f"i64 {from_}"),
                begin,
            )
            code.set(
                "i64", code.call("i64", "llvm.umax.i64", f"i64 {code.get('i64', stop)}", f"i64 {after}"), stop
            )
        return code.get("i64", begin), code.get("i64", stop)

    def _vector(self, address: str) -> str:
        """16 of the cache's elements as float32."""
        if not self.half:
            return self.code.load(_FLOATS, address)
        return self.code(f"fpext <16 x half> {self.code.load('<16 x half>', address)} to {_FLOATS}")

    def _fused(self, total: str, a: str, b: str) -> str:
        return self.code(f"fadd {FAST} {_FLOATS} {total}, {self.code(f'fmul {FAST} {_FLOATS} {a}, {b}')}")

    def _number(self, address: str) -> str:
        return self.code.splat("float", self.code.load("float", address), LANES)

    def _line_offset(self, line: int) -> int:
        """Of a line's queries or results, bytes from those of the first."""
        row, head = divmod(line, self.heads)
        return 4 * self.width * (row * self.all_heads + head)

    def _scores(self, keys: str, coming: str) -> None:
        """Products of the queries with STEP positions' keys. What is `coming`, as much, is fetched meanwhile."""
        code = self.code
        apart = BLOCK * self.width * self.size
        for first in range(0, self.lines, TOGETHER_MAX):
            lines = range(first, min(first + TOGETHER_MAX, self.lines))
            totals = [[code.slot(_FLOATS, "zeroinitializer") for _ in range(STEP // BLOCK)] for _ in lines]
            with code.loop("0", str(self.width)) as element:
                if first == 0:
                    code.prefetch(code.at(coming, element, STEP * self.size), STEP * self.size)
                at = code.at(keys, element, BLOCK * self.size)
                blocks = [self._vector(code.beyond(at, block * apart)) for block in range(STEP // BLOCK)]
                query = code.at(self.queries, element, 4)
                for line, of_line in zip(lines, totals, strict=True):
                    number = self._number(code.beyond(query, self._line_offset(line)))
                    for total, block in zip(of_line, blocks, strict=True):
                        code.set(_FLOATS, self._fused(code.get(_FLOATS, total), block, number), total)
            for line, of_line in zip(lines, totals, strict=True):
                for index, total in enumerate(of_line):
                    at = code.beyond(self.weights, 4 * (line * STEP + index * BLOCK))
                    code.store(_FLOATS, code.get(_FLOATS, total), at)

    def _softmax(self, first: str) -> None:
        """Scores of the positions from `first` on become weights; `fallen` is what earlier ones are to be scaled by."""
        code = self.code
        lanes = ", ".join(f"i32 {lane}" for lane in range(BLOCK))
        start = code.splat("i32", code(f"trunc i64 {first} to i32"), BLOCK)
        places = [
            code(f"add <16 x i32> {start}, {code(f'add <16 x i32> <{lanes}>, splat (i32 {block * BLOCK})')}")
            for block in range(STEP // BLOCK)
        ]
        with code.loop("0", str(self.rows)) as row:
            stop = code.splat("i32", code.load("i32", code.at(self.stops, row, 4)), BLOCK)
            begin = code.splat("i32", code.load("i32", code.at(self.begins, row, 4)), BLOCK)
            seen = []
            for place in places:
                before = code(f"icmp slt <16 x i32> {place}, {stop}")
                after = code(f"icmp sge <16 x i32> {place}, {begin}")
                seen.append(code(f"and <16 x i1> {before}, {after}") if self.window else before)
            with code.loop("0", str(self.heads)) as head:
                line = code(f"add i64 {code(f'mul i64 {row}, {self.heads}')}, {head}")
                self._softmax_line(line, seen)
        padded = -(-self.lines // LANES)
        for index in range(padded):
            at = code.beyond(self.fallen, 64 * index)
            code.store(_FLOATS, exponential(code, code.load(_FLOATS, at)), at)

    def _softmax_line(self, line: str, seen: list[str]) -> None:
        code = self.code
        at = code.at(self.weights, line, 4 * STEP)
        scores = []
        for block, mask in enumerate(seen):
            score = code.load(_FLOATS, code.beyond(at, 4 * BLOCK * block))
            unseen = "splat (float 0xFFF0000000000000)"
            scores.append(code(f"select <16 x i1> {mask}, {_FLOATS} {score}, {_FLOATS} {unseen}"))
        best_at = code.at(self.best, line, 4)
        best = code.load("float", best_at)
        over = highest(code, larger(code, *scores))
        higher = code(f"select i1 {code(f'fcmp ogt float {over}, {best}')}, float {over}, float {best}")
        code.store("float", higher, best_at)
        code.store("float", code(f"fsub float {best}, {higher}"), code.at(self.fallen, line, 4))
        wide = code.splat("float", higher, LANES)
        for block, (score, mask) in enumerate(zip(scores, seen, strict=True)):
            weight = exponential(code, code(f"fsub {_FLOATS} {score}, {wide}"))
            weight = code(f"select <16 x i1> {mask}, {_FLOATS} {weight}, {_FLOATS} zeroinitializer")
            code.store(_FLOATS, weight, code.beyond(at, 4 * BLOCK * block))

    def _values(self, values: str, count: str, coming: str) -> None:
        """Add `count` positions' weighted values to what earlier ones gave, and fetch what is `coming`."""
        code = self.code
        for line in range(self.lines):
            at = code.beyond(self.totals, 64 * line)
            weights = [
                code.load(_FLOATS, code.beyond(self.weights, 4 * (line * STEP + block * BLOCK)))
                for block in range(STEP // BLOCK)
            ]
            fallen = self._number(code.beyond(self.fallen, 4 * line))
            total = code(f"fmul {_FLOATS} {code.load(_FLOATS, at, kept=True)}, {fallen}")
            for weight in weights:
                total = code(f"fadd {_FLOATS} {total}, {weight}")
            code.store(_FLOATS, total, at, kept=True)
        vectors = min(self.vectors, 4)
        lines = max(1, SUMS_MAX // vectors)
        for first in range(0, self.lines, lines):
            for left in range(0, self.vectors, vectors):
                some = range(left, min(left + vectors, self.vectors))
                some_lines = range(first, min(first + lines, self.lines))
                self._values_of(values, count, some_lines, some, coming if first == left == 0 else "")

    def _values_of(self, values: str, count: str, lines: range, vectors: range, coming: str) -> None:
        code = self.code
        sums = {}
        for line in lines:
            fallen = self._number(code.beyond(self.fallen, 4 * line))
            for vector in vectors:
                before = code.load(_FLOATS, self._sum_at(line, vector), kept=True)
                sums[line, vector] = code.slot(_FLOATS, code(f"fmul {_FLOATS} {before}, {fallen}"))
        with code.loop("0", count) as position:
            if coming:
                code.prefetch(code.at(coming, position, self.width * self.size), self.width * self.size)
            at = code.at(values, position, self.width * self.size)
            weight = code.at(self.weights, position, 4)
            found = {vector: self._vector(code.beyond(at, LANES * self.size * vector)) for vector in vectors}
            for line in lines:
                number = self._number(code.beyond(weight, 4 * STEP * line))
                for vector, value in found.items():
                    total = sums[line, vector]
                    code.set(_FLOATS, self._fused(code.get(_FLOATS, total), value, number), total)
        for (line, vector), total in sums.items():
            code.store(_FLOATS, code.get(_FLOATS, total), self._sum_at(line, vector), kept=True)

    def _sum_at(self, line: int, vector: int) -> str:
        return self.code.beyond(self.sums, 4 * (line * self.width + vector * LANES))

    def _finish(self) -> None:
        code = self.code
        for line in range(self.lines):
            weights = code.load(_FLOATS, code.beyond(self.totals, 64 * line), kept=True)
            total = code.call(
                "float", "llvm.vector.reduce.fadd.v16f32", "float 0.0", f"{_FLOATS} {weights}", fast=True
            )
            some = code(f"fcmp une float {total}, 0.0")  # a padding row sees nothing
            inverse = code(f"select i1 {some}, float {code(f'fdiv float 1.0, {total}')}, float 0.0")
            wide = code.splat("float", inverse, LANES)
            for vector in range(self.vectors):
                value = code.load(_FLOATS, self._sum_at(line, vector), kept=True)
                target = code.beyond(self.out, self._line_offset(line) + 64 * vector)
                code.store(_FLOATS, code(f"fmul {_FLOATS} {value}, {wide}"), target)
