"""An independent llama forward pass in numpy float32: what the engine's tokens are compared with.

Shares nothing with the engine but the GGUF header reader; decodes F32, Q4_1 and Q8_0 by the format's description.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine import gguf as gguf_file


def _decode(raw: np.ndarray, kind: int) -> np.ndarray:
    if kind == 0:
        return raw.view("<f4")
    if kind == 3:  # Q4_1: scale, minimum, 16 bytes: low nibbles first
        blocks = raw.reshape(-1, 20)
        scale, least = (blocks[:, a : a + 2].copy().view("<f2").astype("f4") for a in (0, 2))
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype("f4")
        return (nibbles * scale + least).reshape(-1)
    if kind == 8:  # Q8_0: scale, 32 signed bytes
        blocks = raw.reshape(-1, 34)
        scale = blocks[:, :2].copy().view("<f2").astype("f4")
        return (blocks[:, 2:].view(np.int8).astype("f4") * scale).reshape(-1)
    raise ValueError(f"ggml type {kind}")


class Reference:
    """The whole model in memory; every call computes every position anew."""

    def __init__(self, path: Path) -> None:
        header = gguf_file.read(path)
        data = np.fromfile(path, dtype=np.uint8)
        self.w: dict[str, np.ndarray] = {
            info.name: _decode(data[info.offset : info.offset + info.size], info.kind).reshape(info.shape)
            for info in header.tensors.values()
        }
        self.meta: dict[str, Any] = header.metadata

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
