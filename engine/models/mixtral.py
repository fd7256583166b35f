"""Mixtral: Mistral with a mixture of experts as its feed-forward.

llama.cpp writes it as architecture llama with an expert count, all experts of a block as one tensor; older files, and
folders, have a tensor for each.
"""

from __future__ import annotations

from engine.files.gguf import Gguf
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import llama, reading
from engine.models.decoder import DecoderConfig

ARCHITECTURE = llama.ARCHITECTURE
MODEL_TYPE = "mixtral"
_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate": "block_sparse_moe.experts.{}.w1",
    "ffn_down": "block_sparse_moe.experts.{}.w2",
    "ffn_up": "block_sparse_moe.experts.{}.w3",
}


def spelled(name: str) -> str:
    """A tensor's name in a folder."""
    return reading.spelled(name, **_NAMES)


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    config = reading.from_gguf(gguf, ARCHITECTURE, Rotation())
    count, used = (gguf.integer(f"llama.expert_{key}") for key in ("count", "used_count"))
    return reading.mixture(gguf.path, config, count, used, config.feed_forward)


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "silu")
    config = reading.from_folder(folder)
    count, used = folder.integer("num_local_experts"), folder.integer("num_experts_per_tok")
    return reading.mixture(folder.path, config, count, used, config.feed_forward)
