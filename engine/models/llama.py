"""The llama family: RMSNorm, rotary positions, grouped queries, SwiGLU. SmolLM2, Llama 2 and 3, TinyLlama.

As llama.cpp writes it (`general.architecture` = llama) queries and keys are permuted so that neighbours are pairs; such
a file may also be a Mistral. Llama 3's rotary factors are a tensor there and computed from config.json in a folder.
"""

from __future__ import annotations

from dataclasses import replace

from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import reading
from engine.models.decoder import DecoderConfig

ARCHITECTURE = "llama"
MODEL_TYPE = "llama"
FACTORS = "rope_freqs.weight"

spelled = reading.spelled


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    config = reading.from_gguf(gguf, ARCHITECTURE, Rotation())
    if gguf.integer("llama.expert_count", 0):
        raise reading.refused(gguf.path, "is a mixture of experts, whose family is mixtral and not this one")
    if FACTORS not in gguf.tensors:
        return config
    factors = gguf.floats(FACTORS)
    if len(factors) != config.width // 2:
        raise bad_file(gguf.path, f"tensor {FACTORS!r} has {len(factors)} elements")
    rope = replace(config.ropes[0], divisors=tuple(reading.positive(gguf.path, factor) for factor in factors))
    return replace(config, ropes=(rope,), consumed=frozenset({FACTORS}))


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "silu")
    return reading.from_folder(folder)
