"""How well the engine predicts a text, beside llama.cpp with the same file and the same tokens.

The text is `tests/engine/texts/alice.txt`, of which tests/engine/texts/README.md says what it is. Figures do not depend
on time: one round. llama.cpp rounds what goes into its products to 8 bits, the engine does not: of Gemma's first 96
tokens the engine's perplexity is 29.35, as a float32 reference's is, and llama.cpp's 30.24.
"""

from __future__ import annotations

import math
from typing import Any

from tests.bench.engine.contenders import CACHE, CONTEXT, llama
from tests.bench.engine.models import Model, gemma3, smollm2
from tests.bench.processes import REPOSITORY, Missing
from tests.bench.report import Options, Result, Row
from tests.engine.whole_model import ask

TEXT = REPOSITORY / "tests" / "engine" / "texts" / "alice.txt"
TOKENS, TOKENS_QUICK = CONTEXT - 1, 512
GOAL = "ratio<=1.01"


def perplexity(answer: dict[str, Any]) -> float:
    return math.exp(answer["nll"] / answer["count"])


def _measure(model: Model, most: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    tokens = model.vocabulary().encode(TEXT.read_text())[:most]
    with llama(model) as server:
        theirs = server.ask("nll", tokens=tokens)
    try:
        return len(tokens), ask(model.path, model.family, CACHE, {"nll": tokens}), theirs
    except RuntimeError as error:
        raise Missing(f"the engine: {error}") from None


def measure(options: Options) -> Result:
    result = Result()
    for find in (smollm2, gemma3):
        try:
            model = find()
            count, mine, theirs = _measure(model, TOKENS_QUICK if options.quick else TOKENS)
        except Missing as error:
            result.rows.append(Row(f"perplexity, {find.__name__}", None, note=str(error)))
            continue
        result.raw[model.name] = {"tokens": count, "ours": mine, "llama.cpp": theirs}
        name = f"perplexity, {model.name}, {count} tokens"
        result.rows.append(Row(name, perplexity(mine), perplexity(theirs), "", "llama.cpp", GOAL))
    return result
