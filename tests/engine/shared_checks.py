"""A script, DEV=CPU:LLVM: `python -m tests.engine.shared_checks DIRECTORY OUT` compares a model shared by devices.

The model is quantised in blocks of 32, has six key/value heads, and neither its feed-forward nor its vocabulary can be
cut into equal parts: shared by two and by three CPU devices it must give one device's logits, and what cannot be shared
must say why. OUT gets a JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad.helpers import GlobalCounters

from engine import device
from engine.batching.batcher import Row
from engine.errors import LoadError
from engine.files import gguf
from engine.graphs import GraphedModel, cache_length
from engine.kernels.transformer import Rotation
from engine.kernels.weights import Weights
from engine.models.decoder import Decoder, DecoderConfig, Layer, Rope
from engine.self_test import open_devices
from tests.engine import small_gguf

EMBEDDING, HEADS, GROUPS, WIDTH, FEED_FORWARD, VOCABULARY, BLOCKS, EXPERTS = 64, 12, 6, 16, 160, 250, 2, 4
SLOTS, CONTEXT = 2, 40
DEVICES = ("CPU", "CPU:1", "CPU:2")
random = np.random.default_rng(5)


def q4_0(rows: int, columns: int) -> bytes:
    blocks = rows * columns // 32
    scales = (random.random((blocks, 1)) * 0.02).astype("<f2").view(np.uint8)
    return np.concatenate([scales, random.integers(0, 256, (blocks, 16), dtype=np.uint8)], axis=1).tobytes()


def f16(rows: int, columns: int) -> bytes:
    return (random.standard_normal((rows, columns)) / 8).astype("<f2").tobytes()


def written(path: Path, experts: int) -> gguf.Gguf:
    """A file with the tensors of a decoder; the last matrix as float16, the others as Q4_0."""
    tensors: dict[str, Any] = {}

    def matrix(name: str, rows: int, columns: int, count: int = 0) -> None:
        raw = q4_0(rows * max(count, 1), columns)
        tensors[name + ".weight"] = ((columns, rows, count) if count else (columns, rows), 2, raw)

    def vector(name: str, size: int) -> None:
        tensors[name + ".weight"] = ((size,), 0, (random.random(size) + 0.5).astype("<f4").tobytes())

    for block in (f"blk.{index}." for index in range(BLOCKS)):
        for norm in ("attn_norm", "ffn_norm"):
            vector(block + norm, EMBEDDING)
        for part, heads in {"q": HEADS, "k": GROUPS, "v": GROUPS}.items():
            matrix(f"{block}attn_{part}", heads * WIDTH, EMBEDDING)
        matrix(block + "attn_output", EMBEDDING, HEADS * WIDTH)
        kind = "_exps" if experts else ""
        if experts:
            router = random.standard_normal((experts, EMBEDDING)).astype("<f4").tobytes()
            tensors[block + "ffn_gate_inp.weight"] = ((EMBEDDING, experts), 0, router)
        for part in ("gate", "up"):
            matrix(f"{block}ffn_{part}{kind}", FEED_FORWARD, EMBEDDING, experts)
        matrix(f"{block}ffn_down{kind}", EMBEDDING, FEED_FORWARD, experts)
    vector("output_norm", EMBEDDING)
    matrix("token_embd", VOCABULARY, EMBEDDING)
    tensors["output.weight"] = ((EMBEDDING, VOCABULARY), 1, f16(VOCABULARY, EMBEDDING))
    return gguf.read(small_gguf.write(path, {"general.architecture": "llama"}, tensors))


def config(experts: int) -> DecoderConfig:
    return DecoderConfig(
        layers=(Layer(), Layer(window=5)),
        ropes=(Rope(10_000.0),),
        embedding=EMBEDDING,
        feed_forward=FEED_FORWARD,
        heads=HEADS,
        groups=GROUPS,
        width=WIDTH,
        vocabulary=VOCABULARY,
        epsilon=1e-5,
        context_max=CONTEXT,
        rotation=Rotation(halves=True),
        tied=False,
        query_scale=WIDTH**-0.5,
        experts=experts,
        experts_used=2 if experts else 0,
    )


def logits(file: gguf.Gguf, experts: int, devices: tuple[str, ...]) -> tuple[np.ndarray, dict[str, int]]:
    """Of a prompt in two steps, of single tokens, and after its beginning was copied to another slot; bytes held."""
    before = dict(GlobalCounters.mem_used_per_device)
    with Weights(file, lambda done, total: None) as weights:
        model = Decoder(config(experts), weights, SLOTS, cache_length(CONTEXT), 1, devices)
    held = {each: GlobalCounters.mem_used_per_device[each] - before.get(each, 0) for each in devices}
    graphs = GraphedModel(model, SLOTS, CONTEXT, on_cpu=True)
    graphs.sizes = [1, 8]
    for size in graphs.sizes:
        graphs.capture(size)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 20)
    found = []
    for start in (0, 8):
        rows = [Row(int(tokens[at]), 0, at) for at in range(start, start + 8)]
        found.append(graphs.step(rows, [3, 7]))
    found += [graphs.step([Row(int(tokens[at]), 0, at)], [0]) for at in range(16, 20)]
    graphs.copy(0, 1, 12)
    found += [graphs.step([Row(int(tokens[at]), 1, at)], [0]) for at in range(12, 15)]
    graphs.free()
    return np.concatenate(found), held


def main(directory: Path) -> dict[str, Any]:
    open_devices(device.parse("CPU:0,1,2"))
    found: dict[str, Any] = {}
    for experts in (0, EXPERTS):
        file = written(directory / f"{experts}.gguf", experts)
        right, whole = logits(file, experts, DEVICES[:1])
        for count in (3,) if experts else (2, 3):
            got, held = logits(file, experts, DEVICES[:count])
            found[f"{experts} experts, {count} devices"] = {
                "worst": float(np.abs(got - right).max() / right.std()),
                "largest_share": max(held.values()) / whole["CPU"],
            }
    for count in (4, 6):
        try:
            logits(file, EXPERTS, tuple(f"CPU:{number}" for number in range(count)))
        except LoadError as error:
            found[f"{count} devices"] = [error.code, str(error)]
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Path(sys.argv[1]))))
