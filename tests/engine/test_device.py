"""Which device: names, refusals that say what to do, and an engine told to use what is not there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine import device
from engine.errors import DeviceUnusable
from engine.protocol import Configure, Finished, Load, Loaded, LoadFailed, Ready, Unusable
from tests.engine.conftest import CACHE
from tests.engine.family_checks import FIXTURES
from tests.engine.harness import EngineProcess


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("CPU", "CPU:LLVM"),
        ("CPU:X86", "CPU:X86"),
        ("AMD", "KFD+AMD:LLVM"),
        ("KFD:0+AMD:LLVM", "KFD:0+AMD:LLVM"),
        ("PCI+AMD", "PCI+AMD:LLVM"),
        ("CUDA", "CUDA:PTX"),
        ("CUDA:1:CUDA", "CUDA:1:CUDA"),
        ("NV", "NVK+NV:PTX"),
        ("CL:1", "CL:1"),
        ("CPU:0,1", "CPU:0,1:LLVM"),
        ("KFD:0,2+AMD", "KFD:0,2+AMD:LLVM"),
        ("MOCKKFD+AMD:LLVM:gfx1201", "MOCKKFD+AMD:LLVM:gfx1201"),
    ],
)
def test_what_is_not_named_is_not_guessed(given: str, meant: str) -> None:
    assert str(device.parse(given)) == meant


@pytest.mark.parametrize(
    ("given", "environment", "devices"),
    [
        ("CPU", "CPU:LLVM", ("CPU",)),
        ("CPU:0,1", "CPU:LLVM", ("CPU", "CPU:1")),
        ("CL:1", "CL;CPU:LLVM", ("CL:1",)),
        ("AMD", "KFD+AMD:LLVM;CPU:LLVM", ("AMD",)),
        ("KFD:2+AMD", "KFD:2+AMD:LLVM;CPU:LLVM", ("AMD",)),  # the only one that the interface shows
        ("KFD:0,2+AMD", "KFD:0,2+AMD:LLVM;CPU:LLVM", ("AMD", "AMD:1")),
    ],
)
def test_what_tinygrad_is_told(given: str, environment: str, devices: tuple[str, ...]) -> None:
    name = device.parse(given)
    assert (name.environment, name.devices) == (environment, devices)


def test_several_devices_as_one() -> None:
    card = device.DeviceFacts("Radeon", "gfx1100", 16)
    assert device.joined([card, card]) == device.DeviceFacts("2 x Radeon", "gfx1100", 32)
    other = device.DeviceFacts("Instinct", "gfx942", 64)
    assert device.joined([card, other]) == device.DeviceFacts("Radeon + Instinct", "gfx1100 + gfx942", 32)


@pytest.mark.parametrize(
    "wrong", ["", "GPU", "A+B+AMD", "PYTHON", "KFD:0,0+AMD", "KFD:0-2+AMD", "CPU:0,", "KFD+CPU"]
)
def test_unknown_devices(wrong: str) -> None:
    with pytest.raises(DeviceUnusable):
        device.parse(wrong)


def node(folder: Path, number: int, version: int, gpu: int = 7) -> None:
    path = folder / str(number)
    path.mkdir()
    (path / "properties").write_text(f"simd_count 96\ngfx_target_version {version}\ndrm_render_minor 128\n")
    (path / "gpu_id").write_text(str(gpu))
    (path / "name").write_text("navi21\n")


def test_an_unsupported_card_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node(tmp_path, 0, 0, gpu=0)
    node(tmp_path, 1, 100300)
    node(tmp_path, 2, 110000)
    kfd = tmp_path / "kfd"
    kfd.touch()
    monkeypatch.setattr(device, "KFD_NODES", tmp_path)
    monkeypatch.setattr(device, "KFD_DEVICE", kfd)
    with pytest.raises(DeviceUnusable) as caught:
        device.examine(device.parse("KFD:0+AMD"))
    assert caught.value.code == "unsupported_gpu"
    assert "navi21 is gfx1030" in str(caught.value)
    assert device.examine(device.parse("KFD:1+AMD")).architecture == "gfx1100"
    with pytest.raises(DeviceUnusable, match="navi21 is gfx1030"):
        device.examine(device.parse("KFD:1,0+AMD"))
    with pytest.raises(DeviceUnusable) as caught:
        device.examine(device.parse("KFD:2+AMD"))
    assert caught.value.code == "no_device"


@pytest.mark.process
@pytest.mark.skipif(Path("/dev/kfd").exists(), reason="this host has an AMD GPU")
def test_without_a_gpu_the_engine_says_so() -> None:
    with EngineProcess(Configure(worker_id="w", device="KFD:0+AMD:LLVM")) as engine:
        refused = engine.wait_type(Ready, Unusable)
        assert isinstance(refused, Unusable)
        assert refused.code == "no_device"
        assert "/dev/kfd" in refused.message
        assert engine.process.wait(5) == 69


@pytest.mark.process
def test_a_cache_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    configure = Configure(worker_id="w", device="CPU:LLVM", cache_dir=str(tmp_path))
    with EngineProcess(configure) as engine:
        assert engine.wait_type(Ready, Unusable, timeout_s=60).code == "bad_configuration"


@pytest.mark.process
def test_fewer_slots_are_made_where_not_all_fit() -> None:
    """Refused with what one slot needs; with so much memory it has one, and serves."""
    load = Load(model="m", path=str(FIXTURES / "llama3/model.gguf"), family="llama", context=128, slots=8)
    configure = Configure(worker_id="w", device="CPU", memory_limit_bytes=10_000, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        engine.send(load)
        failed = engine.wait_type(LoadFailed, Unusable, timeout_s=60)
        assert failed.code == "out_of_memory"
        needed = int(failed.message.split(" needs ")[1].split()[0])
    with EngineProcess(msgspec.structs.replace(configure, memory_limit_bytes=needed + 1000)) as engine:
        engine.send(load)
        loaded = engine.wait_type(Loaded, LoadFailed, Unusable, timeout_s=120)
        assert isinstance(loaded, Loaded), loaded
        assert (loaded.slots, loaded.slots_asked, loaded.context) == (1, 8, 128)
        assert loaded.memory_bytes <= needed
        for number in range(2):
            engine.run(f"t/{number}", prompt="the moon", temperature=0, max_tokens=4)
        for number in range(2):
            assert isinstance(engine.wait_end(f"t/{number}"), Finished)


@pytest.mark.process
def test_a_model_that_does_not_fit(model_path: Path) -> None:
    limit = 60_000_000
    configure = Configure(worker_id="w", device="CPU", memory_limit_bytes=limit, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        assert engine.wait_type(Ready, Unusable, timeout_s=60).memory_total_bytes == limit
        engine.send(Load(model="m", path=str(model_path), family="llama", context=2048))
        failed = engine.wait_type(LoadFailed)
        assert failed.code == "out_of_memory"
        assert str(limit) in failed.message
        engine.sock.close()
        assert engine.process.wait(5) == 0
