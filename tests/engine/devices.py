"""On which device the suite runs, and the tiny models on any other.

`ENGINE_DEVICE=CUDA make test` (or NV, AMD, CL, CPU:X86, ...) runs on a host's card what otherwise runs on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import device
from tests.engine.conftest import CACHE
from tests.engine.harness import REPOSITORY

DEVICE = os.environ.get("ENGINE_DEVICE", "CPU:LLVM")


def environment(database: Path) -> dict[str, str]:
    """Of a script that computes on the suite's device by `open_default`."""
    return os.environ | {"DEV": device.parse(DEVICE).environment, "CACHEDB": str(database)}


def compare(
    word: str,
    out: Path,
    models: list[str],
    *,
    extent: str = "brief",
    timeout_s: float = 300.0,
    **variables: str,
) -> dict[str, Any]:
    """What `tests.engine.on_device` found on a device; models are "fixture:format"."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.on_device", str(out), word, extent, *models],
        cwd=REPOSITORY,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def check_models(found: dict[str, Any], tolerance: float) -> None:
    """All models gave their references' logits, within `tolerance` standard deviations, and their tokens."""
    assert "refused" not in found, found["refused"]
    assert found["models"]
    for model, result in found["models"].items():
        assert "refused" not in result, (model, result)
        wrong = {way: error for way, error in result["worst"].items() if not error < tolerance}
        assert not wrong, (model, wrong)
        assert all(result["greedy"].values()), (model, result["greedy"])
