"""Qwen 3 with a mixture of experts as the feed-forward of every block."""

from __future__ import annotations

from dataclasses import replace

from engine.files.gguf import Gguf
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import reading
from engine.models.decoder import DecoderConfig

ARCHITECTURE = "qwen3moe"
MODEL_TYPE = "qwen3_moe"
_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.experts.{}.gate_proj",
    "ffn_down": "mlp.experts.{}.down_proj",
    "ffn_up": "mlp.experts.{}.up_proj",
}


def spelled(name: str) -> str:
    """A tensor's name in a folder."""
    return reading.spelled(name, **_NAMES)


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    config = replace(reading.from_gguf(gguf, ARCHITECTURE, Rotation(halves=True)), head_norms=True)
    keys = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    return reading.mixture(gguf.path, config, *(gguf.integer(f"{ARCHITECTURE}.{key}") for key in keys))


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "silu")
    if not folder.flag("norm_topk_prob", False):
        raise reading.refused(folder.path, "does not normalise its experts' shares (norm_topk_prob)")
    if folder.integer("decoder_sparse_step", 1) != 1 or folder.config.get("mlp_only_layers"):
        raise reading.refused(folder.path, "has blocks without experts among others with them")
    config = replace(reading.from_folder(folder), head_norms=True)
    count = folder.integer("num_experts", folder.integer("num_local_experts", 0))
    used, size = folder.integer("num_experts_per_tok"), folder.integer("moe_intermediate_size")
    return reading.mixture(folder.path, config, count, used, size)
