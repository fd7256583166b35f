"""What all decoder families share: their configuration, their tensors on the device, one step's computation.

A family's file says how its file describes a model; everything else is here. Names as in `engine.kernels`: R rows,
H heads, G key/value heads, D head dimension, C cache length; E embedding, F feed-forward, V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from engine import experts, kernels
from engine.kernels import HeadNorm, Normed, Rotation
from engine.matrices import Matrix
from engine.weights import MATRIX, Piece, Weights, array_dtype, upload


@dataclass(frozen=True)
class Rope:
    """A table of rotary angles: pair `j` of `d` turns by `base ** (-2 j / d) / divisors[j]` per position."""

    base: float
    divisors: tuple[float, ...] = ()  # () = 1
    magnitude: float = 1.0  # cosines and sines times this


@dataclass(frozen=True)
class Layer:
    """Where a block's attention differs from its neighbours'."""

    rope: int = 0  # index into the configuration's ropes
    window: int = 0  # positions that a row sees, its own included; 0 = all


@dataclass(frozen=True)
class DecoderConfig:
    """A model's shape and its family's peculiarities."""

    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    embedding: int
    feed_forward: int
    heads: int
    groups: int
    width: int  # of one head
    vocabulary: int
    epsilon: float
    context_max: int
    rotation: Rotation
    tied: bool  # the output matrix is the embedding's
    query_scale: float
    embedding_scale: float = 1.0
    norm_offset: float = 0.0  # added to every norm's weights
    qkv_fused: bool = False  # queries, keys and values are one tensor, gate and up another
    qkv_bias: bool = False
    head_norms: bool = False  # of queries and keys
    post_norms: bool = False  # of what attention and feed-forward give, before it is added
    gelu: bool = False  # instead of SiLU
    experts: int = 0
    experts_used: int = 0
    consumed: frozenset[str] = (
        frozenset()
    )  # tensors that the configuration itself was read from, or that say nothing

    @property
    def blocks(self) -> int:
        return len(self.layers)

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.groups) * self.width

    @property
    def inner(self) -> int:
        """The widest intermediate of one row's feed-forward."""
        return 3 * self.feed_forward * max(1, self.experts_used)

    def cache_bytes(self, slots: int, length: int) -> int:
        """Keys and values of all slots."""
        one = 2 * self.blocks * self.groups * self.width * int(MATRIX.itemsize)
        return slots * length * one


@dataclass
class _Block:
    attention_norm: Tensor  # [E]
    qkv: Matrix  # [(H + 2 G) D, E]
    bias: Tensor | None  # [(H + 2 G) D]
    query_norm: Tensor | None  # [D]
    key_norm: Tensor | None  # [D]
    output: Matrix  # [E, H D]
    attention_post: Tensor | None  # [E]
    feed_forward_norm: Tensor  # [E]
    feed_forward: _Dense | _Mixture
    feed_forward_post: Tensor | None  # [E]
    cache: Tensor  # [2, S, G, C, D]


@dataclass
class _Dense:
    gate_up: Matrix  # [2 F, E]
    down: Matrix  # [E, F]


@dataclass
class _Mixture:
    router: Matrix  # [X, E], float32: a rounded score would choose another expert
    gate: Matrix  # [X F, E]
    up: Matrix  # [X F, E]
    down: Matrix  # [X E, F]


