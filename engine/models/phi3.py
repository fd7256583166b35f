"""Phi-3 (also Phi-3.5 and Phi-4): queries, keys and values as one tensor, gate and up as another, maybe LongRoPE.

LongRoPE has two sets of rotary factors, for contexts up to the original length and beyond. Which one is used is
decided once, by the context that a slot is given, because cached keys cannot be turned again; so it is in llama.cpp,
where transformers decides by the length that a text has reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import reading
from engine.models.decoder import DecoderConfig, Layer

ARCHITECTURE = "phi3"
MODEL_TYPE = "phi3"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_NAMES = {"ffn_up": "mlp.gate_up_proj"}


def spelled(name: str) -> str:
    """A tensor's name in a folder."""
    return reading.spelled(name, **_NAMES)


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    config = replace(reading.from_gguf(gguf, ARCHITECTURE, Rotation(halves=True)), qkv_fused=True)
    window = reading.seen(gguf.path, gguf.integer("phi3.attention.sliding_window", 0))
    config = replace(config, layers=(Layer(window=window),) * config.blocks)
    if not {LONG, SHORT} <= gguf.tensors.keys():
        return config
    original = gguf.integer("phi3.rope.scaling.original_context_length")
    factors = gguf.floats(LONG if min(context, config.context_max) > original else SHORT)
    config = replace(config, consumed=frozenset({LONG, SHORT}))
    magnitude = gguf.number("phi3.rope.scaling.attn_factor", 1.0)
    return _long_rope(gguf.path, config, factors, magnitude)


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "silu")
    config = replace(reading.from_folder(folder), qkv_fused=True)
    numbers: Mapping[str, Any] = {**folder.mapping("rope_scaling"), **folder.mapping("rope_parameters")}
    part = numbers.get("partial_rotary_factor", folder.config.get("partial_rotary_factor", 1.0))
    rotated = int(config.width * min(1.0, reading.positive(folder.path, part)))
    config = reading.partly_rotated(folder.path, config, rotated)
    if numbers.get("rope_type", numbers.get("type", "default")) == "default":
        return config
    original = folder.integer(
        "original_max_position_embeddings", numbers.get("original_max_position_embeddings")
    )
    longer = min(context, config.context_max) > original
    factors = numbers.get("long_factor" if longer else "short_factor")
    if not isinstance(factors, list) or original < 2:
        raise bad_file(folder.path, "config.json lacks its rotary factors")
    scale = max(1.0, config.context_max / original)
    magnitude = numbers.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(scale) / math.log(original))
    return _long_rope(folder.path, config, factors, magnitude)


def _long_rope(path: Path, config: DecoderConfig, factors: Any, magnitude: object) -> DecoderConfig:
    rotated = config.rotation.rotated or config.width
    if len(factors) != rotated // 2:
        raise bad_file(path, f"it has {len(factors)} rotary factors instead of {rotated // 2}")
    divisors = tuple(reading.positive(path, factor) for factor in factors)
    rope = replace(config.ropes[0], divisors=divisors, magnitude=reading.positive(path, magnitude))
    return replace(config, ropes=(rope,))
