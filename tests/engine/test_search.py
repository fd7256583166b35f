"""Kernels are searched while a model is loaded, within bounds; what was found is kept, and serves other hosts."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.onnx.model import MODEL, TEST
from engine.protocol import Configure, Heartbeat, Load, Loaded, LoadFailed, LoadProgress, Ready, Unusable
from peer.cli import main
from tests.engine import small_onnx
from tests.engine.devices import environment, found_by
from tests.engine.harness import REPOSITORY, EngineProcess

pytestmark = pytest.mark.process


def searched(folder: Path, mode: str) -> dict[str, Any]:
    out = folder / "found.json"
    return found_by("search_checks", [str(out), mode], out, environment(folder / "kernels.db"))


def test_a_search_is_bounded_checked_and_kept(tmp_path: Path) -> None:
    found = searched(tmp_path, "all")
    assert found["first"] == [1, 1]
    assert found["told"] > 2, "others are told between candidates"
    assert found["again"] == found["from the file"] == [0, 0]
    assert found["stated"] == [[1, 0], [0, 0]], "loops that a kernel states are its loops, whatever the width"
    assert found["unread"] == [1, 1]
    assert found["right"]
    assert found["faster"] == {"count": [1, 1], "usual": False}
    for kept in ("slower", "faster and wrong", "no time"):
        assert found[kept] == {"count": [1, 1], "usual": True}, kept
    assert found["too large"] == {"count": [1, 0], "usual": True}
    assert searched(tmp_path, "kept") == {"again": [0, 0]}


def test_a_kernel_in_whose_search_the_engine_dies_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engine.search_checks", str(tmp_path / "none"), "die"]
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment(tmp_path / "kernels.db"),
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 9, done.stderr[-2000:]
    assert searched(tmp_path, "last") == {"count": [1, 0]}


# ---------------------------------------------------------------- the engine


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """A model whose kernels are tinygrad's own on every device."""
    folder = tmp_path / "product"
    folder.mkdir()
    random = np.random.default_rng(3)
    weight = random.standard_normal((8, 8)).astype(np.float32)
    nodes = [small_onnx.node("MatMul", ["x", "w"], ["y"])]
    ends = [small_onnx.value("x", "float32", 4, 8)], [small_onnx.value("y", "float32", 4, 8)]
    (folder / MODEL).write_bytes(small_onnx.model(nodes, *ends, w=weight))
    kept: dict[str, Any] = {"tolerance": np.float64(1e-4)}
    for case in "01":
        x = random.standard_normal((4, 8)).astype(np.float32)
        kept |= {f"{case}.input.x": x, f"{case}.output.y": x @ weight}
    np.savez(folder / TEST, **kept)
    return folder


def load(model: Path, cache: Path, beam: int) -> tuple[Loaded, list[Any]]:
    """By an engine of its own. What it said meanwhile."""
    configure = Configure(worker_id="w", device="CPU:LLVM", cache_dir=str(cache), beam=beam)
    with EngineProcess(configure) as engine:
        ready = engine.wait_type(Ready, Unusable, timeout_s=120)
        assert isinstance(ready, Ready), ready
        at = len(engine.seen)
        engine.send(Load(model="m", path=str(model), family="onnx", task_type="tensor"))
        loaded = engine.wait_type(Loaded, LoadFailed, timeout_s=180)
        assert isinstance(loaded, Loaded), loaded
        return loaded, engine.seen[at:]


def test_what_was_found_survives_a_restart_and_serves_a_second_host(
    product: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "cache").mkdir(parents=True, mode=0o700)
    loaded, seen = load(product, first / "cache" / "cpu0", beam=1)
    assert loaded.kernels_searched == loaded.kernels_compiled > 0
    progress = [message for message in seen if isinstance(message, LoadProgress)]
    assert [stage for stage, _ in groupby(m.stage for m in progress)] == [
        "read",
        "compile",
        "search",
        "compile",
    ]
    assert [m.done for m in progress if m.stage == "search"][-1] == loaded.kernels_searched
    beats = [seen[at + 1] for at, message in enumerate(seen) if message in progress]
    assert all(isinstance(beat, Heartbeat) for beat in beats)
    assert {beat.phase for beat in beats[1:]} == {"warmup"}

    loaded, seen = load(product, first / "cache" / "cpu0", beam=1)
    assert (loaded.kernels_compiled, loaded.kernels_searched) == (0, 0)
    assert not [
        message for message in seen if isinstance(message, LoadProgress) and message.stage == "search"
    ]

    file = str(tmp_path / "kernels")
    assert main(["engine-cache", "export", file, "--device", "CPU", "--json", "--data-dir", str(first)]) == 0
    signer = json.loads(capsys.readouterr().out)["signer"]
    command = ["engine-cache", "import", file, "--device", "CPU", "--trust", signer]
    assert main([*command, "--data-dir", str(second)]) == 0
    loaded, _ = load(product, second / "cache" / "cpu0", beam=1)
    assert (loaded.kernels_compiled, loaded.kernels_searched) == (0, 0)
