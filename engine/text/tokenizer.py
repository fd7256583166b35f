"""Text to tokens and back, from a GGUF's own tables, on the `tokenizers` library.

Two kinds: `gpt2` (byte-level BPE, with the pre-tokenizers below) and `llama` (SentencePiece BPE with scores).
Others raise LoadError `unsupported_tokenizer`: a guess would yield plausible garbage. Thread-safe once built.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import LoadError
from engine.files.gguf import Gguf, bad_file

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # tokenizer.ggml.token_type
NAME_MAX = 1024  # characters of a token
NAMES_MAX = 16 * 1024 * 1024  # of all tokens; 262144 have 2 million
_SPACE = "\u2581"  # SentencePiece's visible space
END_NAMES = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "</s>",
    "<|eom_id|>",
    "<end_of_turn>",
)

_PHI3_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")

# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, by tokenizer.ggml.pre
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"|\p{N}{1,3}|", r"|\p{N}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> (pattern, whether whole words in the vocabulary skip the merges)
_PATTERNS = {
    "llama-bpe": (_LLAMA3_PATTERN, True),
    "llama3": (_LLAMA3_PATTERN, True),
    "llama-v3": (_LLAMA3_PATTERN, True),
    "dbrx": (_LLAMA3_PATTERN, False),
    "qwen2": (_QWEN2_PATTERN, False),
    "deepseek-r1-qwen": (_QWEN2_PATTERN, False),
    "tekken": (_TEKKEN_PATTERN, True),
    "gpt-4o": (_GPT4O_PATTERN, False),
}


def _pre_tokenizer(name: str) -> tuple[Any, bool] | None:
    """The pre-tokenizer of that name and whether whole words in the vocabulary skip the merges."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "gpt2"):
        return byte_level, False
    if name in ("smollm", "codeshell", "refact", "command-r"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level]), False
    if name in _PATTERNS:
        pattern, whole = _PATTERNS[name]
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain]), whole
    return None


def byte_of_character() -> dict[str, int]:
    """GPT-2's byte-to-unicode table, reversed."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in kept}
    others = [byte for byte in range(256) if byte not in kept]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokenizer. `pieces[t]` are the bytes that token `t` stands for, empty for control tokens."""

    tokenizer: Tokenizer
    pieces: list[bytes]
    names: list[str]
    begin: int | None  # token put before every prompt
    end: int | None  # the end-of-sequence token, as chat templates name it
    ends: frozenset[int]  # every token that ends a generation
    chat_template: str | None
    context_max: int
    strip_first_space: bool

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt; control tokens that a chat template wrote are recognised."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.begin is not None and ids[:1] != [self.begin]:
            ids.insert(0, self.begin)
        return ids

    def name(self, token: int | None) -> str:
        return self.names[token] if token is not None and 0 <= token < len(self.names) else ""

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)


