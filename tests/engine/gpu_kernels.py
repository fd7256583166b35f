"""A script, DEV=CPU:LLVM: compiles a step's kernels for a GPU's architecture, with no card; prints their names.

The kernels are built as for a GPU (no CPU loop shapes), run on the CPU, and each is also rendered and compiled by
tinygrad's renderer for the target: "AMD:LLVM:gfx1100" through the engine's llvmlite shim, "NV:PTX:sm_90" through
NVIDIA's libnvJitLink, "NV:CUDA:sm_90" through its libnvrtc.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tinygrad.engine.realize as realize
from tinygrad import Tensor, dtypes
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import CUDARenderer
from tinygrad.renderer.llvmir import AMDLLVMRenderer
from tinygrad.renderer.ptx import PTXRenderer
from tinygrad.uop.ops import UOp

from engine.compilers import llvm
from engine.kernels import experts, layer_norm, transformer
from engine.kernels.matrices import LANES, LAYOUTS, Layout, Matrix, PackedForm, Part
from engine.kernels.slot_copy import copy_positions

RENDERERS: dict[str, Any] = {"LLVM": AMDLLVMRenderer, "PTX": PTXRenderer, "CUDA": CUDARenderer}
ROWS, HEADS, GROUPS, WIDTH, SLOTS, LENGTH = 4, 4, 2, 64, 2, 64


def main(target: str) -> None:
    llvm.install()
    device, compiler, architecture = target.split(":")
    gpu = RENDERERS[compiler](Target(device, compiler, architecture))
    compile_kernel = realize.to_program

    def compile_for_both(ast: Any, renderer: Any) -> Any:
        program = compile_kernel(ast, gpu)
        assert bytes(program.src[-1].arg)[:4] == b"\x7fELF"
        print(ast.arg.name)
        return compile_kernel(ast, renderer)

    realize.to_program = compile_for_both
    transformer._on_cpu = lambda tensor: False
    step()


def step() -> None:
    embedding = HEADS * WIDTH
    tokens, slots, positions = (
        Tensor(np.array(v, dtype=np.int32)) for v in ([1, 2, 3, 4], [0, 0, 1, 1], [0, 1, 0, 1])
    )
    table = Tensor.ones(8, embedding).half().contiguous()
    norm = Tensor.ones(embedding).contiguous()
    for layout in sorted({*LAYOUTS.values()}, key=str):
        transformer.matmul(
            transformer.normed(transformer.gather_rows(packed(layout, 8, embedding), tokens), norm, 1e-5),
            packed(layout, 48, embedding),
        ).realize()
    x = transformer.gather_rows(table, tokens)
    weight = Tensor.ones((HEADS + 2 * GROUPS) * WIDTH, embedding).half().contiguous()
    qkv = transformer.matmul(transformer.normed(x, norm, 1e-5), weight)
    angles = Tensor.ones(2, ROWS, WIDTH // 2).contiguous()
    empty = Tensor.zeros(2, SLOTS, GROUPS, LENGTH, WIDTH).half().contiguous().realize()
    cache = transformer.write_cache(empty, qkv, angles, slots, positions, HEADS)
    queries = transformer.rotate_queries(qkv, angles, HEADS, WIDTH, WIDTH**-0.5)
    length = UOp.variable("length", 1, LENGTH).bind(2)
    mixed = transformer.attention(queries, cache, slots, positions, length)
    x = transformer.matmul(mixed, Tensor.ones(embedding, embedding).half().contiguous(), residual=x)
    assert np.isfinite(transformer.gated(x).numpy()).all()
    encoders(x, tokens)
    copy_positions(cache, Tensor(np.array([0, 1], dtype=np.int32)), length).realize()
    peculiar(qkv, angles, empty, slots, positions, length)


def encoders(x: Tensor, tokens: Tensor) -> None:
    """What only encoders have."""
    embedding = x.shape[1]
    table = Tensor.ones(8, embedding).contiguous()
    weight, bias = Tensor.ones(embedding).contiguous(), Tensor.ones(embedding).contiguous()
    normed = layer_norm.layer_norm(layer_norm.add_rows(x, table, tokens), weight, bias, 1e-5)
    assert np.isfinite(layer_norm.gelu(normed).numpy()).all()


def packed(layout: Layout, outputs: int, inputs: int) -> Matrix:
    panels = -(-outputs // LANES)
    words = Tensor.ones(panels, inputs // layout.elements, LANES, dtype=dtypes.uint32).contiguous()
    kind = dtypes.float32 if layout.wide else dtypes.float16
    scales = Tensor.ones(panels, inputs // layout.group, LANES, dtype=kind).contiguous()
    tensors = (words, scales, scales) if layout.minimum else (words, scales)
    return Matrix((Part(PackedForm(outputs, inputs, layout), tensors),))


def peculiar(
    qkv: Tensor, angles: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, length: UOp
) -> None:
    """What only some families have."""
    rotation = transformer.Rotation(halves=True, rotated=WIDTH // 2)
    inverse = transformer.inverse_head_norms(qkv, HEADS + GROUPS, WIDTH, 1e-5)
    norm = transformer.HeadNorm(inverse, Tensor.ones(WIDTH).contiguous())
    cache = transformer.write_cache(cache, qkv, angles, slots, positions, HEADS, rotation, norm)
    queries = transformer.rotate_queries(qkv, angles, HEADS, WIDTH, WIDTH**-0.5, rotation, norm)
    x = transformer.attention(queries, cache, slots, positions, length, window=8)
    weight = Tensor.ones(HEADS * WIDTH).contiguous()
    x = transformer.add_normed(x, x, transformer.inverse_norm(x, 1e-5), weight)
    scores = transformer.matmul(
        x, Tensor.ones(8, HEADS * WIDTH).contiguous(), bias=Tensor.ones(8).contiguous()
    )
    chosen, shares = experts.choose(scores, 2)
    assert chosen.numpy().tolist() == [[0, 1]] * ROWS  # of equals the first
    matrices = [packed(LAYOUTS[12], 8 * 32, HEADS * WIDTH) for _ in range(2)]
    inner = experts.expand(transformer.normed(x, weight, 1e-5), *matrices, chosen, 8)
    down = packed(LAYOUTS[14], 8 * HEADS * WIDTH, 32)
    x = experts.contract(inner, down, chosen, shares, x, 8)
    assert np.isfinite(transformer.gated(x, gelu=True).numpy()).all()


if __name__ == "__main__":
    main(sys.argv[1])
