"""Text that keeps to a grammar: which tokens may come next. JSON schemas by llguidance, on the host.

The text has the spaces of Python's json.dumps and no others, so that it cannot go on with blanks for ever. What an
attempt costs is bounded: the schema's size and depth, and the library's work per step and memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.errors import RunError
from engine.text.tokenizer import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Tokens = npt.NDArray[np.int64]
SCHEMA_BYTES_MAX = 64 * 1024
SCHEMA_DEPTH_MAX = 64
STACK_BYTES = (
    256 * 1024 * 1024
)  # of address space; the longest chains that fit into a schema use a tenth of it
_POWERS_OF_TEN = frozenset(float(f"1e{exponent}") for exponent in range(-9, 10))
_SPACING: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_LIMITS = LLParserLimits(  # each of its states takes 1 to 2 kB
    max_lexer_states=20_000, max_grammar_size=100_000, verbose_errors=False
)


class Grammar:
    """One run's place in its grammar."""

    def __init__(self, matcher: LLMatcher, tokens: int) -> None:
        self._matcher = matcher
        self._tokens = tokens

    def allowed(self) -> Tokens:
        """What may come next, at least one; ends of the text among it where it may end. Raises RunError."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = np.flatnonzero(np.unpackbits(mask, count=self._tokens, bitorder="little"))
        self._check()
        if not len(found):
            raise RunError("bad_parameters", "response_format: this model has no token that could come next")
        return found

    def push(self, token: int) -> bool:
        """An allowed token has come. Whether the text is complete: nothing may follow. Raises RunError."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._matcher)


class Grammars:
    """The grammars of one vocabulary. Its tables are made for the first run that needs them (50,000 tokens: 0.3 s)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def begin(self, response_format: Any) -> Grammar | None:
        """None when nothing is asked for. Raises RunError `bad_parameters`."""
        if response_format is None:
            return None
        schema = _schema(response_format)
        if not self._vocabulary.ends:
            raise RunError("bad_parameters", "response_format: this model has no token that ends a text")
        matcher = _compiled(self._tokenizer, schema)
        if matcher.is_error():
            raise _refusal(matcher)
        return Grammar(matcher, len(self._vocabulary.pieces))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        ends = sorted(self._vocabulary.ends)
        wrapper = TokenizerWrapper(_Spelling(self._vocabulary))
        return LLTokenizer(wrapper, eos_token=ends, slices=LLTokenizer.json_slices())


class _Spelling:
    """A vocabulary as llguidance wants it. Called with text that must come next: the tokens that spell just that."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._encode = vocabulary.tokenizer.encode
        self.tokens = vocabulary.pieces
        self.eos_token_id = min(vocabulary.ends)
        self.bos_token_id = vocabulary.begin
        self.special_token_ids = sorted(
            vocabulary.ends | {token for token, piece in enumerate(self.tokens) if not piece}
        )

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # it tries bytes first
            raise TypeError("text is wanted")
        for lead in ("", "\n"):  # some put a space before every text, but not after a line's end
            ids = self._encode(lead + text, add_special_tokens=False).ids
            at, left = len(ids), len(text.encode())
            while at and left > 0:
                at -= 1
                left -= len(self.tokens[ids[at]])
            if b"".join(self.tokens[token] for token in ids[at:]) == text.encode():
                return ids[at:]
        return self._longest(text.encode())

    def _longest(self, text: bytes) -> list[int]:
        """By the longest token each time, as far as there are any: for what the tokenizer itself would change."""
        found, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest_piece), at, -1)
            token = next(
                (self._by_piece[text[at:end]] for end in ends if text[at:end] in self._by_piece), None
            )
            if token is None:
                break
            found.append(token)
            at += len(self.tokens[token])
        return found

    @cached_property
    def _by_piece(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {piece: token for token, piece in enumerate(self.tokens) if token not in special}

    @cached_property
    def _longest_piece(self) -> int:
        return max(map(len, self.tokens))


def _compiled(tokenizer: LLTokenizer, schema: str) -> LLMatcher:
    """On a stack that is deep enough for any chain of references: the library goes down it and would crash."""
    found: list[LLMatcher] = []

    def compile_() -> None:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)
        found.append(LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))

    usual = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=compile_, name="grammar")
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    return found[0]


def _refusal(matcher: LLMatcher) -> RunError:
    reason = matcher.get_error().partition("\n")[0][:300]
    return RunError("bad_parameters", f"response_format: this schema cannot be served: {reason}")


def _schema(response_format: Any) -> str:
    """The JSON schema of a `response_format`, as JSON."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "json_object":
        return '{"type": "object"}'
    schema = response_format.get("schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping):
        text = 'response_format must be {"type": "json_object"} or {"type": "json_schema", "schema": {...}}'
        raise RunError("bad_parameters", text)
    problem = _problem(schema)
    if problem:
        raise RunError("bad_parameters", f"response_format.schema {problem}")
    return msgspec.json.encode(schema).decode()


def _problem(schema: Mapping[str, Any]) -> str:
    """Why it is not even tried, or ""."""
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH_MAX):
        multiples = [
            node["multipleOf"] for node in level if isinstance(node, Mapping) and "multipleOf" in node
        ]
        for step in multiples:  # of others the library makes as many states as they have common multiples
            if isinstance(step, int | float) and step not in _POWERS_OF_TEN:
                return f"has multipleOf {step}: only powers of ten are served"
        level = [child for node in level for child in _children(node)]
        if not level:
            size = len(msgspec.json.encode(schema))
            return f"has {size} bytes, at most {SCHEMA_BYTES_MAX}" if size > SCHEMA_BYTES_MAX else ""
    return f"is nested more than {SCHEMA_DEPTH_MAX} deep"


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, list) else ()
