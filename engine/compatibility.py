"""What compiled kernels depend on: where all of it is equal, one process's kernels run in another.

`python -m engine.compatibility DEVICE` prints it as one line of JSON, for a peer that exports or imports kernels. The
device is looked at and not opened, so an engine may own it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version

from engine import device
from engine.device import DeviceName
from engine.errors import DeviceUnusable
from engine.process import EXIT_UNUSABLE, EXIT_USAGE

LOWERING = 4  # raise it when engine.compilers change what a kernel becomes or is kept as


def facts(name: DeviceName) -> dict[str, str]:
    """By names for people. tinygrad's environment must be set (`device.choose`). Raises DeviceUnusable."""
    import llvmlite
    import llvmlite.binding as llvm
    from tinygrad.helpers import CPU_COUNT
    from tinygrad.helpers import VERSION as CACHE_FORMAT

    found = {
        "tinygrad": version("tinygrad"),
        "cache format": str(CACHE_FORMAT),
        "lowering": str(LOWERING),
        "llvmlite": llvmlite.__version__,
        "LLVM": ".".join(map(str, llvm.llvm_version_info)),
        "device": name.kind,
        "compiler": name.compiler,
        "architecture": name.architecture or device.examine(name).architecture,
    }
    if name.kind == "CPU":  # kernels use all that this processor can do, and are cut for its threads
        found |= {
            "processor": llvm.get_host_cpu_name(),
            "features": llvm.get_host_cpu_features().flatten(),
            "threads": str(CPU_COUNT.value),
        }
    return found


def digest(found: dict[str, str]) -> str:
    """Of facts, in hexadecimal: what a kernel's key in the cache begins with."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def main(arguments: list[str]) -> int:
    """Print the facts of the device named."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m engine.compatibility DEVICE\n")
        return EXIT_USAGE
    try:
        name = device.parse(arguments[0])
        device.examine(name)
        device.choose(name, "")
        found = facts(name)
    except DeviceUnusable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_UNUSABLE
    print(json.dumps({"facts": found, "digest": digest(found)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
