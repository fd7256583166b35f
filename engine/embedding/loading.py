"""Loading a model that computes embeddings: an encoder, or a decoder whose logits are not wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor
from tinygrad.dtype import DType
from tinygrad.uop.ops import UOp

from engine.checkpoint import open_checkpoint
from engine.embedding.batcher import EmbeddingBatcher
from engine.embedding.pooling import Pooling, read_pooling
from engine.embedding.states import StatesModel, bucket_sizes
from engine.embedding.text import TextEncoder, read_text_encoder
from engine.errors import LoadError
from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder
from engine.graphs import cache_length
from engine.kernels.weights import MATRIX, Progress, Weights, weights_bytes
from engine.models import Family, check_family, read_config
from engine.models.decoder import Decoder, DecoderConfig
from engine.models.encoder import Encoder, EncoderConfig

_HEADS = ("output.weight", "lm_head.weight")  # of a decoder, which embeddings do not use


class DecoderStates:
    """A Decoder's states for `StatesModel`: it takes a text in pieces, and each token sees those before it."""

    whole = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.slots, self.length = decoder.slots, decoder.length
        self.half, self.ropes = decoder.config.width // 2, len(decoder.config.ropes)
        self.embedding = decoder.config.embedding

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        return self._decoder.angles(positions)

    def states(
        self,
        tokens: Tensor,
        slots: Tensor,
        positions: Tensor,
        ends: Tensor,
        angles: Sequence[Tensor],
        length: UOp,
    ) -> Tensor:
        return self._decoder.states(tokens, slots, positions, angles, length)


@dataclass(frozen=True)
class EmbeddingFiles:
    """A model's files, read and checked; nothing is on the device yet."""

    checkpoint: Gguf | Folder
    family: Family
    config: DecoderConfig | EncoderConfig
    encoder: TextEncoder
    pooling: Pooling
    slots: int
    context: int

    @classmethod
    def read(cls, path: str, family_name: str, slots: int, context: int) -> EmbeddingFiles:
        """Raises LoadError."""
        checkpoint = open_checkpoint(path)
        family = check_family(checkpoint, family_name)
        config = read_config(checkpoint, family, context)
        pooling, encoder = read_pooling(checkpoint), read_text_encoder(checkpoint)
        if encoder.tokens > config.vocabulary:
            raise bad_file(path, f"it has {encoder.tokens} tokens and vectors for {config.vocabulary}")
        if isinstance(config, DecoderConfig):
            # no output matrix: that of the input stands where one would be
            config = replace(config, tied=True, consumed=config.consumed | frozenset(_HEADS))
            if pooling.mode == "cls":
                raise LoadError("unsupported_architecture", f"{path} pools by a token that sees no other")
        around = len(encoder.before) + len(encoder.after)
        if slots < 1 or context <= around:
            raise LoadError("bad_parameters", f"{slots} slots of {context} tokens make no sense")
        longest = min(config.context_max, pooling.tokens_max or config.context_max)
        if longest <= around:
            raise bad_file(path, f"it takes texts of {longest} tokens, {around} of them special")
        context = min(context, longest)
        return cls(checkpoint, family, config, encoder, pooling, slots, context)

    def memory_needed(self, on_cpu: bool) -> int:
        """Weights, caches and the steps' intermediates, in bytes of the device."""
        c, length = self.config, cache_length(self.context)
        need = weights_bytes(self.checkpoint)
        for rows in bucket_sizes(self.context, isinstance(c, EncoderConfig), on_cpu):
            if isinstance(c, EncoderConfig):
                need += c.step_bytes(rows, length)
            else:
                need += 4 * rows * (2 * c.heads * length + 5 * c.embedding + c.qkv + c.inner)
        return need + (
            c.cache_bytes(length) if isinstance(c, EncoderConfig) else c.cache_bytes(self.slots, length)
        )

    def upload(self, progress: Progress, threads: int, on_cpu: bool, matrices: DType = MATRIX) -> StatesModel:
        """The model on the device, no graph captured yet. Raises LoadError, MemoryError, OSError."""
        length = cache_length(self.context)
        with Weights(self.checkpoint, progress, self._spelled, matrices) as weights:
            network: Encoder | DecoderStates
            if isinstance(self.config, EncoderConfig):
                network = Encoder(self.config, weights, length, threads)
            else:
                network = DecoderStates(Decoder(self.config, weights, self.slots, length, threads))
        return StatesModel(network, self.slots, self.context, on_cpu)

    def batcher(self, model: StatesModel) -> EmbeddingBatcher:
        return EmbeddingBatcher(model, self.encoder, self.pooling)

    def _spelled(self, name: str) -> str:
        if isinstance(self.checkpoint, Gguf):
            return name
        name = self.family.spelled(name)
        if isinstance(self.config, EncoderConfig):
            return self.config.prefix + name
        # a decoder saved without its head has its names without the head's prefix
        bare = name.removeprefix("model.")
        return bare if bare in self.checkpoint.tensors else name
