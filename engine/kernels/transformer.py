"""The kernels of a transformer step that plain tensor operations make slow, written as tinygrad UOps.

A step works on *rows*: row `r` is one token of the run in slot `slots[r]` at position `positions[r]`. Decoding runs
give one row each and a prompt gives as many as fit, so one graph serves prefill and decode together.

Shapes: R rows, I inputs, O outputs, H query heads, G key/value heads, D head dimension, S slots, C cache length
(context and some padding). Activations are float32, weights and caches float16 (or float32), indices int32.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from engine.kernels import cpu_attention, cpu_gated, cpu_matmul, vectors
from engine.kernels.matrices import LANES, DenseForm, Matrix, PackedForm, Part
from engine.kernels.recording import call

LOG2_E = 1.4426950408889634
GELU_FACTOR = 1.5957691216057308  # 2 sqrt(2 / pi)
THREADED_MACS_MIN = 4_000_000  # below it, waking the second core costs more than it saves


def summed(value: UOp, over: UOp) -> UOp:
    return value.reduce(over, arg=Ops.ADD)


def _on_cpu(tensor: Tensor) -> bool:
    return str(tensor.device).split(":")[0] == "CPU"


def in_vectors(tensor: Tensor) -> bool:
    """Whether kernels of whole vectors compute what is on the tensor's device."""
    return _on_cpu(tensor) and vectors.usable(tensor)


def as_written(tensor: Tensor) -> tuple[Opt, ...] | None:
    """On the CPU the loops stay as they are, for LLVM to vectorise; a GPU's need tinygrad's own heuristics."""
    return () if _on_cpu(tensor) else None


def _divisor(size: int, choices: tuple[int, ...]) -> int:
    """The first of `choices` that divides `size`, or 1."""
    return next((choice for choice in choices if size % choice == 0), 1)


def _cpu_matmul_opts(rows: int, form: DenseForm | PackedForm, threads: int) -> tuple[Opt, ...]:
    """Loop shapes measured to be fastest through LLVM 22: the sum over inputs is left to its loop vectoriser.

    Several rows share each weight that is loaded (upcast over rows); two outputs at once hide the latency of adds.
    """
    outputs = form.outputs
    # of whole panels tinygrad makes two loops, over panels and over lanes, and the first one is what can be cut
    lanes = LANES if isinstance(form, PackedForm) and outputs % LANES == 0 else 1
    opts: list[Opt] = []
    outputs_axis = 0
    if rows > 1:
        block = _divisor(rows, (8, 4, 2))
        if block > 1:
            opts.append(Opt(OptOps.UPCAST, 0, block))
        outputs_axis = 1 if rows > block else 0
        if outputs // lanes % 2 == 0 and rows >= 8:
            opts.append(Opt(OptOps.UPCAST, outputs_axis, 2))
            outputs //= 2
    if threads > 1 and outputs // lanes % threads == 0 and rows * outputs * form.inputs >= THREADED_MACS_MIN:
        opts.append(Opt(OptOps.THREAD, outputs_axis, threads))
    return tuple(opts)


@dataclass(frozen=True)
class Normed:
    """Rows whose RMSNorm is still to be applied, by the product that reads them: `x * inverse[r] * weight`."""

    x: Tensor  # [R, I]
    inverse: Tensor  # [R], see `inverse_norm`
    weight: Tensor  # [I]

    def applied(self) -> Tensor:
        """[R, I]."""
        rows, inputs = self.x.shape
        opts = as_written(self.x)

        def kernel(out: UOp, x: UOp, inverse: UOp, weight: UOp) -> UOp:
            r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
            value = x[r, i] * inverse[r] * weight[i]
            info = KernelInfo(name=f"normed_{rows}_{inputs}", opts_to_apply=opts)
            return out[r, i].store(value).end(r, i).sink(arg=info)

        out = Tensor.empty(rows, inputs, dtype=dtypes.float32, device=self.x.device)
        return call(kernel, out, self.x, self.inverse, self.weight)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Normed:
    """x [R, I], weight [I]."""
    return Normed(x, inverse_norm(x, epsilon), weight)


