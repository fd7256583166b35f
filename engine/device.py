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
from typing import TYPE_CHECKING, Any

from engine.errors import DeviceUnusable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

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
    from tinygrad import Device

    from engine import compatibility, llvm, programs

    programs.install(compatibility.digest(compatibility.facts(name)))
    if name.compiler == "LLVM":
        llvm.install()
    try:
        opened = Device[Device.DEFAULT]
        opened.renderer  # noqa: B018 - opening a device does not yet prove that it has a compiler
    except (RuntimeError, OSError, AssertionError, ImportError, AttributeError, ExceptionGroup) as error:
        raise DeviceUnusable("no_device", f"{name} cannot be opened: {error}") from error
    for what, (got, right) in _known_results(np.random.default_rng(1)).items():
        worst = float(np.abs(got - right).max() / np.abs(right).max())
        if not worst < TOLERANCE:
            text = f"{name} computes a wrong {what} (error {worst:.2g}): do not use it; check driver and hardware"
            raise DeviceUnusable("self_test_failed", text)
    return time.monotonic() - began


def _known_results(random: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """What the device computes and what numpy does: a plain product, and a layer by the engine's own kernels."""
    import numpy as np
    from tinygrad import Tensor
    from tinygrad.uop.ops import UOp

    from engine import kernels

    heads, groups, width = 4, 2, 16
    size, rows = heads * width, 4
    x, a, qkv, out = (
        random.standard_normal(shape).astype(np.float32) / 4
        for shape in ((rows, size), (size, size), ((heads + 2 * groups) * width, size), (size, size))
    )
    gate_up = random.standard_normal((2 * size, size)).astype(np.float32) / 4
    product = (Tensor(x) @ Tensor(a)).numpy()
    tensor, positions = Tensor(x), np.arange(rows)
    turn = positions[:, None] / 100.0 ** (np.arange(width // 2) / width)[None, :]
    angles = Tensor(np.stack([np.cos(turn), np.sin(turn)]).astype(np.float32))
    where = Tensor(positions.astype(np.int32))
    slots = Tensor(np.zeros(rows, dtype=np.int32))
    ones = Tensor(np.ones(size, dtype=np.float32))
    mixed_in = kernels.matmul(kernels.normed(tensor, ones, 1e-5), Tensor(qkv).half())
    cache = Tensor.zeros(2, 1, groups, 32, width).half().contiguous().realize()
    cache = kernels.write_cache(cache, mixed_in, angles, slots, where, heads)
    queries = kernels.rotate_queries(mixed_in, angles, heads, width, width**-0.5)
    length = UOp.variable("length", 1, 32).bind(rows)
    mixed = kernels.attention(queries, cache, slots, where, length).realize()
    attended = kernels.matmul(mixed, Tensor(out).half(), residual=tensor)
    inner = kernels.matmul(kernels.normed(attended, ones, 1e-5), Tensor(gate_up).half())
    layer = kernels.gated(inner).numpy()
    right_mixed = _attention(x, qkv, turn, heads, groups)
    gate, up = np.split(_normed(x + right_mixed @ out.T) @ gate_up.T, 2, axis=1)
    return {
        "matmul": (product, x @ a),
        "attention": (mixed.numpy(), right_mixed),
        "layer": (layer, gate / (1 + np.exp(-gate)) * up),
    }


def _normed(x: Array) -> Array:
    result: Array = x / ((x * x).mean(-1, keepdims=True) + 1e-5) ** 0.5
    return result


def _attention(x: Array, qkv: Array, turn: Array, heads: int, groups: int) -> Array:
    """Of all rows to those before them, by numpy."""
    import numpy as np

    rows, width = len(x), turn.shape[1] * 2

    q, k, v = np.split((_normed(x) @ qkv.T).reshape(rows, -1, width), [heads, heads + groups], axis=1)
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    q, k = (
        np.stack([t[..., 0::2] * cos - t[..., 1::2] * sin, t[..., 1::2] * cos + t[..., 0::2] * sin], -1)
        for t in (q, k)
    )
    q, k = (t.reshape(rows, -1, width) for t in (q, k))
    k, v = (np.repeat(t, heads // groups, axis=1) for t in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / width**0.5 + np.triu(np.full((rows, rows), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    result: Array = np.einsum("hqk,khd->qhd", shares, v).reshape(rows, -1)
    return result
