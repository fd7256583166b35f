"""An independent Gemma 3 forward pass in numpy float32, as `tests.engine.reference` is for llama.

By the description of the architecture: https://arxiv.org/abs/2503.19786 and transformers' modeling_gemma3.py.

texts/gemma3-greedy.json has what it computes with Gemma 3 270M in Q4_K_M, minutes of work: each prompt's tokens and the
likeliest ones after it. `.venv/bin/python -m tests.engine.gemma_reference MODEL` writes it anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from engine.files import gguf
from engine.text import tokenizer
from tests.engine.reference import weights

TEXTS = Path(__file__).parent / "texts"
GREEDY = TEXTS / "gemma3-greedy.json"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "To bake bread you first need",
    "def add(a, b):",
)
SHORT, LONG = 16, 6  # tokens that follow
LONG_PROMPT = 560  # tokens: beyond the window of 512
LOCAL_BASE = 10_000.0
GLOBAL_EVERY = 6


class GemmaReference:
    """The whole model in memory (1 GB for 270M); every call computes every position anew."""

    def __init__(self, path: Path) -> None:
        self.meta, self.w = weights(path)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """The file's weights have the 1 of Gemma's `1 + weight` already."""
        epsilon = self.meta["gemma3.attention.layer_norm_rms_epsilon"]
        normed: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * self.w[name + ".weight"]
        return normed

    def _attention(self, h: np.ndarray, block: int) -> np.ndarray:
        m, p, count = self.meta, f"blk.{block}.", len(h)
        heads, groups = m["gemma3.attention.head_count"], m["gemma3.attention.head_count_kv"]
        width, window = m["gemma3.attention.key_length"], m["gemma3.attention.sliding_window"]
        local = (block + 1) % GLOBAL_EVERY != 0
        base = LOCAL_BASE if local else m["gemma3.rope.freq_base"]
        angle = np.arange(count)[:, None] * base ** (-np.arange(0, width, 2) / width)
        cos, sin = np.cos(angle)[:, None].astype("f4"), np.sin(angle)[:, None].astype("f4")

        def rotate(x: np.ndarray) -> np.ndarray:
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        q, k, v = (h @ self.w[f"{p}attn_{name}.weight"].T for name in "qkv")
        q = rotate(self._norm(q.reshape(count, heads, width), p + "attn_q_norm"))
        k = rotate(self._norm(k.reshape(count, groups, width), p + "attn_k_norm"))
        k, v = (np.repeat(t.reshape(count, groups, width), heads // groups, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / float(np.sqrt(width))
        distance = np.arange(count)[:, None] - np.arange(count)
        seen = (distance >= 0) & (distance < window if local else True)
        scores = np.where(seen, scores, np.float32(-np.inf))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, v).reshape(count, -1)
        out: np.ndarray = mixed @ self.w[p + "attn_output.weight"].T
        return out

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the last position."""
        table = self.w["token_embd.weight"]
        x = table[tokens] * np.float32(table.shape[1] ** 0.5)
        for block in range(self.meta["gemma3.block_count"]):
            p = f"blk.{block}."
            mixed = self._attention(self._norm(x, p + "attn_norm"), block)
            x = x + self._norm(mixed, p + "post_attention_norm")
            h = self._norm(x, p + "ffn_norm")
            gate, up = (h @ self.w[f"{p}ffn_{name}.weight"].T for name in ("gate", "up"))
            gelu = 0.5 * gate * (1 + np.tanh(float(np.sqrt(2 / np.pi)) * (gate + 0.044715 * gate**3)))
            x = x + self._norm((gelu * up) @ self.w[p + "ffn_down.weight"].T, p + "post_ffw_norm")
        out: np.ndarray = self._norm(x[-1], "output_norm") @ table.T
        return out

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        given = list(tokens)
        for _ in range(count):
            given.append(int(self.logits(given).argmax()))
        return given[len(tokens) :]


def main() -> None:
    path = Path(sys.argv[1])
    vocabulary = tokenizer.from_gguf(gguf.read(path))
    prompts = [(vocabulary.encode(prompt), SHORT) for prompt in PROMPTS]
    prompts.append((vocabulary.encode((TEXTS / "alice.txt").read_text())[:LONG_PROMPT], LONG))
    model = GemmaReference(path)
    made = [{"prompt": prompt, "greedy": model.greedy(prompt, count)} for prompt, count in prompts]
    GREEDY.write_text("[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n")


if __name__ == "__main__":
    main()
