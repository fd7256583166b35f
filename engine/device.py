"""Which device this process owns: chosen before tinygrad is imported, named for people, tested before use.

A device string is tinygrad's, `[INTERFACE[:INDICES]+]DEVICE[:COMPILER[:ARCH]]`, such as "CPU:LLVM", "CPU:X86" or
"KFD:0+AMD:LLVM". What it does not name is never chosen silently: the compiler defaults to the bundled LLVM, the AMD
interface to the kernel driver (without it tinygrad would take the card from amdgpu over PCI), the device to nothing.
Every problem raises `DeviceUnusable`, whose message names the card, its architecture and what to do.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DeviceUnusable

KFD_DEVICE = Path("/dev/kfd")
KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
RENDER_NODES = Path("/sys/class/drm")
DEVICES = ("CPU", "AMD", "NV", "CUDA", "CL")
SUPPORTED_AMD = "gfx942, gfx950, gfx11xx and gfx12xx"
TOLERANCE = 2e-2  # of the self-test, whose matrices are float16


@dataclass(frozen=True)
class DeviceName:
    """A parsed device string."""

    kind: str  # "CPU", "AMD", ...
    compiler: str
    architecture: str
    interface: str
    indices: str

    def __str__(self) -> str:
        before = ":".join(filter(None, (self.interface, self.indices)))
        after = ":".join(filter(None, (self.kind, self.compiler, self.architecture)))
        return f"{before}+{after}" if before else after


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of the device without tinygrad."""

    name: str
    architecture: str
    memory_bytes: int


def parse(device: str) -> DeviceName:
    """Raises DeviceUnusable `bad_configuration`."""
    before, plus, after = device.rpartition("+")
    interface, _, indices = before.partition(":") if plus else ("", "", "")
    kind, _, rest = after.partition(":")
    compiler, _, architecture = rest.partition(":")
    kind, compiler, interface = kind.upper(), compiler.upper(), interface.upper()
    if kind not in DEVICES or "+" in before:
        raise DeviceUnusable(
            "bad_configuration",
            f"device {device!r} is not one of {', '.join(DEVICES)}; examples: CPU:LLVM, KFD:0+AMD:LLVM",
        )
    if indices and not indices.isdigit():
        text = f"device {device!r} names several cards; an engine owns one: write its index alone, as in KFD:0+AMD"
        raise DeviceUnusable("bad_configuration", text)
    if kind in ("CPU", "AMD"):
        compiler = compiler or "LLVM"
    if kind == "AMD":
        interface = interface or "KFD"
    return DeviceName(kind, compiler, architecture, interface, indices)


def examine(name: DeviceName) -> DeviceFacts:
    """Look at the host. Raises DeviceUnusable `no_device` or `unsupported_gpu`."""
    if name.kind == "AMD" and name.interface == "KFD":
        return _examine_amd(name)
    if name.kind == "CPU":
        return DeviceFacts(_cpu_name(), platform.machine(), _host_memory("MemTotal"))
    return DeviceFacts(f"{name.kind} device", name.architecture or name.kind.lower(), 0)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_memory(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def memory_available(name: DeviceName) -> int:
    """What the host could give a CPU device now; 0 for others, whose own memory counts."""
    return _host_memory("MemAvailable") if name.kind == "CPU" else 0


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
    index = int(name.indices or 0)
    if index >= len(cards):
        raise DeviceUnusable(
            "no_device", f"GPU {index} was asked for and the kernel driver shows {len(cards)}"
        )
    facts = cards[index]
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
    os.environ["DEV"] = str(name)
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


def self_test(name: DeviceName) -> float:
    """Open the device and compare a matmul and a small layer with numpy. Seconds it took.

    Raises DeviceUnusable `no_device` when it does not open, `self_test_failed` when it computes something else.
    """
    began = time.monotonic()
    import numpy as np
    from tinygrad import Device, Tensor

    from engine import kernels, llvm, programs

    programs.install()
    if name.compiler == "LLVM":
        llvm.install()
    try:
        opened = Device[Device.DEFAULT]
        opened.renderer  # noqa: B018 - opening a device does not yet prove that it has a compiler
    except (RuntimeError, OSError, AssertionError, ImportError, AttributeError, ExceptionGroup) as error:
        raise DeviceUnusable("no_device", f"{name} cannot be opened: {error}") from error
    random = np.random.default_rng(1)
    x, a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 64), (128, 64)))
    product = (Tensor(x) @ Tensor(a)).numpy()
    tensor = Tensor(x)
    scale = kernels.inverse_norm(tensor, 1e-5)
    layer = kernels.gated(kernels.matmul(tensor, Tensor(b).half(), scale=scale)).numpy()
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) @ b.T
    gate, up = normed[:, :64], normed[:, 64:]
    wanted = {"matmul": (product, x @ a), "layer": (layer, gate / (1 + np.exp(-gate)) * up)}
    for what, (got, right) in wanted.items():
        worst = float(np.abs(got - right).max() / np.abs(right).max())
        if not worst < TOLERANCE:
            text = f"{name} computes a wrong {what} (error {worst:.2g}): do not use it; check driver and hardware"
            raise DeviceUnusable("self_test_failed", text)
    return time.monotonic() - began
