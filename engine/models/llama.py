"""The llama family: RMSNorm, rotary positions on neighbouring pairs, grouped queries, SwiGLU.

SmolLM2, Llama 2 and 3, TinyLlama, Mistral as llama.cpp writes them (`general.architecture` = llama). Mixtures of
experts and rotary scalings other than Llama 3's factors are refused. Names as in `engine.kernels`: R rows, H heads,
G key/value heads, D head dimension, C cache length; E embedding, F feed-forward, V vocabulary, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from engine import kernels
from engine.errors import LoadError
from engine.gguf import Gguf, bad_file
from engine.weights import MATRIX, Weights, upload

CACHE = dtypes.float16


@dataclass(frozen=True)
class LlamaConfig:
    """What the file says of the model's shape."""

    blocks: int
    embedding: int
    feed_forward: int
    heads: int
    groups: int
    width: int  # of one head
    vocabulary: int
    epsilon: float
    rope_base: float
    context_max: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.groups) * self.width

    def weights_bytes(self, tied: bool) -> int:
        """Of the device, matrices in float16."""
        block = self.embedding * (self.qkv + self.heads * self.width + 3 * self.feed_forward)
        ends = self.embedding * self.vocabulary * (1 if tied else 2)
        return (self.blocks * block + ends) * int(MATRIX.itemsize)

    def cache_bytes(self, slots: int, length: int) -> int:
        """Keys and values of all slots."""
        return 2 * self.blocks * slots * self.groups * length * self.width * int(CACHE.itemsize)


def read_config(gguf: Gguf) -> LlamaConfig:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    if gguf.integer("llama.expert_count", 0):
        raise LoadError(
            "unsupported_architecture", f"{gguf.path} is a mixture of experts, which is not built"
        )
    scaling = gguf.text("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise LoadError("unsupported_architecture", f"{gguf.path} has rotary scaling {scaling!r}: not built")
    heads, embedding = gguf.integer("llama.attention.head_count"), gguf.integer("llama.embedding_length")
    config = LlamaConfig(
        blocks=gguf.integer("llama.block_count"),
        embedding=embedding,
        feed_forward=gguf.integer("llama.feed_forward_length"),
        heads=heads,
        groups=gguf.integer("llama.attention.head_count_kv", heads),
        width=gguf.integer("llama.attention.key_length", embedding // max(heads, 1)),
        vocabulary=len(gguf.metadata.get("tokenizer.ggml.tokens", [])),
        epsilon=gguf.number("llama.attention.layer_norm_rms_epsilon"),
        rope_base=gguf.number("llama.rope.freq_base", 10_000.0),
        context_max=gguf.integer("llama.context_length"),
    )
    sizes = (
        config.blocks,
        config.embedding,
        config.feed_forward,
        config.heads,
        config.groups,
        config.vocabulary,
    )
    if min(sizes) < 1 or config.width < 2 or config.width % 2 or config.heads % config.groups:
        raise bad_file(gguf.path, f"its sizes make no sense: {config}")
    if gguf.integer("llama.rope.dimension_count", config.width) != config.width:
        raise LoadError("unsupported_architecture", f"{gguf.path} rotates only part of a head: not built")
    return config


@dataclass
class _Block:
    qkv: Tensor  # [(H + 2 G) D, E], the attention's norm folded in
    output: Tensor  # [E, H D]
    gate_up: Tensor  # [2 F, E], the feed-forward's norm folded in
    down: Tensor  # [E, F]
    cache: Tensor  # [2, S, G, C, D]


class Llama:
    """A loaded model: weights, the slots' caches and one step's computation."""

    def __init__(self, config: LlamaConfig, weights: Weights, slots: int, length: int, threads: int) -> None:
        """Reads every tensor. `length` is C. Raises LoadError, MemoryError or OSError when memory is short."""
        self.config, self.slots, self.length = config, slots, length
        self._threads = threads
        self._blocks = [self._load_block(weights, index) for index in range(config.blocks)]
        self._norm = weights.vector("output_norm.weight", config.embedding)
        self._embedding = weights.matrix("token_embd.weight", config.vocabulary, config.embedding)
        self._output = self._embedding
        if weights.has("output.weight"):
            self._output = weights.matrix("output.weight", config.vocabulary, config.embedding)
        factors = np.ones(config.width // 2, dtype=np.float64)
        if weights.has("rope_freqs.weight"):
            factors = weights.vector("rope_freqs.weight", config.width // 2).numpy().astype(np.float64)
        weights.finish()
        pairs = np.arange(0, config.width, 2, dtype=np.float64) / config.width
        angles = np.arange(length, dtype=np.float64)[:, None] / (config.rope_base**pairs * factors)[None, :]
        self._angles = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)

    def _load_block(self, weights: Weights, index: int) -> _Block:
        c, name = self.config, f"blk.{index}."
        attention_norm = weights.vector(name + "attn_norm.weight", c.embedding)
        feed_forward_norm = weights.vector(name + "ffn_norm.weight", c.embedding)
        queries, keys = (c.heads * c.width, c.embedding), (c.groups * c.width, c.embedding)
        inner = (c.feed_forward, c.embedding)
        shape = (2, self.slots, c.groups, self.length, c.width)
        return _Block(
            qkv=weights.stacked(
                [(f"{name}attn_{part}.weight", keys if part != "q" else queries) for part in "qkv"],
                columns=attention_norm,
            ),
            output=weights.matrix(name + "attn_output.weight", c.embedding, c.heads * c.width),
            gate_up=weights.stacked(
                [(name + "ffn_gate.weight", inner), (name + "ffn_up.weight", inner)],
                columns=feed_forward_norm,
            ),
            down=weights.matrix(name + "ffn_down.weight", c.embedding, c.feed_forward),
            # zeros, because a masked position still takes part with weight 0, and 0 x NaN is NaN
            cache=upload(np.zeros(shape, dtype=np.float16)),
        )

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Cosines and sines of these positions, [2, R, D / 2]."""
        return np.ascontiguousarray(self._angles[:, positions])

    def forward(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, angles: Tensor, wanted: Tensor, length: UOp
    ) -> Tensor:
        """One step. tokens, slots, positions [R]; angles [2, R, D / 2]; `wanted` [L]: the rows whose logits
        are asked for; `length` bound to at least max(positions) + 1. -> logits [L, V]."""
        c = self.config
        x = kernels.gather_rows(self._embedding, tokens)
        for block in self._blocks:
            qkv = self._matmul(x, block.qkv, scale=kernels.inverse_norm(x, c.epsilon))
            cache = kernels.write_cache(block.cache, qkv, angles, slots, positions, c.heads)
            queries = kernels.rotate_queries(qkv, angles, c.heads, c.width)
            mixed = kernels.attention(queries, cache, slots, positions, length)
            x = self._matmul(mixed, block.output, residual=x)
            inner = self._matmul(x, block.gate_up, scale=kernels.inverse_norm(x, c.epsilon))
            x = self._matmul(kernels.gated(inner), block.down, residual=x)
        x = kernels.gather_rows(x, wanted)
        scale = kernels.inverse_norm(x, c.epsilon)
        return self._matmul(kernels.scale_columns(x, self._norm), self._output, scale=scale)

    def _matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return kernels.matmul(x, weight, scale=scale, residual=residual, threads=self._threads)
