"""The kernels that encoders need beside those of `transformer`: LayerNorm, exact GELU, sums of table rows.

R rows, I inputs; activations float32.
"""

from __future__ import annotations

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from engine.kernels.recording import call
from engine.kernels.transformer import LOG2_E, as_written, held, summed

# Abramowitz and Stegun 7.1.26: erf to 1.5e-7
_ERF_T = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def add_rows(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """x [R, I] plus the rows `indices` [R] of table [N, I]."""
    rows, inputs = x.shape

    def kernel(out: UOp, x: UOp, table: UOp, indices: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
        value = x[r, i] + table[held(indices[r], table.shape[0]), i]
        return out[r, i].store(value).end(r, i).sink(arg=KernelInfo(name=f"add_rows_{rows}_{inputs}"))

    return call(kernel, Tensor.empty(rows, inputs, dtype=dtypes.float32, device=x.device), x, table, indices)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """x [R, I] -> each row less its mean, divided by its standard deviation, times weight [I] plus bias [I]."""
    rows, inputs = x.shape
    opts = as_written(x)

    def mean(out: UOp, x: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1, axis_type=AxisType.REDUCE)
        value = summed(x[r, i], i) * (1.0 / inputs)
        return out[r].store(value).end(r).sink(arg=KernelInfo(name=f"mean_{rows}", opts_to_apply=opts))

    def inverse(out: UOp, x: UOp, mean: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1, axis_type=AxisType.REDUCE)
        off = x[r, i] - mean[r]
        value = (summed(off * off, i) * (1.0 / inputs) + epsilon).alu(Ops.SQRT).alu(Ops.RECIPROCAL)
        return out[r].store(value).end(r).sink(arg=KernelInfo(name=f"deviation_{rows}", opts_to_apply=opts))

    def normed(out: UOp, x: UOp, mean: UOp, inverse: UOp, weight: UOp, bias: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
        value = (x[r, i] - mean[r]) * inverse[r] * weight[i] + bias[i]
        return out[r, i].store(value).end(r, i).sink(arg=KernelInfo(name=f"layer_norm_{rows}_{inputs}"))

    def empty(*shape: int) -> Tensor:
        return Tensor.empty(*shape, dtype=dtypes.float32, device=x.device)

    means = call(mean, empty(rows), x)
    inverses = call(inverse, empty(rows), x, means)
    return call(normed, empty(rows, inputs), x, means, inverses, weight, bias)


def gelu(x: Tensor) -> Tensor:
    """x [R, I] -> x times the normal distribution's probability below x, not its approximation by tanh."""
    rows, inputs = x.shape

    def kernel(out: UOp, x: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
        value = x[r, i]
        z = value * 0.5**0.5
        size = z.maximum(z * -1.0)
        t = (size * _ERF_T + 1.0).alu(Ops.RECIPROCAL)
        series = UOp.const(dtypes.float32, 0.0)
        for factor in reversed(_ERF):
            series = (series + factor) * t
        tail = series * (size * size * -LOG2_E).alu(Ops.EXP2)  # 1 - erf(|z|)
        below = (value < 0.0).where(tail, tail * -1.0 + 2.0) * 0.5
        result = value * below
        return out[r, i].store(result).end(r, i).sink(arg=KernelInfo(name=f"gelu_{rows}_{inputs}"))

    return call(kernel, Tensor.empty(rows, inputs, dtype=dtypes.float32, device=x.device), x)
