"""Mistral: llama with, in its first version, a window of positions that every layer sees.

llama.cpp writes it as architecture llama, and its window not at all: up to the window's length the same is computed.
"""

from __future__ import annotations

from engine.files.safetensors import Folder
from engine.models import llama, reading
from engine.models.decoder import DecoderConfig

ARCHITECTURE = llama.ARCHITECTURE
MODEL_TYPE = "mistral"

spelled = reading.spelled
from_gguf = llama.from_gguf


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    reading.activation(folder, "silu")
    return reading.from_folder(folder)
