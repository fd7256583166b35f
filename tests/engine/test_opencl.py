"""Models on OpenCL, where a host has it; `apt-get install pocl-opencl-icd ocl-icd-libopencl1` makes the CPU one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.devices import check_models, compare

pytestmark = pytest.mark.process
MODELS = ["llama:gguf", "qwen2:folder", "qwen3moe:folder", "gemma3:folder"]


def test_models_on_opencl(tmp_path: Path) -> None:
    found = compare("CL", tmp_path / "found.json", MODELS, timeout_s=600)
    if "refused" in found and found["refused"][0] == "no_device":
        pytest.skip(found["refused"][1])
    check_models(found, 0.15)
    assert found["memory"] > 0


def test_searched_kernels_on_opencl(tmp_path: Path) -> None:
    """Each for a moment only: PoCL takes a second for each candidate."""
    search = {"ENGINE_BEAM": "2", "ENGINE_SEARCH_S": "1", "ENGINE_CACHE": str(tmp_path / "cache")}
    found = compare("CL", tmp_path / "found.json", MODELS[:1], timeout_s=900, **search)
    if "refused" in found and found["refused"][0] == "no_device":
        pytest.skip(found["refused"][1])
    check_models(found, 0.15)
    assert found["searched"] > 10
