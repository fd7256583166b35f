"""A script: a real model by the engine's own parts on the suite's device, asked for what its protocol does not tell.

`python -m tests.engine.whole_model MODEL FAMILY` reads one JSON object from stdin and answers it:

    {"nll": [token, ...]}                          "nll": sum of -log p of every token but the first; "count"
    {"greedy": [[token, ...], ...], "tokens": n}   "greedy": n likeliest tokens after each prompt
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.conftest import DEVICE
from tests.engine.devices import environment, open_suites
from tests.engine.harness import REPOSITORY

ROWS = 16  # of a step, logits of all of them wanted: as many as there are slots
CONTEXT = 640  # of greedy texts
ANSWER_S = 900.0


def ask(model: Path, family: str, cache: Path, question: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own. `cache` is a private folder for compiled kernels. Raises RuntimeError."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.whole_model", str(model), family],
        cwd=REPOSITORY,
        env=environment(cache / "kernels.db"),
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


class Whole:
    """A loaded model and its first slot."""

    def __init__(self, path: str, family: str, context: int) -> None:
        from engine import device
        from engine.loading import load_model
        from engine.protocol import Load

        open_suites()
        load = Load(model="m", path=path, family=family, context=context, slots=ROWS)
        self.model: Any = load_model(load, ROWS, device.parse(DEVICE), 0, lambda _: None).graphs

    def logits(self, tokens: list[int], start: int = 0) -> np.ndarray:
        """[len(tokens), vocabulary] of tokens at `start` and after it, the earlier ones being in the cache."""
        from engine.batching.batcher import Row

        found = []
        for at in range(0, len(tokens), ROWS):
            rows = [Row(token, 0, start + at + place) for place, token in enumerate(tokens[at : at + ROWS])]
            found.append(self.model.step(rows, range(len(rows))).copy())
        return np.concatenate(found)

    def nll(self, tokens: list[int]) -> dict[str, Any]:
        total = 0.0
        for at in range(0, len(tokens) - 1, ROWS):
            part = tokens[at : min(at + ROWS, len(tokens) - 1)]
            logits = self.logits(part, at).astype(np.float64)
            best = logits.max(axis=1)
            sums = best + np.log(np.exp(logits - best[:, None]).sum(axis=1))
            following = tokens[at + 1 : at + 1 + len(part)]
            total += float((sums - logits[np.arange(len(part)), following]).sum())
        return {"nll": total, "count": len(tokens) - 1}

    def greedy(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        texts = []
        for prompt in prompts:
            text = [int(self.logits(prompt)[-1].argmax())]
            while len(text) < count:
                text.append(int(self.logits(text[-1:], len(prompt) + len(text) - 1)[-1].argmax()))
            texts.append(text)
        return {"greedy": texts}


def main() -> None:
    path, family = sys.argv[1:3]
    asked = json.load(sys.stdin)
    if "nll" in asked:
        answer = Whole(path, family, len(asked["nll"]) + 1).nll(asked["nll"])
    else:
        answer = Whole(path, family, CONTEXT).greedy(asked["greedy"], asked["tokens"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
