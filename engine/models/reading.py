"""What the families have in common when they read a model's configuration, from either format.

A family's file calls `from_gguf` or `from_folder` and changes what is peculiar to it. What a configuration may ask for
and is not built here (other rotary scalings, soft-capped logits) is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import LoadError
from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.kernels.transformer import Rotation
from engine.models.decoder import DecoderConfig, Layer, Rope

BLOCKS_MAX = 512
SIZE_MAX = 1 << 30  # of anything a configuration counts
WIDTH_MAX = 1 << 16  # of one head
PARAMETER_MAX = 1e30  # of a rotary base or factor, and 1 over the smallest: their products are numbers, too

# GGUF's name -> Hugging Face's, of what most families share; within a block and outside of one
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
END_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def spelled(name: str, **changes: str) -> str:
    """A tensor's name as a folder has it. `changes` are a family's own `BLOCK_NAMES`."""
    head, _, rest = name.partition(".")
    if head != "blk":
        return f"{END_NAMES[head]}.{rest}"
    index, part, *expert, kind = rest.split(".")
    found = (BLOCK_NAMES | changes).get(part, part)
    return f"model.layers.{index}.{found.format(*expert)}.{kind}"


def refused(what: object, why: str) -> LoadError:
    """The error of a model that is sound and needs what is not built."""
    return LoadError("unsupported_architecture", f"{what} {why}: not built")


# ---------------------------------------------------------------- GGUF


def from_gguf(gguf: Gguf, architecture: str, rotation: Rotation) -> DecoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    a = architecture
    heads, embedding = gguf.integer(f"{a}.attention.head_count"), gguf.integer(f"{a}.embedding_length")
    width = gguf.integer(f"{a}.attention.key_length", embedding // max(heads, 1))
    if gguf.integer(f"{a}.attention.value_length", width) != width:
        raise refused(gguf.path, "has values wider or narrower than its keys")
    blocks = gguf.integer(f"{a}.block_count")
    _check_blocks(gguf.path, blocks)
    config = DecoderConfig(
        layers=(Layer(),) * blocks,
        ropes=(_gguf_rope(gguf, a),),
        embedding=embedding,
        feed_forward=gguf.integer(f"{a}.feed_forward_length"),
        heads=heads,
        groups=gguf.integer(f"{a}.attention.head_count_kv", heads),
        width=width,
        vocabulary=vocabulary_size(gguf),
        epsilon=gguf.number(f"{a}.attention.layer_norm_rms_epsilon"),
        context_max=gguf.integer(f"{a}.context_length"),
        rotation=rotation,
        tied="output.weight" not in gguf.tensors,
        query_scale=max(width, 1) ** -0.5,
    )
    rotated = gguf.integer(f"{a}.rope.dimension_count", width)
    return checked(gguf.path, partly_rotated(gguf.path, config, rotated))


def vocabulary_size(gguf: Gguf) -> int:
    """How many tokens the file has. Raises LoadError."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise bad_file(gguf.path, "its tokens are no list")
    return len(tokens)


def _gguf_rope(gguf: Gguf, a: str) -> Rope:
    base = positive(gguf.path, gguf.number(f"{a}.rope.freq_base", 10_000.0))
    kind = gguf.text(f"{a}.rope.scaling.type", "none")
    if kind == "linear":
        return Rope(base, divisors=(positive(gguf.path, gguf.number(f"{a}.rope.scaling.factor")),))
    if kind not in (
        "none",
        "longrope",
    ):  # longrope's factors are tensors, which a family reads or leaves over
        raise refused(gguf.path, f"has rotary scaling {kind!r}")
    return Rope(base)


# ---------------------------------------------------------------- folders


def from_folder(folder: Folder, tied: bool = False) -> DecoderConfig:
    """`tied` is what the family takes an absent `tie_word_embeddings` for. Raises LoadError as `from_gguf` does."""
    heads, embedding = folder.integer("num_attention_heads"), folder.integer("hidden_size")
    width = folder.integer("head_dim", embedding // max(heads, 1))
    blocks = folder.integer("num_hidden_layers")
    _check_blocks(folder.path, blocks)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "quantization_config"):
        if folder.config.get(key):
            raise refused(folder.path, f"has {key}")
    tied = folder.flag("tie_word_embeddings", tied)
    rotary = {
        name
        for name in folder.tensors
        if name.endswith(".rotary_emb.inv_freq")  # old files have them; they follow from the base
    }
    config = DecoderConfig(
        layers=_folder_layers(folder, blocks),
        ropes=(folder_rope(folder, folder.mapping("rope_parameters")),),
        embedding=embedding,
        feed_forward=folder.integer("intermediate_size"),
        heads=heads,
        groups=folder.integer("num_key_value_heads", heads),
        width=width,
        vocabulary=folder.integer("vocab_size"),
        epsilon=folder.number("rms_norm_eps"),
        context_max=folder.integer("max_position_embeddings"),
        rotation=Rotation(halves=True),
        tied=tied,
        query_scale=max(width, 1) ** -0.5,
        consumed=frozenset(rotary | ({"lm_head.weight"} if tied else set())),
    )
    return checked(folder.path, config)


