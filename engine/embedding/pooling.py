"""How a text's hidden states become one vector: as the model's own files say, never by a guess.

A Hugging Face folder has modules.json and the settings of its Pooling module, as sentence-transformers writes them; a
GGUF file has `pooling_type`. Whether vectors are brought to length 1 a folder says by a Normalize module; a GGUF file
cannot, and then they are, as llama.cpp does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import LoadError
from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import Folder, read_object, read_text
from engine.models.reading import refused

Mode = Literal["mean", "cls", "last"]
_GGUF_MODES: dict[int, Mode] = {1: "mean", 2: "cls", 3: "last"}
# sentence-transformers' flags, and the one word that newer versions have instead
_FLAGS: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_WORDS: dict[str, Mode] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_MODULES_MAX = 16


@dataclass(frozen=True)
class Pooling:
    """`tokens_max`: the longest text that the model was made for, where its files say it; 0 = not said."""

    mode: Mode
    normalize: bool
    tokens_max: int = 0


class Pooled:
    """The vector of one text, from its states as they come, in order."""

    def __init__(self, mode: Mode, embedding: int) -> None:
        self._mode = mode
        self._sum = np.zeros(embedding, dtype=np.float32)
        self._rows = 0

    def add(self, states: npt.NDArray[np.float32]) -> None:
        """states [n, E] of the text's next n tokens."""
        if self._mode == "mean":
            self._sum += states.sum(axis=0)
        elif self._mode == "last":
            self._sum = states[-1]
        elif self._rows == 0:
            self._sum = states[0]
        self._rows += len(states)

    def vector(self, normalize: bool) -> npt.NDArray[np.float32]:
        """[E]; of length 1 when `normalize`, except where it is 0."""
        found = self._sum / self._rows if self._mode == "mean" else self._sum
        if normalize:
            found = found / max(float(np.linalg.norm(found)), 1e-12)
        return np.asarray(found, dtype=np.float32)


def read_pooling(checkpoint: Gguf | Folder) -> Pooling:
    """Raises LoadError `bad_model_file` or `unsupported_architecture`."""
    return _of_gguf(checkpoint) if isinstance(checkpoint, Gguf) else _of_folder(checkpoint)


def _of_gguf(gguf: Gguf) -> Pooling:
    kind = gguf.integer(f"{gguf.text('general.architecture')}.pooling_type", 0)
    if kind not in _GGUF_MODES:
        raise refused(gguf.path, f"has pooling_type {kind} (1 mean, 2 first and 3 last token are known)")
    return Pooling(_GGUF_MODES[kind], True)


class _Module(msgspec.Struct, frozen=True):
    type: str
    path: str = ""


_modules = msgspec.json.Decoder(list[_Module])


def _of_folder(folder: Folder) -> Pooling:
    path = folder.path / "modules.json"
    if not path.exists():
        text = f"{folder.path} has no modules.json: nothing says how its states become one vector"
        raise LoadError("unsupported_architecture", text)
    try:
        modules = _modules.decode(read_text(path))
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_file(path, f"it is no list of modules ({error})") from None
    kinds = [module.type.rpartition(".")[2] for module in modules[: _MODULES_MAX + 1]]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise refused(path, f"has the modules {', '.join(kind[:40] for kind in kinds)}")
    where = modules[1].path
    if os.path.basename(where) != where or where in ("", ".", "..") or "\0" in where:
        raise bad_file(path, f"it names the folder {where[:80]!r}")
    mode = _mode(folder.path / where / "config.json")
    return Pooling(mode, len(kinds) == 3, _tokens_max(folder.path / "sentence_bert_config.json"))


def _mode(path: Path) -> Mode:
    settings = read_object(path)
    found = [mode for flag, mode in _FLAGS.items() if settings.get(flag) is True]
    others = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    word = settings.get("pooling_mode")
    if isinstance(word, str) and not others:
        found, others = ([_WORDS[word]], [word]) if word in _WORDS else ([], [word])
    if len(found) != 1 or len(others) != 1:
        raise refused(path, f"pools by {', '.join(map(str, others))[:200] or 'nothing'}")
    return found[0]


def _tokens_max(path: Path) -> int:
    value: Any = read_object(path).get("max_seq_length") if path.exists() else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