class Decoder:
    """A loaded model: weights, the slots' caches and one step's computation."""

    def __init__(
        self, config: DecoderConfig, weights: Weights, slots: int, length: int, threads: int
    ) -> None:
        """Reads every tensor. `length` is C. Raises LoadError, MemoryError or OSError when memory is short."""
        self.config, self.slots, self.length = config, slots, length
        self._threads = threads
        weights.consume(config.consumed)
        self._blocks = [self._load_block(weights, index) for index in range(config.blocks)]
        self._norm = self._norm_of(weights, "output_norm", config.embedding)
        self._embedding = weights.matrix("token_embd.weight", config.vocabulary, config.embedding)
        self._output = self._embedding
        if not config.tied:
            self._output = weights.matrix("output.weight", config.vocabulary, config.embedding)
        weights.finish()
        self._angles = np.stack([_angles(rope, config, length) for rope in config.ropes])

    # ------------------------------------------------------------ loading

    def _norm_of(self, weights: Weights, name: str, size: int) -> Tensor:
        loaded = weights.vector(name + ".weight", size)
        offset = self.config.norm_offset
        return upload(loaded.numpy() + np.float32(offset)) if offset else loaded

    def _load_block(self, weights: Weights, index: int) -> _Block:
        c, name = self.config, f"blk.{index}."

        def norm(wanted: bool, part: str, size: int) -> Tensor | None:
            return self._norm_of(weights, name + part, size) if wanted else None

        sizes = {"q": c.heads * c.width, "k": c.groups * c.width, "v": c.groups * c.width}
        parts = [Piece(f"{name}attn_{part}.weight", (size, c.embedding)) for part, size in sizes.items()]
        if c.qkv_fused:
            parts = [Piece(name + "attn_qkv.weight", (c.qkv, c.embedding))]
        bias = None
        if c.qkv_bias:
            found = [weights.vector(f"{name}attn_{part}.bias", size).numpy() for part, size in sizes.items()]
            bias = upload(np.concatenate(found))
        cache = (2, self.slots, c.groups, self.length, c.width)
        return _Block(
            attention_norm=self._norm_of(weights, name + "attn_norm", c.embedding),
            qkv=weights.stacked(parts),
            bias=bias,
            query_norm=norm(c.head_norms, "attn_q_norm", c.width),
            key_norm=norm(c.head_norms, "attn_k_norm", c.width),
            output=weights.matrix(name + "attn_output.weight", c.embedding, c.heads * c.width),
            attention_post=norm(c.post_norms, "post_attention_norm", c.embedding),
            feed_forward_norm=self._norm_of(weights, name + "ffn_norm", c.embedding),
            feed_forward=(self._load_mixture if c.experts else self._load_dense)(weights, name),
            feed_forward_post=norm(c.post_norms, "post_ffw_norm", c.embedding),
            # zeros, because a masked position still takes part with weight 0, and 0 x NaN is NaN
            cache=upload(np.zeros(cache, dtype=array_dtype(weights.matrices))),
        )

    def _load_dense(self, weights: Weights, name: str) -> _Dense:
        c = self.config
        inner = (c.feed_forward, c.embedding)
        parts = [Piece(name + "ffn_gate.weight", inner), Piece(name + "ffn_up.weight", inner)]
        if c.qkv_fused:
            parts = [Piece(name + "ffn_up.weight", (2 * c.feed_forward, c.embedding))]
        return _Dense(
            gate_up=weights.stacked(parts),
            down=weights.matrix(name + "ffn_down.weight", c.embedding, c.feed_forward),
        )

    def _load_mixture(self, weights: Weights, name: str) -> _Mixture:
        c = self.config

        def below(part: str, rows: int, columns: int) -> Matrix:
            """A file has all experts' matrices as one tensor, or one tensor for each."""
            if weights.has(f"{name}{part}_exps.weight"):
                return weights.matrix(f"{name}{part}_exps.weight", c.experts, rows, columns)
            return weights.stacked(
                [Piece(f"{name}{part}.{expert}.weight", (rows, columns)) for expert in range(c.experts)]
            )

        return _Mixture(
            router=weights.precise(name + "ffn_gate_inp.weight", c.experts, c.embedding),
            gate=below("ffn_gate", c.feed_forward, c.embedding),
            up=below("ffn_up", c.feed_forward, c.embedding),
            down=below("ffn_down", c.embedding, c.feed_forward),
        )

    # ------------------------------------------------------------ steps

    @property
    def caches(self) -> list[Tensor]:
        """Keys and values of each block, [2, S, G, C, D]: each slot's whole context, also behind a window."""
        return [block.cache for block in self._blocks]

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Cosines and sines of these positions for each rope, [ropes, 2, R, D / 2]."""
        return np.ascontiguousarray(self._angles[:, :, positions])

    def forward(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        angles: Sequence[Tensor],
        wanted: Tensor,
        length: UOp,
    ) -> Tensor:
        """One step. tokens, slots, positions [R]; angles [2, R, D / 2] for each rope; `wanted` [L]: the rows whose
        logits are asked for; `length` bound to at least max(positions) + 1. -> logits [L, V]."""
        x = kernels.gather_rows(self._through_blocks(tokens, slots, positions, angles, length), wanted)
        return self._matmul(kernels.normed(x, self._norm, self.config.epsilon), self._output)

    def states(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, angles: Sequence[Tensor], length: UOp
    ) -> Tensor:
        """As `forward`, but instead of logits what they are made of, of every row: normed, [R, E]."""
        x = self._through_blocks(tokens, slots, positions, angles, length)
        return kernels.normed(x, self._norm, self.config.epsilon).applied()

    def _through_blocks(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, angles: Sequence[Tensor], length: UOp
    ) -> Tensor:
        x = kernels.gather_rows(self._embedding, tokens, self.config.embedding_scale)
        for block, layer in zip(self._blocks, self.config.layers, strict=True):
            x = self._attend(x, block, layer, slots, positions, angles[layer.rope], length)
            x = self._feed_forward(x, block)
        return x

    def _attend(
        self,
        x: Tensor,
        block: _Block,
        layer: Layer,
        slots: Tensor,
        positions: Tensor,
        angles: Tensor,
        length: UOp,
    ) -> Tensor:
        c = self.config
        qkv = self._matmul(kernels.normed(x, block.attention_norm, c.epsilon), block.qkv, bias=block.bias)
        keys_norm = queries_norm = None
        if block.query_norm is not None and block.key_norm is not None:
            inverse = kernels.inverse_head_norms(qkv, c.heads + c.groups, c.width, c.epsilon)
            keys_norm, queries_norm = HeadNorm(inverse, block.key_norm), HeadNorm(inverse, block.query_norm)
        cache = kernels.write_cache(
            block.cache, qkv, angles, slots, positions, c.heads, c.rotation, keys_norm
        )
        queries = kernels.rotate_queries(
            qkv, angles, c.heads, c.width, c.query_scale, c.rotation, queries_norm
        )
        mixed = kernels.attention(queries, cache, slots, positions, length, layer.window)
        if block.attention_post is None:
            return self._matmul(mixed, block.output, residual=x)
        return self._add_normed(x, self._matmul(mixed, block.output), block.attention_post)

    def _feed_forward(self, x: Tensor, block: _Block) -> Tensor:
        c, part = self.config, block.feed_forward
        normed = kernels.normed(x, block.feed_forward_norm, c.epsilon)
        if isinstance(part, _Mixture):
            chosen, shares = experts.choose(kernels.matmul(normed, part.router), c.experts_used)
            inner = experts.expand(normed, part.gate, part.up, chosen, c.experts)
            return experts.contract(inner, part.down, chosen, shares, x, c.experts)
        inner = kernels.gated(self._matmul(normed, part.gate_up), c.gelu)
        if block.feed_forward_post is None:
            return self._matmul(inner, part.down, residual=x)
        return self._add_normed(x, self._matmul(inner, part.down), block.feed_forward_post)

    def _add_normed(self, x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        return kernels.add_normed(x, out, kernels.inverse_norm(out, self.config.epsilon), weight)

    def _matmul(
        self, x: Tensor | Normed, weight: Matrix, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return kernels.matmul(x, weight, bias=bias, residual=residual, threads=self._threads)


def _angles(rope: Rope, config: DecoderConfig, length: int) -> npt.NDArray[np.float32]:
    """[2, C, D / 2]: cosines and sines; 1 and 0 for pairs that do not turn."""
    rotated = config.rotation.rotated or config.width
    pairs = np.arange(0, rotated, 2, dtype=np.float64) / rotated
    divisors = np.array(rope.divisors or 1.0, dtype=np.float64)
    angles = np.arange(length, dtype=np.float64)[:, None] / (rope.base**pairs * divisors)[None, :]
    table = np.zeros((2, length, config.width // 2), dtype=np.float32)
    table[0] = 1.0
    table[0, :, : rotated // 2] = np.cos(angles) * rope.magnitude
    table[1, :, : rotated // 2] = np.sin(angles) * rope.magnitude
    return table
