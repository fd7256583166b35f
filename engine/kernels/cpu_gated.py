"""A feed-forward's activation on the CPU, in whole vectors."""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine.kernels.recording import call
from engine.kernels.vectors import FAST, Code, exponential, program, single

LANES = 16
THREADED_MIN = 8_192  # results; below it one thread is as fast
_FLOATS = "<16 x float>"


def gated(x: Tensor, gelu_factor: float, threads: int) -> Tensor:
    """As `engine.kernels.transformer.gated`, of a size that is a multiple of LANES; `gelu_factor` 0 for silu."""
    rows, size = x.shape[0], x.shape[1] // 2
    parts = size // LANES
    threads = threads if rows * size >= THREADED_MIN else 1

    def kernel(*buffers: UOp) -> UOp:
        code = Code()
        with code.loop(*code.share(rows * parts, threads)) as unit:
            row, part = code(f"udiv i64 {unit}, {parts}"), code(f"urem i64 {unit}, {parts}")
            at = code.at(code.at("%x", row, 8 * size), part, 4 * LANES)
            gate, up = code.load(_FLOATS, at), code.load(_FLOATS, code.beyond(at, 4 * size))
            value = activated(code, gate, up, gelu_factor)
            code.store(_FLOATS, value, code.at("%out", unit, 4 * LANES))
        name = f"gated_{rows}_{size}{'_gelu' if gelu_factor else ''}"
        return program(code, name, ["out", "x"], buffers, threads)

    return call(kernel, Tensor.empty(rows, size, dtype=dtypes.float32, device=x.device), x)


def activated(code: Code, gate: str, up: str, gelu_factor: float = 0.0) -> str:
    """Of 16 float32 each."""
    # (1 + tanh(z)) / 2 is the logistic function of 2 z
    inner = _gelu(code, gate, gelu_factor) if gelu_factor else gate
    falling = exponential(code, code(f"fneg {_FLOATS} {inner}"))
    below = code(f"fadd {_FLOATS} {falling}, splat (float 1.0)")
    return code(f"fdiv {_FLOATS} {code(f'fmul {_FLOATS} {gate}, {up}')}, {below}")


def _gelu(code: Code, gate: str, factor: float) -> str:
    cubic = code(f"fmul {_FLOATS} {code(f'fmul {_FLOATS} {gate}, {gate}')}, splat (float {single(0.044715)})")
    more = code(f"fmul {FAST} {_FLOATS} {code(f'fadd {_FLOATS} {cubic}, splat (float 1.0)')}, {gate}")
    return code(f"fmul {_FLOATS} {more}, splat (float {single(factor)})")
