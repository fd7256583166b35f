"""BERT and MiniLM: encoders that see a whole text at once, with learned positions and LayerNorm after each part."""

from __future__ import annotations

from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.models.encoder import EncoderConfig
from engine.models.reading import BLOCKS_MAX, SIZE_MAX, activation, refused, vocabulary_size

ARCHITECTURE = "bert"
MODEL_TYPE = "bert"

# GGUF's name -> Hugging Face's, within a block and outside of one
_BLOCK_NAMES = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_END_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
_PREFIX = "bert."  # of every name where the folder is of a model with a head
# what embeddings do not use: a classifier's input, and the head that guesses masked words
_ENDS_UNUSED = ("pooler.", "cls.")


def spelled(name: str) -> str:
    """A tensor's name in a folder of the bare model."""
    head, _, rest = name.partition(".")
    if head != "blk":
        return f"{_END_NAMES[head]}.{rest}"
    index, part, kind = rest.split(".")
    return f"encoder.layer.{index}.{_BLOCK_NAMES[part]}.{kind}"


def from_gguf(gguf: Gguf, context: int) -> EncoderConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    if gguf.metadata.get("bert.attention.causal", False):
        raise refused(gguf.path, "is a BERT that looks back only")
    config = EncoderConfig(
        blocks=gguf.integer("bert.block_count"),
        embedding=gguf.integer("bert.embedding_length"),
        feed_forward=gguf.integer("bert.feed_forward_length"),
        heads=gguf.integer("bert.attention.head_count"),
        vocabulary=vocabulary_size(gguf),
        types=gguf.integer("tokenizer.ggml.token_type_count", 2),
        epsilon=gguf.number("bert.attention.layer_norm_epsilon"),
        context_max=gguf.integer("bert.context_length"),
    )
    return _checked(gguf, config)


def from_folder(folder: Folder, context: int) -> EncoderConfig:
    """Raises LoadError as `from_gguf` does."""
    activation(folder, "gelu")
    if folder.config.get("position_embedding_type", "absolute") != "absolute":
        raise refused(folder.path, f"has positions of type {folder.config['position_embedding_type']!r}")
    if folder.config.get("is_decoder") or folder.config.get("quantization_config"):
        raise refused(folder.path, "is a decoder or quantised")
    prefix = _PREFIX if _PREFIX + spelled("token_embd.weight") in folder.tensors else ""
    unused = {name for name in folder.tensors if name.removeprefix(prefix).startswith(_ENDS_UNUSED)}
    config = EncoderConfig(
        blocks=folder.integer("num_hidden_layers"),
        embedding=folder.integer("hidden_size"),
        feed_forward=folder.integer("intermediate_size"),
        heads=folder.integer("num_attention_heads"),
        vocabulary=folder.integer("vocab_size"),
        types=folder.integer("type_vocab_size", 2),
        epsilon=folder.number("layer_norm_eps", 1e-12),
        context_max=folder.integer("max_position_embeddings"),
        prefix=prefix,
        consumed=frozenset(unused),
    )
    return _checked(folder, config)


def _checked(checkpoint: Gguf | Folder, config: EncoderConfig) -> EncoderConfig:
    c = config
    sizes = (c.blocks, c.embedding, c.feed_forward, c.heads, c.vocabulary, c.types, c.context_max)
    odd = min(sizes) < 1 or max(sizes) > SIZE_MAX or not 0 <= c.epsilon < 1 or c.blocks > BLOCKS_MAX
    if odd or c.embedding % (2 * c.heads):
        raise bad_file(checkpoint.path, f"its sizes make no sense: {config}")
    return config
