"""SQLite stores of other processes: killed, side by side, on disks that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from peer.adapters.stores.sqlite_store import SqliteStore
from tests.contracts.conftest import SqliteFactory
from tests.contracts.sqlite_child import FAIL_FILE_ENV
from tests.contracts.store import put, values

REPOSITORY = Path(__file__).resolve().parents[2]
FAILING_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int fails(void) {
  const char *file = getenv("BITINGLIP_TEST_FAIL_FILE");
  if (!file || access(file, F_OK)) return 0;
  errno = EIO;
  return 1;
}
int fsync(int fd) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
"""


def child(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.contracts.sqlite_child", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def acknowledged(lines: list[str]) -> dict[str, int]:
    return {key: int(revision) for key, _, revision in (line.partition(" ") for line in lines)}


@pytest.mark.process
async def test_what_was_acknowledged_outlives_a_kill(
    store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    for run in range(3):
        process = child("write", store_factory.path, f"run{run}")
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(150)]
        process.kill()
        rest, errors = process.communicate()
        assert errors == ""
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        store = await store_factory.open(nursery)
        written = {item.key[2:]: item for item in (await store.range("a/", "a0")).items}
        for key, revision in acknowledged(lines).items():
            assert written[key].mod_revision == revision
        pairs = (await store.range("b/", "b0")).items
        assert {item.key[2:]: item.mod_revision for item in pairs} == {
            key: item.mod_revision for key, item in written.items()
        }
        await store.aclose()


@pytest.mark.process
async def test_two_processes_write_side_by_side(store_factory: SqliteFactory, nursery: trio.Nursery) -> None:
    store = await SqliteStore.open(store_factory.path, nursery, clock=store_factory.clock)
    process = child("write", store_factory.path, "other")
    assert process.stdout is not None
    theirs = [await trio.to_thread.run_sync(process.stdout.readline)]
    ours = [await put(store, f"ours/{number:03}") for number in range(50)]
    process.kill()
    rest, errors = process.communicate()
    assert errors == ""
    theirs += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    assert not set(ours) & set(acknowledged(theirs).values())
    assert sorted(ours) == ours
    assert await store.count("ours/", "ours0") == 50
    assert await store.count("a/", "a0") >= len(theirs)
    await store.aclose()


async def check_broken(factory: SqliteFactory, nursery: trio.Nursery, how: str, **environment: str) -> None:
    process = child("break", factory.path, how, **environment)
    output, errors = await trio.to_thread.run_sync(process.communicate)
    assert errors == ""
    count_line, *last = output.splitlines()
    assert last == ["ok"]
    count = int(count_line.removeprefix("acknowledged "))
    store = await factory.open(nursery)
    assert {f"k/{number:04}" for number in range(count)} <= set(await values(store, "k/", "k0"))
    await put(store, "usable again")
    await store.aclose()


@pytest.mark.process
async def test_a_full_disk_breaks_the_store_for_good(
    store_factory: SqliteFactory, nursery: trio.Nursery
) -> None:
    await check_broken(store_factory, nursery, "full")


@pytest.mark.process
async def test_a_failed_fsync_breaks_the_store_for_good(
    store_factory: SqliteFactory, nursery: trio.Nursery, tmp_path: Path
) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: an fsync that fails is made with a preloaded library")
    source, library = tmp_path / "fsync.c", tmp_path / "fsync.so"
    source.write_text(FAILING_FSYNC)
    await trio.run_process([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"])
    environment = {"LD_PRELOAD": str(library), FAIL_FILE_ENV: str(tmp_path / "fail")}
    await check_broken(store_factory, nursery, "fsync", **environment)
