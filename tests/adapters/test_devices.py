"""Device words over a made-up sysfs; the measurements of its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from peer.adapters.devices.devices import find_devices, find_gpus
from peer.adapters.devices.telemetry import Telemetries, ThreadedSource, open_telemetry
from peer.adapters.devices.telemetry_host import CpuReader, Host, MemoryGroup, cpu_name
from peer.adapters.devices.telemetry_sysfs import SysfsReader
from peer.engines import Device
from peer.errors import ConfigError
from peer.state.worker import Telemetry

# node: (gpu_id, gfx_target_version, render minor, location, product)
CARDS = {
    0: (0, 0, 0, 0, ""),  # the CPU
    1: (4711, 110000, 128, 0x0300, "Radeon RX 7900 XTX"),
    2: (4712, 100300, 129, 0x4300, ""),
    10: (4713, 90402, 130, 0xC308, "Instinct MI300X"),
}


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    for node, (gpu_id, version, minor, location, product) in CARDS.items():
        folder = tmp_path / "devices/virtual/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(f"{gpu_id}\n")
        (folder / "name").write_text("navi21\n" if node == 2 else "x\n")
        (folder / "properties").write_text(
            f"cpu_cores_count 0\ngfx_target_version {version}\ndrm_render_minor {minor}\n"
            f"location_id {location}\ndomain 0\nodd\nunique_id -1\n"
        )
        card = tmp_path / f"class/drm/renderD{minor}/device"
        if gpu_id:
            (card / "hwmon/hwmon3").mkdir(parents=True)
            (card / "mem_info_vram_total").write_text("25753026560\n")
            (card / "mem_info_vram_used").write_text("1073741824\n")
            (card / "gpu_busy_percent").write_text("37\n")
            (card / "hwmon/hwmon3/temp1_input").write_text("61000\n")
            (card / "hwmon/hwmon3/temp1_label").write_text("edge\n")
            (card / "hwmon/hwmon3/temp2_input").write_text("78000\n")
            (card / "hwmon/hwmon3/temp2_label").write_text("junction\n")
            if product:
                (card / "product_name").write_text(product + "\n")
    (tmp_path / "module/amdgpu").mkdir(parents=True)
    (tmp_path / "module/amdgpu/version").write_text("6.12.12\n")
    return tmp_path


def test_every_gpu_is_found_in_the_engines_order(sysfs: Path) -> None:
    gpus = find_gpus(sysfs)
    assert [(gpu.index, gpu.architecture, gpu.pci) for gpu in gpus] == [
        (0, "gfx1100", "0000:03:00.0"),
        (1, "gfx1030", "0000:43:00.0"),
        (2, "gfx942", "0000:c3:01.0"),
    ]
    assert [gpu.name for gpu in gpus] == ["AMD Radeon RX 7900 XTX", "AMD navi21", "AMD Instinct MI300X"]
    assert gpus[0].driver_version == "amdgpu 6.12.12"
    assert gpus[0].memory_total_bytes == 25_753_026_560


@pytest.mark.parametrize("word", ["auto", "AMD", "AMD:LLVM", "amd"])
def test_all_gpus_get_a_worker_and_unsupported_ones_say_why(sysfs: Path, word: str) -> None:
    devices = find_devices([word], sysfs)
    assert [device.label for device in devices] == ["gpu0", "gpu1", "gpu2"]
    assert [device.device for device in devices] == [f"KFD:{i}+AMD:LLVM" for i in range(3)]
    assert (devices[0].problem, devices[2].problem) == ("", "")
    for words in ("AMD navi21", "gfx1030", "gfx11xx", "--device"):
        assert words in devices[1].problem


def test_chosen_gpus(sysfs: Path) -> None:
    assert [device.label for device in find_devices(["AMD:2,0"], sysfs)] == ["gpu2", "gpu0"]
    assert [device.pci for device in find_devices(["KFD:2+AMD:LLVM"], sysfs)] == ["0000:c3:01.0"]
    with pytest.raises(ConfigError, match=r"no GPU 7 .* 0 \(AMD Radeon RX 7900 XTX\)"):
        find_devices(["AMD:0,7"], sysfs)
    with pytest.raises(ConfigError, match="twice"):
        find_devices(["AMD:1", "AMD:1"], sysfs)


def test_several_gpus_as_one_worker(sysfs: Path) -> None:
    card = sysfs / "devices/virtual/kfd/kfd/topology/nodes"
    for properties in card.glob("*/properties"):
        properties.write_text(properties.read_text().replace("90402", "110000"))
    alone, both = find_devices(["AMD:1,0+2"], sysfs)
    assert (alone.label, alone.members) == ("gpu1", ())
    assert (both.label, both.device, both.problem) == ("gpu0-2", "KFD:0,2+AMD:LLVM", "")
    assert both.name == "AMD Radeon RX 7900 XTX + AMD Instinct MI300X"
    assert both.memory_total_bytes == sum(one.memory_total_bytes for one in both.members)
    assert [one.label for one in both.members] == ["gpu0", "gpu2"]
    with pytest.raises(ConfigError, match="twice, as gpu2"):
        find_devices(["AMD:0+2", "AMD:2"], sysfs)
    with pytest.raises(ConfigError, match="no GPU 7"):
        find_devices(["AMD:0+7"], sysfs)


def test_gpus_that_cannot_be_one_worker_say_why(sysfs: Path) -> None:
    assert "different architectures (gfx1100, gfx942)" in find_devices(["AMD:0+2"], sysfs)[0].problem
    assert "AMD navi21" in find_devices(["AMD:0+1"], sysfs)[0].problem


async def test_several_gpus_are_measured_as_one(sysfs: Path) -> None:
    device = find_devices(["AMD:0+2"], sysfs)[0]
    other = Path(device.members[1].sysfs)
    (other / "gpu_busy_percent").write_text("99\n")
    (other / "hwmon/hwmon3/temp1_input").write_text("70000\n")
    source = Telemetries([device]).source(device)
    assert source is not None
    assert await source.read() == Telemetry(
        memory_total_bytes=2 * 25_753_026_560,
        memory_used_bytes=2 * 1_073_741_824,
        temperature_c=70.0,
        utilization_percent=68.0,
        source="sysfs",
    )
    (other / "gpu_busy_percent").write_text("")
    assert (await source.read()).utilization_percent is None


@pytest.mark.parametrize("word", ["auto", "AMD", "AMD:0"])
def test_no_gpu_is_an_error_that_names_the_cpu_and_never_takes_it(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=r"no AMD GPU .*--device CPU"):
        find_devices([word], tmp_path)


@pytest.mark.parametrize(
    ("word", "label", "device"),
    [
        ("CPU", "cpu0", "CPU:LLVM"),
        ("cpu", "cpu0", "CPU:LLVM"),
        ("CPU:X86", "cpu0", "CPU:X86"),
        ("CUDA", "cuda0", "CUDA"),
        ("NV", "nv0", "NV"),
        ("CL:1", "cl1", "CL:1"),
        ("PCI+AMD:LLVM", "amd0", "PCI+AMD:LLVM"),
        ("PCI+AMD:1", "amd1", "PCI:1+AMD"),
        ("CUDA:1:CUDA", "cuda1", "CUDA:1:CUDA"),
        ("CPU:0+1", "cpu0-1", "CPU:0,1"),
        ("NV:0+1+2", "nv0-1-2", "NV:0,1,2"),
    ],
)
def test_other_devices_are_passed_on(tmp_path: Path, word: str, label: str, device: str) -> None:
    found = find_devices([word], tmp_path)
    assert [(one.label, one.device, one.stand_in) for one in found] == [(label, device, False)]


def test_stand_ins_are_counted_and_say_so(tmp_path: Path) -> None:
    found = find_devices(["fake:2", "CPU"], tmp_path)
    assert [(one.label, one.device, one.stand_in) for one in found] == [
        ("fake0", "fake", True),
        ("fake1", "fake", True),
        ("cpu0", "CPU:LLVM", False),
    ]
    assert find_devices(["fake"], tmp_path)[0].label == "fake0"


@pytest.mark.parametrize(
    "words", [[], ["fake:0"], ["fake:x"], ["fake:999"], [""], ["a b"], ["../x"], ["CPU\n"]]
)
def test_nonsense_is_refused(tmp_path: Path, words: list[str]) -> None:
    if words == ["CPU\n"]:
        assert find_devices(words, tmp_path)[0].label == "cpu0"
        return
    with pytest.raises(ConfigError):
        find_devices(words, tmp_path)


def test_sysfs_measures_a_card(sysfs: Path) -> None:
    card = Path(find_gpus(sysfs)[0].sysfs)
    assert SysfsReader(card)() == Telemetry(
        memory_total_bytes=25_753_026_560,
        memory_used_bytes=1_073_741_824,
        temperature_c=61.0,
        utilization_percent=37.0,
        source="sysfs",
    )
    (card / "hwmon/hwmon3/temp1_label").unlink()
    (card / "gpu_busy_percent").write_text("")
    reading = SysfsReader(card)()
    assert (reading.temperature_c, reading.utilization_percent) == (78.0, None)


async def test_a_card_that_goes_away_keeps_its_last_memory(sysfs: Path) -> None:
    device = find_devices(["AMD:0"], sysfs)[0]
    source = Telemetries([device]).source(device)
    assert source is not None
    assert (await source.read()).temperature_c == 61.0
    (Path(device.sysfs) / "mem_info_vram_used").unlink()
    reading = await source.read()
    assert reading == Telemetry(
        memory_total_bytes=25_753_026_560, memory_used_bytes=1_073_741_824, source="sysfs"
    )


async def test_the_cpu_is_measured_by_psutil_and_a_stand_in_not_at_all(tmp_path: Path) -> None:
    cpu, fake, other = find_devices(["CPU", "fake", "CUDA"], tmp_path)
    found = await open_telemetry([cpu, fake, other])
    assert found.source(fake) is None
    assert found.source(other) is None
    source = found.source(cpu)
    assert source is not None
    reading = await source.read()
    assert reading.source == "psutil"
    assert 0 < reading.memory_used_bytes < reading.memory_total_bytes
    assert reading.utilization_percent is not None
    await found.close()


def test_the_hosts_description() -> None:
    info = Host()()
    assert info.cpu
    assert info.os
    assert 0 < info.ram_used_bytes < info.ram_total_bytes
    assert cpu_name(Path("/nonexistent"))


def test_a_container_leaves_a_cpu_less_memory(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/old\n0::/pod/unit\n")
    inner = tmp_path / "root/pod/unit"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "root/pod/memory.max").write_text("1000000\n")
    (tmp_path / "root/pod/memory.current").write_text("700000\n")
    (tmp_path / "root/pod/memory.stat").write_text("anon 5\ninactive_file 200000\n")
    group = MemoryGroup(tmp_path / "root", own)
    assert (group.limit_bytes, group.used_bytes()) == (1_000_000, 500_000)
    reading = CpuReader(group)()
    assert (reading.memory_total_bytes, reading.memory_used_bytes) == (1_000_000, 500_000)
    assert MemoryGroup(tmp_path / "none", tmp_path / "none").limit_bytes == 0


def test_sensors_that_there_are_none_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        current = 71.5

    monkeypatch.setattr("psutil.sensors_temperatures", lambda: {"k10temp": [Entry()], "nvme": [Entry()]})
    assert CpuReader()().temperature_c == 71.5
    monkeypatch.setattr("psutil.sensors_temperatures", lambda: {"nvme": [Entry()]})
    assert CpuReader()().temperature_c is None


async def test_a_reader_that_blocks_is_left_behind() -> None:
    import threading

    release = threading.Event()

    def blocks() -> Telemetry:
        release.wait(10)
        return Telemetry(memory_total_bytes=2, memory_used_bytes=1)

    source = ThreadedSource("x", "s", blocks, trio.CapacityLimiter(1), memory_total_bytes=9, read_s_max=0.05)
    try:
        for _ in range(3):
            with trio.fail_after(1):
                assert (await source.read()).memory_total_bytes == 9
    finally:
        release.set()


def test_a_device_without_a_gpu_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("amdsmi was opened")

    monkeypatch.setattr("peer.adapters.devices.telemetry.open_amdsmi", never)
    trio.run(open_telemetry, [Device(label="cpu0", device="CPU:LLVM")])
