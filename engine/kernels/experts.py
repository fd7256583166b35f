"""The kernels of a mixture of experts: each row's best experts, and products with their matrices only.

As in `engine.kernels.transformer`: R rows, I inputs, O outputs, F the experts' inner size; X experts, K of them for
each row. The experts' matrices lie one below the other, [X O, I]. Every row reads its own experts' weights, which is
what decoding needs; a prompt's rows that share an expert read it once each.
"""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from engine.kernels import cpu_experts, cpu_matmul
from engine.kernels.matrices import Matrix
from engine.kernels.recording import call
from engine.kernels.transformer import (
    LOG2_E,
    Normed,
    as_written,
    held,
    in_vectors,
    summed,
)


def choose(scores: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """scores [R, X] -> the `used` best experts [R, K], best first, and the softmax over their scores [R, K].

    A score that is not a number is among the best, so that the shares of several are none either, and show it.
    """
    rows, experts = scores.shape
    opts = as_written(scores)

    def ranks(out: UOp, scores: UOp) -> UOp:
        r, e = UOp.range(rows, 0), UOp.range(experts, 1)
        n = UOp.range(experts, 2, axis_type=AxisType.REDUCE)
        mine, other = (_ordered(scores[r, at]) for at in (e, n))
        one, zero = UOp.const(dtypes.int32, 1), UOp.const(dtypes.int32, 0)
        earlier = (n < e).where(one, zero)  # of equals the first
        ahead = (mine < other).where(one, (other < mine).where(zero, earlier))
        info = KernelInfo(name=f"ranks_{rows}_{experts}", opts_to_apply=opts)
        return out[r, e].store(_total(ahead, n)).end(r, e).sink(arg=info)

    def chosen(out: UOp, ranks: UOp) -> UOp:
        r, k = UOp.range(rows, 0), UOp.range(used, 1)
        e = UOp.range(experts, 2, axis_type=AxisType.REDUCE)
        zero = UOp.const(dtypes.int32, 0)
        value = ranks[r, e].ne(k.cast(dtypes.int32)).where(zero, e.cast(dtypes.int32))
        info = KernelInfo(name=f"chosen_{rows}_{experts}_{used}", opts_to_apply=opts)
        return out[r, k].store(_total(value, e)).end(r, k).sink(arg=info)

    def shares(out: UOp, scores: UOp, chosen: UOp) -> UOp:
        r, k = UOp.range(rows, 0), UOp.range(used, 1)
        n = UOp.range(used, 2, axis_type=AxisType.REDUCE)
        best, mine, other = (
            scores[r, held(chosen[r, at], experts)] for at in (UOp.const(dtypes.weakint, 0), k, n)
        )
        value = ((mine - best) * LOG2_E).alu(Ops.EXP2)
        total = _total(((other - best) * LOG2_E).alu(Ops.EXP2), n)
        info = KernelInfo(name=f"shares_{rows}_{experts}_{used}", opts_to_apply=opts)
        return out[r, k].store(value / total).end(r, k).sink(arg=info)

    def empty(size: int, dtype: object) -> Tensor:
        return Tensor.empty(rows, size, dtype=dtype, device=scores.device)

    order = call(ranks, empty(experts, dtypes.int32), scores)
    best = call(chosen, empty(used, dtypes.int32), order)
    return best, call(shares, empty(used, dtypes.float32), scores, best)


def _ordered(score: UOp) -> UOp:
    """NaN as infinity: comparisons with it would be no order, and no ranks."""
    return score.ne(score).where(UOp.const(dtypes.float32, float("inf")), score)


def _total(value: UOp, over: UOp) -> UOp:
    """`summed`. Of a loop of one, which tinygrad drops, it could not sum what does not depend on it."""
    return summed(value, over) if over.vmax else value.substitute({over: UOp.const(dtypes.weakint, 0)})


def expand(x: Normed, gate: Matrix, up: Matrix, chosen: Tensor, count: int, threads: int = 1) -> Tensor:
    """x [R, I] through its experts' gate and up matrices [X F, I]: silu(gate) * up, [R K, F]."""
    if in_vectors(x.x) and cpu_experts.fits(gate, count) and cpu_experts.fits(up, count):
        integers = cpu_matmul.quantised(x.x, x.inverse, x.weight, threads)
        return cpu_experts.expand(integers, gate, up, chosen, count, threads)
    values = x.applied()
    rows = values.shape[0]
    used, size = chosen.shape[1], gate.shape[0] // count
    opts = as_written(values)
    first, second, split = gate.only.form, up.only.form, len(gate.only.tensors)

    def kernel(out: UOp, x: UOp, chosen: UOp, *matrices: UOp) -> UOp:
        r, k, f = UOp.range(rows, 0), UOp.range(used, 1), UOp.range(size, 2)
        line = held(chosen[r, k], count) * size + f
        a, b = (
            (x[r, form.column(*ranges)] * form.value(tensors, line, *ranges)).reduce(*ranges, arg=Ops.ADD)
            for form, tensors, ranges in (
                (first, matrices[:split], first.ranges(3, AxisType.REDUCE)),
                (second, matrices[split:], second.ranges(5, AxisType.REDUCE)),
            )
        )
        value = a * b * ((a * -LOG2_E).alu(Ops.EXP2) + 1.0).alu(Ops.RECIPROCAL)
        info = KernelInfo(name=f"expand_{rows}_{used}_{size}", opts_to_apply=opts)
        return out[r * used + k, f].store(value).end(r, k, f).sink(arg=info)

    out = Tensor.empty(rows * used, size, dtype=dtypes.float32, device=values.device)
    return call(kernel, out, values, chosen, *gate.only.tensors, *up.only.tensors)


def contract(
    inner: Tensor,
    down: Matrix,
    chosen: Tensor,
    shares: Tensor,
    residual: Tensor | None,
    count: int,
    threads: int = 1,
) -> Tensor:
    """The experts' results, weighed and added: inner [R K, F], down [X E, F], residual [R, E] -> [R, E]."""
    if in_vectors(inner) and cpu_experts.fits(down, count):
        integers = cpu_matmul.quantised(inner, None, None, threads)
        return cpu_experts.contract(integers, down, chosen, shares, residual, count, threads)
    rows, used = chosen.shape
    opts = as_written(inner)
    form = down.only.form
    outputs, split = form.outputs // count, len(down.only.tensors)

    def kernel(out: UOp, inner: UOp, chosen: UOp, shares: UOp, *more: UOp) -> UOp:
        r, o = UOp.range(rows, 0), UOp.range(outputs, 1)
        k = UOp.range(used, 2, axis_type=AxisType.REDUCE)
        ranges = form.ranges(3, AxisType.REDUCE)
        line = held(chosen[r, k], count) * outputs + o
        weight = form.value(more[:split], line, *ranges)
        value = inner[r * used + k, form.column(*ranges)] * weight * shares[r, k]
        total = value.reduce(k, *ranges, arg=Ops.ADD)
        if residual is not None:
            total = more[-1][r, o] + total
        info = KernelInfo(name=f"contract_{rows}_{outputs}_{used}", opts_to_apply=opts)
        return out[r, o].store(total).end(r, o).sink(arg=info)

    out = Tensor.empty(rows, outputs, dtype=dtypes.float32, device=inner.device)
    extras = () if residual is None else (residual,)
    return call(kernel, out, inner, chosen, shares, *down.only.tensors, *extras)
