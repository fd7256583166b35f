"""Which devices get a worker: the configuration's words turned into device strings for engines.

AMD GPUs are found by the amdgpu kernel driver's KFD topology, in the order in which tinygrad numbers them. A comma
makes two workers, a plus one worker of two devices: "AMD:0,1" is GPU 0 and GPU 1, each with models of its own, in
"AMD:0+1" they share each model. Nothing here opens a device. A GPU that is asked for and not there is an error:
never silently the CPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from peer.engines import Device
from peer.errors import ConfigError

SYSFS: Final = Path("/sys")
TOPOLOGY: Final = "devices/virtual/kfd/kfd/topology/nodes"
DEVICES_MAX: Final = 64
FAKES_MAX: Final = 64
SUPPORTED: Final = "gfx942, gfx950, gfx11xx and gfx12xx"
_CPU_HINT = "to run on the CPU, say so: `--device CPU`"
_NUMBERS = r"[0-9]{1,3}(?:[,+][0-9]{1,3})*"
_NUMBERED = re.compile(
    rf"(?:(?P<interface>[A-Z]{{2,8}})\+)?(?P<kind>[A-Z]{{2,8}}):(?P<numbers>{_NUMBERS})(?P<compiler>:[A-Z][A-Z0-9]*)?"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_:+,.\-]{0,127}\Z")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """An AMD GPU as the kernel driver lists it; `index` is tinygrad's number of it."""

    index: int
    architecture: str  # gfx1100
    name: str
    pci: str  # 0000:03:00.0
    sysfs: str  # its amdgpu device directory
    driver_version: str
    memory_total_bytes: int


def supported(architecture: str) -> bool:
    """What tinygrad's AMD backend takes."""
    return architecture in ("gfx942", "gfx950") or architecture.startswith(("gfx11", "gfx12"))


def find_gpus(sysfs: Path = SYSFS) -> list[Gpu]:
    """Every GPU in the KFD topology, unsupported ones included."""
    try:
        nodes = sorted((node for node in (sysfs / TOPOLOGY).iterdir()), key=lambda node: int(node.name))
    except (OSError, ValueError):
        return []
    gpus: list[Gpu] = []
    for node in nodes[:DEVICES_MAX]:
        if _read(node / "gpu_id") not in ("", "0"):
            gpus.append(_gpu(len(gpus), node, sysfs))
    return gpus


def _gpu(index: int, node: Path, sysfs: Path) -> Gpu:
    properties = _properties(node / "properties")
    version = properties.get("gfx_target_version", 0)
    architecture = f"gfx{version // 10000:d}{version // 100 % 100:x}{version % 100:x}"
    card = sysfs / "class/drm" / f"renderD{properties.get('drm_render_minor', 0)}" / "device"
    location, domain = properties.get("location_id", 0), properties.get("domain", 0)
    pci = f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7:x}"
    total = _read(card / "mem_info_vram_total")
    name = _read(card / "product_name") or _read(node / "name")
    return Gpu(
        index=index,
        architecture=architecture,
        name=f"AMD {name}" if name and not name.startswith("AMD") else name or f"AMD GPU ({architecture})",
        pci=pci,
        sysfs=str(card),
        driver_version=_driver_version(sysfs),
        memory_total_bytes=int(total) if total.isdecimal() else 0,
    )


