"""A script, DEV and CACHEDB given: `python -m tests.engine.device_checks CHECK` fails when the check does.

A process of its own, because tinygrad takes its device from the environment once.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.llm.gguf import ggml_data_to_tensor
from tinygrad.uop.ops import UOp

from engine import device
from engine.compilers import programs
from engine.errors import DeviceUnusable
from engine.files import gguf
from engine.kernels import experts, transformer, vectors
from engine.kernels.matrices import LAYOUTS, Matrix, PackedForm, Part, device_bytes, panels, unpack
from engine.kernels.recording import recording
from engine.kernels.weights import Piece, Weights, upload
from engine.self_test import self_test
from tests.engine import small_gguf
from tests.engine.conftest import DEVICE
from tests.engine.devices import open_suites

ROWS, HEADS, GROUPS, WIDTH, SLOTS, LENGTH = 4, 4, 2, 64, 2, 64
EMBEDDING = HEADS * WIDTH
random = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def decoders(directory: Path) -> None:
    """Every kind, stacked, replayed and in part, beside what tinygrad decodes without a graph: equal values."""
    tensors: dict[str, Any] = {}
    for kind, (_, elements, size) in gguf.TYPES.items():
        for index, rows in enumerate((24, 7, 24)):
            blocks = rows * 512 // elements
            if kind in (0, 1, 30):
                raw = (floats(rows * 512).view(np.uint32) >> 16).astype("<u2").tobytes()  # sound as bfloat16
                raw = {0: floats(rows * 512), 1: floats(rows * 512).astype("<f2")}.get(kind, raw)
            else:
                top = 120 if kind == 39 else 96  # moderate when read as a scale, be it an exponent
                raw = random.integers(0, top, blocks * size, dtype=np.uint8)
            raw = raw if isinstance(raw, bytes) else raw.tobytes()
            tensors[f"{kind}.{index}"] = ((512, rows), kind, raw)
    header = gguf.read(small_gguf.write(directory / "kinds.gguf", {"general.architecture": "llama"}, tensors))
    with Weights(header, lambda done, total: None) as weights:
        for kind in gguf.TYPES:
            plain = [
                ggml_data_to_tensor(
                    Tensor(np.frombuffer(tensors[f"{kind}.{index}"][2], np.uint8).copy()).realize(),
                    rows * 512,
                    kind,
                ).reshape(rows, 512)
                for index, rows in enumerate((24, 7, 24))
            ]
            right = [each.float().numpy() for each in plain]
            stacked = weights.stacked([Piece(f"{kind}.0", (24, 512)), Piece(f"{kind}.1", (7, 512))])
            part = weights.matrix(f"{kind}.2", 24, 512, rows=(3, 21), columns=(256, 512))
            assert (stacked.shape, part.shape) == ((31, 512), (18, 256))
            _same(values(stacked), np.concatenate(right[:2]), kind)
            _same(values(part), right[2][3:21, 256:], kind)
            for columns in ((32, 288), (96, 160), (0, 500)):  # the last one within a packed group, too
                cut = weights.matrix(f"{kind}.2", 24, 512, columns=columns)
                assert cut.shape == (24, columns[1] - columns[0])
                # cut anywhere, a matrix becomes float16
                right_cut = right[2][:, slice(*columns)]
                _same(values(cut), right_cut.astype(np.float16) if columns[1] % 32 else right_cut, kind)
            whole = stacked.nbytes
            assert whole <= device_bytes(kind, (32, 512)) <= whole * 32 / 31, kind  # lanes are filled up
            panels = weights.matrix(f"{kind}.2", 24, 512, rows=(0, 16))  # an odd number of whole ones
            for some in (part, panels):
                if np.isfinite(values(some)).all():
                    product(some, values(some))
        weights.finish()
        # what is read of a row of F16 and of one of IQ4_XS, in blocks of 256, is not the same
        pieces = [Piece(f"{kind}.0", (24, 512), columns=(32, 288)) for kind in (1, 23)]
        for piece, part in zip(pieces, weights.stacked(pieces).parts, strict=True):
            alone = weights.stacked([piece])
            np.testing.assert_array_equal(values(Matrix((part,))), values(alone))


def values(matrix: Matrix) -> np.ndarray:
    """All its rows, as the kernels see them."""
    rows = upload(np.arange(matrix.shape[0], dtype=np.int32))
    return transformer.gather_rows(matrix, rows).numpy()


def _same(got: np.ndarray, right: np.ndarray, kind: int) -> None:
    """Packed: to float32's rounding of a product and a sum; otherwise rounded to float16."""
    if kind not in LAYOUTS:
        right = right.astype(np.float16).astype(np.float32)
    assert right.any()
    scale = np.abs(right[np.isfinite(right)]).max()
    np.testing.assert_allclose(got, right, rtol=2e-7, atol=4e-7 * scale if kind in LAYOUTS else 0)


