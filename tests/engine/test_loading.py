"""What makes a load fast gives the same results: decoders as graphs, recorded steps, stored programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import DEVICE
from tests.engine.devices import environment
from tests.engine.harness import REPOSITORY

EMULATED = "MOCKKFD+AMD:LLVM"  # gfx1100 in software, from a checkout of tinygrad


def check(name: str, directory: Path, word: str = DEVICE, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.device_checks", name, str(directory)],
        cwd=REPOSITORY,
        env=environment(directory / "kernels.db", word) | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.process
@pytest.mark.parametrize(
    "name", ["decoders", "mixtures", "attention", "neighbours", "choices", "recorded", "stored"]
)
def test_same_as_plain_tinygrad(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.process
def test_a_wrong_device_is_refused(tmp_path: Path) -> None:
    check("wrong", tmp_path)


@pytest.mark.process
@pytest.mark.skipif(
    "TINYGRAD_SOURCE" not in os.environ, reason="TINYGRAD_SOURCE names no checkout of tinygrad"
)
def test_recorded_on_an_emulated_amd_card(tmp_path: Path) -> None:
    check("recorded", tmp_path, EMULATED, PYTHONPATH=os.environ["TINYGRAD_SOURCE"])