def _properties(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdecimal():
            found[name] = int(value)
    return found


def _driver_version(sysfs: Path) -> str:
    """Of amdgpu: its own when it came with ROCm, else the kernel's."""
    own = _read(sysfs / "module/amdgpu/version")
    if own:
        return f"amdgpu {own}"
    kernel = _read(Path("/proc/sys/kernel/osrelease"))
    return f"amdgpu (Linux {kernel})" if kernel else "amdgpu"


def _read(path: Path) -> str:
    """ "" where there is no such file, or the driver cannot tell."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def find_devices(words: Sequence[str], sysfs: Path = SYSFS) -> tuple[Device, ...]:
    """The devices that `config.engine.devices` names. Raises ConfigError, which says what to do."""
    devices: list[Device] = []
    for word in words:
        devices.extend(_devices(word.strip(), sysfs))
    if not devices:
        raise ConfigError(f"engine.devices names no device; {_CPU_HINT}")
    seen: set[str] = set()
    for device in devices:
        for one in device.members or (device,):
            if one.label in seen:
                raise ConfigError(f"engine.devices names {one.device} twice, as {one.label}")
            seen.add(one.label)
    return tuple(devices)


def _devices(word: str, sysfs: Path) -> list[Device]:
    kind, _, which = word.partition(":")
    if word.lower() == "auto" or word.upper() in ("AMD", "AMD:LLVM"):
        gpus = find_gpus(sysfs)
        if not gpus:
            raise ConfigError(
                "there is no AMD GPU on this host (the amdgpu driver's KFD topology lists none, see "
                f"`bitinglip doctor`); {_CPU_HINT}"
            )
        return [_amd(gpu) for gpu in gpus]
    if kind.upper() == "AMD" and re.fullmatch(_NUMBERS, which):
        return _chosen(word, _groups(which), sysfs)
    if pinned := re.fullmatch(rf"KFD:({_NUMBERS})\+AMD(?::LLVM)?", word):
        return _chosen(word, _groups(pinned[1]), sysfs)
    if kind.lower() == "fake":
        return _fakes(word, which)
    if not _NAME.match(word):
        raise ConfigError(
            f"engine.devices: {word!r} is no device; known are auto, AMD, AMD:0,2, AMD:0+1, CPU and fake"
        )
    if word.upper() == "CPU":
        return [Device(label="cpu0", device="CPU:LLVM")]
    if numbered := _NUMBERED.fullmatch(word.upper()):
        return [_numbered(numbered, group) for group in _groups(numbered["numbers"])]
    return [Device(label=_label(kind, which), device=word)]


def _groups(numbers: str) -> list[list[int]]:
    """ "0,2+3" is [[0], [2, 3]]: one worker for each."""
    return [[int(number) for number in group.split("+")] for group in numbers.split(",")]


def _numbered(word: re.Match[str], group: list[int]) -> Device:
    """One worker's devices of a backend whose devices the host does not list."""
    kind, compiler = word["kind"], word["compiler"] or ""

    def engines_word(numbers: list[int]) -> str:
        listed = ",".join(map(str, numbers))
        return (
            f"{word['interface']}:{listed}+{kind}{compiler}"
            if word["interface"]
            else f"{kind}:{listed}{compiler}"
        )

    singles = [Device(label=_label(kind, str(number)), device=engines_word([number])) for number in group]
    return _joined(singles, engines_word(group))


def _joined(members: list[Device], device: str) -> Device:
    """One worker of several devices; of one it is that device."""
    if len(members) == 1:
        return members[0]
    problem = next((member.problem for member in members if member.problem), "")
    architectures = dict.fromkeys(member.architecture for member in members)
    if len(architectures) > 1 and not problem:
        problem = (
            f"{device} joins GPUs of different architectures ({', '.join(architectures)}), which would round "
            "differently: join those of one kind, and give the others workers of their own"
        )
    first, *others = members
    numbers = (re.sub(r"^[a-z]+", "", member.label) for member in others)
    return Device(
        label="-".join((first.label, *numbers)),
        device=device,
        name=joined_name([member.name for member in members]),
        architecture=first.architecture,
        driver_version=first.driver_version,
        problem=problem,
        memory_total_bytes=sum(member.memory_total_bytes for member in members),
        members=tuple(members),
    )


def joined_name(names: Sequence[str]) -> str:
    """ "2 x AMD Instinct MI300X"; "" where one is not known."""
    counted = Counter(names)
    return (
        "" if "" in counted else " + ".join(f"{n} x {name}" if n > 1 else name for name, n in counted.items())
    )


def _chosen(word: str, groups: list[list[int]], sysfs: Path) -> list[Device]:
    gpus = find_gpus(sysfs)
    if not gpus:
        raise ConfigError(f"{word}: there is no AMD GPU on this host; {_CPU_HINT}")
    for index in (index for group in groups for index in group):
        if index >= len(gpus):
            there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in gpus)
            raise ConfigError(f"{word}: there is no GPU {index} on this host, only {there}")
    return [
        _joined([_amd(gpus[index]) for index in group], f"KFD:{','.join(map(str, group))}+AMD:LLVM")
        for group in groups
    ]


def _amd(gpu: Gpu) -> Device:
    problem = ""
    if not supported(gpu.architecture):
        problem = (
            f"{gpu.name} ({gpu.architecture}) is not supported: the AMD backend runs {SUPPORTED} only. "
            "Leave it out with `--device AMD:` and the numbers of the others, try its OpenCL driver with "
            "`--device CL`, or use another card"
        )
    return Device(
        label=f"gpu{gpu.index}",
        device=f"KFD:{gpu.index}+AMD:LLVM",
        name=gpu.name,
        architecture=gpu.architecture,
        driver_version=gpu.driver_version,
        problem=problem,
        pci=gpu.pci,
        sysfs=gpu.sysfs,
        memory_total_bytes=gpu.memory_total_bytes,
    )


def _fakes(word: str, count: str) -> list[Device]:
    if count and not (count.isdecimal() and 1 <= int(count) <= FAKES_MAX):
        raise ConfigError(f"engine.devices: {word!r} asks for no number of stand-ins from 1 to {FAKES_MAX}")
    return [
        Device(label=f"fake{index}", device="fake", name="stand-in engine (no GPU)", stand_in=True)
        for index in range(int(count or 1))
    ]


def _label(kind: str, which: str) -> str:
    """Of a device that is passed through: its backend's name and number, "CL:1" as cl1."""
    backend = re.sub(r"[^a-z0-9]", "", kind.split("+")[-1].lower())
    return backend + (which if which.isdecimal() else "0")
