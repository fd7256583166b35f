"""A seeded corpus of nasty texts, and llama.cpp's own tokens of it.

texts/tokens.json was made by `.venv/bin/python -m tests.engine.corpus`, which has the llama-cpp-python 0.3.36 of
`make bench-engine` tokenize each text with SmolLM2's and Gemma 3's GGUF files, special tokens recognised, none added.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS = Path(__file__).parent / "texts" / "tokens.json"
PLANES = range(17)
SURROGATES = range(0xD800, 0xE000)
SCRIPTS = {
    "Latin": (0x41, 0x24F),
    "Greek": (0x391, 0x3C9),
    "Cyrillic": (0x410, 0x44F),
    "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x621, 0x64A),
    "Devanagari": (0x905, 0x939),
    "Thai": (0xE01, 0xE3A),
    "Georgian": (0x10D0, 0x10F0),
    "Hangul": (0xAC00, 0xD7A3),
    "Kana": (0x3041, 0x30FA),
    "Han": (0x4E00, 0x9FA5),
    "Gothic": (0x10330, 0x1034A),
    "Han beyond": (0x20000, 0x2A6D6),
}
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2009\u200b\u2028\u202f\u205f\u3000\ufeff"
NUMBERS = "0123456789\u0660\u0669\u0967\u00b2\u00bd\u2155\u2167\u2460\u3007\U0001d7d8\U0001f100"
EMOJI = (
    "\U0001f600",
    "\u2764\ufe0f",
    "\U0001f44d\U0001f3fd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "\U0001f1e9\U0001f1ea",
    "1\ufe0f\u20e3",
    "\U0001fae0",
    "\u2600",
)
RUNS = (
    "a",
    "A",
    " ",
    "\n",
    "\r\n",
    "\t",
    "=",
    "-",
    ".",
    "7",
    "ab",
    "a ",
    " a",
    "\u00e9",
    "\u65e5",
    "\U0001f600",
    "!?",
)
PLAIN = (
    "it's WE'LL they'Re I'D 'tis o'clock ''s 'S'LL",
    "x=[1,2.5e-3];//<b>&amp;</b>\n\tif(a&&b){return!c;}",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<eos><bos><pad>",
    "<|im_start|<|im_end|>>endoftext|><|endoftext|>",
    "1,234,567.89 0x1F \u00bc3rd 10\u2076 \u2163 2\u20443",
    "C:\\Users\\a\\b.txt https://example.org/?q=a%20b&c=d#e",
    "snake_case camelCase SCREAMING_CASE kebab-case a.b.c",
    "\u00c5 A\u030a \ufb01 \u017f \u0130 \u0131 \u00df \u1e9e",
    "\u2581\u2581lower one eighth\u2581block\u2581",
)


def _pick(draw: random.Random, things: Sequence[Any]) -> Any:
    return things[int(draw.random() * len(things))]  # `random` alone is the same in every Python


def _point(draw: random.Random, plane: int) -> str:
    while True:
        point = plane * 0x10000 + int(draw.random() * 0x10000)
        if point not in SURROGATES and point > 0x20:
            return chr(point)


def texts() -> list[str]:
    """All Unicode planes, scripts, spaces, numbers, emoji, marks upon marks, long runs, and what programs write."""
    draw = random.Random(135)
    made = list(PLAIN)
    for plane in PLANES:
        made += ["".join(_point(draw, plane) for _ in range(12)) for _ in range(2)]
    for first, last in SCRIPTS.values():
        letters = range(first, last + 1)
        words = [
            "".join(chr(_pick(draw, letters)) for _ in range(1 + int(draw.random() * 6))) for _ in range(5)
        ]
        made.append(" ".join(words))
    for alphabet in (SPACES, NUMBERS, EMOJI):
        made += [
            "".join(_pick(draw, alphabet) + _pick(draw, ("", "", "a", "B", "'s", ".")) for _ in range(16))
            for _ in range(3)
        ]
    made += [
        "".join("e" + "".join(chr(0x300 + int(draw.random() * 0x70)) for _ in range(6)) for _ in range(4))
    ]
    made += [run * length for run in RUNS for length in (3, 31, 150)]
    mixed = [*SPACES, *NUMBERS, *EMOJI, *"abcXYZ'-_.,;:!?()[]{}<>|/\\@#$%^&*~`\"", "the", " of", "ing"]
    made += ["".join(_pick(draw, mixed) for _ in range(60)) for _ in range(12)]
    return made


def known(name: str) -> list[list[int]]:
    """llama.cpp's tokens of each text, by the model's name."""
    found: dict[str, list[list[int]]] = json.loads(TOKENS.read_text())
    return found[name]


def main() -> None:
    from tests.bench.engine.contenders import llama
    from tests.bench.engine.models import gemma3, smollm2

    made = {}
    for model in (smollm2(), gemma3()):
        with llama(model) as server:
            made[model.name] = server.ask("tokenize", texts=texts(), special=True)["ids"]
    lines = (
        f'"{name}": [\n' + ",\n".join(json.dumps(each, separators=(",", ":")) for each in ids) + "\n]"
        for name, ids in made.items()
    )
    TOKENS.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
