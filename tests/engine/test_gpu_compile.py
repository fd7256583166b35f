"""Every kernel compiles for the GPUs' architectures with neither a card nor a system's LLVM.

For AMD through llvmlite. For NVIDIA where its own compilers are: `pip install nvidia-nvjitlink nvidia-cuda-nvrtc
nvidia-cuda-runtime`, then NVJITLINK_PATH and NVRTC_PATH name the libraries' files, CUDA_PATH the folder with `include`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.harness import REPOSITORY

_NEEDS = {"PTX": ("NVJITLINK_PATH",), "CUDA": ("NVRTC_PATH", "CUDA_PATH")}


@pytest.mark.process
@pytest.mark.parametrize(
    "target",
    [
        "AMD:LLVM:gfx1100",
        "AMD:LLVM:gfx1201",
        "AMD:LLVM:gfx942",
        "AMD:LLVM:gfx950",
        "NV:PTX:sm_80",
        "NV:PTX:sm_90",
        "NV:PTX:sm_120",
        "NV:CUDA:sm_90",
    ],
)
def test_kernels_compile(target: str) -> None:
    missing = [name for name in _NEEDS.get(target.split(":")[1], ()) if name not in os.environ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not set: NVIDIA's compiler is not here")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.gpu_kernels", target],
        cwd=REPOSITORY,
        env=os.environ | {"DEV": "CPU:LLVM", "CACHELEVEL": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(done.stdout.split())
    assert {"scores_4", "values_4", "exp_4", "highest_4", "write_cache_4", "rotate_4", "norm_4"} <= names
    assert {"add_rows_4_256", "mean_4", "deviation_4", "layer_norm_4_256", "gelu_4_256"} <= names
    assert {
        "copy_positions",
        "head_norms_4",
        "ranks_4_8",
        "chosen_4_8_2",
        "shares_4_8_2",
        "expand_4_2_32",
    } <= names
