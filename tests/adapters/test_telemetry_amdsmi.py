"""The real `amdsmi` package over a stand-in libamd_smi.so, in a process of its own for the library's path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import amdsmi_stub

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the stand-in library"),
]

SCRIPT = """
import json, os, sys, time
import structlog, trio
from msgspec import structs, to_builtins
from peer.adapters.devices import telemetry
from peer.engines import Device

state = os.environ.get("AMDSMI_STUB_STATE", "/dev/null")
devices = [
    Device(label="gpu0", device="KFD:0+AMD:LLVM", name="known by sysfs", driver_version="amdgpu old",
           pci="0000:03:00.0", sysfs=sys.argv[1], memory_total_bytes=7),
    Device(label="gpu1", device="KFD:1+AMD:LLVM", name="second", pci="0000:c3:00.0", sysfs=sys.argv[1]),
]
told = []

async def read(source):
    began = time.monotonic()
    found = to_builtins(await source.read())
    found["took_s"] = time.monotonic() - began
    return found

async def main():
    opened = await telemetry.open_telemetry(devices)
    told.append([structs.asdict(device) for device in opened.devices])
    sources = [opened.source(device) for device in opened.devices]
    for text in json.loads(sys.argv[2]):
        with open(state, "w") as file:
            file.write(text)
        told.append([await read(source) for source in sources])
    await opened.close()

telemetry.READ_S_MAX = 0.3
telemetry.ThreadedSource.__init__.__kwdefaults__["read_s_max"] = 0.3
with structlog.testing.capture_logs() as lines:
    trio.run(main)
sys.stdout.write(json.dumps({"told": told, "log": [line["event"] for line in lines]}))
"""


@pytest.fixture(scope="session")
def rocm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rocm")
    amdsmi_stub.build(folder)
    return folder


@pytest.fixture
def card(tmp_path: Path) -> Path:
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "mem_info_vram_total").write_text("1000\n")
    (folder / "mem_info_vram_used").write_text("250\n")
    return folder


def ask(card: Path, states: list[str], environment: Mapping[str, str]) -> Any:
    """What the script tells; its output is only that, so nothing may print."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(card), json.dumps(states)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def with_stub(rocm: Path, tmp_path: Path, card: Path, *states: str) -> Any:
    state = tmp_path / "state"
    state.write_text("")
    environment = {"ROCM_PATH": str(rocm), "AMDSMI_STUB_STATE": str(state)}
    return ask(card, list(states), environment)


def test_two_gpus_with_changing_values(rocm: Path, tmp_path: Path, card: Path) -> None:
    found = with_stub(
        rocm,
        tmp_path,
        card,
        "0 used 8000000000\n0 busy 75\n0 edge 65\n1 total 192000000000\n1 used 1\n1 busy 3\n1 hotspot 50\n",
        "0 used 9000000000\n0 busy 100\n0 edge 96\n1 total 192000000000\n1 used 2\n1 busy 0\n1 hotspot 51\n",
    )
    devices, first, second = found["told"]
    assert [device["name"] for device in devices] == ["AMD Radeon RX 7900 XTX", "AMD Instinct MI300X"]
    assert devices[0]["driver_version"] == "amdgpu 6.12.12"
    assert first[0]["memory_total_bytes"] == 24_000_000_000
    assert first[0]["memory_used_bytes"] == 8_000_000_000
    assert (first[0]["temperature_c"], first[0]["utilization_percent"]) == (65.0, 75.0)
    assert first[1]["memory_total_bytes"] == 192_000_000_000
    assert first[1]["temperature_c"] == 50.0, "without an edge sensor the hotspot counts"
    assert {reading["source"] for reading in first} == {"amdsmi"}
    assert (second[0]["temperature_c"], second[0]["utilization_percent"]) == (96.0, 100.0)
    assert second[1]["memory_used_bytes"] == 2


def test_what_a_card_does_not_support_is_none_and_memory_has_a_second_way(
    rocm: Path, tmp_path: Path, card: Path
) -> None:
    found = with_stub(
        rocm,
        tmp_path,
        card,
        "0 used 8388608\n0 fail.amdsmi_get_gpu_activity 2\n0 fail.amdsmi_get_temp_metric 2\n"
        "0 fail.amdsmi_get_gpu_memory_usage 30\n",
    )
    reading = found["told"][1][0]
    assert "temperature_c" not in reading
    assert "utilization_percent" not in reading
    assert reading["memory_used_bytes"] == 8_388_608


def test_a_driver_that_fails_degrades_and_recovers_with_one_line_each(
    rocm: Path, tmp_path: Path, card: Path
) -> None:
    lost = "0 fail.amdsmi_get_gpu_memory_total 1\n0 fail.amdsmi_get_gpu_vram_usage 1\n"
    found = with_stub(rocm, tmp_path, card, "0 used 5\n0 edge 60\n", lost, lost, "0 used 6\n0 edge 61\n")
    _, well, bad, still, again = found["told"]
    assert well[0]["temperature_c"] == 60.0
    assert bad[0]["memory_used_bytes"] == 5
    assert "temperature_c" not in bad[0]
    assert bad[0] == {**still[0], "took_s": bad[0]["took_s"]}
    assert again[0]["memory_used_bytes"] == 6
    assert found["log"].count("telemetry_fails") == 1
    assert found["log"].count("telemetry_works_again") == 1


def test_a_driver_that_hangs_costs_its_time_limit_only(rocm: Path, tmp_path: Path, card: Path) -> None:
    found = with_stub(
        rocm, tmp_path, card, "0 used 5\n", "0 slow.amdsmi_get_gpu_memory_total 2000\n", "0 used 5\n"
    )
    slow = found["told"][2]
    assert slow[0]["memory_used_bytes"] == 5
    assert slow[0]["took_s"] < 1.0
    assert slow[1]["took_s"] < 1.0, "the second card waits for the library, not for ever"


@pytest.mark.parametrize("case", ["absent", "broken", "init fails", "old"])
def test_without_a_library_that_works_sysfs_is_read(
    rocm: Path, tmp_path: Path, card: Path, case: str
) -> None:
    """Nothing is printed and nothing raises, whatever the import does."""
    state = tmp_path / "state"
    state.write_text("0 fail.amdsmi_init 1\n" if case == "init fails" else "")
    home = tmp_path / "rocm"
    (home / "lib").mkdir(parents=True)
    library = home / "lib" / "libamd_smi.so"
    if case == "broken":
        library.write_text("not a library")
    elif case == "init fails":
        shutil.copy(rocm / "lib" / "libamd_smi.so", library)
    elif case == "old":  # a library that lacks what the package looks up at import
        source = tmp_path / "old.c"
        source.write_text("int amdsmi_init(void) { return 0; }\n")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    found = ask(card, ["0 fail.amdsmi_init 1\n"], {"ROCM_PATH": str(home), "AMDSMI_STUB_STATE": str(state)})
    devices, reading = found["told"]
    assert devices[0]["name"] == "known by sysfs"
    assert reading[0]["source"] == "sysfs"
    assert (reading[0]["memory_total_bytes"], reading[0]["memory_used_bytes"]) == (1000, 250)
    assert ("amdsmi_absent" in found["log"]) == (case in ("absent", "broken"))
    assert ("amdsmi_unusable" in found["log"]) == (case in ("init fails", "old"))
