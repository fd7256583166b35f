"""A script: `python -m tests.engine.search_checks OUT MODE` searches kernels on the suite's device, kept in CACHEDB.

Modes: `all` tries what a search does, `kept` compiles the same kernel once more, `die` ends the process in a search.
OUT gets a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.codegen.opt.heuristic import hand_coded_optimizations
from tinygrad.engine.realize import compile_linear
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from engine.compilers import programs, search
from engine.kernels.recording import Kernel, call, recording
from engine.kernels.transformer import held
from tests.engine.devices import open_suites

USUAL: list[bool] = []  # of each kernel that could be searched: whether it got the loops of the rules


def product(rows: int, opts: tuple[Opt, ...] | None = None) -> tuple[Kernel, tuple[Tensor, ...]]:
    """A kernel of `rows` x 32 times 32 x 64, and its buffers."""

    def kernel(out: UOp, x: UOp, weight: UOp) -> UOp:
        r, o, i = UOp.range(rows, 0), UOp.range(64, 1), UOp.range(32, 2, axis_type=AxisType.REDUCE)
        value = (x[r, i] * weight[o, i]).reduce(i, arg=Ops.ADD)
        return (
            out[r, o].store(value).end(r, o).sink(arg=KernelInfo(name=f"product_{rows}", opts_to_apply=opts))
        )

    return kernel, (Tensor.empty(rows, 64), Tensor.ones(rows, 32), Tensor.ones(64, 32))


def gathered() -> tuple[Kernel, tuple[Tensor, ...]]:
    """A kernel that leaves its second buffer unread, as one of a single slot does."""

    def kernel(out: UOp, unread: UOp, table: UOp, indices: UOp) -> UOp:
        r, i = UOp.range(8, 0), UOp.range(64, 1)
        value = table[held(indices[r], 8), i] * 2.0
        return out[r, i].store(value).end(r, i).sink(arg=KernelInfo(name="gathered"))

    indices = Tensor.zeros(8, dtype=dtypes.int32)
    return kernel, (Tensor.empty(8, 64), Tensor.ones(8), Tensor.ones(8, 64), indices)


def compiled(work: tuple[Kernel, tuple[Tensor, ...]], width: int, tell: Any = lambda _: None) -> list[int]:
    """How many kernels were compiled for it, and searched."""
    kernel, tensors = work
    tensors = tuple(tensor.contiguous().realize() for tensor in tensors)
    before = programs.compiled(), search.searched()
    with recording() as record:
        call(kernel, *tensors)
    with search.searching(width, tell):
        compile_linear(UOp(Ops.LINEAR, src=tuple(record._calls)))
    return [programs.compiled() - before[0], search.searched() - before[1]]


def times(rules_s: float, others_s: float) -> Callable[..., float]:
    """In place of measuring: what is timed first in a search is what the rules give."""

    def timed(self: Any, program: UOp, *_: float) -> float:
        binary = program.src[4].arg
        first = vars(self).setdefault("first", binary)
        return rules_s if binary == first else others_s

    return timed


def tried(rows: int, **changed: Any) -> dict[str, Any]:
    """A search of a new kernel while names of `search` are something else, and what came of it."""
    before = {name: getattr(search, name) for name in changed}
    vars(search).update(changed)
    try:
        count = compiled(product(rows), 2)
    finally:
        vars(search).update(before)
    return {"count": count, "usual": USUAL[-1]}


def all_of_it() -> dict[str, Any]:
    """By name how many kernels were compiled and searched, and whether loops are those of the rules."""
    original, timed, told = search._search, search._Search._timed, []

    def noted(kernel: Any, *given: Any) -> Any:
        usual, found = hand_coded_optimizations(kernel.copy()), original(kernel, *given)
        USUAL.append(usual.applied_opts == found.applied_opts)
        return found

    search.search.beam_search = noted
    found: dict[str, Any] = {}
    found["first"] = compiled(product(4), 2, told.append)
    found["told"] = len(told)
    found["again"] = compiled(product(4), 2)
    programs._programs.clear()
    found["from the file"] = compiled(product(4), 2)
    found["stated"] = [compiled(product(4, opts=()), width) for width in (2, 0)]
    found["unread"] = compiled(gathered(), 2)
    try:
        search._Search._timed = times(1e-3, 1e-4)
        found["faster"] = tried(8)
        readings = iter(range(100))
        read = search.read
        found["faster and wrong"] = tried(16, read=lambda buffer: read(buffer) * (1 + next(readings)))
        search._Search._timed = times(1e-4, 1e-3)
        found["slower"] = tried(32)
    finally:
        search._Search._timed = timed
    found["no time"] = tried(64, KERNEL_S_MAX=0.0)
    found["too large"] = tried(128, BYTES_MAX=1000)
    return found | {"right": results_are_right()}


def results_are_right() -> bool:
    """Of the kernels as they were found, by the way that serves."""
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 32), (64, 32)))
    kernel, (out, _, _) = product(4)
    tensors = tuple(Tensor(array).realize() for array in (x, weight))
    with search.searching(2, lambda _: None):
        found = call(kernel, out, *tensors).numpy()
    return bool(np.abs(found - x @ weight.T).max() < 1e-4)


def main(mode: str) -> dict[str, Any]:
    open_suites()
    few = (Opt(OptOps.UPCAST, axis, amount) for axis in (0, 1) for amount in (2, 4))
    search.search.actions[:] = few  # of hundreds
    search.FAST_S = 0.0  # also what is fast already
    if mode == "all":
        return all_of_it()
    if mode == "kept":
        return {"again": compiled(product(4), 2)}
    return {"count": compiled(product(512), 2, lambda _: os._exit(9) if mode == "die" else None)}


if __name__ == "__main__":
    out, mode = sys.argv[1:]
    Path(out).write_text(json.dumps(main(mode)))