def product(matrix: Matrix, weights: np.ndarray) -> None:
    """matmul with all that can be added, for one row and for several."""
    outputs, inputs = matrix.shape
    for rows in (1, 3, 8, 33):
        x, norm, inverse = floats(rows, inputs), floats(inputs), floats(rows)
        bias, residual = floats(outputs), floats(rows, outputs)
        given = transformer.Normed(upload(x), upload(inverse), upload(norm))
        got = transformer.matmul(given, matrix, bias=upload(bias), residual=upload(residual)).numpy()
        normed = x * inverse[:, None] * norm
        for ours, values, added in (
            (got, normed, (bias, residual)),
            (transformer.matmul(upload(x), matrix).numpy(), x, ()),
        ):
            right = values.astype(np.float64) @ weights.T + sum(added)
            sizes = np.abs(weights).sum(1) * np.abs(values).max(1, keepdims=True)  # activations have 16 bits
            assert (np.abs(ours - right) <= 2e-5 * sizes + 2e-6).all()


def mixtures(_: Path) -> None:
    """Experts' products for every layout, as numbers in float64 give them; each row's whatever is beside it."""
    count, used, rows = 3, 2, 5
    kinds = list(LAYOUTS)
    # experts of 24 outputs do not begin with a panel
    for size, kind, other in [(32, *pair) for pair in pairwise([*kinds, kinds[0]])] + [(24, 2, 8)]:
        (gate, a), (up, b) = (packed(each, count * size, 256) for each in (kind, other))
        down, c = packed(kind, count * size, 256)
        x = floats(rows, 256) / np.float32(np.linalg.norm(a, axis=1).max())  # gates where silu bends
        inner, residual = floats(rows * used, 256), floats(rows, size)
        norm, inverse = floats(256), floats(rows)
        shares = random.random((rows, used), dtype=np.float32)
        chosen = np.array([[0, 2], [1, 0], [-7, 1], [2, 99], [1, 2]], dtype=np.int32)
        read = chosen.clip(0, count - 1).reshape(-1)
        normed = np.repeat((x * inverse[:, None] * norm).astype(np.float64), used, axis=0)
        first, second, third = (
            np.einsum("ci,coi->co", values, weights.reshape(count, size, 256)[read])
            for values, weights in ((normed, a), (normed, b), (inner, c))
        )
        expanded = first * second / (1 + np.exp(-first))
        contracted = (third.reshape(rows, used, size) * shares[:, :, None]).sum(1) + residual
        alone = None
        for some in (1, rows):
            given = transformer.Normed(upload(x[:some]), upload(inverse[:some]), upload(norm))
            numbers, weighed = upload(chosen[:some]), upload(shares[:some])
            more = upload(inner[: some * used]), upload(residual[:some])
            one = experts.expand(given, gate, up, numbers, count, 2).numpy()
            two = experts.contract(more[0], down, numbers, weighed, more[1], count, 2).numpy()
            for ours, right in ((one, expanded), (two, contracted)):
                assert np.abs(ours - right[: len(ours)]).max() <= 2e-4 * np.abs(right).max(), (kind, size)
            if alone is not None and vectors.usable(numbers):
                np.testing.assert_array_equal(alone[0], one[:used])
                np.testing.assert_array_equal(alone[1], two[:1])
            alone = one, two


