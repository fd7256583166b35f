"""tinygrad compiles through the LLVM of the `llvmlite` wheel, so that pip alone sets the engine up.

tinygrad 0.13 looks for a libLLVM shared library of the system, whose version it does not choose: Debian's 14 and 15
fail and 19 aborts the process on gfx950. llvmlite 0.50 carries LLVM 22 with the X86, AArch64 and AMDGPU targets.
`install` replaces the two methods of tinygrad's `LLVMCompiler` that touch libLLVM; everything above them (renderers,
kernel cache, ELF loader) stays tinygrad's.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from tinygrad.device import Compiler
from tinygrad.dtype import dtypes
from tinygrad.renderer import Renderer
from tinygrad.renderer.llvmir import CPULLVMRenderer
from tinygrad.runtime.support import compiler_cpu

TRIPLES = {
    "arm64": "aarch64-none-unknown-elf",
    "x86_64": "x86_64-none-unknown-elf",
    "AMDGPU": "amdgcn-amd-amdhsa",
}
OPTIMISATION_LEVEL = 2
# tinygrad lets LLVM fuse multiply and add, but not reorder a sum, without which its loop vectoriser leaves every dot
# product scalar (B=1, 1536x576: 4 instead of 12 GFLOP/s). Sums are reordered on the CPU only.
TINYGRAD_FLAGS = "nsz arcp contract afn"
# Where a sum has two products LLVM fuses one or the other, as the loop around it suggests. These kernels keep both, so
# that a row's keys and queries are the same bits whatever rows are beside it.
UNFUSED = ("@write_cache_", "@rotate_")


def _init(self: Any, arch: str, processor: str, feats: str, cache_key: str | None = None) -> None:
    """`LLVMCompiler.__init__`: a target machine for `arch`, named in the kernel cache with its LLVM's version."""
    if arch not in TRIPLES:
        raise RuntimeError(f"no LLVM target for {arch!r}; known: {', '.join(TRIPLES)}")
    target = llvm.Target.from_triple(TRIPLES[arch])
    self.target_machine = target.create_target_machine(
        cpu=processor, features=feats, opt=OPTIMISATION_LEVEL, reloc="pic", codemodel="default"
    )
    version = ".".join(map(str, llvm.llvm_version_info))
    key = f"llvmlite_{llvmlite.__version__}_{version}_{processor}_{feats}{'_jit' if self.jit else ''}"
    Compiler.__init__(self, cache_key or f"compile_{_sql_name(key)}")


def _sql_name(key: str) -> str:
    """tinygrad quotes the cache key as an SQL table's name by hand."""
    return key.replace("'", "").replace('"', "")


def _init_cpu(self: Any, arch: list[str], cache_key: str | None = None) -> None:
    """`CPULLVMCompiler.__init__`: `arch` is [arch, processor or "native", features...]."""
    self.arch, processor, *named = arch
    features = [name if name.startswith("-") else f"+{name}" for name in named]
    if processor == "native":
        processor = llvm.get_host_cpu_name()
        found = llvm.get_host_cpu_features().flatten()
        features.append(found)
        if "+avx512vnni" in found:  # multiply and add pairs in one instruction: LLVM would tune for two
            features.append("+fast-dpwssd")
    if self.arch == "arm64":
        features.insert(0, "+reserve-x18")  # x18 belongs to the platform, see ClangJITCompiler
    _init(self, self.arch, processor, ",".join(filter(None, features)), cache_key)


def _compile_to_obj(self: Any, src: str) -> bytes:
    """LLVM IR in, a relocatable ELF object out. RuntimeError with LLVM's own words on IR it refuses."""
    if self.jit:
        fused = not any(f"void {name}" in src for name in UNFUSED)
        src = src.replace(TINYGRAD_FLAGS, TINYGRAD_FLAGS + " reassoc" if fused else "nsz arcp afn")
    module = llvm.parse_assembly(src)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=OPTIMISATION_LEVEL)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = True
    builder = llvm.create_pass_builder(self.target_machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(self.target_machine.emit_object(module))


def _supported_dtypes(self: Any) -> set[Any]:
    """With F16C a half is loaded and converted in one instruction; tinygrad would emulate it with integers."""
    return set(Renderer.supported_dtypes(self)) - set(dtypes.fp8s)


def _no_del(self: Any) -> None:
    """llvmlite's objects free themselves."""


def install() -> None:
    """Make every `DEV=<device>:LLVM` compile through llvmlite. Call it before the first kernel."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    compiler_cpu.LLVMCompiler.__init__ = _init
    compiler_cpu.LLVMCompiler.compile_to_obj = _compile_to_obj
    compiler_cpu.LLVMCompiler.__del__ = _no_del
    compiler_cpu.CPULLVMCompiler.__init__ = _init_cpu
    if platform.machine() != "x86_64" or "+f16c" in llvm.get_host_cpu_features().flatten():
        CPULLVMRenderer.supported_dtypes = _supported_dtypes
