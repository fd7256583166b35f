"""What the stand-in engine gives for an embedding task: vectors that are the same for the same words.

And for a tensor task: the arrays that it was given.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from typing import Any

from engine.errors import RunError
from engine.protocol import Array

DIMENSIONS = 8
_FORMATS = {"float32": "f", "float64": "d", "float16": "e", "bool": "?"} | {
    f"{sign}int{bits}": letter.upper() if sign else letter
    for bits, letter in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
    for sign in ("", "u")
}


def texts_of(parameters: dict[str, Any]) -> list[str]:
    """An embedding task's texts."""
    given = parameters.get("input", [])
    return [given] if isinstance(given, str) else list(given)


def longest(parameters: dict[str, Any]) -> str:
    """Of its texts the one with the most words."""
    return max(texts_of(parameters), key=lambda text: len(text.split()), default="")


def embed(parameters: dict[str, Any], context: int) -> tuple[int, Array]:
    """How many words there are, and a vector for each text: of length 1 unless `normalize` is false.

    Raises RunError `prompt_too_long`.
    """
    texts = [text.split() for text in texts_of(parameters)]
    if parameters.get("truncate"):
        texts = [words[:context] for words in texts]
    data = b""
    for index, words in enumerate(texts):
        if len(words) > context:
            text = f"text {index} has {len(words)} tokens and the model takes {context}"
            raise RunError("prompt_too_long", text)
        data += _vector(words, parameters.get("normalize") is not False)
    return sum(map(len, texts)), Array("embeddings", "float32", (len(texts), DIMENSIONS), data)


def _vector(words: list[str], normalize: bool) -> bytes:
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    numbers = [byte / 127.5 - 1.0 for byte in digest[:DIMENSIONS]]
    size = sum(number * number for number in numbers) ** 0.5 if normalize else 1.0
    return struct.pack(f"<{DIMENSIONS}f", *(number / size for number in numbers))


def given_back(parameters: dict[str, Any]) -> list[Array]:
    """A tensor task's arrays. Raises RunError `bad_parameters`."""
    return [_array(name, given) for name, given in parameters.get("inputs", {}).items()]


def _array(name: str, given: dict[str, Any]) -> Array:
    data, letter = given["data"], _FORMATS[given["dtype"]]
    try:
        if isinstance(data, str):
            packed = base64.b64decode(data, validate=True)
        else:
            packed = struct.pack(f"<{len(data)}{letter}", *data)
    except (ValueError, OverflowError, struct.error) as error:
        raise RunError("bad_parameters", f"input {name}: {error}") from None
    count = math.prod(given["shape"])
    if len(packed) != count * struct.calcsize(f"<{letter}"):
        text = f"input {name} has {len(packed)} bytes, and its shape {count} numbers of {given['dtype']}"
        raise RunError("bad_parameters", text)
    return Array(name, given["dtype"], tuple(given["shape"]), packed)
