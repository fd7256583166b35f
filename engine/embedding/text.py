"""Texts to tokens for embeddings: with the special tokens that the model expects around a text, cut or not.

WordPiece (BERT) from a folder's tokenizer.json or a GGUF's tables, and the tokenizers of the decoder families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from engine.files.gguf import Gguf, bad_file
from engine.files.safetensors import TOKENIZER_BYTES_MAX, Folder, read_text
from engine.text import folder_tokenizer, tokenizer

_WORD_CHARS_MAX = 100  # a longer word is unknown, as in every published WordPiece model
_START = "\u2581"  # GGUF marks the pieces that begin a word, Hugging Face those that go on with one
_PROBE = "a"


@dataclass(frozen=True)
class TextEncoder:
    """`before` and `after` stand around every text."""

    tokenizer: Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens: int  # how many there are: the highest number and one

    def encode(self, text: str, most: int = 0) -> list[int]:
        """Token ids; of a text that is longer than `most` (0: any length) its beginning, special tokens included."""
        ids: Sequence[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if most:
            ids = ids[: max(0, most - len(self.before) - len(self.after))]
        return [*self.before, *ids, *self.after]


class _Model(msgspec.Struct, frozen=True):
    type: str = ""


class _File(msgspec.Struct, frozen=True):
    model: _Model


def read_text_encoder(checkpoint: Gguf | Folder) -> TextEncoder:
    """Raises LoadError `unsupported_tokenizer` or `bad_model_file`."""
    return _of_gguf(checkpoint) if isinstance(checkpoint, Gguf) else _of_folder(checkpoint)


# ---------------------------------------------------------------- folders


def _of_folder(folder: Folder) -> TextEncoder:
    path = folder.path / folder_tokenizer.FILE
    text = read_text(path, TOKENIZER_BYTES_MAX)
    try:
        kind = msgspec.json.decode(text, type=_File).model.type
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_file(path, f"it is no tokenizer ({error})") from None
    if kind == "WordPiece":
        found = folder_tokenizer.parse(path, text)
        unknown = found.model.unk_token
        if found.model.token_to_id(unknown) is None:  # a word that it does not know would raise
            raise bad_file(path, f"it has no token {unknown[:40]!r} for what it does not know")
    else:  # the others' reader knows what it can and cannot read
        found = folder_tokenizer.from_text(folder, text).tokenizer
    found.no_truncation()
    found.no_padding()
    plain: list[int] = found.encode(_PROBE, add_special_tokens=False).ids
    whole = folder_tokenizer.templated(path, found, _PROBE)
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return _made(found, whole[:at], whole[at + len(plain) :])
    raise bad_file(path, "it changes a text that it puts special tokens around")


def _made(found: Tokenizer, before: Sequence[int], after: Sequence[int]) -> TextEncoder:
    tokens = max(found.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return TextEncoder(found, tuple(before), tuple(after), tokens)


# ---------------------------------------------------------------- GGUF


def _of_gguf(gguf: Gguf) -> TextEncoder:
    if gguf.text("tokenizer.ggml.model") == "bert":
        return _word_piece(gguf)
    vocabulary = tokenizer.from_gguf(gguf)
    after = (vocabulary.end,) if gguf.metadata.get("tokenizer.ggml.add_eos_token") is True else ()
    if None in after:
        raise bad_file(gguf.path, "it wants a token after every text and names none")
    before = () if vocabulary.begin is None else (vocabulary.begin,)
    return _made(vocabulary.tokenizer, before, [token for token in after if token is not None])


def _word_piece(gguf: Gguf) -> TextEncoder:
    names = tokenizer.token_names(gguf)
    kinds = tokenizer.token_kinds(gguf, len(names))
    unknown = _special(gguf, names, "unknown", "[UNK]")
    vocabulary: dict[str, int] = {}
    for token, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind != tokenizer.CONTROL and token != unknown:
            name = name.removeprefix(_START) if name.startswith(_START) else "##" + name
        vocabulary.setdefault(name, token)
    model: Any = models.WordPiece(
        vocab=vocabulary,
        unk_token=names[unknown],
        continuing_subword_prefix="##",
        max_input_chars_per_word=_WORD_CHARS_MAX,
    )
    found = Tokenizer(model)
    lower = gguf.metadata.get("tokenizer.ggml.normalizer.lowercase", True) is not False
    found.normalizer = normalizers.BertNormalizer(lowercase=lower)
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [name for name, kind in zip(names, kinds, strict=True) if kind == tokenizer.CONTROL and name]
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    before = _special(gguf, names, "cls", "[CLS]", "bos")
    # the key is written with this mistake in it
    after = _special(gguf, names, "seperator", "[SEP]", "separator", "eos")
    return _made(found, [before], [after])


def _special(gguf: Gguf, names: list[str], key: str, usual: str, *others: str) -> int:
    """A special token by the file's keys, else by its usual name. Raises LoadError."""
    for each in (key, *others):
        token = gguf.metadata.get(f"tokenizer.ggml.{each}_token_id")
        if isinstance(token, int) and 0 <= token < len(names):
            return token
    if usual not in names:
        raise bad_file(gguf.path, f"it has no token {usual}")
    return names.index(usual)
