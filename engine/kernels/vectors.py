"""Writes a CPU kernel as LLVM IR with whole vectors in it, where tinygrad would split every vector into numbers.

The kernel is a tinygrad program all the same: it has tinygrad's buffers, threads (`core_id`), compiler and cache.
LLVM lowers vectors of any width to what the processor has, so nothing here depends on its instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

from tinygrad import Device, Tensor, dtypes
from tinygrad.renderer import Estimates
from tinygrad.renderer.llvmir import CPULLVMRenderer
from tinygrad.uop.ops import KernelInfo, Ops, ProgramInfo, UOp

_ATTRIBUTES = (
    'attributes #0 = { nounwind "no-builtins" "no-trapping-math"="true" "min-legal-vector-width"="512" '
    '"prefer-vector-width"="512" }'
)
# Infinities and NaN are kept, which tell of a broken device, and so is the order of sums: a row's result must not
# depend on how many rows are beside it.
FAST = "nsz contract"
LINE = 64  # bytes that a processor fetches from memory at once
_LOG2_E = 1.4426950408889634
# 2^x for x in [-1/2, 1/2], by Taylor's series: off by 1.2e-7 at most
_SERIES = (1.540353e-4, 1.3333558e-3, 9.618129e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)


def usable(tensor: Tensor) -> bool:
    """Whether the tensor's device takes such kernels."""
    device = str(tensor.device)
    return device.split(":")[0] == "CPU" and isinstance(Device[device].renderer, CPULLVMRenderer)


