"""A step's kernel calls written down as they are made, instead of through tinygrad's scheduler.

Every kernel of a step is written by hand and names the buffers it reads and writes, so the order of calls is the
schedule. tinygrad would find the same list again by rewriting the graph of the whole step: seconds for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tinygrad import Tensor
from tinygrad.engine.jit import CapturedJit, jit_lower
from tinygrad.engine.realize import compile_linear
from tinygrad.schedule.memory import memory_plan_rewrite
from tinygrad.uop.ops import Ops, UOp, buffers

from engine.kernels import native

Kernel = Callable[..., UOp]


class Recording:
    """Calls in their order, and the kernels they call: a block's kernels are built once, not for each block."""

    def __init__(self) -> None:
        self._calls: list[UOp] = []
        self._kernels: dict[Any, UOp] = {}

    def add(self, kernel: Kernel, tensors: tuple[Tensor, ...]) -> None:
        key = (kernel.__code__, *map(_identity, _closed_over(kernel)), *map(_identity, tensors))
        if key not in self._kernels:
            placeholders = [
                UOp.placeholder_like(tensor.uop, slot=slot) for slot, tensor in enumerate(tensors)
            ]
            self._kernels[key] = kernel(*placeholders)
        self._calls.append(self._kernels[key].call(*(_buffer(tensor) for tensor in tensors)))

    def add_copy(self, target: Tensor, source: Tensor) -> None:
        """From device to device: within a graph by the cards' copy engines where they reach each other."""
        copy = _buffer(source).copy_to_device(target.device)
        self._calls.append(copy.call(_buffer(target), _buffer(source)))

    def captured(self, result: Tensor) -> CapturedJit[Tensor]:
        """The calls compiled, their intermediates laid over each other in one buffer, and made a device graph."""
        linear = compile_linear(UOp(Ops.LINEAR, src=tuple(self._calls)))
        # a kernel that touches no buffer is a copy onto itself: of one slot to another where there is only one
        calls = [_of_used_buffers(call) for call in linear.src if _touches_buffers(call)]
        linear = linear.replace(src=tuple(calls))
        held = {*buffers, _buffer(result)}
        if native.runs(linear):
            return native.NativeStep(result, memory_plan_rewrite(linear, held))
        return CapturedJit(result, jit_lower(linear, held, []), [], [])


_active: Recording | None = None


@contextmanager
def recording() -> Iterator[Recording]:
    """Inside, `call` records. Every tensor must be a buffer of its own: nothing lazy is computed."""
    global _active
    _active = Recording()
    try:
        yield _active
    finally:
        _active = None


def call(kernel: Kernel, *tensors: Tensor, bound: tuple[UOp, ...] = ()) -> Tensor:
    """Call `kernel`, which writes the first tensor. Returns that tensor as it is after the kernel.

    `bound` are the bound variables that the kernel's loops use: the scheduler must be told, a recording must not.
    """
    if _active is not None:
        _active.add(kernel, tensors)
        return tensors[0]
    sources = [t.uop if t.uop.op is Ops.AFTER else t.uop.contiguous() for t in tensors]
    placeholders = [UOp.placeholder_like(source, slot=slot) for slot, source in enumerate(sources)]
    return Tensor(sources[0].after(kernel(*placeholders).call(*sources, *bound)))


def copied(tensor: Tensor, device: str | tuple[str, ...]) -> Tensor:
    """`tensor` on `device`: itself where it is there."""
    if tensor.device == device:
        return tensor
    if _active is None:
        return tensor.to(device).contiguous()
    target = Tensor.empty(*tensor.shape, dtype=tensor.dtype, device=device)
    _active.add_copy(target, tensor)
    return target


def _touches_buffers(call: UOp) -> bool:
    return call.src[0].op is not Ops.PROGRAM or bool(call.src[0].arg.globals)


def _of_used_buffers(call: UOp) -> UOp:
    """A compiled call without the buffers that its kernel does not read: of one slot, which slot a row is in.

    tinygrad leaves them out when it runs a kernel by itself; its graphs of HCQ devices do not, and the kernel would
    take the next buffer for the one that it wants.
    """
    program, *buffers_given = call.src
    if program.op is not Ops.PROGRAM:
        return call
    used = program.arg.globals
    if len(used) == len(buffers_given):
        return call
    place = {given: index for index, given in enumerate(used)}
    info = replace(
        program.arg,
        globals=tuple(place.values()),
        outs=tuple(place[given] for given in program.arg.outs),
        ins=tuple(place[given] for given in program.arg.ins),
    )
    return call.replace(src=(program.replace(arg=info), *(buffers_given[given] for given in used)))


def _buffer(tensor: Tensor) -> UOp:
    base = tensor.uop.base
    if base.op is not Ops.BUFFER or not tensor.uop.has_buffer_identity():
        raise AssertionError(f"a recorded kernel works on a tensor that is no buffer: {tensor.uop.op}")
    return base


def _closed_over(kernel: Kernel) -> list[Any]:
    return [cell.cell_contents for cell in kernel.__closure__ or ()]


def _identity(value: Any) -> Any:
    """What of a value decides the kernel that is built: of a tensor, its form only."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value
