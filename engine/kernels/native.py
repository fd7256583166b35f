"""A recorded step on the CPU as one native call for each thread, without Python between its kernels.

tinygrad's CPU device calls every kernel from Python and wakes its threads for each: 5 ms a step of 460 kernels, more
than the products of a small model. Here a list of the kernels' addresses and arguments is worked through by a short
function of ours; threads meet at a barrier after a kernel that several worked on.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor
from tinygrad.engine.jit import CapturedJit
from tinygrad.engine.realize import get_runtime
from tinygrad.renderer.llvmir import CPULLVMRenderer
from tinygrad.runtime.ops_cpu import CPUProgram
from tinygrad.uop.ops import Ops, UOp

ARGUMENTS_MAX = 16  # of a kernel: buffers and variables
_WORDS = 3 + ARGUMENTS_MAX  # of a list's entry: address, threads, whether to meet after it, arguments
_SPINS = 256  # some microseconds, before a waiting thread lets others have its core


def _source() -> str:
    """`run`: thread `%thread` of `%threads` works through `%count` entries. `%arrived` counts arrivals at barriers,
    of which there were `%before` when the step began; it only ever grows, so that a late thread is never caught."""
    loads, values = [], []
    for index in range(ARGUMENTS_MAX):
        loads.append(f"  %p{index} = getelementptr i64, ptr %entry, i64 {3 + index}")
        loads.append(f"  %a{index} = load i64, ptr %p{index}")
        values.append(f"i64 %a{index}")
    pause = "  call void @llvm.x86.sse2.pause()\n" if _on_x86() else ""
    declared = "declare void @llvm.x86.sse2.pause()\n" if _on_x86() else ""
    return f"""{declared}
define void @run(ptr %list, i64 %count, i64 %thread, i64 %threads, ptr %arrived, i64 %before, ptr %yield) #0 {{
start:
  br label %next
next:
  %index = phi i64 [0, %start], [%index1, %passed]
  %target = phi i64 [%before, %start], [%target1, %passed]
  %more = icmp ult i64 %index, %count
  br i1 %more, label %look, label %done
look:
  %offset = mul i64 %index, {_WORDS}
  %entry = getelementptr i64, ptr %list, i64 %offset
  %wants_at = getelementptr i64, ptr %entry, i64 1
  %wants = load i64, ptr %wants_at
  %mine = icmp ult i64 %thread, %wants
  br i1 %mine, label %work, label %worked
work:
  %kernel = load ptr, ptr %entry
{chr(10).join(loads)}
  call void %kernel({", ".join(values)})
  br label %worked
worked:
  %meet_at = getelementptr i64, ptr %entry, i64 2
  %meet = load i64, ptr %meet_at
  %meets = icmp ne i64 %meet, 0
  br i1 %meets, label %arrive, label %passed
arrive:
  %all = add i64 %target, %threads
  %here = atomicrmw add ptr %arrived, i64 1 acq_rel
  br label %wait
wait:
  %spins = phi i64 [0, %arrive], [%spins1, %again]
  %now = load atomic i64, ptr %arrived acquire, align 8
  %together = icmp uge i64 %now, %all
  br i1 %together, label %passed, label %spin
spin:
{pause}  %spins1 = add i64 %spins, 1
  %tired = icmp ugt i64 %spins1, {_SPINS}
  br i1 %tired, label %rest, label %again
rest:
  call void %yield()
  br label %again
again:
  br label %wait
passed:
  %target1 = phi i64 [%target, %worked], [%all, %wait]
  %index1 = add i64 %index, 1
  br label %next
