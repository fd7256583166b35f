"""Qwen 3: llama with an RMSNorm of each query and key head."""

from __future__ import annotations

from dataclasses import replace

from engine.files.gguf import Gguf
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import reading
from engine.models.decoder import DecoderConfig

ARCHITECTURE = "qwen3"
MODEL_TYPE = "qwen3"

spelled = reading.spelled


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    return replace(reading.from_gguf(gguf, ARCHITECTURE, Rotation(halves=True)), head_norms=True)


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "silu")
    return replace(reading.from_folder(folder), head_norms=True)
