"""Scripts of tests on the suite's device, and the tiny models on any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import device
from engine.self_test import open_devices
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.harness import REPOSITORY


def environment(database: Path, word: str = DEVICE) -> dict[str, str]:
    """Of a script that computes on this device, kernels kept in `database`."""
    chosen = {"ENGINE_DEVICE": word, "DEV": device.parse(word).environment, "CACHEDB": str(database)}
    return os.environ | chosen


def open_suites() -> None:
    """In such a script, before its first kernel."""
    open_devices(device.parse(DEVICE))


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
    arguments = [str(out), word, extent, *models]
    return found_by("on_device", arguments, out, os.environ | variables, timeout_s)


def found_by(
    script: str, arguments: list[str], out: Path, environment: dict[str, str], timeout_s: float = 600.0
) -> dict[str, Any]:
    """What a script of tests.engine has written to `out`, in a process of its own."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{script}", *arguments],
        cwd=REPOSITORY,
        env=environment,
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