done:
  ret void
}}
attributes #0 = {{ nounwind "no-builtins" }}
"""


def _on_x86() -> bool:
    return str(Device["CPU"].renderer.target.arch).startswith("x86")


class _Team:
    """The threads that run steps beside the caller's, and where they meet."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        compiler = Device["CPU"].renderer.compiler
        self._program = CPUProgram(Device["CPU"], "run", compiler.compile_cached(_source()))
        address = ctypes.cast(self._program.fxn, ctypes.c_void_p).value or 0
        self._run = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 7)(address)
        self._yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
        self._arrived = np.zeros(8, dtype=np.uint64)  # a cache line
        self._met = 0
        self._work: list[SimpleQueue[tuple[Any, ...]]] = [SimpleQueue() for _ in range(threads - 1)]
        for thread, work in enumerate(self._work, 1):
            name = f"kernels {thread}"
            threading.Thread(target=self._serve, args=(thread, work), name=name, daemon=True).start()

    def run(self, lists: npt.NDArray[np.uint64], meetings: int) -> None:
        """`lists` [threads, entries, words], of which `meetings` end with a barrier. Returns when all is done."""
        before = self._met
        self._met += meetings * self.threads
        for work in self._work:
            work.put((lists, before))
        self._enter(0, lists, before)

    def _serve(self, thread: int, work: SimpleQueue[tuple[Any, ...]]) -> None:
        while True:
            self._enter(thread, *work.get())

    def _enter(self, thread: int, lists: npt.NDArray[np.uint64], before: int) -> None:
        mine = lists[thread]
        arrived = self._arrived.ctypes.data
        self._run(mine.ctypes.data, len(mine), thread, self.threads, arrived, before, self._yield)


@functools.cache
def _team(threads: int) -> _Team:
    return _Team(threads)


def runs(linear: UOp) -> bool:
    """Whether all of a step's compiled calls are kernels on the CPU, by LLVM, that fit a list."""
    on_cpu = bool(linear.src) and str(linear.src[0].src[1].device).split(":")[0] == "CPU"
    return (
        on_cpu
        and isinstance(Device["CPU"].renderer, CPULLVMRenderer)
        and all(
            call.src[0].op is Ops.PROGRAM
            and len(call.src) - 1 <= ARGUMENTS_MAX - 4
            and all(str(buffer.device).split(":")[0] == "CPU" for buffer in call.src[1:])
            for call in linear.src
        )
    )


class NativeStep(CapturedJit[Tensor]):  # type: ignore[misc]
    """Calls that `runs` accepts, planned and compiled: called like any captured graph."""

    def __init__(self, result: Tensor, linear: UOp) -> None:
        super().__init__(result, linear, [], [])
        self._threads = max(call.src[0].arg.global_size[0] for call in linear.src)
        self._lists = np.zeros((self._threads, len(linear.src), _WORDS), dtype=np.uint64)
        self._variables: dict[str, list[tuple[int, int]]] = {}  # name -> places of its value
        self._kept: list[Any] = []  # programs and buffers, whose addresses are in the lists
        for index, call in enumerate(linear.src):
            self._add(index, call)
        wants = self._lists[0, :, 1]
        after = np.append(wants[1:], 1)
        self._lists[:, :, 2] = ((wants > 1) | (after > 1)) & (self._threads > 1)
        self._meetings = int(self._lists[0, :, 2].sum())

    def _add(self, index: int, call: UOp) -> None:
        info = call.src[0].arg
        program = get_runtime("CPU", call.src[0])
        found = [buffer.buffer.ensure_allocated() for buffer in call.src[1:]]
        buffers = [found[at] for at in info.globals]  # tinygrad drops those that a kernel does not read
        self._kept += [program, *buffers]
        entry = self._lists[:, index]
        entry[:, 0] = ctypes.cast(program.fxn, ctypes.c_void_p).value
        entry[:, 1] = info.global_size[0]
        entry[:, 3 : 3 + len(buffers)] = [buffer._buf.va_addr for buffer in buffers]
        for at, variable in enumerate(info.vars, 3 + len(buffers)):
            if variable.expr == "core_id":
                entry[:, at] = np.arange(self._threads)
            else:
                self._variables.setdefault(variable.expr, []).append((index, at))

    def __call__(self, input_uops: list[UOp], var_vals: dict[str, int]) -> Tensor:
        Device["CPU"].synchronize()
        for name, places in self._variables.items():
            rows, columns = zip(*places, strict=True)
            self._lists[:, rows, columns] = var_vals[name]
        _team(self._threads).run(self._lists, self._meetings)
        return self.ret

    def free_intermediates(self) -> None:
        self._kept.clear()
        super().free_intermediates()
