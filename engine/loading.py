"""Loading a model onto the device and giving its memory back. On the device's thread only.

Measured with SmolLM2-135M Q4_1, 8 slots of 2048 tokens, two CPU cores that others used too: 11.7 s of processor time
with an empty kernel cache and 6.2 s with a filled one, 4 s of them the steps by which each graph is timed; 495 MB on
the device. The host holds at most a sixth more while it loads than afterwards: a tensor at a time is repacked from the
mapped file.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tinygrad import Device
from tinygrad.helpers import CPU_COUNT, GlobalCounters

from engine.batching.batcher import Batcher
from engine.checkpoint import open_checkpoint, vocabulary_of
from engine.compilers import programs, search
from engine.device import DeviceName, memory_available
from engine.errors import LoadError
from engine.files.gguf import Gguf, bad_file
from engine.graphs import GraphedModel, bucket_sizes, cache_length, logits_rows
from engine.kernels.weights import Weights, weights_bytes
from engine.models import check_family, read_config
from engine.models.decoder import Decoder, DecoderConfig
from engine.models.encoder import EncoderConfig
from engine.protocol import Load, Loaded, LoadProgress, Message, Run

Progress = Callable[[LoadProgress], None]


class Serving(Protocol):
    """The runs of a model, as engine.batching.Batcher has them. Every method returns the messages to send."""

    prefilling: bool

    @property
    def active(self) -> int: ...
    @property
    def busy(self) -> bool: ...

    def add(self, run: Run) -> list[Message]: ...
    def cancel(self, run_id: str) -> list[Message]: ...
    def fail_all(self, code: str, message: str) -> list[Message]: ...
    def step(self, room: int) -> list[Message]: ...


class Graphs(Protocol):
    """A model on the device, whose steps are captured for each number of rows."""

    slots: int
    sizes: list[int]

    def capture(self, size: int) -> None: ...
    def free(self) -> None: ...


G = TypeVar("G", bound=Graphs)


@dataclass
class LoadedModel:
    """A model that serves runs."""

    batcher: Serving
    graphs: Graphs
    loaded: Loaded


def memory_used(devices: Sequence[str] = ()) -> int:
    """Bytes that tinygrad holds on these devices, or on all."""
    if devices:
        return sum(int(GlobalCounters.mem_used_per_device[each]) for each in devices)
    return int(GlobalCounters.mem_used)


def load_model(
    load: Load, slots: int, name: DeviceName, limit: int, progress: Progress, beam: int = 0
) -> LoadedModel:
    """Read, check, upload, capture. Raises LoadError, after which the device holds nothing of the model.

    `beam`: the width of a search for faster kernels, see `engine.compilers.search`.
    """
    began, before = time.monotonic(), memory_used()
    compiled_before, searched_before = programs.compiled(), search.searched()
    kinds = {"text_generation": _load_decoder, "embedding": _load_embeddings, "tensor": _load_tensors}
    if load.task_type not in kinds:
        raise LoadError("bad_parameters", f"the engine serves no tasks of type {load.task_type!r}")
    failed: LoadError | None = None
    if name.kind == "CPU" and load.task_type != "tensor":  # its kernels state their loops, but for trifles
        beam = 0
    try:
        batcher, graphs, context = kinds[load.task_type](load, slots, name, limit, progress, beam)
    except LoadError as error:
        failed = LoadError(error.code, str(error))  # the one that was raised holds what was half loaded
    except MemoryError:
        failed = LoadError("out_of_memory", f"the host's memory ended while {load.model} was read")
    if failed is not None:
        free_unused()
        raise failed
    loaded = Loaded(
        model=load.model,
        memory_bytes=memory_used() - before,
        load_s=time.monotonic() - began,
        context=context,
        slots=graphs.slots,
        slots_asked=slots,
        kernels_compiled=programs.compiled() - compiled_before,
        kernels_searched=search.searched() - searched_before,
    )
    return LoadedModel(batcher, graphs, loaded)


def _load_decoder(
    load: Load, slots: int, name: DeviceName, limit: int, progress: Progress, beam: int
) -> tuple[Serving, Graphs, int]:
    checkpoint = open_checkpoint(load.path)
    family = check_family(checkpoint, load.family)
    if slots < 1 or load.context < 2:
        raise LoadError("bad_parameters", f"{slots} slots of {load.context} tokens make no sense")
    config = read_config(checkpoint, family, load.context)
    if isinstance(config, EncoderConfig):
        raise LoadError(
            "unsupported_architecture", f"a {load.family} model generates no text, only embeddings"
        )
    vocabulary = vocabulary_of(checkpoint)
    context = min(load.context, config.context_max)
    if len(vocabulary.pieces) > config.vocabulary:
        raise bad_file(
            load.path, f"it has {len(vocabulary.pieces)} tokens and logits for {config.vocabulary}"
        )
    on_cpu = name.kind == "CPU"
    weights, available = weights_bytes(checkpoint), memory_available(name)

    def needed(slots: int) -> int:
        return memory_needed(config, weights, slots, context, on_cpu, len(name.devices))

    slots = slots_that_fit(slots, needed, limit, available)
    need = needed(slots)
    check_memory(load.model, need, limit, available)
    size = checkpoint.file_size
    progress(LoadProgress(model=load.model, stage="read", done=size, total=size))

    def upload() -> GraphedModel:
        spelled = str if isinstance(checkpoint, Gguf) else family.spelled
        with Weights(checkpoint, _uploads(load.model, progress), spelled) as weights:
            threads = CPU_COUNT.value if on_cpu else 1
            model = Decoder(config, weights, slots, cache_length(context), threads, name.devices)
        return GraphedModel(model, slots, context, on_cpu)

    graphs = _captured(load, need, upload, progress, beam)
    return Batcher(graphs, vocabulary), graphs, context


def _load_embeddings(
    load: Load, slots: int, name: DeviceName, limit: int, progress: Progress, beam: int
) -> tuple[Serving, Graphs, int]:
    from engine.embedding.loading import EmbeddingFiles

    on_cpu = name.kind == "CPU"
    files = EmbeddingFiles.read(load.path, load.family, slots, load.context)
    need = files.memory_needed(on_cpu)
    check_first(load.model, need, limit, name)
    size = files.checkpoint.file_size
    progress(LoadProgress(model=load.model, stage="read", done=size, total=size))
    uploads, threads = _uploads(load.model, progress), CPU_COUNT.value if on_cpu else 1
    graphs = _captured(load, need, lambda: files.upload(uploads, threads, on_cpu), progress, beam)
    return files.batcher(graphs), graphs, files.context


def _load_tensors(
    load: Load, slots: int, name: DeviceName, limit: int, progress: Progress, beam: int
) -> tuple[Serving, Graphs, int]:
    from engine.onnx.batcher import TensorBatcher
    from engine.onnx.model import OnnxFiles, OnnxModel

    if load.family != "onnx":
        raise LoadError(
            "unsupported_architecture", f"{load.model} is of family {load.family!r}: tensors are of onnx"
        )
    files = OnnxFiles.read(load.path)
    need = files.memory_needed()
    check_first(load.model, need, limit, name)
    progress(LoadProgress(model=load.model, stage="read", done=files.size, total=files.size))
    model = _captured(load, need, lambda: OnnxModel(files, slots), progress, beam)
    return TensorBatcher(model), model, load.context


def _captured(load: Load, need: int, upload: Callable[[], G], progress: Progress, beam: int) -> G:
    """A model on the device with all its graphs. Raises LoadError when the memory was not enough after all."""
    graphs: G | None = None
    before = search.searched()

    def tell(searched: int) -> None:
        progress(LoadProgress(model=load.model, stage="search", done=searched - before, total=0))

    gc.disable()  # building graphs makes millions of objects that live: collecting them took a fifth of the load
    try:
        graphs = upload()
        for done, size in enumerate(graphs.sizes):
            progress(LoadProgress(model=load.model, stage="compile", done=done, total=len(graphs.sizes)))
            with search.searching(beam, tell):
                graphs.capture(size)
        progress(
            LoadProgress(model=load.model, stage="compile", done=len(graphs.sizes), total=len(graphs.sizes))
        )
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        if graphs is not None:
            graphs.free()
        text = f"{load.model} did not fit after all ({error}): {need} bytes were expected to be enough"
        raise LoadError("out_of_memory", text) from None
    finally:
        gc.enable()
    return graphs


def _uploads(model: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(LoadProgress(model=model, stage="upload", done=done, total=total))


def memory_needed(
    config: DecoderConfig, weights: int, slots: int, context: int, on_cpu: bool, devices: int = 1
) -> int:
    """Weights, caches and the steps' intermediates, in bytes of all devices together."""
    length = cache_length(context)
    weights += (
        (4 * devices - 2) * config.blocks * config.experts * config.embedding
    )  # float32 routers, on each
    streams = 4 * devices + devices * (devices - 1)  # each device's own, and what it gets of the others
    logits = config.vocabulary if devices == 1 else 3 * config.vocabulary  # computed, copied, side by side
    steps = sum(
        4 * rows * (2 * config.heads * length + streams * config.embedding + config.qkv + config.inner)
        + 4 * logits_rows(rows, slots) * logits
        for rows in bucket_sizes(slots, on_cpu)
    )
    return weights + config.cache_bytes(slots, length) + steps


