"""`.venv/bin/python -m tests.bench.engine.profile`: where a step's time goes on the CPU, kernel by kernel.

The kernels of a captured step are called one after the other, thread by thread and alone, so that each finds the
processor's caches as the one before left them; the best of REPEATS passes counts, and of a kernel that several threads
share the slowest part. Their sum stands beside the whole step, which has Python, its threads' meetings, and what they
take from each other besides. SmolLM2-135M Q4_1.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine import device
from engine.batching.batcher import Row
from engine.protocol import Load
from engine.self_test import open_devices
from tests.bench.engine.contenders import CACHE, CONTEXT, SLOTS
from tests.bench.engine.models import smollm2
from tests.bench.report import median

REPEATS = 15
STEPS = 40  # of the whole step
TOKEN = 5
LOAD_BYTES = 8 << 30


def situations() -> dict[str, list[Row]]:
    """Rows of a step by what it is a step of."""
    found = {
        f"{runs} runs at 200": [Row(TOKEN, slot, 200) for slot in range(runs)] for runs in (1, 2, 4, 8, 16)
    }
    for before in (200, 1000):
        found[f"32 rows of a prompt at {before}"] = [Row(TOKEN, 0, before + at) for at in range(32)]
    return found


def kernels(step: Any) -> dict[str, tuple[int, float]]:
    """How many of each kind a `NativeStep` has, and their milliseconds together."""
    found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    slowest = np.max([_best_ms(entries, thread) for thread, entries in enumerate(step._lists)], axis=0)
    for call, ms in zip(step.linear.src, slowest, strict=True):
        kind = _kind(call.src[0].arg.name)
        count, total = found[kind]
        found[kind] = count + 1, total + float(ms)
    return found


def _best_ms(entries: np.ndarray, thread: int) -> np.ndarray:
    """Of each of a thread's kernels; 0 for those that it has no part in."""
    words = entries.shape[1] - 3
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * words)
    calls = [(kind(int(entry[0])), [int(each) for each in entry[3:]]) for entry in entries]
    best = np.full(len(calls), np.inf)
    mine = entries[:, 1] > thread
    for _ in range(REPEATS):
        for index in np.flatnonzero(mine):
            call, arguments = calls[index]
            best[index] = min(best[index], _seconds(lambda: call(*arguments)))  # noqa: B023 - called at once
    return np.where(mine, best * 1e3, 0.0)


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _kind(name: str) -> str:
    product = re.fullmatch(r"packed_\d+_(\d+)_(\d+)\w*", name)
    return f"product with {product[1]} x {product[2]}" if product else re.sub(r"_\d.*", "", name)


def main() -> int:
    name = device.parse("CPU")
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    device.choose(name, str(CACHE))
    open_devices(name)
    from engine.loading import load_model  # tinygrad has read which device to take

    model = smollm2()
    load = Load(model="m", path=str(model.path), family=model.family, context=CONTEXT, slots=SLOTS)
    graphs = load_model(load, SLOTS, name, LOAD_BYTES, lambda *_: None).graphs
    columns: dict[str, dict[str, tuple[int, float]]] = {}
    for title, rows in situations().items():
        took = [_seconds(lambda rows=rows: graphs.step(rows, [len(rows) - 1])) * 1e3 for _ in range(STEPS)]
        size = next(size for size in graphs.sizes if size >= len(rows))
        columns[title] = kernels(graphs._graphs[size]._graph)
        alone = sum(ms for _, ms in columns[title].values())
        calls = sum(count for count, _ in columns[title].values())
        columns[title] |= {
            "all kernels": (calls, alone),
            "the whole step, best": (1, min(took)),
            "the whole step, middle": (1, median(took) or 0.0),
        }
    print_table(columns)
    return 0


def print_table(columns: dict[str, dict[str, tuple[int, float]]]) -> None:
    first = next(iter(columns.values()))
    kinds = sorted(first, key=lambda kind: -first[kind][1])
    kinds += [kind for column in columns.values() for kind in column if kind not in kinds]
    print_line(["ms", "", *columns])
    for kind in dict.fromkeys(kinds):
        counts = {str(column[kind][0]) for column in columns.values() if kind in column}
        shown = [f"{column[kind][1]:.2f}" if kind in column else "" for column in columns.values()]
        print_line([kind, ", ".join(sorted(counts)), *shown])


def print_line(cells: Sequence[str]) -> None:
    print(f"{cells[0]:28}{cells[1]:>8}", *(f"{cell:>28}" for cell in cells[2:]))


if __name__ == "__main__":
    sys.exit(main())
