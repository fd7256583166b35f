"""What was chosen is opened and tested: a device that computes something else than numpy serves nothing.

Of several devices each is tested. Nothing but this file opens a device, so everything that tinygrad must be changed
by (the modules of `engine.compilers`) is put in place here.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any

from engine.device import DeviceFacts, DeviceName, joined
from engine.errors import DeviceUnusable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

TOLERANCE = 2e-2  # its matrices are float16
# What each backend needs on the host beside the card
NEEDS = {
    "AMD": "the amdgpu kernel driver; through PCI instead, root and a card that no driver holds",
    "CUDA": "NVIDIA's driver (libcuda.so.1); for `CUDA:CUDA` instead of PTX also libnvrtc and CUDA's headers",
    "NV": "NVIDIA's kernel driver and, for its PTX compiler, libnvJitLink.so (NVJITLINK_PATH may name it)",
    "CL": "an OpenCL loader (ocl-icd-libopencl1) and the card's OpenCL driver in /etc/OpenCL/vendors",
    "CPU": "nothing else",
}
_CANNOT_OPEN = (
    RuntimeError,
    OSError,
    AssertionError,
    ImportError,
    AttributeError,
    IndexError,
    ExceptionGroup,
)


def open_devices(name: DeviceName) -> DeviceFacts | None:
    """Open all of them, and what their drivers say of them; None where `device.examine` knows more.

    `device.choose` has been called. Raises DeviceUnusable `no_device`, saying what is missing.
    """
    from tinygrad import Device

    from engine import compatibility
    from engine.compilers import llvm, opencl, programs, search

    made_for = compatibility.digest(compatibility.facts(name))
    programs.install(made_for)
    search.install(made_for)
    llvm.install()
    opencl.install()
    # tinygrad's own is always number 0, which may be another engine's
    type(Device).DEFAULT = property(lambda _: name.devices[0])
    facts = []
    for each in name.devices:
        try:
            opened = Device[each]
            opened.renderer  # noqa: B018 - opening a device does not yet prove that it has a compiler
            facts.append(_described(name, opened))
        except _CANNOT_OPEN as error:
            why = "; ".join(map(str, error.exceptions)) if isinstance(error, ExceptionGroup) else str(error)
            text = f"{each} of {name} cannot be opened: {why or type(error).__name__} (it needs {NEEDS[name.kind]})"
            raise DeviceUnusable("no_device", text) from error
    return joined([each for each in facts if each is not None]) if all(facts) else None


def _described(name: DeviceName, opened: Any) -> DeviceFacts | None:
    """What the driver says of an opened device."""
    if name.kind == "CL":
        from tinygrad.runtime.autogen import opencl as cl

        size = ctypes.c_uint64()
        cl.clGetDeviceInfo(opened.device_id, cl.CL_DEVICE_GLOBAL_MEM_SIZE, 8, ctypes.byref(size), None)
        return DeviceFacts(opened.device_name, f"OpenCL {opened.driver_version}", size.value)
    if name.kind == "CUDA":
        from tinygrad.runtime.autogen import cuda

        title, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        cuda.cuDeviceGetName(title, 256, opened.cu_device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), opened.cu_device)
        return DeviceFacts(title.value.decode(errors="replace"), str(opened.arch), memory.value)
    if name.kind == "NV":
        return DeviceFacts(f"NVIDIA GPU ({opened.arch})", str(opened.arch), 0)
    return None


def self_test(name: DeviceName) -> float:
    """Compare a matmul and a small layer of each device with numpy. Seconds it took. `open_devices` comes first.

    Raises DeviceUnusable `self_test_failed` when a device computes something else, or cannot compute at all.
    """
    began = time.monotonic()
    import numpy as np
    from tinygrad.device import CompileError

    for each in name.devices:
        try:
            results = _known_results(np.random.default_rng(1), each)
        except (CompileError, *_CANNOT_OPEN) as error:
            text = f"{each} of {name} cannot compute: {type(error).__name__}: {error} (it needs {NEEDS[name.kind]})"
            raise DeviceUnusable("self_test_failed", text) from error
        for what, (got, right) in results.items():
            worst = float(np.abs(got - right).max() / np.abs(right).max())
            if not worst < TOLERANCE:
                text = f"{each} of {name} computes a wrong {what} (error {worst:.2g}): do not use it; "
                raise DeviceUnusable("self_test_failed", text + "check driver and hardware")
    return time.monotonic() - began


def _known_results(random: np.random.Generator, on: str) -> dict[str, tuple[Array, Array]]:
    """What the device computes and what numpy does: a plain product, and a layer by the engine's own kernels."""
    import numpy as np
    from tinygrad import Tensor
    from tinygrad.uop.ops import UOp

    from engine.kernels import transformer

    heads, groups, width = 4, 2, 16
    size, rows = heads * width, 4
    x, a, qkv, out = (
        random.standard_normal(shape).astype(np.float32) / 4
        for shape in ((rows, size), (size, size), ((heads + 2 * groups) * width, size), (size, size))
    )
    gate_up = random.standard_normal((2 * size, size)).astype(np.float32) / 4

    def put(values: Array) -> Tensor:
        return Tensor(values, device=on)

    product = (put(x) @ put(a)).numpy()
    tensor, positions = put(x), np.arange(rows)
    turn = positions[:, None] / 100.0 ** (np.arange(width // 2) / width)[None, :]
    angles = put(np.stack([np.cos(turn), np.sin(turn)]).astype(np.float32))
    where = put(positions.astype(np.int32))
    slots = put(np.zeros(rows, dtype=np.int32))
    ones = put(np.ones(size, dtype=np.float32))
    mixed_in = transformer.matmul(transformer.normed(tensor, ones, 1e-5), put(qkv).half())
    cache = Tensor.zeros(2, 1, groups, 32, width, device=on).half().contiguous().realize()
    cache = transformer.write_cache(cache, mixed_in, angles, slots, where, heads)
    queries = transformer.rotate_queries(mixed_in, angles, heads, width, width**-0.5)
    length = UOp.variable("length", 1, 32).bind(rows)
    mixed = transformer.attention(queries, cache, slots, where, length).realize()
    attended = transformer.matmul(mixed, put(out).half(), residual=tensor)
    inner = transformer.matmul(transformer.normed(attended, ones, 1e-5), put(gate_up).half())
    layer = transformer.gated(inner).numpy()
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
