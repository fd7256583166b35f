"""A mixture of experts on the CPU, in whole vectors: `engine.kernels.experts`' products with packed matrices.

Every row reads its own experts' panels. The loops go through the panels of an expert first and then through the rows,
so that rows that share an expert find its panel in the cache.
"""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine.kernels.cpu_gated import activated
from engine.kernels.cpu_matmul import PACKED_THREADED_MIN, Panel, buffer_names
from engine.kernels.matrices import LANES, Matrix, PackedForm
from engine.kernels.recording import call
from engine.kernels.vectors import FAST, Code, program

_FLOATS = "<16 x float>"


def fits(matrix: Matrix, count: int) -> bool:
    """Whether the `count` experts that lie one below the other in a matrix are packed, in panels of their own."""
    return all(isinstance(part.form, PackedForm) for part in matrix.parts) and (
        len(matrix.parts) == 1 and matrix.shape[0] % (count * LANES) == 0
    )


def expand(x: Tensor, gate: Matrix, up: Matrix, chosen: Tensor, count: int, threads: int) -> Tensor:
    """As `engine.kernels.experts.expand`; x [R, I / 32, RECORD] as `engine.kernels.cpu_matmul.quantised` gives it."""
    rows, used = chosen.shape
    first, second = _form(gate), _form(up)
    panels = first.outputs // count // LANES
    threads = _threads(threads, rows * used, first, count)

    def kernel(*buffers: UOp) -> UOp:
        code, names = Code(), [*buffer_names(first, "gate_"), *buffer_names(second, "up_")]
        with code.loop(*code.share(panels, threads)) as panel, code.loop("0", str(rows * used)) as choice:
            row = code(f"udiv i64 {choice}, {used}")
            number = _panel(code, choice, panel, panels, count)
            (a,) = Panel(code, first, number, "gate_").products([row])
            (b,) = Panel(code, second, number, "up_").products([row])
            cell = code(f"add i64 {code(f'mul i64 {choice}, {panels}')}, {panel}")
            code.store(_FLOATS, activated(code, a, b), code.at("%out", cell, 4 * LANES))
        return program(
            code, f"experts_expand_{rows}_{used}", ["out", "x", "chosen", *names], buffers, threads
        )

    out = Tensor.empty(rows * used, panels * LANES, dtype=dtypes.float32, device=x.device)
    return call(kernel, out, x, chosen, *gate.only.tensors, *up.only.tensors)


def contract(
    inner: Tensor,
    down: Matrix,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor | None,
    count: int,
    threads: int,
) -> Tensor:
    """As `experts.contract`; inner [R K, F / 32, RECORD] as `cpu_matmul.quantised` gives it."""
    rows, used = chosen.shape
    form, added = _form(down), residual is not None
    panels = form.outputs // count // LANES
    threads = _threads(threads, rows * used, form, count)

    def kernel(*buffers: UOp) -> UOp:
        code, names = Code(), ["out", "x", "chosen", "shares", *buffer_names(form)]
        with code.loop(*code.share(panels, threads)) as panel, code.loop("0", str(rows)) as row:
            cell = code(f"add i64 {code(f'mul i64 {row}, {panels}')}, {panel}")
            there = code.at("%residual", cell, 4 * LANES) if added else ""
            total = code.slot(_FLOATS, code.load(_FLOATS, there) if added else "zeroinitializer")
            with code.loop("0", str(used)) as k:
                choice = code(f"add i64 {code(f'mul i64 {row}, {used}')}, {k}")
                (value,) = Panel(code, form, _panel(code, choice, panel, panels, count)).products([choice])
                share = code.splat("float", code.load("float", code.at("%shares", choice, 4)), 16)
                term = code(f"fmul {FAST} {_FLOATS} {value}, {share}")
                code.set(_FLOATS, code(f"fadd {FAST} {_FLOATS} {code.get(_FLOATS, total)}, {term}"), total)
            code.store(_FLOATS, code.get(_FLOATS, total), code.at("%out", cell, 4 * LANES))
        names += ["residual"] if added else []
        return program(code, f"experts_contract_{rows}_{used}", names, buffers, threads)

    out = Tensor.empty(rows, panels * LANES, dtype=dtypes.float32, device=inner.device)
    extras = () if residual is None else (residual,)
    return call(kernel, out, inner, chosen, shares, *down.only.tensors, *extras)


def _form(matrix: Matrix) -> PackedForm:
    form = matrix.only.form
    assert isinstance(form, PackedForm)
    return form


def _threads(threads: int, choices: int, form: PackedForm, count: int) -> int:
    outputs = form.outputs // count
    return 1 if choices * outputs * form.inputs < PACKED_THREADED_MIN else min(threads, outputs // LANES)


def _panel(code: Code, choice: str, panel: str, panels: int, count: int) -> str:
    """The number in the whole matrix of panel `panel` of an expert: of row and slot `choice`, held to the experts."""
    expert = code.load("i32", code.at("%chosen", choice, 4))
    expert = code.call("i32", "llvm.smax.i32", f"i32 {expert}", "i32 0")
    expert = code.call("i32", "llvm.smin.i32", f"i32 {expert}", f"i32 {count - 1}")
    wide = code(f"zext i32 {expert} to i64")
    return code(f"add i64 {code(f'mul i64 {wide}, {panels}')}, {panel}")