def attention(_: Path) -> None:
    """Of every number of slots and heads, also one, by the kernels that any device takes: as numpy gives it."""
    usable = vectors.usable
    for slots, heads, groups, rows in ((1, 1, 1, 1), (1, 2, 1, 3), (1, 3, 3, 2), (2, 2, 1, 3), (2, 4, 2, 1)):
        qkv = floats(rows, (heads + 2 * groups) * WIDTH)
        still = np.stack([np.ones((rows, WIDTH // 2)), np.zeros((rows, WIDTH // 2))]).astype(np.float32)
        queries, keys, held = np.split(qkv.reshape(rows, -1, WIDTH), [heads, heads + groups], axis=1)
        keys, held = (np.repeat(each, heads // groups, axis=1) for each in (keys, held))
        hidden = np.triu(np.full((rows, rows), -np.inf), 1)
        scores = np.exp(np.einsum("qhd,khd->hqk", queries, keys) / 8 + hidden)
        right = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), held).reshape(rows, -1)
        for vectors.usable in (usable, lambda tensor: False):
            cache = upload(np.zeros((2, slots, groups, 32, WIDTH), dtype=np.float32))
            place = upload(np.full(rows, slots - 1, dtype=np.int32)), upload(np.arange(rows, dtype=np.int32))
            given, angles = upload(qkv), upload(still)
            cache = transformer.write_cache(cache, given, angles, *place, heads)
            turned = transformer.rotate_queries(given, angles, heads, WIDTH, 1 / 8)
            length = UOp.variable("length", 1, 32).bind(rows)
            got = transformer.attention(turned, cache, *place, length).numpy()
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
    vectors.usable = usable


def neighbours(_: Path) -> None:
    """A row's attention is as numpy gives it, whatever rows are beside it: of its prompt, of other runs, padding.

    To the last bit where vectors are whole, and there what an earlier run left behind a row's position is not seen.
    """
    length, before = 96, 67
    for heads, groups, width, window in (
        (9, 3, 64, 0),
        (4, 4, 32, 0),
        (2, 1, 256, 0),
        (6, 2, 64, 20),
        (7, 1, 16, 0),
    ):
        empty = np.zeros((2, 3, groups, length, width), dtype=np.float16)
        cache, known = upload(empty), {}
        for slot in (0, 1):
            qkv = floats(length - 1, (heads + 2 * groups) * width)
            if transformer.in_vectors(cache):
                qkv[before:] = np.nan
            still = np.stack([np.ones((length - 1, width // 2)), np.zeros((length - 1, width // 2))])
            places = (
                upload(np.array(each, dtype=np.int32)) for each in ([slot] * (length - 1), range(length - 1))
            )
            cache = transformer.write_cache(
                cache, upload(qkv), upload(still.astype(np.float32)), *places, heads
            )
            half = qkv.astype(np.float16).astype(np.float64).reshape(length - 1, -1, width)
            known[slot] = np.split(half, [heads, heads + groups], axis=1)[1:]
        queries = floats(8, heads, width) / np.float32(width**0.5)
        for slots, positions in (
            ([0] * 8, list(range(59, 67))),
            ([1, *[0] * 7], [40, *range(60, 67)]),
            ([0] * 8, [*range(30, 36), length - 1, length - 1]),
            ([0, 1] * 4, [3, 66, 31, 32, 33, 0, 64, 63]),
        ):
            got = _attended(cache, queries, slots, positions, window)
            for row, (slot, own) in enumerate(zip(slots, positions, strict=True)):
                if own == length - 1:
                    continue
                alone = _attended(cache, queries[row : row + 1], [slot], [own], window)[0]
                if transformer.in_vectors(cache):
                    np.testing.assert_array_equal(got[row], alone)
                first = max(0, own + 1 - window) if window else 0
                keys, values_ = (
                    np.repeat(each[first : own + 1], heads // groups, axis=1) for each in known[slot]
                )
                scores = np.exp(np.einsum("hd,khd->hk", queries[row].astype(np.float64), keys))
                right = np.einsum("hk,khd->hd", scores / scores.sum(-1, keepdims=True), values_).reshape(-1)
                np.testing.assert_allclose(got[row], right, rtol=1e-3, atol=1e-4)


def _attended(
    cache: Tensor, queries: np.ndarray, slots: list[int], positions: list[int], window: int
) -> np.ndarray:
    places = (upload(np.array(each, dtype=np.int32)) for each in (slots, positions))
    length = UOp.variable("length", 1, cache.shape[3]).bind(
        max(p for p in positions if p < cache.shape[3] - 1) + 1
    )
    return transformer.attention(upload(queries), cache, *places, length, window).numpy()


def choices(_: Path) -> None:
    """The best experts and their shares, also of one; a score that is no number is chosen and shows in the shares."""
    for count, used in ((1, 1), (5, 1), (5, 3), (4, 4)):
        scores = floats(6, count)
        scores[0] = 1.0  # of equals the first
        best = np.argsort(-scores, axis=1, kind="stable")[:, :used]
        powers = np.exp(np.take_along_axis(scores, best, 1))
        chosen, shares = (each.numpy() for each in experts.choose(upload(scores), used))
        np.testing.assert_array_equal(chosen, best)
        np.testing.assert_allclose(shares, powers / powers.sum(1, keepdims=True), rtol=1e-5)
    for at in range(3):
        scores = np.array([[1, 3, 2]], dtype=np.float32)
        scores[0, at] = np.nan
        chosen, shares = (each.numpy() for each in experts.choose(upload(scores), 2))
        assert chosen[0, 0] == at
        assert np.isnan(shares).all()


def packed(kind: int, outputs: int, inputs: int) -> tuple[Matrix, np.ndarray]:
    """A matrix of random blocks, and its values."""
    _, elements, size = gguf.TYPES[kind]
    raw = random.integers(0, 48, (outputs, inputs // elements, size), dtype=np.uint8)
    found = tuple(upload(panels([rows])) for rows in unpack(raw, kind))
    matrix = Matrix((Part(PackedForm(outputs, inputs, LAYOUTS[kind]), found),))
    return matrix, values(matrix).astype(np.float64)


def step(inputs: dict[str, Tensor], length: UOp) -> Tensor:
    """A block and its ends, as a model has them."""
    x = transformer.gather_rows(inputs["table"], inputs["tokens"])
    for _ in range(2):
        qkv = transformer.matmul(transformer.normed(x, inputs["norm"], 1e-5), inputs["qkv"])
        ints = inputs["slots"], inputs["positions"]
        cache = transformer.write_cache(inputs["cache"], qkv, inputs["angles"], *ints, HEADS)
        queries = transformer.rotate_queries(qkv, inputs["angles"], HEADS, WIDTH, WIDTH**-0.5)
        x = transformer.matmul(
            transformer.attention(queries, cache, *ints, length), inputs["output"], residual=x
        )
        inner = transformer.gated(transformer.matmul(x, inputs["gate_up"]))
        x = transformer.matmul(inner, inputs["output"], residual=x)
    return transformer.normed(x, inputs["norm"], 1e-5).applied()


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
            transformer.inverse_norm(given["table"].float() * 2, 1e-5)
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
    name = device.parse(DEVICE)
    assert self_test(name) > 0
    right = {
        part: getattr(transformer, part) for part in ("gated", "attention", "rotate_queries", "inverse_norm")
    }
    for part, kernel in right.items():
        setattr(
            transformer, part, lambda *args, kernel=kernel, **named: kernel(*args, **named).contiguous() * 1.1
        )
        with pytest.raises(DeviceUnusable, match=r"computes a wrong (attention|layer)") as caught:
            self_test(name)
        assert caught.value.code == "self_test_failed"
        setattr(transformer, part, kernel)


if __name__ == "__main__":
    open_suites()
    checks = (decoders, mixtures, attention, neighbours, choices, recorded, stored, wrong)
    {check.__name__: check for check in checks}[sys.argv[1]](Path(sys.argv[2]))
