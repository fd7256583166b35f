"""Which device this process owns, or which several: chosen before tinygrad is imported, named for people.

A device string is tinygrad's, `[INTERFACE[:NUMBERS]+]DEVICE[:COMPILER[:ARCH]]`, such as "CPU:LLVM", "CPU:X86" or
"KFD:0+AMD:LLVM"; where a backend has no interfaces the numbers follow its name, as in "CL:1" or "CPU:0,1:LLVM".
Several numbers are one engine's devices, which share each model (`engine.models.decoder`). What a string does not
name is never chosen silently: the compiler defaults to the one that needs least of the host (`COMPILERS`), the
interface to the kernel driver (without it tinygrad would take the card from the driver over PCI), the device to
nothing. Every problem raises `DeviceUnusable`, whose message names the card, its architecture and what to do.
`engine.self_test` opens and tests what was chosen.
"""

from __future__ import annotations

import os
import platform
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DeviceUnusable

KFD_DEVICE = Path("/dev/kfd")
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
RENDER_NODES = Path("/sys/class/drm")
# LLVM comes with llvmlite. PTX needs only NVIDIA's driver on CUDA, and libnvJitLink on NV. OpenCL has its driver's own.
COMPILERS = {"CPU": "LLVM", "AMD": "LLVM", "NV": "PTX", "CUDA": "PTX", "CL": ""}
INTERFACES = {"AMD": "KFD", "NV": "NVK"}
HOST = "CPU:LLVM"  # for what tinygrad computes on the host beside another device
SUPPORTED_AMD = "gfx942, gfx950, gfx11xx and gfx12xx"
DEVICES_MAX = 16  # of one engine


@dataclass(frozen=True)
class DeviceName:
    """A parsed device string."""

    kind: str  # "CPU", "AMD", ...
    compiler: str
    architecture: str
    interface: str
    numbers: tuple[int, ...]  # () = the first

    def __str__(self) -> str:
        numbers = ",".join(map(str, self.numbers))
        if self.interface:
            before = ":".join(filter(None, (self.interface, numbers)))
            return before + "+" + ":".join(filter(None, (self.kind, self.compiler, self.architecture)))
        return ":".join(filter(None, (self.kind, numbers, self.compiler, self.architecture)))

    @property
    def environment(self) -> str:
        """What tinygrad's DEV must be."""
        plain = DeviceName(self.kind, self.compiler, self.architecture, "", ())
        chosen = str(self if self.interface else plain)
        return chosen if self.kind == "CPU" else f"{chosen};{HOST}"

    @property
    def devices(self) -> tuple[str, ...]:
        """tinygrad's names of them, the first one first. An interface shows only those that were asked for."""
        count = len(self.numbers) or 1
        numbers = self.numbers if self.numbers and not self.interface else range(count)
        return tuple(f"{self.kind}:{number}" if number else self.kind for number in numbers)


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a device; of several see `joined`."""

    name: str
    architecture: str
    memory_bytes: int  # 0: unknown


def parse(device: str) -> DeviceName:
    """Raises DeviceUnusable `bad_configuration`."""
    before, plus, after = device.rpartition("+")
    interface, _, numbers = before.partition(":") if plus else ("", "", "")
    kind, _, rest = after.partition(":")
    kind, interface = kind.upper(), interface.upper()
    if not plus and re.fullmatch(r"[0-9,]+(:.*)?", rest):
        numbers, _, rest = rest.partition(":")
    compiler, _, architecture = rest.partition(":")
    if kind not in COMPILERS or "+" in before:
        raise DeviceUnusable(
            "bad_configuration",
            f"device {device!r} is not one of {', '.join(COMPILERS)}; "
            "examples: CPU:LLVM, KFD:0+AMD:LLVM, KFD:0,1+AMD:LLVM, CL:1",
        )
    if interface and kind not in INTERFACES:
        raise DeviceUnusable("bad_configuration", f"device {device!r}: {kind} has no interface to choose")
    return DeviceName(
        kind,
        compiler.upper() or COMPILERS[kind],
        architecture,
        interface or INTERFACES.get(kind, ""),
        _numbers(device, numbers),
    )


def _numbers(device: str, text: str) -> tuple[int, ...]:
    if not text:
        return ()
    if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", text):
        raise DeviceUnusable("bad_configuration", f"device {device!r}: {text!r} are no numbers of devices")
    numbers = tuple(map(int, text.split(",")))
    if len(set(numbers)) < len(numbers) or len(numbers) > DEVICES_MAX:
        raise DeviceUnusable(
            "bad_configuration",
            f"device {device!r}: an engine owns at most {DEVICES_MAX} devices, each once",
        )
    return numbers


def examine(name: DeviceName) -> DeviceFacts:
    """Look at the host. Raises DeviceUnusable `no_device` or `unsupported_gpu`."""
    if name.kind == "AMD" and name.interface == "KFD":
        return _examine_amd(name)
    if name.kind == "CPU":
        return DeviceFacts(_cpu_name(), platform.machine(), host_memory("MemTotal"))
    return joined(
        [DeviceFacts(f"{name.kind} device", name.architecture or name.kind.lower(), 0)] * len(name.devices)
    )


def joined(facts: Sequence[DeviceFacts]) -> DeviceFacts:
    """Several devices as one: "2 x Radeon PRO W7900", or the names side by side where they differ.

    Each holds an equal share of a model: the memory is the smallest one's times their number.
    """
    counts = Counter(each.name for each in facts)
    names = [f"{count} x {name}" if count > 1 else name for name, count in counts.items()]
    architectures = dict.fromkeys(each.architecture for each in facts)
    memory = min(each.memory_bytes for each in facts) * len(facts)
    return DeviceFacts(" + ".join(names), " + ".join(architectures), memory)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def host_memory(field: str) -> int:
    """Bytes of the kernel's field of that name (/proc/meminfo); 0 where it has none."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def memory_available(name: DeviceName) -> int:
    """What the host could give a CPU device now; 0 for others, whose own memory counts."""
    return host_memory("MemAvailable") if name.kind == "CPU" else 0


