"""Broken model files and templates for a few seconds each: clear errors only, in bounded time and memory.

`python -m tests.engine.fuzz TARGET SECONDS SEED` for longer.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.engine.harness import REPOSITORY

SECONDS = 4


@pytest.mark.process
@pytest.mark.parametrize(
    "target", ["gguf", "folder", "template", "embedding-gguf", "embedding-folder", "onnx"]
)
def test_only_clear_errors(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.fuzz", target, str(SECONDS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
