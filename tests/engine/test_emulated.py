"""Models on emulated AMD cards, with the very code that a real card would get. Minutes, by hand:

TINYGRAD_SOURCE=<a checkout of tinygrad, tag v0.13.0> pytest tests/engine/test_emulated.py

The emulator is in tinygrad's repository and not in its package. It interprets each instruction.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.devices import check_models, compare

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        "TINYGRAD_SOURCE" not in os.environ, reason="TINYGRAD_SOURCE names no checkout of tinygrad"
    ),
]
MODELS = ["llama:gguf", "llama:folder", "qwen3moe:folder"]  # quantised; float16; a mixture of experts
TOLERANCE = 0.15  # as in test_families


def computed(device: str, folder: Path, models: list[str] = MODELS, **variables: str) -> dict[str, Any]:
    source = os.environ["TINYGRAD_SOURCE"]
    out = folder / "found.json"
    found = compare(device, out, models, timeout_s=1200, PYTHONPATH=source, **variables)
    check_models(found, TOLERANCE)
    return found


@pytest.mark.parametrize("architecture", ["gfx1100", "gfx1201", "gfx950"])
def test_models_on_one_card(architecture: str, tmp_path: Path) -> None:
    computed(f"MOCKKFD+AMD:LLVM:{architecture}", tmp_path)


@pytest.mark.parametrize("architecture", ["gfx1100", "gfx950"])
def test_models_shared_by_two_cards(architecture: str, tmp_path: Path) -> None:
    found = computed(f"MOCKKFD:0,1+AMD:LLVM:{architecture}", tmp_path)
    for result in found["models"].values():
        first, second = result["used"].values()
        assert abs(first - second) < 0.25 * first


def test_searched_kernels(tmp_path: Path) -> None:
    """By AMD's code path; what an emulator takes for them says nothing."""
    search = {"ENGINE_BEAM": "2", "ENGINE_SEARCH_S": "1", "ENGINE_CACHE": str(tmp_path / "cache")}
    found = computed("MOCKKFD+AMD:LLVM:gfx1100", tmp_path, MODELS[:1], **search)
    assert found["searched"] > 10
