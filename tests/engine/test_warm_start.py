"""Kernels that one host has exported and another imported: the small model loads there without compiling any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.protocol import Configure, Load, Loaded, LoadFailed, Ready, Unusable
from peer.adapters.devices.devices import find_devices
from peer.cli import main
from tests.engine.conftest import CACHE, CONTEXT, DEVICE, SLOTS
from tests.engine.harness import EngineProcess


@pytest.mark.model
@pytest.mark.process
def test_a_second_host_compiles_nothing(
    real: EngineProcess, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    label = find_devices([DEVICE])[0].label
    (first / "cache").mkdir(parents=True, mode=0o700)
    (first / "cache" / label).symlink_to(CACHE)  # what the engine of `real` has compiled, and goes on using
    command = ["engine-cache", "export", str(tmp_path / "kernels"), "--device", DEVICE, "--json"]
    assert main([*command, "--data-dir", str(first)]) == 0
    exported = json.loads(capsys.readouterr().out)
    command = ["engine-cache", "import", str(tmp_path / "kernels"), "--device", DEVICE, "--json"]
    assert main([*command, "--trust", exported["signer"], "--data-dir", str(second)]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == {label: exported["kernels"]}

    cache = str(second / "cache" / label)
    with EngineProcess(Configure(worker_id="w", device=DEVICE, slots_max=SLOTS, cache_dir=cache)) as engine:
        ready = engine.wait_type(Ready, Unusable, timeout_s=120)
        assert isinstance(ready, Ready), ready
        engine.send(Load(model="m", path=str(model_path), family="llama", context=CONTEXT, slots=SLOTS))
        loaded = engine.wait_type(Loaded, LoadFailed, timeout_s=180)
        assert isinstance(loaded, Loaded), loaded
        assert loaded.kernels_compiled == 0
