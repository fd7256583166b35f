"""A script, DEV and CACHEDB given: `python -m tests.engine.device_checks CHECK` fails when the check does.

A process of its own, because tinygrad takes its device from the environment once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Device, Tensor
from tinygrad.llm.gguf import ggml_data_to_tensor
from tinygrad.uop.ops import UOp

from engine import device, gguf, kernels, llvm, programs
from engine.errors import DeviceUnusable
from engine.recording import recording
from engine.weights import Weights, upload
from tests.engine import small_gguf

ROWS, HEADS, GROUPS, WIDTH, SLOTS, LENGTH = 4, 4, 2, 64, 2, 64
EMBEDDING = HEADS * WIDTH
random = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def decoders(directory: Path) -> None:
    """Every kind, replayed and beside others, bit for bit as tinygrad decodes it without a graph."""
    tensors: dict[str, Any] = {"norm": ((512,), 0, floats(512).tobytes())}
    for kind, (_, elements, size) in gguf.TYPES.items():
        for index, rows in enumerate((8, 4, 8)):
            blocks = rows * 512 // elements
            if kind in (0, 1, 30):
                raw = (floats(rows * 512).view(np.uint32) >> 16).astype("<u2").tobytes()  # sound as bfloat16
                raw = {0: floats(rows * 512), 1: floats(rows * 512).astype("<f2")}.get(kind, raw)
            else:
                raw = random.integers(0, 120, blocks * size, dtype=np.uint8)  # finite when read as a scale
            raw = raw if isinstance(raw, bytes) else raw.tobytes()
            tensors[f"{kind}.{index}"] = ((512, rows), kind, raw)
    header = gguf.read(small_gguf.write(directory / "kinds.gguf", {"general.architecture": "llama"}, tensors))
    with Weights(header, lambda done, total: None) as weights:
        norm = weights.vector("norm", 512)
        for kind in gguf.TYPES:
            got = weights.stacked([(f"{kind}.0", (8, 512)), (f"{kind}.1", (4, 512))], columns=norm).numpy()
            again = weights.matrix(f"{kind}.2", 8, 512).numpy()
            plain = [
                ggml_data_to_tensor(
                    Tensor(np.frombuffer(tensors[f"{kind}.{index}"][2], np.uint8).copy()).realize(),
                    rows * 512,
                    kind,
                )
                .reshape(rows, 512)
                .float()
                for index, rows in enumerate((8, 4, 8))
            ]
            for index, top in ((0, 0), (1, 8)):
                right = (plain[index] * norm).half().numpy()
                np.testing.assert_array_equal(got[top : top + len(right)], right, str(kind))
            np.testing.assert_array_equal(again, plain[2].half().numpy(), str(kind))
            assert again.any(), kind
        weights.finish()


def step(inputs: dict[str, Tensor], length: UOp) -> Tensor:
    """A block and its ends, as a model has them."""
    x = kernels.gather_rows(inputs["table"], inputs["tokens"])
    for _ in range(2):
        qkv = kernels.matmul(x, inputs["qkv"], scale=kernels.inverse_norm(x, 1e-5))
        ints = inputs["slots"], inputs["positions"]
        cache = kernels.write_cache(inputs["cache"], qkv, inputs["angles"], *ints, HEADS)
        queries = kernels.rotate_queries(qkv, inputs["angles"], HEADS, WIDTH, WIDTH**-0.5)
        x = kernels.matmul(kernels.attention(queries, cache, *ints, length), inputs["output"], residual=x)
        inner = kernels.gated(kernels.matmul(x, inputs["gate_up"]))
        x = kernels.matmul(inner, inputs["output"], residual=x)
    return kernels.scale_columns(x, inputs["norm"])


def inputs() -> dict[str, Tensor]:
    matrices = {
        "table": (8, EMBEDDING),
        "qkv": ((HEADS + 2 * GROUPS) * WIDTH, EMBEDDING),
        "output": (EMBEDDING, EMBEDDING),
        "gate_up": (2 * EMBEDDING, EMBEDDING),
    }
    made = {name: upload((floats(*shape) / 16).astype(np.float16)) for name, shape in matrices.items()}
    for name, values in {"tokens": [1, 2, 3, 4], "slots": [0, 0, 1, 1], "positions": [0, 1, 0, 1]}.items():
        made[name] = upload(np.array(values, dtype=np.int32))
    made["angles"] = upload(floats(2, ROWS, WIDTH // 2))
    made["norm"] = upload(floats(EMBEDDING))
    made["cache"] = upload(np.zeros((2, SLOTS, GROUPS, LENGTH, WIDTH), dtype=np.float16))
    return made


def recorded(_: Path) -> None:
    """A recorded step computes what the scheduler's does, again and again, and refuses what is lazy."""
    given, length = inputs(), UOp.variable("length", 1, LENGTH)
    right = step(given, length.bind(2)).numpy()
    with recording() as record:
        out = step(given, length.bind(1))
    graph = record.captured(out)
    for _ in range(3):
        got = graph([], {"length": 2}).numpy()
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)
    graph.free_intermediates()
    with recording():
        try:
            kernels.inverse_norm(given["table"].float() * 2, 1e-5)
        except AssertionError:
            return
    raise AssertionError("a lazy tensor was recorded")


def stored(_: Path) -> None:
    """A kernel's program comes from the cache file the second time, without being lowered again."""
    given, length = inputs(), UOp.variable("length", 1, LENGTH).bind(2)
    assert programs.compiled() == 0
    step(given, length).realize()
    assert programs.compiled() > 0
    programs._programs.clear()
    lower = programs.to_program

    def never(ast: UOp, renderer: Any) -> UOp:
        raise AssertionError(f"{ast.arg.name} was lowered again")

    programs.to_program = never
    again = step(given, length).numpy()
    programs._programs.clear()
    programs.to_program = lower
    programs.diskcache_get = lambda table, key: None
    np.testing.assert_array_equal(step(given, length).numpy(), again)


def wrong(_: Path) -> None:
    """A device that computes one thing wrongly, whichever, is refused and says what."""
    name = device.parse("CPU:LLVM")
    assert device.self_test(name) > 0
    right = {
        part: getattr(kernels, part) for part in ("gated", "attention", "rotate_queries", "inverse_norm")
    }
    for part, kernel in right.items():
        setattr(
            kernels, part, lambda *args, kernel=kernel, **named: kernel(*args, **named).contiguous() * 1.1
        )
        with pytest.raises(DeviceUnusable, match=r"computes a wrong (attention|layer)") as caught:
            device.self_test(name)
        assert caught.value.code == "self_test_failed"
        setattr(kernels, part, kernel)


if __name__ == "__main__":
    llvm.install()
    programs.install()
    assert Device.DEFAULT in ("CPU", "AMD")
    {check.__name__: check for check in (decoders, recorded, stored, wrong)}[sys.argv[1]](Path(sys.argv[2]))
