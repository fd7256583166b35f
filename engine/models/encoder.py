"""What encoder families share: their configuration, their tensors on the device, one step's computation.

A step works on rows as a decoder's does: row `r` is one token of the text in slot `slots[r]` at position
`positions[r]`. All tokens of a text are in one step, and each sees all of them, up to `ends[r]`: the decoders' kernels
with another mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from engine.kernels import layer_norm, transformer
from engine.kernels.matrices import Matrix
from engine.kernels.weights import Weights, upload

SLOTS = 16  # texts in one step


@dataclass(frozen=True)
class EncoderConfig:
    """A model's shape."""

    blocks: int
    embedding: int
    feed_forward: int
    heads: int
    vocabulary: int
    types: int  # kinds of tokens ("sentence A"), of which a text has the first
    epsilon: float
    context_max: int
    prefix: str = ""  # of every tensor's name in the file
    consumed: frozenset[str] = frozenset()  # tensors that say nothing of embeddings

    @property
    def width(self) -> int:
        """Of one head."""
        return self.embedding // self.heads

    def cache_bytes(self, length: int) -> int:
        """Keys and values of one block: they live for a step, so the blocks share them."""
        return 2 * SLOTS * length * self.embedding * 4

    def step_bytes(self, rows: int, length: int) -> int:
        """What one step of so many rows holds beside them."""
        return 4 * rows * (2 * self.heads * length + 8 * self.embedding + 2 * self.feed_forward)


@dataclass
class _Norm:
    weight: Tensor  # [E]
    bias: Tensor  # [E]


@dataclass
class _Block:
    qkv: Matrix  # [3 E, E]
    qkv_bias: Tensor  # [3 E]
    output: Matrix  # [E, E]
    output_bias: Tensor  # [E]
    attention_norm: _Norm
    up: Matrix  # [F, E]
    up_bias: Tensor  # [F]
    down: Matrix  # [E, F]
    down_bias: Tensor  # [E]
    norm: _Norm


class Encoder:
    """A loaded model. `length` is C, the longest text and some padding."""

    whole = True  # a text is computed in one step

    def __init__(self, config: EncoderConfig, weights: Weights, length: int, threads: int) -> None:
        """Reads every tensor. Raises LoadError, MemoryError or OSError when memory is short."""
        self.config, self.slots, self.length = config, SLOTS, length
        self.embedding, self.half, self.ropes = config.embedding, config.width // 2, 1
        self._threads = threads
        c = config
        weights.consume(c.consumed)
        self._words = weights.matrix("token_embd.weight", c.vocabulary, c.embedding)
        positions = weights.vector("position_embd.weight", c.context_max, c.embedding).numpy()
        types = weights.vector("token_types.weight", c.types, c.embedding).numpy()
        table = np.zeros((length, c.embedding), dtype=np.float32)  # rows that pad a step are beyond the last
        known = min(length, c.context_max)
        table[:known] = positions[:known] + types[0]
        self._positions = upload(table)
        self._norm = self._norm_of(weights, "token_embd_norm")
        self._blocks = [self._load_block(weights, f"blk.{index}.") for index in range(c.blocks)]
        weights.finish()
        self._cache = upload(np.zeros((2, SLOTS, c.heads, length, c.width), dtype=np.float32))

    def _norm_of(self, weights: Weights, name: str) -> _Norm:
        size = self.config.embedding
        return _Norm(weights.vector(name + ".weight", size), weights.vector(name + ".bias", size))

    def _load_block(self, weights: Weights, name: str) -> _Block:
        e, f = self.config.embedding, self.config.feed_forward
        parts = [f"{name}attn_{part}" for part in "qkv"]
        biases = [weights.vector(part + ".bias", e).numpy() for part in parts]
        return _Block(
            qkv=weights.stacked([(part + ".weight", (e, e)) for part in parts]),
            qkv_bias=upload(np.concatenate(biases)),
            output=weights.matrix(name + "attn_output.weight", e, e),
            output_bias=weights.vector(name + "attn_output.bias", e),
            attention_norm=self._norm_of(weights, name + "attn_output_norm"),
            up=weights.matrix(name + "ffn_up.weight", f, e),
            up_bias=weights.vector(name + "ffn_up.bias", f),
            down=weights.matrix(name + "ffn_down.weight", e, f),
            down_bias=weights.vector(name + "ffn_down.bias", e),
            norm=self._norm_of(weights, name + "layer_output_norm"),
        )

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Heads are not turned: cosine 1 and sine 0, [1, 2, R, D / 2]."""
        turned = np.zeros((1, 2, len(positions), self.half), dtype=np.float32)
        turned[:, 0] = 1.0
        return turned

    def states(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        ends: Tensor,
        angles: Sequence[Tensor],
        length: UOp,
    ) -> Tensor:
        """One step. tokens, slots, positions, ends [R]; `length` bound to at least max(ends) + 1. -> [R, E]."""
        c = self.config
        x = layer_norm.add_rows(transformer.gather_rows(self._words, tokens), self._positions, positions)
        x = self._normed(x, self._norm)
        for block in self._blocks:
            qkv = self._matmul(x, block.qkv, block.qkv_bias)
            cache = transformer.write_cache(self._cache, qkv, angles[0], slots, positions, c.heads)
            queries = transformer.rotate_queries(qkv, angles[0], c.heads, c.width, c.width**-0.5)
            mixed = transformer.attention(queries, cache, slots, ends, length, threads=self._threads)
            x = self._normed(self._matmul(mixed, block.output, block.output_bias, x), block.attention_norm)
            inner = layer_norm.gelu(self._matmul(x, block.up, block.up_bias))
            x = self._normed(self._matmul(inner, block.down, block.down_bias, x), block.norm)
        return x

    def _normed(self, x: Tensor, norm: _Norm) -> Tensor:
        return layer_norm.layer_norm(x, norm.weight, norm.bias, self.config.epsilon)

    def _matmul(self, x: Tensor, weight: Matrix, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return transformer.matmul(x, weight, bias=bias, residual=residual, threads=self._threads)
