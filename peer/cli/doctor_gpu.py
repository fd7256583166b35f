"""What the doctor looks at where AMD GPUs are to be used: the driver, its devices, and who may open them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from peer.cli.findings import Finding, fail, ok, warn

SUPPORTED = re.compile(r"gfx(942|950|11[0-9a-f]{2}|12[0-9a-f]{2})")
SUPPORTED_TEXT = "gfx942, gfx950, gfx11xx, gfx12xx"


def gpu_findings(root: Path) -> Iterator[Finding]:
    """`root` is "/" outside tests."""
    yield driver(root)
    yield kfd(root)
    yield render_nodes(root)
    yield from architectures(root)


def driver(root: Path) -> Finding:
    name = "amdgpu driver"
    module = root / "sys/module/amdgpu"
    if not module.is_dir():
        return fail(
            name, "not loaded", "load it: `modprobe amdgpu`, or install AMD's amdgpu-dkms for new cards"
        )
    version = _read(module / "version")
    return ok(name, f"version {version}" if version else "the kernel's own")


def kfd(root: Path) -> Finding:
    name = "/dev/kfd"
    device = root / "dev/kfd"
    if not device.exists():
        return fail(
            name,
            "does not exist",
            "the amdgpu driver makes it; in a container add --device=/dev/kfd --device=/dev/dri",
        )
    return _access(name, device)


def render_nodes(root: Path) -> Finding:
    name = "/dev/dri"
    nodes = sorted((root / "dev/dri").glob("renderD*")) if (root / "dev/dri").is_dir() else []
    if not nodes:
        return fail(
            name, "has no render node", "the amdgpu driver makes them; in a container add --device=/dev/dri"
        )
    for node in nodes:
        found = _access(name, node)
        if found.status != "ok":
            return found
    return ok(name, f"{len(nodes)} render node{'s' if len(nodes) > 1 else ''}, readable and writable")


def _access(name: str, device: Path) -> Finding:
    if os.access(device, os.R_OK | os.W_OK):
        return ok(name, "readable and writable")
    group = _group(device)
    return fail(
        name,
        f"{device.name} may not be opened; it belongs to group {group}",
        f"`sudo usermod -aG render,video $USER` (here: {group}), then log in again",
    )


def _group(device: Path) -> str:
    import grp

    try:
        return grp.getgrgid(device.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "unknown"


def architectures(root: Path) -> Iterator[Finding]:
    """One finding for each GPU that the kernel driver shows."""
    found = list(_gpus(root))
    if not found:
        yield fail(
            "GPU",
            "none found",
            "on a machine without an AMD GPU use --device CPU (slow) or --device fake (no model at all)",
        )
    for number, gfx in enumerate(found):
        name = f"GPU {number}"
        if SUPPORTED.fullmatch(gfx):
            yield ok(name, gfx)
        else:
            yield fail(
                name,
                f"{gfx} is not supported by the engine",
                f"supported: {SUPPORTED_TEXT}; choose other cards with --device AMD:N,...",
            )


def _gpus(root: Path) -> Iterator[str]:
    """The gfx name of each compute node that is a GPU."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    if not nodes.is_dir():
        return
    for node in sorted(nodes.iterdir(), key=lambda path: (len(path.name), path.name)):
        version = re.search(r"^gfx_target_version\s+(\d+)$", _read(node / "properties"), re.MULTILINE)
        if version is not None and int(version[1]):
            yield gfx_name(int(version[1]))


def gfx_name(version: int) -> str:
    """110000 -> gfx1100, 90402 -> gfx942: minor and stepping have two decimal digits each, shown in hexadecimal."""
    return f"gfx{version // 10_000}{version // 100 % 100:x}{version % 100:x}"


def libraries() -> Finding:
    """AMD's telemetry library; without it the driver's files are read."""
    name = "amdsmi"
    for folder in ("/opt/rocm/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"):
        if (Path(folder) / "libamd_smi.so").exists():
            return ok(name, f"{folder}/libamd_smi.so")
    return warn(
        name, "libamd_smi.so not found", "telemetry comes from the driver's files instead; nothing to do"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
