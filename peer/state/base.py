"""What every record is: a frozen, typed, keyword-only struct."""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A fact. Unknown fields are ignored when read, so that peers of two versions can share a store."""
