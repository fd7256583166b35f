"""Loading a model onto the device and giving its memory back. On the device's thread only.

Measured with SmolLM2-135M Q4_1, 8 slots of 2048 tokens, two CPU cores that others used too: 6.6 to 9.5 s with an empty
kernel cache, 2.3 to 4.6 s (2.1 s of processor time) with a filled one; 664 MB on the device.
"""

from __future__ import annotations

import errno
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Device
from tinygrad.helpers import CPU_COUNT, GlobalCounters

from engine import programs
from engine.batching import Batcher
from engine.checkpoint import open_checkpoint, vocabulary_of
from engine.device import DeviceName, memory_available
from engine.errors import LoadError
from engine.gguf import Gguf, bad_file
from engine.graphs import GraphedModel, bucket_sizes, cache_length, logits_rows
from engine.models import check_family, read_config
from engine.models.decoder import Decoder, DecoderConfig
from engine.protocol import Load, Loaded, LoadProgress
from engine.weights import Weights, weights_bytes

Progress = Callable[[LoadProgress], None]


@dataclass
class LoadedModel:
    """A model that serves runs."""

    batcher: Batcher
    graphs: GraphedModel
    loaded: Loaded


def memory_used() -> int:
    """Bytes that tinygrad holds on the device."""
    return int(GlobalCounters.mem_used)


def load_model(load: Load, slots: int, name: DeviceName, limit: int, progress: Progress) -> LoadedModel:
    """Read, check, upload, capture. Raises LoadError, after which the device holds nothing of the model."""
    began, before, compiled_before = time.monotonic(), memory_used(), programs.compiled()
    checkpoint = open_checkpoint(load.path)
    family = check_family(checkpoint, load.family)
    vocabulary = vocabulary_of(checkpoint)
    if slots < 1 or load.context < 2:
        raise LoadError("bad_parameters", f"{slots} slots of {load.context} tokens make no sense")
    config = read_config(checkpoint, family, load.context)
    context = min(load.context, config.context_max)
    if len(vocabulary.pieces) > config.vocabulary:
        raise bad_file(
            load.path, f"it has {len(vocabulary.pieces)} tokens and logits for {config.vocabulary}"
        )
    on_cpu = name.kind == "CPU"
    need = memory_needed(config, weights_bytes(checkpoint), slots, context, on_cpu)
    check_memory(load.model, need, limit, memory_available(name))
    size = checkpoint.file_size
    progress(LoadProgress(model=load.model, stage="read", done=size, total=size))
    graphs: GraphedModel | None = None
    gc.disable()  # building graphs makes millions of objects that live: collecting them took a fifth of the load
    try:
        spelled = str if isinstance(checkpoint, Gguf) else family.spelled
        with Weights(checkpoint, _uploads(load.model, progress), spelled) as weights:
            model = Decoder(config, weights, slots, cache_length(context), CPU_COUNT.value if on_cpu else 1)
        graphs = GraphedModel(model, slots, context, on_cpu)
        del model
        for done, size in enumerate(graphs.sizes):
            progress(LoadProgress(model=load.model, stage="compile", done=done, total=len(graphs.sizes)))
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
    loaded = Loaded(
        model=load.model,
        memory_bytes=memory_used() - before,
        load_s=time.monotonic() - began,
        context=context,
        slots=slots,
        kernels_compiled=programs.compiled() - compiled_before,
    )
    return LoadedModel(Batcher(graphs, vocabulary), graphs, loaded)


def _uploads(model: str, progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: progress(LoadProgress(model=model, stage="upload", done=done, total=total))


def memory_needed(config: DecoderConfig, weights: int, slots: int, context: int, on_cpu: bool) -> int:
    """Weights, caches and the steps' intermediates, in bytes of the device."""
    length = cache_length(context)
    weights += 2 * config.blocks * config.experts * config.embedding  # routers are float32
    steps = sum(
        4 * rows * (2 * config.heads * length + 4 * config.embedding + config.qkv + config.inner)
        + 4 * logits_rows(rows, slots) * config.vocabulary
        for rows in bucket_sizes(slots, on_cpu)
    )
    return weights + config.cache_bytes(slots, length) + steps


def check_memory(model: str, need: int, limit: int, available: int) -> None:
    """Raises LoadError `out_of_memory` with the arithmetic. A limit or availability of 0 is unknown."""
    used = memory_used()
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
    gc.collect()
    allocator = Device[Device.DEFAULT].allocator
    if hasattr(allocator, "free_cache"):
        allocator.free_cache()
    return before - memory_used()