def slots_that_fit(asked: int, needed: Callable[[int], int], limit: int, available: int) -> int:
    """The most slots, at most `asked`, for which `needed` bytes are free; 1 if none: `check_memory` then refuses.

    The context is never cut: tasks were admitted by it. `limit` and `available` as there.
    """
    rooms = [limit - memory_used()] * bool(limit) + [available] * bool(available)
    return next((slots for slots in range(asked, 1, -1) if all(needed(slots) <= room for room in rooms)), 1)


def check_first(model: str, need: int, limit: int, name: DeviceName) -> None:
    """`check_memory` of what only the first of several devices has; `limit` is of all of them, in equal parts."""
    check_memory(model, need, limit // len(name.devices), memory_available(name), name.devices[:1])


def check_memory(model: str, need: int, limit: int, available: int, devices: Sequence[str] = ()) -> None:
    """Raises LoadError `out_of_memory` with the arithmetic. A limit or availability of 0 is unknown.

    `limit` is of these devices, or of all.
    """
    used = memory_used(devices)
    free = limit - used if limit else need
    if need > free:
        raise LoadError(
            "out_of_memory",
            f"{model} needs {need} bytes (weights, caches, intermediates); the device may use {limit}, "
            f"of which {used} are taken and {free} are free: unload a model, or use fewer slots or a shorter context",
        )
    if available and need > available:
        raise LoadError(
            "out_of_memory", f"{model} needs {need} bytes and the host has only {available} available now"
        )


def unload_model(model: LoadedModel) -> int:
    """Let go of a model's memory. Bytes that came back, measured."""
    before = memory_used()
    model.graphs.free()
    del model.batcher
    free_unused()
    return before - memory_used()


def free_unused() -> None:
    """Give back what nothing refers to: the devices' freed buffers, which tinygrad keeps, and the host's."""
    gc.collect()
    for device in Device._opened_devices:
        allocator = Device[device].allocator
        if hasattr(allocator, "free_cache"):
            allocator.free_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
