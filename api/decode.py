"""JSON bodies into validated structs; what is wrong with one becomes a 400 that names the field."""

from __future__ import annotations

import json
import re
from typing import Any, Generic, TypeVar

import msgspec

from peer.errors import BadRequest

T = TypeVar("T")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`(?P<path>[^`]*)`)?$", re.DOTALL)
_INTEGRAL = re.compile(rb"[0-9](?:\.0|[eE])")
_EXACT = 2**53  # beyond it a float says nothing of the last digits
_NAMED = re.compile(r"field `(?P<name>[^`]*)`")


class _Twice(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


_keys = json.JSONDecoder(object_pairs_hook=_unique, parse_float=str, parse_int=str)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


_plain = msgspec.json.Decoder(float_hook=_number)


class BodyDecoder(Generic[T]):
    """Decodes bodies of one type, or of one of several that a field tells apart."""

    def __init__(self, type_: type[T]) -> None:
        self._type = type_
        self._decode = msgspec.json.Decoder(type_).decode

    def __call__(self, body: bytes) -> T:
        """Raises BadRequest: not JSON, not UTF-8, wrong, unknown, missing or repeated fields."""
        if not body:
            raise BadRequest("A JSON body is needed", code="missing_body")
        try:
            value = self._value(body)
            _keys.decode(body.decode())
        except msgspec.ValidationError as error:
            raise _invalid(str(error)) from None
        except _Twice as error:
            name = str(error)[:64]
            raise BadRequest(f"The field {name!r} is given twice", details={"field": name}) from None
        except (msgspec.DecodeError, ValueError) as error:
            raise BadRequest(f"The body is not valid JSON: {_reason(error)}", code="invalid_json") from None
        except RecursionError:
            raise BadRequest("The body is nested too deeply", code="invalid_json") from None
        return value

    def _value(self, body: bytes) -> T:
        """In JSON 512.0 is an integer too; msgspec takes it for none. What is wrong still is told as it was sent."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            if _INTEGRAL.search(body) is None:
                raise
            try:
                return msgspec.convert(_plain.decode(body), self._type)
            except (msgspec.ValidationError, RecursionError):
                raise error from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error)[:200]


def _invalid(message: str) -> BadRequest:
    """msgspec's "Expected `int` >= 1 - at `$.parameters.max_tokens`" with the field's name."""
    match = _PATH.match(message)
    what, path = (match["what"], match["path"] or "$") if match else (message, "$")
    field = path[1:].lstrip(".")
    named = _NAMED.search(what)
    if named:
        field = f"{field}.{named['name']}" if field else named["name"]
    field = field[:200]
    text = f"{field}: {what}" if field else what
    return BadRequest(text[:500].replace("`", "'"), details={"field": field, "reason": what[:300]})
