"""An independent llama forward pass in numpy float32: what the engine's tokens are compared with.

Shares nothing with the engine but the GGUF header reader; decodes blocks by the format's description.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.files import gguf as gguf_file


def _half(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view("<f2").astype("f4")


def _decode(raw: np.ndarray, kind: int) -> np.ndarray:
    if kind == 0:
        return raw.view("<f4")
    if kind == 3:  # Q4_1: scale, minimum, 16 bytes: low nibbles first
        blocks = raw.reshape(-1, 20)
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype("f4")
        return (nibbles * _half(blocks[:, :2]) + _half(blocks[:, 2:4])).reshape(-1)
    if kind == 6:  # Q5_0: scale, 32 fifth bits, 16 bytes: low nibbles first
        blocks = raw.reshape(-1, 22)
        high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
        nibbles = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1)
        return (((nibbles | high).astype("f4") - 16) * _half(blocks[:, :2])).reshape(-1)
    if kind == 8:  # Q8_0: scale, 32 signed bytes
        blocks = raw.reshape(-1, 34)
        return (blocks[:, 2:].view(np.int8).astype("f4") * _half(blocks[:, :2])).reshape(-1)
    if kind == 12:
        return _decode_q4_k(raw.reshape(-1, 144))
    if kind == 14:
        return _decode_q6_k(raw.reshape(-1, 210))
    raise ValueError(f"ggml type {kind}")


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    """Scale, least, 8 pairs of 6-bit scales and minimums in 12 bytes, 128 bytes: 4 times 32 low, 32 high nibbles."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | (first >> 6) << 4], axis=1).astype("f4")
    leasts = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], axis=1).astype("f4")
    quarters = blocks[:, 16:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(-1, 8, 32).astype("f4")
    scales, leasts = scales * _half(blocks[:, :2]), leasts * _half(blocks[:, 2:4])
    return (nibbles * scales[:, :, None] - leasts[:, :, None]).reshape(-1)


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    """128 bytes of low nibbles, 64 of upper pairs of bits, 16 signed scales, a scale; two halves of 128 values."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)  # [blocks, half, quarter, 32]
    pairs = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    values = (nibbles | pairs << 4).reshape(-1, 16, 16).astype("f4") - 32
    scales = blocks[:, 192:208].view(np.int8).astype("f4") * _half(blocks[:, 208:])
    return (values * scales[:, :, None]).reshape(-1)


def weights(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A file's metadata, and its tensors in float32."""
    header = gguf_file.read(path)
    data = np.fromfile(path, dtype=np.uint8)
    return header.metadata, {
        info.name: _decode(data[info.offset : info.offset + info.size], info.kind).reshape(info.shape)
        for info in header.tensors.values()
    }


class Reference:
    """The whole model in memory; every call computes every position anew."""

    def __init__(self, path: Path) -> None:
        self.meta, self.w = weights(path)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the last position."""
        m, w = self.meta, self.w
        heads, groups = m["llama.attention.head_count"], m["llama.attention.head_count_kv"]
        epsilon = m["llama.attention.layer_norm_rms_epsilon"]
        x = w["token_embd.weight"][tokens]
        count, width = len(tokens), x.shape[1] // heads
        frequency = m["llama.rope.freq_base"] ** (-np.arange(0, width, 2) / width)
        angle = np.arange(count)[:, None] * frequency
        cos, sin = np.cos(angle)[:, None].astype("f4"), np.sin(angle)[:, None].astype("f4")

        def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight

        def rotate(x: np.ndarray) -> np.ndarray:
            even, odd = x[..., 0::2], x[..., 1::2]
            return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

        for block in range(m["llama.block_count"]):
            p = f"blk.{block}."
            h = norm(x, w[p + "attn_norm.weight"])
            q = rotate((h @ w[p + "attn_q.weight"].T).reshape(count, heads, width))
            k = rotate((h @ w[p + "attn_k.weight"].T).reshape(count, groups, width))
            v = (h @ w[p + "attn_v.weight"].T).reshape(count, groups, width)
            k, v = (np.repeat(t, heads // groups, axis=1) for t in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) / float(
                np.sqrt(width)
            )  # a numpy scalar would make it all float64
            scores += np.triu(np.full((count, count), -np.inf, dtype="f4"), 1)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(count, -1)
            x = x + mixed @ w[p + "attn_output.weight"].T
            h = norm(x, w[p + "ffn_norm.weight"])
            gate, up = h @ w[p + "ffn_gate.weight"].T, h @ w[p + "ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "ffn_down.weight"].T
        last = norm(x[-1:], w["output_norm.weight"])
        out = w.get("output.weight", w["token_embd.weight"])
        return (last @ out.T)[0]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        given = list(tokens)
        for _ in range(count):
            given.append(int(self.logits(given).argmax()))
        return given[len(tokens) :]
