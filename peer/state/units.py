"""How bytes are written for people: GiB as "GB" with one decimal where needed, as the API reference does."""

from __future__ import annotations

_GIB = 1 << 30
_MIB = 1 << 20


def memory_text(size_bytes: int) -> str:
    """ "24GB", "6.5GB", "312MB"."""
    if size_bytes < _GIB:
        return f"{round(size_bytes / _MIB)}MB"
    text = f"{size_bytes / _GIB:.1f}"
    return f"{text.removesuffix('.0')}GB"