def matmul(
    x: Tensor | Normed,
    weight: Matrix | Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """`x @ weight.T + bias + residual`.

    x [R, I], weight [O, I] (a tensor is a dense matrix), bias [O], residual [R, O] -> [R, O].
    """
    matrix = weight if isinstance(weight, Matrix) else Matrix.dense(weight)
    values = x.x if isinstance(x, Normed) else x
    rows, outputs = values.shape[0], matrix.shape[0]
    out, top = Tensor.empty(rows, outputs, dtype=dtypes.float32, device=values.device), 0
    integers: Tensor | None = None
    for part in matrix.parts:
        if isinstance(part.form, PackedForm) and in_vectors(values):
            if integers is None:
                norm = x if isinstance(x, Normed) else None
                inverse, factors = (norm.inverse, norm.weight) if norm else (None, None)
                integers = cpu_matmul.quantised(values, inverse, factors, threads)
            out = cpu_matmul.product(out, integers, part, top, bias, residual, threads)
        else:
            if isinstance(x, Normed) and _on_cpu(values):  # once for all outputs; a GPU saves the launch
                x = x.applied()
            out = _product(out, x, part, top, bias, residual, threads)
        top += part.form.outputs
    return out


def _product(
    out: Tensor,
    x: Tensor | Normed,
    part: Part,
    top: int,
    bias: Tensor | None,
    residual: Tensor | None,
    threads: int,
) -> Tensor:
    """Columns of `out` from `top` on."""
    normed, form, count = isinstance(x, Normed), part.form, len(part.tensors)
    values, norm = (x.x, (x.inverse, x.weight)) if isinstance(x, Normed) else (x, ())
    rows, inputs = values.shape
    extras = [*norm, *(tensor for tensor in (bias, residual) if tensor is not None)]
    opts = _cpu_matmul_opts(rows, form, threads) if _on_cpu(values) else None

    def kernel(out: UOp, x: UOp, *more: UOp) -> UOp:
        r, o = UOp.range(rows, 0), UOp.range(form.outputs, 1)
        ranges = form.ranges(2, AxisType.REDUCE)
        left = list(more[count:])
        i = form.column(*ranges)
        value = x[r, i]
        if normed:
            inverse, weight = left.pop(0), left.pop(0)
            value = value * weight[i]
        value = (value * form.value(more[:count], o, *ranges)).reduce(*ranges, arg=Ops.ADD)
        if normed:
            value = value * inverse[r]
        if bias is not None:
            value = value + left.pop(0)[top + o]
        if residual is not None:
            value = value + left.pop(0)[r, top + o]
        info = KernelInfo(name=f"matmul_{rows}_{form.outputs}_{inputs}", opts_to_apply=opts)
        return out[r, top + o].store(value).end(r, o).sink(arg=info)

    return call(kernel, out, values, *part.tensors, *extras)


def gather_rows(
    table: Matrix | Tensor, indices: Tensor, factor: float = 1.0, share: tuple[int, int] | None = None
) -> Tensor:
    """table [N, I], indices [R] -> float32 [R, I]: embedding look-up without a one-hot product.

    `share` says which rows of a larger table these N are: the others are zero.
    """
    part = (table if isinstance(table, Matrix) else Matrix.dense(table)).only
    form, rows, inputs = part.form, indices.shape[0], part.form.inputs

    def kernel(out: UOp, *given: UOp) -> UOp:
        *tensors, indices = given  # last: of a table of one row it is not read, and tinygrad counts what is
        r, ranges = UOp.range(rows, 0), form.ranges(1)
        index = indices[r] - share[0] if share else indices[r]
        value = form.value(tensors, held(index, form.outputs), *ranges)
        value = value if factor == 1.0 else value * factor
        if share:
            value = ((index >= 0) & (index < form.outputs)).where(value, UOp.const(dtypes.float32, 0.0))
        info = KernelInfo(name=f"gather_{rows}_{inputs}")
        return out[r, form.column(*ranges)].store(value).end(r, *ranges).sink(arg=info)

    out = Tensor.empty(rows, inputs, dtype=dtypes.float32, device=indices.device)
    return call(kernel, out, *part.tensors, indices)


@dataclass(frozen=True)
class Rotation:
    """How a head's elements are paired for rotary positions."""

    halves: bool = (
        False  # pairs (j, j + rotated / 2), as in Hugging Face's weights; else neighbours (2 j, 2 j + 1)
    )
    rotated: int = 0  # elements that take part when not all do; the others pass, by cosine 1 and sine 0

    def pair(self, j: UOp, width: int) -> tuple[UOp, UOp]:
        """The two elements of pair `j` of `width / 2`."""
        if not self.halves:
            return 2 * j, 2 * j + 1
        half = (self.rotated or width) // 2
        if 2 * half == width:
            return j, j + half
        return (j < half).where(j, 2 * j), (j < half).where(j + half, 2 * j + 1)


NEIGHBOURS = Rotation()


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each query and key head before it is rotated: the inverse norms of a step, and the heads' weights."""

    inverse: Tensor  # [R, H + G], see `inverse_head_norms`
    weight: Tensor  # [D]


def _by_vectors(cache: Tensor) -> bool:
    """Whether `cpu_attention` reads the cache, whose keys then lie in its blocks."""
    return in_vectors(cache) and cpu_attention.fits(cache)


def _key_place(position: UOp, element: UOp, width: int, in_blocks: bool) -> tuple[UOp, UOp]:
    return cpu_attention.key_place(position, element, width) if in_blocks else (position, element)


def write_cache(
    cache: Tensor,
    qkv: Tensor,
    angles: Tensor,
    slots: Tensor,
    positions: Tensor,
    heads: int,
    rotation: Rotation = NEIGHBOURS,
    norm: HeadNorm | None = None,
) -> Tensor:
    """Rotate the keys of `qkv` and store keys and values at their slot and position. Returns the cache.

    cache [2, S, G, C, D], where keys may lie in blocks (`cpu_attention.key_place`); qkv [R, (H + 2 G) D]; angles
    [2, R, D / 2] = cosines and sines; slots, positions [R].
    Costs the same at any context length.
    """
    _, _, groups, _, width = cache.shape
    rows = qkv.shape[0]
    half = width // 2
    opts = as_written(cache)
    in_blocks = _by_vectors(cache)

    def kernel(cache: UOp, qkv: UOp, angles: UOp, slots: UOp, positions: UOp, *norms: UOp) -> UOp:
        r, g, j = UOp.range(rows, 0), UOp.range(groups, 1), UOp.range(half, 2)
        slot, position = held(slots[r], cache.shape[1]), held(positions[r], cache.shape[3])
        keys, values = (heads + g) * width, (heads + groups + g) * width
        first, second = rotation.pair(j, width)
        a, b = qkv[r, keys + first], qkv[r, keys + second]
        if norms:
            inverse, weight = norms
            a, b = (x * inverse[r, heads + g] * weight[at] for x, at in ((a, first), (b, second)))
        cos, sin = angles[0, r, j], angles[1, r, j]
        key, other = (_key_place(position, at, width, in_blocks) for at in (first, second))
        stores = [
            cache[0, slot, g, *key].store((a * cos - b * sin).cast(cache.dtype.base)),
            cache[0, slot, g, *other].store((b * cos + a * sin).cast(cache.dtype.base)),
            cache[1, slot, g, position, first].store(qkv[r, values + first].cast(cache.dtype.base)),
            cache[1, slot, g, position, second].store(qkv[r, values + second].cast(cache.dtype.base)),
        ]
        return (
            UOp.group(*stores)
            .end(r, g, j)
            .sink(arg=KernelInfo(name=f"write_cache_{rows}", opts_to_apply=opts))
        )

    return call(kernel, cache, qkv, angles, slots, positions, *_norm_tensors(norm))


def rotate_queries(
    qkv: Tensor,
    angles: Tensor,
    heads: int,
    width: int,
    scale: float,
    rotation: Rotation = NEIGHBOURS,
    norm: HeadNorm | None = None,
) -> Tensor:
    """qkv [R, (H + 2 G) D], angles [2, R, D / 2] -> rotated queries [R, H, D] times `scale`."""
    rows = qkv.shape[0]

    opts = as_written(qkv)

    def kernel(out: UOp, qkv: UOp, angles: UOp, *norms: UOp) -> UOp:
        r, h, j = UOp.range(rows, 0), UOp.range(heads, 1), UOp.range(width // 2, 2)
        first, second = rotation.pair(j, width)
        a, b = qkv[r, h * width + first], qkv[r, h * width + second]
        if norms:
            inverse, weight = norms
            a, b = (x * inverse[r, h] * weight[at] for x, at in ((a, first), (b, second)))
        cos, sin = angles[0, r, j] * scale, angles[1, r, j] * scale
        stores = [
            out[r, h, first].store(a * cos - b * sin),
            out[r, h, second].store(b * cos + a * sin),
        ]
        return UOp.group(*stores).end(r, h, j).sink(arg=KernelInfo(name=f"rotate_{rows}", opts_to_apply=opts))

    out = Tensor.empty(rows, heads, width, dtype=dtypes.float32, device=qkv.device)
    return call(kernel, out, qkv, angles, *_norm_tensors(norm))


def _norm_tensors(norm: HeadNorm | None) -> tuple[Tensor, ...]:
    return () if norm is None else (norm.inverse, norm.weight)


def inverse_head_norms(qkv: Tensor, heads: int, width: int, epsilon: float) -> Tensor:
    """qkv [R, at least H D] -> 1 / root mean square of each of the first H heads, [R, H]."""
    rows = qkv.shape[0]
    opts = as_written(qkv)

    def kernel(out: UOp, qkv: UOp) -> UOp:
        r, h = UOp.range(rows, 0), UOp.range(heads, 1)
        d = UOp.range(width, 2, axis_type=AxisType.REDUCE)
        value = qkv[r, h * width + d]
        mean = summed(value * value, d) * (1.0 / width) + epsilon
        info = KernelInfo(name=f"head_norms_{rows}", opts_to_apply=opts)
        return out[r, h].store(mean.alu(Ops.SQRT).alu(Ops.RECIPROCAL)).end(r, h).sink(arg=info)

    return call(kernel, Tensor.empty(rows, heads, dtype=dtypes.float32, device=qkv.device), qkv)


def attention(
    queries: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    length: UOp,
    window: int = 0,
    threads: int = 1,
) -> Tensor:
    """Causal attention of each row over its own slot's cache, or over the `window` positions that end at its own.

    queries [R, H, D] (rotated and scaled), cache [2, S, G, C, D], `length` a bound variable of at least
    max(positions) + 1: one graph serves every length. -> [R, H D].
    """
    rows, heads, width = queries.shape
    if _by_vectors(cache):
        return cpu_attention.attention(queries, cache, slots, positions, length, window, threads)
    scores = _scores(queries, cache, slots, positions, length, window)
    weights = _exponentials(scores, length)
    return _weighted_values(weights, cache, slots, length).reshape(rows, heads * width)


def _scores(
    queries: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, length: UOp, window: int
) -> Tensor:
    """-> [R, H, C]; set up to `length`, minus infinity where a row may not look."""
    rows, heads, width = queries.shape
    share = heads // cache.shape[2]
    opts = as_written(cache)

    def kernel(out: UOp, queries: UOp, cache: UOp, slots: UOp, positions: UOp) -> UOp:
        r, h, n = UOp.range(rows, 0), UOp.range(heads, 1), UOp.range(_unbound(length), 2)
        d = UOp.range(width, 3, axis_type=AxisType.REDUCE)
        key = cache[0, held(slots[r], cache.shape[1]), h // share, n, d].cast(dtypes.float32)
        value = summed(queries[r, h, d] * key, d)
        own = positions[r].cast(dtypes.weakint)
        seen = (n <= own) & (own < n + window) if window else n <= own
        value = seen.where(value, UOp.const(dtypes.float32, float("-inf")))
        info = KernelInfo(name=f"scores_{rows}", opts_to_apply=opts)
        return out[r, h, n].store(value).end(r, h, n).sink(arg=info)

    out = Tensor.empty(rows, heads, cache.shape[3], dtype=dtypes.float32, device=cache.device)
    return call(kernel, out, queries, cache, slots, positions, bound=(length,))


def _exponentials(scores: Tensor, length: UOp) -> Tensor:
    """exp(score - highest score of its row and head), not yet divided by their sum: [R, H, C]."""
    rows, heads, _ = scores.shape
    opts = as_written(scores)

    def highest(out: UOp, scores: UOp) -> UOp:
        r, h = UOp.range(rows, 0), UOp.range(heads, 1)
        n = UOp.range(_unbound(length), 2, axis_type=AxisType.REDUCE)
        value = scores[r, h, n].reduce(n, arg=Ops.MAX)
        return (
            out[r, h].store(value).end(r, h).sink(arg=KernelInfo(name=f"highest_{rows}", opts_to_apply=opts))
        )

    def exponentials(out: UOp, scores: UOp, most: UOp) -> UOp:
        r, h, n = UOp.range(rows, 0), UOp.range(heads, 1), UOp.range(_unbound(length), 2)
        value = ((scores[r, h, n] - most[r, h]) * LOG2_E).alu(Ops.EXP2)
        return (
            out[r, h, n]
            .store(value)
            .end(r, h, n)
            .sink(arg=KernelInfo(name=f"exp_{rows}", opts_to_apply=opts))
        )

    most = call(
        highest,
        Tensor.empty(rows, heads, dtype=dtypes.float32, device=scores.device),
        scores,
        bound=(length,),
    )
    return call(
        exponentials,
        Tensor.empty(*scores.shape, dtype=dtypes.float32, device=scores.device),
        scores,
        most,
        bound=(length,),
    )


def _weighted_values(weights: Tensor, cache: Tensor, slots: Tensor, length: UOp) -> Tensor:
    """weights [R, H, C] -> their mean of the cached values, [R, H, D]."""
    rows, heads, _ = weights.shape
    width = cache.shape[4]
    share = heads // cache.shape[2]
    opts = as_written(cache)

    def kernel(out: UOp, weights: UOp, cache: UOp, slots: UOp) -> UOp:
        r, h, d = UOp.range(rows, 0), UOp.range(heads, 1), UOp.range(width, 2)
        n = UOp.range(_unbound(length), 3, axis_type=AxisType.REDUCE)
        value = cache[1, held(slots[r], cache.shape[1]), h // share, n, d].cast(dtypes.float32)
        total, part = summed(weights[r, h, n] * value, n), summed(weights[r, h, n], n)
        info = KernelInfo(name=f"values_{rows}", opts_to_apply=opts)
        return out[r, h, d].store(total / part).end(r, h, d).sink(arg=info)

    out = Tensor.empty(rows, heads, width, dtype=dtypes.float32, device=cache.device)
    return call(kernel, out, weights, cache, slots, bound=(length,))


def inverse_norm(x: Tensor, epsilon: float) -> Tensor:
    """x [R, I] -> 1 / root mean square of each row, [R]."""
    rows, inputs = x.shape
    opts = as_written(x)

    def kernel(out: UOp, x: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1, axis_type=AxisType.REDUCE)
        mean = summed(x[r, i] * x[r, i], i) * (1.0 / inputs) + epsilon
        value = mean.alu(Ops.SQRT).alu(Ops.RECIPROCAL)
        return out[r].store(value).end(r).sink(arg=KernelInfo(name=f"norm_{rows}", opts_to_apply=opts))

    return call(kernel, Tensor.empty(rows, dtype=dtypes.float32, device=x.device), x)


def add_normed(x: Tensor, out: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """`x + scale[r] * out * weight`: a normed result added to the stream. x, out [R, I], scale [R], weight [I]."""
    rows, inputs = x.shape

    def kernel(total: UOp, x: UOp, out: UOp, scale: UOp, weight: UOp) -> UOp:
        r, i = UOp.range(rows, 0), UOp.range(inputs, 1)
        value = x[r, i] + out[r, i] * scale[r] * weight[i]
        return total[r, i].store(value).end(r, i).sink(arg=KernelInfo(name=f"add_normed_{rows}_{inputs}"))

    total = Tensor.empty(rows, inputs, dtype=dtypes.float32, device=x.device)
    return call(kernel, total, x, out, scale, weight)


def gated(x: Tensor, gelu: bool = False, threads: int = 1) -> Tensor:
    """x [R, 2 F] = gate and up side by side -> silu(gate) * up, or gelu(gate) * up (by tanh), [R, F]."""
    rows, twice = x.shape
    size = twice // 2
    if in_vectors(x) and size % cpu_gated.LANES == 0:
        return cpu_gated.gated(x, GELU_FACTOR if gelu else 0.0, threads)

    def kernel(out: UOp, x: UOp) -> UOp:
        r, f = UOp.range(rows, 0), UOp.range(size, 1)
        gate, up = x[r, f], x[r, size + f]
        # (1 + tanh(z)) / 2 is the logistic function of 2 z
        inner = (gate * gate * 0.044715 + 1.0) * gate * GELU_FACTOR if gelu else gate
        value = gate * up * ((inner * -LOG2_E).alu(Ops.EXP2) + 1.0).alu(Ops.RECIPROCAL)
        return out[r, f].store(value).end(r, f).sink(arg=KernelInfo(name=f"gated_{rows}_{size}"))

    return call(kernel, Tensor.empty(rows, size, dtype=dtypes.float32, device=x.device), x)


def held(value: UOp, size: int) -> UOp:
    """A loaded index, held to [0, size): in bounds whatever it is, and without a modulo in every address."""
    return value.cast(dtypes.weakint).maximum(0).minimum(size - 1)


def _unbound(length: UOp) -> UOp:
    return length.unbind()[0]
