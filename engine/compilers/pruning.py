"""The cache file of compiled kernels is bounded: versions, models and batch sizes come and go, and all leave kernels.

Rows are removed and tables are not, since other engine processes may share the file: what one misses it compiles.
Their room is used again; the file itself does not shrink.
"""

from __future__ import annotations

import sqlite3

BYTES_MAX = 240 << 20  # no more than what `engine-cache export` takes along
_LEFT = 0.75  # of it, so that not every new kernel has to make room


def prune(database: sqlite3.Connection, table: str, made_for: str, most: int) -> int:
    """Remove rows when more than `most` bytes are used, until a quarter of that is free. Returns how many.

    `table` is that of `engine.compilers.programs`, with tinygrad's cache format at its end. First go other formats'
    rows and those of tinygrad's own tables, out of which programs were made; then programs whose keys begin with
    something else than `made_for` (`engine.compatibility.digest`), then others, the oldest first.
    """
    used, removed = _bytes_used(database), 0
    if used <= most:
        return 0
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    with database:
        for name in tables:
            if not _ours(name, table):
                removed += database.execute(f'DELETE FROM "{name}"').rowcount
        for own in (False, True):
            excess = _bytes_used(database) - int(most * _LEFT)
            if excess > 0 and table in tables:
                removed += _remove_oldest(database, table, made_for, own, excess)
    return removed


def _ours(name: str, table: str) -> bool:
    return name.startswith("bitinglip_") and name.rpartition("_")[2] == table.rpartition("_")[2]


def _bytes_used(database: sqlite3.Connection) -> int:
    size, pages, free = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_size", "page_count", "freelist_count")
    )
    return int(size * (pages - free))


def _remove_oldest(database: sqlite3.Connection, table: str, made_for: str, own: bool, excess: int) -> int:
    """At least `excess` bytes of them, where there are so many."""
    which = f"substr(key, 1, {len(made_for) + 1}) {'=' if own else '!='} ?"
    prefix, newest = f"{made_for}:", 0
    ages = database.execute(
        f"SELECT rowid, length(val) FROM {table} WHERE {which} ORDER BY rowid", (prefix,)
    ).fetchall()
    for row, size in ages:
        if excess <= 0:
            break
        newest, excess = row, excess - size
    return database.execute(f"DELETE FROM {table} WHERE rowid <= ? AND {which}", (newest, prefix)).rowcount
