"""Every kernel compiles for the AMD architectures through llvmlite, with neither a card nor a system LLVM."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.harness import REPOSITORY


@pytest.mark.process
@pytest.mark.parametrize("architecture", ["gfx1100", "gfx1201", "gfx942", "gfx950"])
def test_kernels_compile(architecture: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.amd_kernels", architecture],
        cwd=REPOSITORY,
        env=os.environ | {"DEV": "CPU:LLVM", "CACHELEVEL": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(done.stdout.split())
    assert {"scores_4", "values_4", "exp_4", "highest_4", "write_cache_4", "rotate_4", "norm_4"} <= names
    assert {"head_norms_4", "ranks_4_8", "chosen_4_8_2", "shares_4_8_2", "expand_4_2_32"} <= names
