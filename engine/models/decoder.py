"""What all decoder families share: their configuration, their tensors on the device, one step's computation.

A family's file says how its file describes a model; everything else is here. Names as in
`engine.kernels.transformer`: R rows, H heads, G key/value heads, D head dimension, C cache length; E embedding,
F feed-forward, V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tinygrad import Device, Tensor
from tinygrad.uop.ops import UOp

from engine.errors import LoadError
from engine.kernels import experts, transformer
from engine.kernels.matrices import Matrix
from engine.kernels.recording import copied
from engine.kernels.sharing import Share, added, shares, side_by_side
from engine.kernels.transformer import HeadNorm, Normed, Rotation
from engine.kernels.weights import MATRIX, Piece, Weights, array_dtype, upload


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


class _Shard:
    """What one device holds of a model and computes of a step."""

    def __init__(
        self, config: DecoderConfig, share: Share, weights: Weights, slots: int, length: int, threads: int
    ) -> None:
        """Reads its share of every tensor. `length` is C."""
        group = config.heads // config.groups
        groups = share.groups[1] - share.groups[0]
        self.share = share
        self._whole = config
        self.config = replace(
            config,
            heads=groups * group,
            groups=groups,
            feed_forward=share.feed_forward[1] - share.feed_forward[0],
        )
        self._threads = threads
        weights.device = share.device
        self._cache = (2, slots, groups, length, config.width)
        self.blocks = [self._load_block(weights, index) for index in range(config.blocks)]
        self._norm = self._norm_of(weights, "output_norm", config.embedding)
        ends = (config.vocabulary, config.embedding)
        self._embedding = weights.matrix("token_embd.weight", *ends, rows=share.vocabulary)
        self._output = self._embedding
        if not config.tied:
            self._output = weights.matrix("output.weight", *ends, rows=share.vocabulary)

    # ------------------------------------------------------------ loading

    def _norm_of(self, weights: Weights, name: str, size: int) -> Tensor:
        loaded = weights.vector(name + ".weight", size)
        offset = self.config.norm_offset
        return upload(loaded.numpy() + np.float32(offset), self.share.device) if offset else loaded

    def _load_block(self, weights: Weights, index: int) -> _Block:
        c, name = self.config, f"blk.{index}."

        def norm(wanted: bool, part: str, size: int) -> Tensor | None:
            return self._norm_of(weights, name + part, size) if wanted else None

        return _Block(
            attention_norm=self._norm_of(weights, name + "attn_norm", c.embedding),
            qkv=weights.stacked(self._qkv_parts(name)),
            bias=self._load_bias(weights, name) if c.qkv_bias else None,
            query_norm=norm(c.head_norms, "attn_q_norm", c.width),
            key_norm=norm(c.head_norms, "attn_k_norm", c.width),
            output=weights.matrix(
                name + "attn_output.weight",
                c.embedding,
                self._whole.heads * c.width,
                columns=self._heads()["q"][1],
            ),
            attention_post=norm(c.post_norms, "post_attention_norm", c.embedding),
            feed_forward_norm=self._norm_of(weights, name + "ffn_norm", c.embedding),
            feed_forward=(self._load_mixture if c.experts else self._load_dense)(weights, name),
            feed_forward_post=norm(c.post_norms, "post_ffw_norm", c.embedding),
            # zeros, because a masked position still takes part with weight 0, and 0 x NaN is NaN
            cache=upload(np.zeros(self._cache, dtype=array_dtype(weights.matrices)), self.share.device),
        )

    def _heads(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Of queries, keys and values: how many outputs the whole model has, and which of them are here."""
        whole, width = self._whole, self._whole.width
        keys = self.share.groups[0] * width, self.share.groups[1] * width
        group = whole.heads // whole.groups
        sizes = {"q": whole.heads * width, "k": whole.groups * width, "v": whole.groups * width}
        return {
            name: (size, (keys[0] * group, keys[1] * group) if name == "q" else keys)
            for name, size in sizes.items()
        }

    def _qkv_parts(self, name: str) -> list[Piece]:
        c, parts, top = self._whole, [], 0
        for part, (size, (first, last)) in self._heads().items():
            if c.qkv_fused:
                rows = (top + first, top + last)
                parts.append(Piece(name + "attn_qkv.weight", (c.qkv, c.embedding), rows))
            else:
                parts.append(Piece(f"{name}attn_{part}.weight", (size, c.embedding), (first, last)))
            top += size
        return parts

    def _load_bias(self, weights: Weights, name: str) -> Tensor:
        found = [
            weights.vector(f"{name}attn_{part}.bias", size).numpy()[first:last]
            for part, (size, (first, last)) in self._heads().items()
        ]
        return upload(np.concatenate(found), self.share.device)

    def _load_dense(self, weights: Weights, name: str) -> _Dense:
        c, (first, last) = self._whole, self.share.feed_forward
        inner = (c.feed_forward, c.embedding)
        parts = [Piece(f"{name}ffn_{part}.weight", inner, (first, last)) for part in ("gate", "up")]
        if c.qkv_fused:
            fused = name + "ffn_up.weight", (2 * c.feed_forward, c.embedding)
            parts = [Piece(*fused, (first + top, last + top)) for top in (0, c.feed_forward)]
        down = name + "ffn_down.weight"
        return _Dense(
            gate_up=weights.stacked(parts),
            down=weights.matrix(down, c.embedding, c.feed_forward, columns=(first, last)),
        )

    def _load_mixture(self, weights: Weights, name: str) -> _Mixture:
        c, inner = self._whole, self.share.feed_forward

        def below(part: str, *shape: int, **share: tuple[int, int]) -> Matrix:
            """A file has all experts' matrices as one tensor, or one tensor for each."""
            if weights.has(f"{name}{part}_exps.weight"):
                return weights.matrix(f"{name}{part}_exps.weight", c.experts, *shape, **share)
            names = (f"{name}{part}.{expert}.weight" for expert in range(c.experts))
            found = weights.stacked([Piece(each, shape, **share) for each in names])
            if len(found.parts) > 1:
                text = f"the experts' {name}{part} are of different kinds: not built"
                raise LoadError("unsupported_quantisation", text)
            return found

        return _Mixture(
            router=weights.precise(name + "ffn_gate_inp.weight", c.experts, c.embedding),
            gate=below("ffn_gate", c.feed_forward, c.embedding, rows=inner),
            up=below("ffn_up", c.feed_forward, c.embedding, rows=inner),
            down=below("ffn_down", c.embedding, c.feed_forward, columns=inner),
        )

    # ------------------------------------------------------------ steps

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [R] -> [R, E]; zero where a token is another device's."""
        whole = self.share.vocabulary == (0, self._whole.vocabulary)
        share = None if whole else self.share.vocabulary
        return transformer.gather_rows(self._embedding, tokens, self.config.embedding_scale, share)

    def attend(self, x: Tensor, index: int, rows: _Rows) -> Tensor:
        """A block's attention, [R, E]: a partial sum, in which the first device includes `x` if no norm follows."""
        c, block, layer = self.config, self.blocks[index], self.config.layers[index]
        angles = rows.angles[layer.rope]
        qkv = self._matmul(transformer.normed(x, block.attention_norm, c.epsilon), block.qkv, bias=block.bias)
        keys_norm = queries_norm = None
        if block.query_norm is not None and block.key_norm is not None:
            inverse = transformer.inverse_head_norms(qkv, c.heads + c.groups, c.width, c.epsilon)
            keys_norm, queries_norm = HeadNorm(inverse, block.key_norm), HeadNorm(inverse, block.query_norm)
        cache = transformer.write_cache(
            block.cache, qkv, angles, rows.slots, rows.positions, c.heads, c.rotation, keys_norm
        )
        queries = transformer.rotate_queries(
            qkv, angles, c.heads, c.width, c.query_scale, c.rotation, queries_norm
        )
        mixed = transformer.attention(
            queries, cache, rows.slots, rows.positions, rows.length, layer.window, self._threads
        )
        return self._matmul(mixed, block.output, residual=self._residual(x, block.attention_post))

    def feed_forward(self, x: Tensor, index: int) -> Tensor:
        """A block's feed-forward, [R, E], as `attend`."""
        c, block, part = self.config, self.blocks[index], self.blocks[index].feed_forward
        normed = transformer.normed(x, block.feed_forward_norm, c.epsilon)
        residual = self._residual(x, block.feed_forward_post)
        if isinstance(part, _Mixture):
            chosen, weights = experts.choose(transformer.matmul(normed, part.router), c.experts_used)
            inner = experts.expand(normed, part.gate, part.up, chosen, c.experts, self._threads)
            return experts.contract(inner, part.down, chosen, weights, residual, c.experts, self._threads)
        inner = transformer.gated(self._matmul(normed, part.gate_up), c.gelu, self._threads)
        return self._matmul(inner, part.down, residual=residual)

    def settle(self, x: Tensor, total: Tensor, norm: Tensor | None) -> Tensor:
        """The stream after a block's half whose sum is `total`."""
        if norm is None:
            return total
        return transformer.add_normed(x, total, transformer.inverse_norm(total, self.config.epsilon), norm)

    def normed(self, x: Tensor) -> Normed:
        """What logits are made of."""
        return transformer.normed(x, self._norm, self.config.epsilon)

    def logits(self, x: Tensor) -> Tensor:
        """Of this device's share of the vocabulary."""
        return self._matmul(self.normed(x), self._output)

    def _residual(self, x: Tensor, norm: Tensor | None) -> Tensor | None:
        return x if self.share.first and norm is None else None

    def _matmul(
        self, x: Tensor | Normed, weight: Matrix, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return transformer.matmul(x, weight, bias=bias, residual=residual, threads=self._threads)


@dataclass(frozen=True)
class _Rows:
    """A step's inputs on one device."""

    slots: Tensor
    positions: Tensor
    angles: tuple[Tensor, ...]
    length: UOp

    def on(self, device: str) -> _Rows:
        angles = tuple(copied(each, device) for each in self.angles)
        return _Rows(copied(self.slots, device), copied(self.positions, device), angles, self.length)


class Decoder:
    """A loaded model on one device or several: weights, the slots' caches and one step's computation."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        slots: int,
        length: int,
        threads: int,
        devices: Sequence[str] = (),
    ) -> None:
        """Reads every tensor. `length` is C; no devices are the default one.

        Raises LoadError, MemoryError or OSError when memory is short.
        """
        self.config, self.slots, self.length = config, slots, length
        weights.consume(config.consumed)
        devices = tuple(devices) or (Device.DEFAULT,)
        blocks = {weights.block(_down(config, weights, block)) for block in range(config.blocks)}
        cut = shares(devices, config.groups, config.feed_forward, config.vocabulary, max(blocks))
        self._shards = [_Shard(config, share, weights, slots, length, threads) for share in cut]
        weights.finish()
        self._table = np.stack([_angles(rope, config, length) for rope in config.ropes])

    @property
    def caches(self) -> list[Tensor]:
        """Keys and values of each block, [2, S, G, C, D]: each slot's whole context, also behind a window.

        Of several devices each has some of the G.
        """
        return [block.cache for shard in self._shards for block in shard.blocks]

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Cosines and sines of these positions for each rope, [ropes, 2, R, D / 2]."""
        return np.ascontiguousarray(self._table[:, :, positions])

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
        logits are asked for; `length` bound to at least max(positions) + 1. -> logits [L, V].

        Inputs are on the first device, and so is what comes out."""
        logits = []
        stream = self._through_blocks(tokens, _Rows(slots, positions, tuple(angles), length))
        for shard, x in zip(self._shards, stream, strict=True):
            logits.append(shard.logits(transformer.gather_rows(x, copied(wanted, shard.share.device))))
        return side_by_side(logits)

    def states(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, angles: Sequence[Tensor], length: UOp
    ) -> Tensor:
        """As `forward`, but instead of logits what they are made of, of every row: normed, [R, E]."""
        first, *_ = self._through_blocks(tokens, _Rows(slots, positions, tuple(angles), length))
        return self._shards[0].normed(first).applied()

    def _through_blocks(self, tokens: Tensor, rows: _Rows) -> list[Tensor]:
        """The stream [R, E] behind the last block, on each device."""
        shards = self._shards
        given = [rows.on(shard.share.device) for shard in shards]
        stream = added([shard.embed(copied(tokens, shard.share.device)) for shard in shards])
        for index in range(self.config.blocks):
            halves = [
                shard.attend(x, index, each) for shard, x, each in zip(shards, stream, given, strict=True)
            ]
            stream = [
                shard.settle(x, total, shard.blocks[index].attention_post)
                for shard, x, total in zip(shards, stream, added(halves), strict=True)
            ]
            halves = [shard.feed_forward(x, index) for shard, x in zip(shards, stream, strict=True)]
            stream = [
                shard.settle(x, total, shard.blocks[index].feed_forward_post)
                for shard, x, total in zip(shards, stream, added(halves), strict=True)
            ]
        return stream


def _down(config: DecoderConfig, weights: Weights, block: int) -> str:
    """A matrix behind the feed-forward's inner width, as the file names it."""
    name = f"blk.{block}.ffn_down"
    if not config.experts:
        return name + ".weight"
    return name + ("_exps.weight" if weights.has(name + "_exps.weight") else ".0.weight")


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
