"""Text that keeps to a grammar: which tokens may come next. JSON schemas by llguidance, on the host.

The text has the spaces of Python's json.dumps and no others, so that it cannot go on with blanks for ever. What an
attempt costs is bounded: the schema's size and depth, and the library's work per step and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from engine.errors import RunError
from engine.tokenizer import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Tokens = npt.NDArray[np.int64]
SCHEMA_BYTES_MAX = 64 * 1024
SCHEMA_DEPTH_MAX = 64
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
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
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
        return []


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
    if _deeper(schema, SCHEMA_DEPTH_MAX):
        text = f"response_format.schema is nested more than {SCHEMA_DEPTH_MAX} deep"
        raise RunError("bad_parameters", text)
    encoded = msgspec.json.encode(schema)
    if len(encoded) > SCHEMA_BYTES_MAX:
        raise RunError("bad_parameters", f"response_format.schema has more than {SCHEMA_BYTES_MAX} bytes")
    return encoded.decode()


def _deeper(schema: Any, most: int) -> bool:
    """Whether it is nested deeper than `most`."""
    level: Iterable[Any] = [schema]
    for _ in range(most):
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        if not level:
            return False
    return True
