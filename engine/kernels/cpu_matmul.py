"""Products with packed matrices on the CPU: activations become 16-bit integers, so that two products are one addition.

A group of 32 inputs of a row is 32 integers of 16 bits, their scale and the sum of what they stand for. Each is rounded
to 1 / 32767 of the group's largest, finer than float16: unlike llama.cpp's 8 bits it costs no accuracy worth naming.
Processors multiply such pairs and add them in one instruction (`vpdpwssd`, `pmaddwd`), 32 at a time with AVX-512.

A group's integers are in the order in which packed words hold their weights: `PAIRS`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import llvmlite.binding as llvm
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine.kernels.matrices import LANES, PackedForm, Part
from engine.kernels.recording import call
from engine.kernels.vectors import FAST, Code, highest, larger, program

GROUP = 32  # inputs
RECORD = 18  # words of a group: 16 pairs, scale, sum
# Word `k` of four-bit weights holds inputs 4 k to 4 k + 3 and, in the upper halves of its bytes, those 16 on. Shifted
# by 0, 4, 8 and 12 it shows one pair each, in its 16-bit halves.
PAIRS = [
    (4 * k + first, 4 * k + first + 2) for k in range(4) for first in (0, 16, 1, 17)
]  # of inputs, by position
PACKED_THREADED_MIN = 65_536  # weights; below it one thread is as fast
QUANTISED_THREADED_MIN = 4_096  # activations, likewise
# What is fetched ahead of the words in use, as processors do by themselves, but too late once several rows share them.
AHEAD_BYTES = 3_072
_EVEN, _ODD = range(0, 32, 2), range(1, 32, 2)
_FLOATS, _INTS, _HALVES = "<16 x float>", "<16 x i32>", "<32 x i16>"


@functools.cache
def _features() -> frozenset[str]:
    return frozenset(llvm.get_host_cpu_features().flatten().split(","))


def _rows_at_once() -> int:
    """Rows that share each loaded weight: as many as the registers hold."""
    return 8 if "+avx512f" in _features() else 2


def quantised(x: Tensor, inverse: Tensor | None, weight: Tensor | None, threads: int) -> Tensor:
    """x [R, I], or x * inverse[r] * weight[i] -> [R, I / 32, RECORD], int32 words of which some are float32."""
    rows, inputs = x.shape
    normed = inverse is not None
    threads = min(threads, rows) if rows * inputs >= QUANTISED_THREADED_MIN else 1

    def kernel(out: UOp, x: UOp, *norm: UOp) -> UOp:
        code, names = Code(), ["out", "x", *(["inverse", "weight"] if norm else [])]
        with code.loop(*code.share(rows, threads)) as r:
            source = code.at("%x", r, 4 * inputs)
            target = code.at("%out", r, 4 * RECORD * (inputs // GROUP))
            factor = code.load("float", code.at("%inverse", r, 4)) if norm else ""
            with code.loop("0", str(inputs // GROUP)) as g:
                _quantise(code, code.at(source, g, 4 * GROUP), code.at(target, g, 4 * RECORD), factor, g)
        name = f"quantised_{rows}_{inputs}{'_normed' if norm else ''}"
        return program(code, name, names, (out, x, *norm), threads)

    out = Tensor.empty(rows, inputs // GROUP, RECORD, dtype=dtypes.int32, device=x.device)
    return call(kernel, out, x, *((inverse, weight) if normed else ()))


def _quantise(code: Code, source: str, target: str, factor: str, group: str) -> None:
    """One group."""
    halves = [code.load(_FLOATS, code.beyond(source, at)) for at in (0, 64)]
    if factor:
        wide = code.splat("float", factor, 16)
        norm = code.at("%weight", group, 4 * GROUP)
        weights = [code.load(_FLOATS, code.beyond(norm, at)) for at in (0, 64)]
        halves = [code(f"fmul {FAST} {_FLOATS} {half}, {wide}") for half in halves]
        halves = [
            code(f"fmul {FAST} {_FLOATS} {half}, {norm}") for half, norm in zip(halves, weights, strict=True)
        ]
    first, second = (code.call(_FLOATS, "llvm.fabs.v16f32", f"{_FLOATS} {half}") for half in halves)
    most = highest(code, larger(code, first, second))
    both = code(f"fadd {FAST} {_FLOATS} {halves[0]}, {halves[1]}")
    total = code.call("float", "llvm.vector.reduce.fadd.v16f32", "float 0.0", f"{_FLOATS} {both}", fast=True)
    some = code(f"fcmp ogt float {most}, 0.0")
    finer = code(f"select i1 {some}, float {code(f'fdiv float 32767.0, {most}')}, float 0.0")
    wide = code.splat("float", finer, 16)
    integers = []
    for half in halves:
        scaled = code(f"fmul {_FLOATS} {half}, {wide}")
        rounded = code.call(_FLOATS, "llvm.rint.v16f32", f"{_FLOATS} {scaled}")
        integers.append(code(f"trunc {_INTS} {code(f'fptosi {_FLOATS} {rounded} to {_INTS}')} to <16 x i16>"))
    low, high = integers
    ordered = code.shuffle("<16 x i16>", low, high, [input for pair in PAIRS for input in pair])
    code.store(_HALVES, ordered, target)
    # the sum times 0 is 0, or NaN where an input is infinite or NaN: what is computed with the scale then shows it
    shown = code(f"fmul float {total}, 0.0")
    scale = code(f"fadd float {code(f'fdiv float {most}, 32767.0')}, {shown}")
    code.store("float", scale, code.beyond(target, 64))
    code.store("float", total, code.beyond(target, 68))


def product(
    out: Tensor, x: Tensor, part: Part, top: int, bias: Tensor | None, residual: Tensor | None, threads: int
) -> Tensor:
    """Columns of `out` [R, O] from `top` on: x, as `quantised` gives it, times the packed part, and what is added."""
    rows, width = out.shape
    form = part.form
    assert isinstance(form, PackedForm)
    if form.outputs * form.inputs * rows < PACKED_THREADED_MIN:
        threads = 1
    threads = min(threads, -(-form.outputs // LANES))
    added = (bias is not None, residual is not None)

    def kernel(*buffers: UOp) -> UOp:
        names = ["out", "x", *buffer_names(form)]
        names += [name for name, there in zip(("bias", "residual"), added, strict=True) if there]
        code = Code()
        with code.loop(*code.share(-(-form.outputs // LANES), threads)) as panel:
            writer = _Product(code, form, panel, width, top, names)
            step = min(rows, _rows_at_once())
            if rows >= step:
                with code.loop("0", str(rows // step)) as tile:
                    writer.rows(code(f"mul i64 {tile}, {step}"), step)
            if rows % step:
                writer.rows(str(rows - rows % step), rows % step)
        name = f"packed_{rows}_{form.outputs}_{form.inputs}"
        return program(code, name, names, buffers, threads)

    extras = [tensor for tensor in (bias, residual) if tensor is not None]
    return call(kernel, out, x, *part.tensors, *extras)


def buffer_names(form: PackedForm, prefix: str = "") -> list[str]:
    """What a kernel calls the tensors of a part of this form."""
    return [f"{prefix}{name}" for name in ("words", "scales", *(["minimums"] if form.layout.minimum else []))]


class Panel:
    """Reads a panel of a packed matrix: LANES outputs, multiplied with rows of activations."""

    def __init__(self, code: Code, form: PackedForm, panel: str, prefix: str = "") -> None:
        """`panel` is its number; `prefix` begins the names of the matrix's buffers, see `buffer_names`."""
        self.code, self.form = code, form
        layout, inputs = form.layout, form.inputs
        self.groups = inputs // GROUP
        self.scale_bytes = 4 if layout.wide else 2
        self.word_bytes = 4 * LANES * (GROUP // layout.elements)  # of a group
        self.words = code.at(f"%{prefix}words", panel, self.word_bytes * self.groups)
        scales = LANES * self.scale_bytes * (inputs // layout.group)
        self.scales = code.at(f"%{prefix}scales", panel, scales)
        self.minimums = code.at(f"%{prefix}minimums", panel, scales) if layout.minimum else ""

    def products(self, rows: Sequence[str]) -> list[str]:
        """With each row (i64 numbers) of `%x`: 16 float32."""
        code, group = self.code, self.form.layout.group
        sources = [code.at("%x", row, 4 * RECORD * self.groups) for row in rows]
        sums = [code.slot(_FLOATS, "zeroinitializer") for _ in rows]
        with code.loop("0", str(self.groups)) as g:
            pairs = [code.at(source, g, 4 * RECORD) for source in sources]
            scales = self._scales(self.scales, g, GROUP // group)
            minimums = self._scales(self.minimums, g, 1) if self.minimums else []
            totals = self._integers(g, pairs)
            for row, (source, total) in enumerate(zip(pairs, totals, strict=True)):
                value = code.get(_FLOATS, sums[row])
                own = code.splat("float", code.load("float", code.beyond(source, 64)), 16)
                for scale, part in zip(scales, total, strict=True):
                    factor = code(f"fmul {FAST} {_FLOATS} {scale}, {own}")
                    term = code(
                        f"fmul {FAST} {_FLOATS} {code(f'sitofp {_INTS} {part} to {_FLOATS}')}, {factor}"
                    )
                    value = code(f"fadd {FAST} {_FLOATS} {value}, {term}")
                for minimum in minimums:
                    whole = code.splat("float", code.load("float", code.beyond(source, 68)), 16)
                    value = code(
                        f"fadd {FAST} {_FLOATS} {value}, {code(f'fmul {FAST} {_FLOATS} {minimum}, {whole}')}"
                    )
                code.set(_FLOATS, value, sums[row])
        return [code.get(_FLOATS, each) for each in sums]

    def _scales(self, base: str, group: str, count: int) -> list[str]:
        code, size = self.code, self.scale_bytes
        of_group = LANES * size * count
        at = code.at(base, group, of_group)
        code.prefetch(code.beyond(at, AHEAD_BYTES // self.word_bytes * of_group), of_group)
        if self.form.layout.wide:
            return [code.load(_FLOATS, code.beyond(at, LANES * size * each)) for each in range(count)]
        halves = [code.load("<16 x half>", code.beyond(at, LANES * size * each)) for each in range(count)]
        return [code(f"fpext <16 x half> {half} to {_FLOATS}") for half in halves]

    def _integers(self, group: str, rows: list[str]) -> list[list[str]]:
        """For each row the sums of products of a group's inputs, or of its two halves."""
        code, layout = self.code, self.form.layout
        count = GROUP // layout.elements
        at = code.at(self.words, group, self.word_bytes)
        code.prefetch(code.beyond(at, AHEAD_BYTES), self.word_bytes)
        totals = [["zeroinitializer"] * (GROUP // layout.group) for _ in rows]
        for k in range(count):
            word = code(f"bitcast {_INTS} {code.load(_INTS, code.beyond(at, 4 * LANES * k))} to {_HALVES}")
            for position, weights in self._shifted(word, k):
                for row, source in enumerate(rows):
                    pair = code.load("i32", code.beyond(source, 4 * position))
                    part = k * len(totals[row]) // count
                    totals[row][part] = _multiply_add(code, totals[row][part], weights, pair)
        return totals

    def _shifted(self, word: str, k: int) -> list[tuple[int, str]]:
        """A word's pairs: their position among a group's, and their weights."""
        code = self.code
        if self.form.layout.bits == 8:
            low = code(f"ashr {_HALVES} {code(f'shl {_HALVES} {word}, splat (i16 8)')}, splat (i16 8)")
            high = code(f"ashr {_HALVES} {word}, splat (i16 8)")
            first = 4 * (k % 4) + k // 4
            return [(first, low), (first + 2, high)]
        found = []
        for shift in range(4):
            shown = code(f"lshr {_HALVES} {word}, splat (i16 {4 * shift})") if shift else word
            found.append(
                (4 * k + shift, code(f"and {_HALVES} {shown}, splat (i16 15)") if shift < 3 else shown)
            )
        return found


class _Product:
    """Writes one panel's outputs of some rows."""

    def __init__(
        self, code: Code, form: PackedForm, panel: str, width: int, top: int, names: Sequence[str]
    ) -> None:
        self.code, self.panel = code, Panel(code, form, panel)
        self.width, self.names = width, names
        first = code(f"mul i64 {panel}, {LANES}")
        self.column = code(f"add i64 {first}, {top}")
        left = code(f"sub i64 {form.outputs}, {first}")
        lanes = ", ".join(f"i64 {lane}" for lane in range(LANES))
        self.mask = code(f"icmp ult <16 x i64> <{lanes}>, {code.splat('i64', left, 16)}")

    def rows(self, first: str, count: int) -> None:
        numbers = [self.code(f"add i64 {first}, {row}") for row in range(count)]
        for row, value in zip(numbers, self.panel.products(numbers), strict=True):
            self._finish(row, value)

    def _finish(self, row: str, value: str) -> None:
        """Add what is to be added, and store."""
        code = self.code
        cell = code(f"add i64 {code(f'mul i64 {row}, {self.width}')}, {self.column}")
        for name, index in (("bias", self.column), ("residual", cell)):
            if name in self.names:
                there = code.at(f"%{name}", index, 4)
                more = code.call(
                    _FLOATS,
                    "llvm.masked.load.v16f32.p0",
                    f"ptr {there}",
                    "i32 4",
                    f"<16 x i1> {self.mask}",
                    f"{_FLOATS} zeroinitializer",
                )
                value = code(f"fadd {FAST} {_FLOATS} {value}, {more}")
        target = code.at("%out", cell, 4)
        arguments = (f"{_FLOATS} {value}", f"ptr {target}", "i32 4", f"<16 x i1> {self.mask}")
        code.run("llvm.masked.store.v16f32.p0", *arguments)


def _multiply_add(code: Code, total: str, weights: str, pair: str) -> str:
    """total + the sums of neighbours' products: 16 lanes of two weights, one pair of activations for all."""
    wide = code.splat("i32", pair, 16)
    both = code(f"bitcast {_INTS} {wide} to {_HALVES}")
    longer = [code(f"sext {_HALVES} {each} to <32 x i32>") for each in (weights, both)]
    products = code(f"mul nsw <32 x i32> {longer[0]}, {longer[1]}")
    even, odd = (code.shuffle("<32 x i32>", products, "poison", order) for order in (_EVEN, _ODD))
    return code(f"add {_INTS} {total}, {code(f'add {_INTS} {even}, {odd}')}")
