"""The cache file of kernels stays within its bound: what goes first, and others that use the file meanwhile."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from engine.compilers.pruning import prune
from tests.engine.devices import environment
from tests.engine.harness import REPOSITORY

TABLE, OURS, OTHERS = "bitinglip_programs_22", "a" * 32, "b" * 32
ROW = 20_000  # bytes; a page has 4096
MOST = 40 * ROW


def opened(path: Path) -> sqlite3.Connection:
    """As tinygrad opens it."""
    database = sqlite3.connect(path, timeout=60, isolation_level="IMMEDIATE")
    database.execute("PRAGMA journal_mode=WAL").fetchone()
    return database


def put(database: sqlite3.Connection, table: str, keys: list[str]) -> None:
    database.execute(f"CREATE TABLE IF NOT EXISTS '{table}' (key text, val blob, PRIMARY KEY (key))")
    for key in keys:
        database.execute(f"REPLACE INTO '{table}' (key, val) VALUES (?, ?)", (key, bytes(ROW)))
        database.commit()


def keys(database: sqlite3.Connection, table: str = TABLE) -> list[str]:
    return [key for (key,) in database.execute(f"SELECT key FROM '{table}' ORDER BY rowid")]


def named(made_for: str, count: int, first: int = 0) -> list[str]:
    return [f"{made_for}:{number}" for number in range(first, first + count)]


def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "k.db")) as database:
        assert prune(database, TABLE, OURS, MOST) == 0
        put(database, "compile_x_22", ["source"])
        put(database, TABLE, named(OTHERS, 10))
        assert prune(database, TABLE, OURS, MOST) == 0
        assert keys(database) == named(OTHERS, 10)


def test_what_is_of_no_use_goes_first_then_the_oldest(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "k.db")) as database:
        put(database, "bitinglip_programs_21", named(OURS, 10))
        put(database, "compile_x_22", ["source"])
        put(database, "bitinglip_searches_22", ["kernel"])
        put(database, TABLE, [*named(OURS, 10), *named(OTHERS, 10), *named(OURS, 10, first=10)])
        assert prune(database, TABLE, OURS, MOST) >= 11
        assert keys(database, "bitinglip_programs_21") == keys(database, "compile_x_22") == []
        assert keys(database, "bitinglip_searches_22") == ["kernel"]
        left = keys(database)
        assert left[:10] == named(OURS, 10)
        assert 0 < len(left) - 20 < 10, "of another version's only the oldest, until there is room"
        assert f"{OTHERS}:9" in left

        put(database, TABLE, named(OURS, 30, first=20))
        prune(database, TABLE, OURS, MOST)
        left = keys(database)
        assert left == named(OURS, len(left), first=50 - len(left))
        assert MOST // 2 < len(left) * ROW < MOST


def test_the_file_stays_as_large_as_it_once_was(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "k.db")) as database:
        for first in range(0, 400, 5):
            put(database, TABLE, named(OURS, 5, first))
            prune(database, TABLE, OURS, MOST)
            assert f"{OURS}:{first + 4}" in keys(database)
    assert (tmp_path / "k.db").stat().st_size < 1.5 * MOST


def test_others_write_meanwhile(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write(name: str) -> None:
        try:
            with closing(opened(tmp_path / "k.db")) as database:
                for number in range(60):
                    put(database, TABLE, [f"{name * 32}:{number}"])
                    prune(database, TABLE, name * 32, MOST)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    with closing(opened(tmp_path / "k.db")) as database:
        assert 0 < len(keys(database)) * ROW < MOST
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


SCRIPT = """
import numpy as np
from engine.compilers import programs, pruning
from tests.engine.devices import open_suites
pruning.BYTES_MAX = 80_000
open_suites()
from tinygrad import Tensor
for size in range(2, 28):
    assert Tensor(np.ones(size, dtype=np.float32)).sum().item() == size
print(programs.compiled())
"""


@pytest.mark.process
def test_kernels_that_went_are_compiled_again(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=REPOSITORY,
            env=environment(tmp_path / "k.db"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout) >= 20
    assert (tmp_path / "k.db").stat().st_size < 250_000
