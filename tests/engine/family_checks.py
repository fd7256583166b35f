"""A script, DEV given: `python -m tests.engine.family_checks OUT` computes every fixture's logits in every way.

A process of its own, because tinygrad takes its device from the environment once, and one for all families, because
they share kernels. OUT gets one JSON object: "family/format/numbers" -> what was measured, or an error.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import dtypes

from engine.batching.batcher import Row
from engine.checkpoint import open_checkpoint
from engine.files import gguf
from engine.graphs import GraphedModel, cache_length
from engine.kernels.transformer import Rotation
from engine.kernels.weights import MATRIX, Weights
from engine.models import check_family, read_config
from engine.models.decoder import Decoder, DecoderConfig, Layer, Rope
from tests.engine import small_gguf
from tests.engine.devices import open_suites

FIXTURES = Path(__file__).parent / "families"
# fixture -> (family, context)
CASES = {
    "llama": ("llama", 128),
    "llama3": ("llama", 128),
    "mistral": ("mistral", 128),
    "mistral-window": ("mistral", 128),
    "mixtral": ("mixtral", 128),
    "qwen2": ("qwen2", 128),
    "qwen3": ("qwen3", 128),
    "qwen3moe": ("qwen3moe", 128),
    "gemma3": ("gemma3", 128),
    "phi3": ("phi3", 128),
    "phi4": ("phi3", 128),
    "phi3-long": ("phi3", 128),
    "phi3-short": ("phi3", 64),
}
FORMATS = {"gguf": "model.gguf", "folder": "."}
SLOTS = 3
SIZES = [1, 4, 32]
INNER = (0, 7, 20, 33)


# What would be wrong if a family's file forgot it -> (fixture, the configuration without it)
BROKEN: dict[str, tuple[str, Callable[[DecoderConfig], DecoderConfig]]] = {
    "pairs of neighbours": ("llama", lambda c: replace(c, rotation=Rotation())),
    "rotary factors": ("llama3", lambda c: replace(c, ropes=(Rope(c.ropes[0].base),))),
    "rotary base": ("mixtral", lambda c: replace(c, ropes=(Rope(10_000.0),))),
    "window": ("mistral-window", lambda c: replace(c, layers=(Layer(),) * c.blocks)),
    "window one longer": ("mistral-window", lambda c: replace(c, layers=(Layer(window=9),) * c.blocks)),
    "experts": ("qwen3moe", lambda c: replace(c, experts_used=c.experts_used - 1)),
    "norm offset": ("gemma3", lambda c: replace(c, norm_offset=0.0)),
    "embedding scale": ("gemma3", lambda c: replace(c, embedding_scale=1.0)),
    "query scale": ("gemma3", lambda c: replace(c, query_scale=c.query_scale * 1.1)),
    "gelu": ("gemma3", lambda c: replace(c, gelu=False)),
    "local rope": ("gemma3", lambda c: replace(c, ropes=(c.ropes[0], c.ropes[0]))),
    "global layer": ("gemma3", lambda c: replace(c, layers=(c.layers[0],) * c.blocks)),
    "part of a head": ("phi4", lambda c: replace(c, rotation=Rotation(halves=True))),
    "long factors": ("phi3-long", lambda c: replace(c, ropes=(replace(c.ropes[0], divisors=()),))),
    "long magnitude": ("phi3-long", lambda c: replace(c, ropes=(replace(c.ropes[0], magnitude=1.0),))),
    "epsilon": ("qwen2", lambda c: replace(c, epsilon=1e-2)),
}


def load(
    fixture: str,
    file: str,
    matrices: Any,
    change: Callable[[DecoderConfig], DecoderConfig] = lambda c: c,
    devices: Sequence[str] = (),
    sizes: Sequence[int] = SIZES,
) -> GraphedModel:
    family_name, context = CASES[fixture]
    checkpoint = open_checkpoint(FIXTURES / fixture / file)
    family = check_family(checkpoint, family_name)
    config = change(read_config(checkpoint, family, context))
    spelled = family.spelled if file == "." else str
    with Weights(checkpoint, lambda done, total: None, spelled, matrices) as weights:
        model = Decoder(config, weights, SLOTS, cache_length(context), 1, devices)
    graphs = GraphedModel(model, SLOTS, context, on_cpu=True)
    graphs.sizes = list(sizes)
    for size in graphs.sizes:
        graphs.capture(size)
    return graphs


class Check:
    """One model beside its reference."""

    def __init__(self, model: GraphedModel, expected: dict[str, np.ndarray]) -> None:
        self.model, self.expected = model, expected
        self.worst: dict[str, float] = {}
        self.scale = float(expected["logits0"].std())

    def compare(self, way: str, got: np.ndarray, right: np.ndarray) -> None:
        """The largest difference of any logit, in standard deviations of the logits."""
        error = float(np.abs(got - right).max()) / self.scale
        self.worst[way] = max(self.worst.get(way, 0.0), error)

    def decode(
        self, way: str, slot: int, index: int, given: np.ndarray | None = None, first: int = 0
    ) -> list[int]:
        """Greedy from `first` on, its prompt being in the cache; the tokens."""
        prompt, right = self.expected[f"prompt{index}"], self.expected[f"logits{index}"]
        tokens = [int(right[first].argmax())] if given is None else [int(given.argmax())]
        for step in range(first, len(right) - 1):
            logits = self.model.step([Row(tokens[-1], slot, len(prompt) + step)], [0])[0]
            self.compare(way, logits, right[step + 1])
            tokens.append(int(logits.argmax()))
        return tokens[:-1]

    def prefill(self, way: str, slot: int, index: int, chunk: int, kept: int = 0) -> np.ndarray:
        """Of what comes after the first `kept` positions, which are in the cache."""
        prompt = self.expected[f"prompt{index}"]
        logits = np.zeros(0)
        for start in range(kept, len(prompt), chunk):
            rows = [Row(int(prompt[at]), slot, at) for at in range(start, min(start + chunk, len(prompt)))]
            logits = self.model.step(rows, [len(rows) - 1])[0]
        self.compare(way, logits, self.expected[f"logits{index}"][0])
        return logits

    def greedy_equal(self, tokens: list[int], index: int) -> bool:
        return tokens == self.expected[f"greedy{index}"].tolist()

    def run(self) -> dict[str, Any]:
        greedy = {}
        # a prompt in chunks of 32, of 7 and of 1, then decoding alone
        greedy["alone"] = self.greedy_equal(self.decode("decode", 0, 0, self.prefill("prefill", 0, 0, 32)), 0)
        self.inner(32)
        self.prefill("chunks of 7", 1, 0, 7)
        self.prefill("one by one", 2, 1, 1)
        greedy["batched"] = self.batched()
        # slots that others left: a shorter run where a longer one was, and the other way round
        greedy["churn"] = all(
            self.greedy_equal(
                self.decode("churn", slot, index, self.prefill("churn", slot, index, 32)), index
            )
            for slot, index in ((0, 1), (1, 2), (2, 0))
        )
        # the beginning of a prompt that an earlier run left in the slot, or that is copied from another slot
        half = len(self.expected["prompt0"]) // 2
        left = self.prefill("reused", 2, 0, 32, kept=half)
        greedy["reused"] = self.greedy_equal(self.decode("reused", 2, 0, left), 0)
        self.model.copy(2, 1, half)
        copied = self.prefill("copied", 1, 0, 32, kept=half)
        greedy["copied"] = self.greedy_equal(self.decode("copied", 1, 0, copied), 0)
        greedy["guessed"] = self.guessed(0, 1)
        return {"worst": self.worst, "greedy": greedy}

    def guessed(self, slot: int, index: int) -> bool:
        """Decoding with proposed tokens in the same step, one right and two wrong."""
        prompt, right = self.expected[f"prompt{index}"], self.expected[f"logits{index}"]
        best, vocabulary = right.argmax(-1), right.shape[1]
        tokens = [int(self.prefill("guessed", slot, index, 32).argmax())]
        for step in range(0, len(right) - 2, 2):
            guesses = [best[step + 1], *((best[step + 2] + off) % vocabulary for off in (1, 2))]
            given = [tokens[-1], *map(int, guesses)]
            rows = [Row(token, slot, len(prompt) + step + at) for at, token in enumerate(given)]
            logits = self.model.step(rows, range(4))
            self.compare("guessed", logits[:2], right[step + 1 : step + 3])
            tokens += logits[:2].argmax(-1).tolist()
        return tokens == best[: len(tokens)].tolist()

    def inner(self, chunk: int) -> None:
        """Logits of positions within the first prompt."""
        prompt = self.expected["prompt0"]
        for start in range(0, len(prompt), chunk):
            rows = [Row(int(prompt[at]), 1, at) for at in range(start, min(start + chunk, len(prompt)))]
            wanted = [at - start for at in INNER if start <= at < start + len(rows)]
            for at in range(0, len(wanted), SLOTS):
                some = wanted[at : at + SLOTS]
                logits = self.model.step(rows, some)
                right = [self.expected["inner"][INNER.index(start + each)] for each in some]
                self.compare("inner", logits, np.stack(right))

    def batched(self) -> bool:
        """All three prompts in the same steps, then decoded together."""
        prompts = [self.expected[f"prompt{index}"] for index in range(3)]
        last: dict[int, np.ndarray] = {}
        for start in range(0, max(map(len, prompts)), 10):
            rows, wanted, whose = [], [], []
            for slot, prompt in enumerate(prompts):
                for at in range(start, min(start + 10, len(prompt))):
                    rows.append(Row(int(prompt[at]), slot, at))
                    if at == len(prompt) - 1:
                        wanted.append(len(rows) - 1)
                        whose.append(slot)
            for slot, logits in zip(whose, self.model.step(rows, wanted), strict=True):
                self.compare("batched", logits, self.expected[f"logits{slot}"][0])
                last[slot] = logits
        tokens: list[list[int]] = [[int(last[slot].argmax())] for slot in range(3)]
        steps = len(self.expected["logits0"]) - 1
        for step in range(steps):
            rows = [Row(tokens[slot][-1], slot, len(prompts[slot]) + step) for slot in range(3)]
            logits = self.model.step(rows, [0, 1, 2])
            for slot in range(3):
                self.compare("batched", logits[slot], self.expected[f"logits{slot}"][step + 1])
                tokens[slot].append(int(logits[slot].argmax()))
        return all(self.greedy_equal(tokens[slot][:-1], slot) for slot in range(3))


def each_expert_apart(target: Path) -> str:
    """Mixtral's GGUF file as llama.cpp wrote it before 2024-04: each expert's matrices as tensors of their own."""
    whole = gguf.read(FIXTURES / "mixtral" / "model.gguf")
    data = whole.path.read_bytes()
    tensors: dict[str, Any] = {}
    for name, info in whole.tensors.items():
        parts, shape = {name: data[info.offset : info.offset + info.size]}, info.shape
        if "_exps." in name:
            size, shape = info.size // shape[0], shape[1:]
            apart = name.replace("_exps.", ".{}.")
            parts = {
                apart.format(expert): parts[name][expert * size : (expert + 1) * size]
                for expert in range(info.shape[0])
            }
        tensors |= {part: (shape[::-1], info.kind, raw) for part, raw in parts.items()}
    return str(small_gguf.write(target, whole.metadata, tensors))


def main(out: Path, only: list[str]) -> None:
    measured: dict[str, Any] = {}
    for fixture in only or CASES:
        expected = dict(np.load(FIXTURES / fixture / "expected.npz"))
        formats = dict(FORMATS)
        if fixture == "mixtral":
            formats["gguf, experts apart"] = each_expert_apart(out.with_suffix(".gguf"))
        for kind, file in formats.items():
            if (fixture, kind) == ("mistral-window", "gguf"):
                continue  # llama.cpp's converter drops the window
            # float32 shows that the computation is right, float16 what is served
            for numbers, matrices in (("float32", dtypes.float32), ("float16", MATRIX)):
                if (
                    numbers == "float32"
                    and kind != "folder"
                    and fixture not in ("llama", "gemma3", "phi3-long")
                ):
                    continue
                began = time.monotonic()
                name = f"{fixture}/{kind}/{numbers}"
                try:
                    model = load(fixture, file, matrices)
                    measured[name] = Check(model, expected).run()
                    model.free()
                except Exception as error:
                    measured[name] = {"error": f"{type(error).__name__}: {error}"}
                    traceback.print_exc()
                measured[name]["s"] = round(time.monotonic() - began, 2)
                if only:
                    print(name, json.dumps(measured[name]))
    measured["broken"] = {what: broken(*case) for what, case in BROKEN.items() if case[0] in (only or CASES)}
    out.write_text(json.dumps(measured))


def broken(fixture: str, change: Callable[[DecoderConfig], DecoderConfig]) -> float:
    """How far off the first prompt is with a peculiarity left out."""
    model = load(fixture, ".", dtypes.float32, change)
    check = Check(model, dict(np.load(FIXTURES / fixture / "expected.npz")))
    check.prefill("broken", 0, 0, 32)
    model.free()
    return check.worst["broken"]


if __name__ == "__main__":
    open_suites()
    main(Path(sys.argv[1]), sys.argv[2:])
