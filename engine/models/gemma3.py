"""Gemma 3, text only: norms before and after each part, GeGLU, scaled embeddings, and windows in five layers of six.

Windowed layers have a rotary base of their own. Its norms multiply by 1 + weight: a GGUF file has the 1 added, a
folder does not.
"""

from __future__ import annotations

from dataclasses import replace

from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models import reading
from engine.models.decoder import DecoderConfig, Layer, Rope

ARCHITECTURE = "gemma3"
MODEL_TYPE = "gemma3_text"
PATTERN = 6  # one layer in so many sees every position
LOCAL_BASE = 10_000.0
BLOCKS_27B = 62  # whose queries are scaled by another width than a head's, which its GGUF file does not say
_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def spelled(name: str) -> str:
    """A tensor's name in a folder."""
    return reading.spelled(name, **_NAMES)


def from_gguf(gguf: Gguf, context: int) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    config = _common(reading.from_gguf(gguf, ARCHITECTURE, Rotation(halves=True)))
    if gguf.number("gemma3.final_logit_softcapping", 0.0):
        raise reading.refused(gguf.path, "soft-caps its logits")
    window = reading.seen(gguf.path, gguf.integer("gemma3.attention.sliding_window", 0))
    pattern = gguf.integer("gemma3.attention.sliding_window_pattern", PATTERN)
    if pattern < 1:
        raise bad_file(gguf.path, f"it has windows in a pattern of {pattern}")
    local = Rope(reading.positive(gguf.path, gguf.number("gemma3.rope.freq_base_swa", LOCAL_BASE)))
    if config.blocks == BLOCKS_27B:
        config = replace(config, query_scale=(config.embedding // config.heads) ** -0.5)
    layers = tuple(Layer(window=window if (index + 1) % pattern else 0) for index in range(config.blocks))
    return _with_local(replace(config, layers=layers), local)


def from_folder(folder: Folder, context: int) -> DecoderConfig:
    """Raises LoadError as `from_gguf` does."""
    reading.activation(folder, "gelu_pytorch_tanh", "hidden_activation")
    if folder.flag("use_bidirectional_attention", False):
        raise reading.refused(folder.path, "looks ahead (use_bidirectional_attention)")
    config = _common(reading.from_folder(_with_defaults(folder), tied=True))
    ropes = folder.mapping("rope_parameters")
    whole, local = ropes.get("full_attention", {}), ropes.get("sliding_attention", {})
    if not isinstance(whole, dict) or not isinstance(local, dict):
        raise bad_file(folder.path, "its rope_parameters are not those of a Gemma 3")
    base = folder.number("rope_local_base_freq", LOCAL_BASE)
    scalar = reading.positive(folder.path, folder.number("query_pre_attn_scalar", 256))
    config = replace(
        config,
        ropes=(reading.folder_rope(folder, whole, 1_000_000.0),),
        query_scale=scalar**-0.5,
        norm_offset=1.0,
    )
    return _with_local(config, Rope(reading.positive(folder.path, local.get("rope_theta", base))))


def _common(config: DecoderConfig) -> DecoderConfig:
    scale = config.embedding**0.5
    return replace(config, head_norms=True, post_norms=True, gelu=True, embedding_scale=scale)


def _with_local(config: DecoderConfig, local: Rope) -> DecoderConfig:
    """Windowed layers turn by the local rope."""
    layers = tuple(replace(layer, rope=1 if layer.window else 0) for layer in config.layers)
    return replace(config, layers=layers, ropes=(config.ropes[0], local))


def _with_defaults(folder: Folder) -> Folder:
    """What published configurations leave out, and the ropes, which are read apart."""
    blocks = folder.integer("num_hidden_layers")
    pattern = folder.integer("sliding_window_pattern", folder.integer("_sliding_window_pattern", PATTERN))
    if not 1 <= blocks <= reading.BLOCKS_MAX or pattern < 1:
        raise bad_file(folder.path, f"it has {blocks} blocks in a pattern of {pattern}")
    kinds = ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(blocks)]
    defaults = {
        "layer_types": kinds,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    }
    present = {key: value for key, value in folder.config.items() if value is not None}
    return replace(folder, config=defaults | present | {"rope_parameters": None, "rope_scaling": None})