class Detokenizer:
    """Tokens in, text out as soon as its UTF-8 is complete."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = vocabulary.strip_first_space

    def push(self, token: int) -> str:
        """The text that this token completes, "" while a character is incomplete."""
        piece = self._pieces[token]
        if self._strip and piece:
            piece, self._strip = piece.removeprefix(b" "), False
        return self._decode(piece)

    def finish(self) -> str:
        """What is left: a replacement character for an incomplete one."""
        return self._decode(b"", True)


def _table(gguf: Gguf, key: str, kind: type, length: int | None = None) -> list[Any]:
    value = gguf.metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
        raise bad_file(gguf.path, f"{key} is missing or no list of {kind.__name__}")
    if length is not None and len(value) != length:
        raise bad_file(gguf.path, f"{key} has {len(value)} entries instead of {length}")
    return value


def from_gguf(gguf: Gguf) -> Vocabulary:
    """Build the tokenizer. Raises LoadError `unsupported_tokenizer` or `bad_model_file`."""
    model = gguf.text("tokenizer.ggml.model")
    names = token_names(gguf)
    kinds = token_kinds(gguf, len(names))
    if model == "gpt2":
        tokenizer = _byte_level(gguf, names)
        table = byte_of_character()
        pieces = [byte_level_piece(name, table) for name in names]
    elif model == "llama":
        tokenizer = _sentencepiece(gguf, names, kinds)
        pieces = [sentencepiece_piece(name) for name in names]
    else:
        raise LoadError(
            "unsupported_tokenizer", f"{gguf.path} has a {model!r} tokenizer; usable are gpt2 and llama"
        )
    strips = model == "llama" and gguf.text("general.architecture") == "phi3"  # as Phi-3's own tokenizer does
    tokenizer.add_special_tokens(
        [
            AddedToken(
                name, special=True, normalized=False, rstrip=strips and name not in _PHI3_NOT_STRIPPING
            )
            for name, kind in zip(names, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) and name
        ]
    )
    for token, kind in enumerate(kinds):
        if kind == CONTROL:
            pieces[token] = b""
        elif kind == USER_DEFINED:
            pieces[token] = names[token].encode()
    return _vocabulary(gguf, model, tokenizer, pieces, names, kinds)


def _vocabulary(
    gguf: Gguf, model: str, tokenizer: Tokenizer, pieces: list[bytes], names: list[str], kinds: list[int]
) -> Vocabulary:
    metadata = gguf.metadata
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = {token for token in ids if isinstance(token, int) and 0 <= token < len(names)}
    ends |= {t for t, name in enumerate(names) if kinds[t] == CONTROL and name in END_NAMES}
    begin, pre = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.pre")
    if not metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in ("llama-bpe", "tekken")):
        begin = None
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        tokenizer=tokenizer,
        pieces=pieces,
        names=names,
        begin=begin if isinstance(begin, int) and 0 <= begin < len(names) else None,
        end=ids[0] if ids[0] in ends else None,
        ends=frozenset(ends),
        chat_template=template if isinstance(template, str) else None,
        context_max=gguf.integer(f"{gguf.text('general.architecture')}.context_length", 0),
        strip_first_space=model == "llama" and _prefixed(gguf),
    )


def _byte_level(gguf: Gguf, names: list[str]) -> Tokenizer:
    name = gguf.text("tokenizer.ggml.pre", "")
    found = _pre_tokenizer(name)
    if found is None:
        raise LoadError(
            "unsupported_tokenizer",
            f"{gguf.path} wants the pre-tokenizer {name!r}; usable are gpt-2, smollm, {', '.join(_PATTERNS)}",
        )
    before, ignore_merges = found
    merges = [tuple(merge.split(" ", 1)) for merge in _table(gguf, "tokenizer.ggml.merges", str)]
    vocabulary = {name: token for token, name in enumerate(names)}
    if not all(
        len(m) == 2 and m[0] in vocabulary and m[1] in vocabulary and "".join(m) in vocabulary for m in merges
    ):
        raise bad_file(gguf.path, "tokenizer.ggml.merges names tokens that it does not have")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def token_kinds(gguf: Gguf, count: int) -> list[int]:
    """CONTROL and the like of each token; 1 is a plain one."""
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return [1] * count
    return _table(gguf, "tokenizer.ggml.token_type", int, count)


def token_names(gguf: Gguf) -> list[str]:
    """The tokens, none of them so long that to look at all its cuts would take for ever."""
    names = _table(gguf, "tokenizer.ggml.tokens", str)
    if max(map(len, names)) > NAME_MAX or sum(map(len, names)) > NAMES_MAX:
        raise bad_file(
            gguf.path, f"it has tokens of more than {NAME_MAX} or, together, {NAMES_MAX} characters"
        )
    return names


def _prefixed(gguf: Gguf) -> bool:
    """Whether a space is put before every text."""
    return bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))


def _sentencepiece(gguf: Gguf, names: list[str], kinds: list[int]) -> Tokenizer:
    """SentencePiece's BPE as merges: the pair whose result has the best score is merged first."""
    scores = _table(gguf, "tokenizer.ggml.scores", float, len(names))
    vocabulary = {name: token for token, name in enumerate(names)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, name in enumerate(names):
        if kinds[token] in (CONTROL, USER_DEFINED, BYTE):
            continue
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[token], vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    unknown = gguf.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(names):
        raise bad_file(gguf.path, f"its unknown token is {unknown}")
    model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, _, _, left, right in merges],
        unk_token=names[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if _prefixed(gguf):
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def byte_level_piece(name: str, table: dict[str, int]) -> bytes:
    try:
        return bytes(table[character] for character in name)
    except KeyError:  # not byte-level: a token that stands for itself
        return name.encode("utf-8", "replace")


def sentencepiece_piece(name: str) -> bytes:
    """The bytes of a SentencePiece token: a byte by its number, or text with visible spaces."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            return name.encode()
    return name.replace(_SPACE, " ").encode("utf-8", "replace")