class Code:
    """A function's instructions as they are written. Values are the names of their registers, or constants."""

    def __init__(self) -> None:
        self._numbers = count()
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._declared: set[str] = set()

    def __call__(self, instruction: str) -> str:
        """Write an instruction; its result."""
        name = f"%v{next(self._numbers)}"
        self._lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """Write an instruction that has no result."""
        self._lines.append(f"  {instruction}")

    def call(self, kind: str, function: str, *arguments: str, fast: bool = False) -> str:
        """Call an intrinsic, such as `llvm.fabs.v16f32`. `arguments` are types and values; `fast` lets it reorder."""
        self._declare(kind, function, arguments)
        return self(f"call {'reassoc ' if fast else ''}{kind} @{function}({', '.join(arguments)})")

    def run(self, function: str, *arguments: str) -> None:
        """Call an intrinsic that has no result."""
        self._declare("void", function, arguments)
        self.do(f"call void @{function}({', '.join(arguments)})")

    def _declare(self, kind: str, function: str, arguments: Sequence[str]) -> None:
        types = ", ".join(argument.rpartition(" ")[0] for argument in arguments)
        self._declared.add(f"declare {kind} @{function}({types})")

    def at(self, base: str, index: str, size: int) -> str:
        """The address of element `index` (i64) of elements of `size` bytes."""
        offset = self(f"mul i64 {index}, {size}")
        return self(f"getelementptr i8, ptr {base}, i64 {offset}")

    def beyond(self, base: str, offset: int) -> str:
        """The address `offset` bytes on."""
        return self(f"getelementptr i8, ptr {base}, i64 {offset}") if offset else base

    def load(self, kind: str, address: str, kept: bool = False) -> str:
        """`kept`: of what is stored as kept, too."""
        return self(f"load {'volatile ' if kept else ''}{kind}, ptr {address}, align 2")

    def store(self, kind: str, value: str, address: str, kept: bool = False) -> None:
        """`kept`: in memory, where LLVM would take an array for more registers than there are."""
        self.do(f"store {'volatile ' if kept else ''}{kind} {value}, ptr {address}, align 2")

    def prefetch(self, address: str, size: int = LINE) -> None:
        """Have the lines of `size` bytes fetched from memory; where there is none, nothing happens."""
        for line in range(0, size, LINE):
            self.run("llvm.prefetch.p0", f"ptr {self.beyond(address, line)}", "i32 0", "i32 3", "i32 1")

    def slot(self, kind: str, value: str) -> str:
        """A variable: LLVM keeps it in a register."""
        name = f"%s{next(self._numbers)}"
        self._slots.append(f"  {name} = alloca {kind}")
        self.do(f"store {kind} {value}, ptr {name}")
        return name

    def array(self, kind: str, size: int) -> str:
        """Memory of the function's own."""
        name = f"%s{next(self._numbers)}"
        self._slots.append(f"  {name} = alloca [{size} x {kind}], align 64")
        return name

    def get(self, kind: str, slot: str) -> str:
        return self(f"load {kind}, ptr {slot}")

    def set(self, kind: str, value: str, slot: str) -> None:
        self.do(f"store {kind} {value}, ptr {slot}")

    def splat(self, kind: str, value: str, lanes: int) -> str:
        one = self(f"insertelement <{lanes} x {kind}> poison, {kind} {value}, i32 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        return self(f"shufflevector <{lanes} x {kind}> {one}, <{lanes} x {kind}> poison, {zeros}")

    def shuffle(self, kind: str, first: str, second: str, order: Sequence[int]) -> str:
        """`order` counts through both vectors, of type `kind`."""
        mask = ", ".join(f"i32 {index}" for index in order)
        return self(f"shufflevector {kind} {first}, {kind} {second}, <{len(order)} x i32> <{mask}>")

    @contextmanager
    def loop(self, start: str, stop: str, by: int = 1) -> Iterator[str]:
        """For each i64 from `start` to before `stop`, or each of `by`."""
        number = next(self._numbers)
        at = self.slot("i64", start)
        self.do(f"br label %head{number}")
        self._lines.append(f"head{number}:")
        index = self.get("i64", at)
        more = self(f"icmp ult i64 {index}, {stop}")
        self.do(f"br i1 {more}, label %body{number}, label %done{number}")
        self._lines.append(f"body{number}:")
        yield index
        self.set("i64", self(f"add nuw nsw i64 {index}, {by}"), at)
        self.do(f"br label %head{number}")
        self._lines.append(f"done{number}:")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Only if `condition` (i1)."""
        number = next(self._numbers)
        self.do(f"br i1 {condition}, label %body{number}, label %done{number}")
        self._lines.append(f"body{number}:")
        yield
        self.do(f"br label %done{number}")
        self._lines.append(f"done{number}:")

    def share(self, total: int, threads: int) -> tuple[str, str]:
        """This thread's part of `total` loops: from, to. Every function has its thread's number in `%core_id`."""
        if threads == 1:
            return "0", str(total)
        core = self.core()
        start = self(f"udiv i64 {self(f'mul i64 {core}, {total}')}, {threads}")
        after = self(f"mul i64 {self(f'add i64 {core}, 1')}, {total}")
        return start, self(f"udiv i64 {after}, {threads}")

    def core(self) -> str:
        """This thread's number, i64."""
        return self("zext i32 %core_id to i64")

    def text(self, name: str, pointers: Sequence[str], integers: Sequence[str]) -> str:
        """The whole module."""
        arguments = [f"ptr noalias align 32 %{pointer}" for pointer in pointers]
        arguments += [f"i32 %{integer}" for integer in integers]
        head = f"define void @{name}({', '.join(arguments)}) #0 {{\nentry:"
        body = [*self._slots, *self._lines, "  ret void\n}"]
        return "\n".join([*sorted(self._declared), head, *body, _ATTRIBUTES])


def larger(code: Code, a: str, b: str) -> str:
    """Of each lane of 16 float32, as processors have it in one instruction: of a NaN it is `b`."""
    more = code(f"fcmp ogt <16 x float> {a}, {b}")
    return code(f"select <16 x i1> {more}, <16 x float> {a}, <16 x float> {b}")


def highest(code: Code, value: str) -> str:
    """The highest of 16 float32."""
    for apart in (8, 4, 2, 1):
        turned = code.shuffle("<16 x float>", value, "poison", [(lane + apart) % 16 for lane in range(16)])
        value = larger(code, value, turned)
    return code(f"extractelement <16 x float> {value}, i32 0")


def exponential(code: Code, value: str) -> str:
    """e to the power of each of 16 float32, to 2e-7; 0 and infinity within float32's range; NaN stays."""
    floats, ints = "<16 x float>", "<16 x i32>"
    value = code(f"fmul {floats} {value}, splat (float {single(_LOG2_E)})")
    for compared, bound in (("olt", -126.0), ("ogt", 127.0)):
        beyond = code(f"fcmp {compared} {floats} {value}, splat (float {bound})")
        value = code(f"select <16 x i1> {beyond}, {floats} splat (float {bound}), {floats} {value}")
    whole = code.call(floats, "llvm.rint.v16f32", f"{floats} {value}")
    rest = code(f"fsub {floats} {value}, {whole}")
    power = f"splat (float {single(_SERIES[0])})"
    for factor in _SERIES[1:]:
        product = code(f"fmul contract {floats} {power}, {rest}")
        power = code(f"fadd contract {floats} {product}, splat (float {single(factor)})")
    exponent = code(f"add {ints} {code(f'fptosi {floats} {whole} to {ints}')}, splat (i32 127)")
    scale = code(f"bitcast {ints} {code(f'shl {ints} {exponent}, splat (i32 23)')} to {floats}")
    return code(f"fmul {floats} {power}, {scale}")


def single(value: float) -> str:
    """A float32 constant: LLVM takes only numbers that are exact."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


def program(
    code: Code, name: str, pointers: Sequence[str], buffers: Sequence[UOp], threads: int, *bound: UOp
) -> UOp:
    """A kernel's program: `pointers` name its buffers, the first of which it writes; `bound` are its variables."""
    core = UOp.variable("core_id", 0, threads - 1, dtypes.int)
    variables = tuple(sorted((core, *bound), key=lambda each: each.arg))
    sink = UOp.sink(*buffers, *variables, arg=KernelInfo(name=name, estimates=Estimates()))
    source = code.text(name, pointers, [str(each.expr) for each in variables])
    info = ProgramInfo(
        name=name,
        global_size=(threads, 1, 1),
        local_size=(1, 1, 1),
        vars=variables,
        globals=tuple(range(len(buffers))),
        outs=(0,),
        ins=tuple(range(len(buffers))),
    )
    parts = (sink, UOp(Ops.DEVICE, arg="CPU"), UOp(Ops.LINEAR), UOp(Ops.SOURCE, arg=source))
    return UOp(Ops.PROGRAM, src=parts, arg=info)