def activation(folder: Folder, wanted: str, *keys: str) -> None:
    """Raises LoadError unless the feed-forward's function is the one that the family has."""
    for key in keys or ("hidden_act",):
        found = folder.config.get(key, wanted)
        if found != wanted:
            raise refused(folder.path, f"has {key} {found!r} instead of {wanted!r}")


def _folder_layers(folder: Folder, blocks: int) -> tuple[Layer, ...]:
    """Windows: every layer's, or those that `layer_types` names."""
    window = folder.integer("sliding_window", 0) if folder.flag("use_sliding_window", True) else 0
    kinds = folder.config.get("layer_types")
    if not seen(folder.path, window):
        return (Layer(),) * blocks
    if (
        kinds is None and "max_window_layers" in folder.config
    ):  # Qwen before `layer_types`: only layers from it on
        first = folder.integer("max_window_layers")
        kinds = ["full_attention"] * min(first, blocks) + ["sliding_attention"] * max(0, blocks - first)
    if kinds is None:
        return (Layer(window=window),) * blocks
    if not isinstance(kinds, list) or len(kinds) != blocks:
        raise bad_file(folder.path, f"its layer_types are not {blocks}")
    unknown = {str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}
    if unknown:
        raise refused(folder.path, f"has layers of type {', '.join(sorted(unknown))}")
    return tuple(Layer(window=window if kind == "sliding_attention" else 0) for kind in kinds)


def folder_rope(folder: Folder, parameters: Mapping[str, Any], base: float = 10_000.0) -> Rope:
    """From `rope_parameters`, or `rope_theta` and `rope_scaling` as they were before. Raises LoadError."""
    numbers = dict(folder.mapping("rope_scaling")) | dict(parameters)
    numbers.setdefault("rope_theta", folder.config.get("rope_theta", base))
    kind = numbers.get("rope_type", numbers.get("type", "default"))
    theta = positive(folder.path, numbers["rope_theta"])
    if kind in ("default", "longrope", "su"):  # longrope's factors are the family's to read
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, divisors=(positive(folder.path, numbers.get("factor")),))
    if kind == "llama3":
        return Rope(theta, divisors=_llama3_divisors(folder, theta, numbers))
    raise refused(folder.path, f"has rotary scaling {kind!r}")


def _llama3_divisors(folder: Folder, theta: float, numbers: Mapping[str, Any]) -> tuple[float, ...]:
    """Long waves are divided by the factor, short ones not, and between them smoothly. As Llama 3.1 has it."""
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (positive(folder.path, numbers.get(key)) for key in keys)
    heads = folder.integer("num_attention_heads")
    width = folder.integer("head_dim", folder.integer("hidden_size") // max(heads, 1))
    if high <= low or width > WIDTH_MAX:
        raise bad_file(folder.path, "its rotary factors make no sense")
    divisors = []
    for j in range(width // 2):
        turns = original * theta ** (-2 * j / width) / (2 * math.pi)  # within the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


# ---------------------------------------------------------------- both


def partly_rotated(path: Path | str, config: DecoderConfig, rotated: int) -> DecoderConfig:
    """With only the first elements of each head turned."""
    if rotated == config.width:
        return config
    if rotated < 2 or rotated % 2 or rotated > config.width:
        raise bad_file(path, f"it rotates {rotated} of {config.width} elements of a head")
    return replace(config, rotation=replace(config.rotation, rotated=rotated))


def mixture(
    path: Path | str, config: DecoderConfig, count: int, used: int, feed_forward: int
) -> DecoderConfig:
    """With experts instead of one feed-forward."""
    if not 1 <= used <= count <= 4096 or feed_forward < 1:
        raise bad_file(path, f"it uses {used} of {count} experts of size {feed_forward}")
    return replace(config, experts=count, experts_used=used, feed_forward=feed_forward)


def positive(path: Path | str, value: object) -> float:
    """Raises LoadError unless it is a number over 0, not so small or large that nothing can be computed with it."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 1 / PARAMETER_MAX <= number <= PARAMETER_MAX:
        raise bad_file(path, f"a rotary parameter is {str(value)[:40]}")
    return float(number)


def seen(path: Path | str, window: int) -> int:
    """A window's positions, 0 for all. Raises LoadError unless it can be one."""
    if not 0 <= window <= SIZE_MAX:
        raise bad_file(path, f"it has a window of {str(window)[:40]}")
    return window


def checked(path: Path | str, config: DecoderConfig) -> DecoderConfig:
    """Raises LoadError when the sizes make no sense."""
    c = config
    sizes = (c.blocks, c.embedding, c.feed_forward, c.heads, c.groups, c.vocabulary, c.context_max)
    odd = not 2 <= c.width <= WIDTH_MAX or c.width % 2 or not 0 <= c.epsilon < 1
    if min(sizes) < 1 or max(sizes) > SIZE_MAX or odd or c.heads % c.groups:
        raise bad_file(path, f"its sizes make no sense: {config}")
    return config


def _check_blocks(path: Path | str, blocks: int) -> None:
    if not 1 <= blocks <= BLOCKS_MAX:
        raise bad_file(path, f"it has {blocks} blocks")