# ---------------------------------------------------------------- AMD, through the kernel driver


def _examine_amd(name: DeviceName) -> DeviceFacts:
    if not KFD_DEVICE.exists():
        raise DeviceUnusable(
            "no_device",
            "there is no /dev/kfd: the amdgpu kernel driver is not loaded or this host has no AMD GPU; "
            "load it (modprobe amdgpu) or, in a container, pass /dev/kfd and /dev/dri in",
        )
    if not os.access(KFD_DEVICE, os.R_OK | os.W_OK):
        raise DeviceUnusable(
            "no_device", "/dev/kfd may not be opened: add this user to the groups render and video"
        )
    cards = _amd_cards()
    return joined([_examine_card(cards, number) for number in name.numbers or (0,)])


def _examine_card(cards: list[DeviceFacts], number: int) -> DeviceFacts:
    if number >= len(cards):
        raise DeviceUnusable(
            "no_device", f"GPU {number} was asked for and the kernel driver shows {len(cards)}"
        )
    facts = cards[number]
    gfx = facts.architecture
    if gfx not in ("gfx942", "gfx950") and not gfx.startswith(("gfx11", "gfx12")):
        raise DeviceUnusable(
            "unsupported_gpu",
            f"{facts.name} is {gfx}; tinygrad's AMD backend runs on {SUPPORTED_AMD} only. "
            "If an OpenCL driver for it is installed, configure this device as CL",
        )
    return facts


def _amd_cards() -> list[DeviceFacts]:
    """GPUs in the order of their KFD nodes, which is tinygrad's order."""
    cards = []
    for node in sorted(KFD_NODES.glob("[0-9]*"), key=lambda node: int(node.name)):
        try:
            lines = (node / "properties").read_text().splitlines()
            if int((node / "gpu_id").read_text()) == 0:  # a CPU
                continue
        except (OSError, ValueError):  # a GPU that a container's cgroup hides
            continue
        values = {key: value for key, _, value in (line.partition(" ") for line in lines)}
        version = int(values.get("gfx_target_version", 0))
        gfx = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        render = RENDER_NODES / f"renderD{values.get('drm_render_minor', '')}" / "device"
        memory = _read(render / "mem_info_vram_total")
        title = _read(render / "product_name") or _read(node / "name") or "AMD GPU"
        cards.append(DeviceFacts(title, gfx, int(memory) if memory.isdigit() else 0))
    return cards


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- tinygrad


def choose(name: DeviceName, cache_dir: str) -> None:
    """Set tinygrad's environment; it must not have been imported. Raises DeviceUnusable `bad_configuration`."""
    os.environ["DEV"] = name.environment
    if not cache_dir:
        os.environ["CACHELEVEL"] = "0"
        return
    directory = Path(cache_dir)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise DeviceUnusable("bad_configuration", f"cache_dir {directory}: {error.strerror}") from error
    # tinygrad unpickles what it finds in its cache: whoever can write there runs code here
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        text = f"cache_dir {directory} must belong to this user and have mode 0700"
        raise DeviceUnusable("bad_configuration", text)
    os.environ["CACHEDB"] = str(directory.resolve() / "kernels.db")
