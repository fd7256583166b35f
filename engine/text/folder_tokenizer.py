"""The tokenizer of a Hugging Face folder: tokenizer.json as the `tokenizers` library reads it.

Byte-level BPE, and BPE with byte fallback (SentencePiece's); others raise LoadError `unsupported_tokenizer`. The chat
template is the one of tokenizer_config.json or of chat_template.jinja, its default where there are several.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from engine.errors import LoadError
from engine.files.gguf import bad_file
from engine.files.safetensors import TOKENIZER_BYTES_MAX, Folder, read_object, read_text
from engine.text.tokenizer import (
    END_NAMES,
    Vocabulary,
    byte_level_piece,
    byte_of_character,
    sentencepiece_piece,
)

FILE = "tokenizer.json"
TOKENS_MAX = 1 << 22
T = TypeVar("T")


class _Part(msgspec.Struct, frozen=True):
    """A decoder, pre-tokenizer or normalizer, as far as it matters here."""

    type: str = ""
    decoders: list[Any] = []
    pretokenizers: list[Any] = []
    start: int = 0


class _Model(msgspec.Struct, frozen=True):
    type: str = ""
    byte_fallback: bool = False


class _Added(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _File(msgspec.Struct, frozen=True):
    model: _Model
    added_tokens: list[_Added] = []
    decoder: _Part | None = None


def from_folder(folder: Folder) -> Vocabulary:
    """Raises LoadError `unsupported_tokenizer` or `bad_model_file`."""
    return from_text(folder, read_text(folder.path / FILE, TOKENIZER_BYTES_MAX))


def from_text(folder: Folder, text: str) -> Vocabulary:
    """The same of a tokenizer.json that has been read already."""
    path = folder.path / FILE
    try:
        file = msgspec.json.decode(text, type=_File)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_file(path, f"it is no tokenizer ({error})") from None
    decoders = [
        part.get("type") for part in (file.decoder.decoders if file.decoder else []) if isinstance(part, dict)
    ]
    if file.decoder is not None:
        decoders.append(file.decoder.type)
    fallback = file.model.byte_fallback and "ByteFallback" in decoders
    if file.model.type != "BPE" or not (fallback or "ByteLevel" in decoders):
        raise LoadError(
            "unsupported_tokenizer",
            f"{path} is of type {file.model.type!r}; usable are byte-level BPE and BPE with byte fallback",
        )
    tokenizer = parse(path, text)
    names, pieces = _pieces(path, tokenizer, file, fallback)
    settings = _settings(folder)
    begin = _begin(path, tokenizer, names, settings)
    ends = _ends(folder, settings, names, {added.id for added in file.added_tokens if added.special})
    named = _named(settings, "eos_token", names)
    return Vocabulary(
        tokenizer=tokenizer,
        pieces=pieces,
        names=names,
        begin=begin,
        end=named if named is not None else min(ends, default=None),
        ends=frozenset(ends),
        chat_template=_chat_template(folder.path, settings),
        context_max=folder.integer("max_position_embeddings", 0),
        strip_first_space=fallback and _strips(file),
    )


def parse(path: Path, text: str) -> Tokenizer:
    """tokenizer.json by the library."""
    return _tried(path, lambda: Tokenizer.from_str(text))


def templated(path: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's tokens with those around it that the tokenizer's own template has, which may name some that are not."""
    return _tried(path, lambda: tokenizer.encode(text, add_special_tokens=True).ids)


def _tried(path: Path, action: Callable[[], T]) -> T:
    """The library raises plain Exception and, for some contradictions, panics."""
    try:
        return action()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise bad_file(path, f"it is no tokenizer ({str(error)[:200]})") from None


def _pieces(path: Path, tokenizer: Tokenizer, file: _File, fallback: bool) -> tuple[list[str], list[bytes]]:
    """Names and bytes by token; a token that is not there has neither."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if not 1 <= size <= TOKENS_MAX:
        raise bad_file(path, f"its highest token is {size - 1}")
    names, pieces = [""] * size, [b""] * size
    table = byte_of_character()
    for name, token in vocabulary.items():
        names[token] = name
        pieces[token] = sentencepiece_piece(name) if fallback else byte_level_piece(name, table)
    for added in file.added_tokens:
        if 0 <= added.id < size:
            pieces[added.id] = b"" if added.special else added.content.encode("utf-8", "replace")
    return names, pieces


def _settings(folder: Folder) -> dict[str, Any]:
    path = folder.path / "tokenizer_config.json"
    return read_object(path) if path.exists() else {}


def _named(settings: dict[str, Any], key: str, names: list[str]) -> int | None:
    """The token that a setting names, as a string or as an object with its content."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return names.index(value) if isinstance(value, str) and value in names else None


def _begin(path: Path, tokenizer: Tokenizer, names: list[str], settings: dict[str, Any]) -> int | None:
    """The token that the tokenizer's own template puts before every text."""
    begin = _named(settings, "bos_token", names)
    if settings.get("add_bos_token") is True:
        return begin
    before = templated(path, tokenizer, "")
    return begin if begin is not None and before[:1] == [begin] else None


def _ends(folder: Folder, settings: dict[str, Any], names: list[str], special: set[int]) -> set[int]:
    """Every token that any of the folder's files names as an end, and the special ones that mean it in any family."""
    path = folder.path / "generation_config.json"
    values: list[Any] = [_named(settings, "eos_token", names)]
    for config in (folder.config, read_object(path) if path.exists() else {}):
        value = config.get("eos_token_id")
        values += value if isinstance(value, list) else [value]
    values += [token for token, name in enumerate(names) if token in special and name in END_NAMES]
    return {
        value
        for value in values
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
    }


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    if (path / "chat_template.jinja").exists():
        return read_text(path / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _strips(file: _File) -> bool:
    parts = file.decoder.decoders if file.decoder else []
    return any(isinstance(part, dict) and part.get("type") == "Strip" and part.get("start") for part in parts)
