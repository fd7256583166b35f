"""One file over HTTP: resumed where it was cut off, hashed on its way, in place only when it is whole.

Bytes go to `NAME.part` beside the target; `NAME.part.json` says what they are of, so that a later process can go
on. Cut connections, time-outs and 429 or 5xx answers are tried again, everything else is final.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec
import structlog
import trio

from peer.engines import FetchError, Progress

if TYPE_CHECKING:
    import httpx

CHUNK_BYTES: Final = 1024 * 1024
FILE_BYTES_MAX: Final = 2 * 1024**4
DISK_RESERVE_BYTES: Final = 256 * 1024 * 1024
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?\Z')
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)\Z")

log = structlog.get_logger("fetch")


class DownloadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`tries` in a row without a new byte; `backoff_s` between them."""

    tries: int = 6
    tries_in_all: int = 200
    backoff_s: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 15.0)
    retry_after_s_max: float = 60.0
    connect_s: float = 10.0
    silence_s: float = 30.0
    bytes_max: int = FILE_BYTES_MAX


class _Again(Exception):
    """It may work the next time."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Mark(msgspec.Struct):
    """What a .part file is the beginning of."""

    url: str
    etag: str = ""
    sha256: str = ""


class Download:
    """One transfer. `size_bytes` 0 and `sha256` "" are unknown; a hub's own word on them is taken then."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        target: Path,
        *,
        size_bytes: int = 0,
        sha256: str = "",
        headers: Mapping[str, str] | None = None,
        allowed: DownloadLimits | None = None,
    ) -> None:
        self._client = client
        self._url = url
        self._shown_url = url.split("?", 1)[0]
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._mark_path = target.with_name(target.name + ".part.json")
        self._size = size_bytes
        self._wanted = sha256
        self._headers = dict(headers or {})
        self._allowed = allowed or DownloadLimits()
        self._mark = _Mark(url, sha256=sha256)
        self._hash = hashlib.sha256()
        self._have = 0
        self._resumed = False

    async def run(self, progress: Progress) -> str:
        """Fetch, verify, put in place. Returns the file's sha256; raises FetchError."""
        try:
            return await self._run(progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                text = f"the disk is full: {self._target.parent}"
                raise FetchError("disk_full", text) from None
            raise FetchError("disk_error", f"{self._target}: {error.strerror or error}") from None

    async def _run(self, progress: Progress) -> str:
        await trio.to_thread.run_sync(self._target.parent.mkdir, 0o700, True, True)
        await self._take_up(progress)
        failures = 0
        for _ in range(self._allowed.tries_in_all):
            had = self._have
            try:
                await self._transfer(progress)
                found = await self._finish()
                if found is not None:
                    return found
                continue
            except _Again as error:
                failures = 0 if self._have > had else failures + 1
                if failures >= self._allowed.tries:
                    text = f"{self._shown_url} cannot be downloaded: {error}; what is there is kept"
                    raise FetchError("download_failed", text) from None
                backoff = self._allowed.backoff_s
                wait_s = error.wait_s or backoff[min(failures, len(backoff) - 1)]
                log.info(
                    "download_again", url=self._shown_url, reason=str(error), wait_s=wait_s, have=self._have
                )
                await trio.sleep(wait_s)
        raise FetchError("download_failed", f"{self._shown_url} was cut off too often; what is there is kept")

    # ------------------------------------------------------------ what an earlier process has left

    async def _take_up(self, progress: Progress) -> None:
        mark = await trio.to_thread.run_sync(self._read_mark)
        if (
            mark is None
            or mark.url != self._url
            or mark.sha256 != self._wanted
            or not (mark.etag or mark.sha256)
        ):
            await trio.to_thread.run_sync(self._empty)
            return
        self._mark = mark
        with open(self._part, "rb") as part:  # noqa: ASYNC230
            self._have = await hash_file(part, self._hash, progress, os.fstat(part.fileno()).st_size)
        self._resumed = self._have > 0

    def _read_mark(self) -> _Mark | None:
        try:
            mark = msgspec.json.decode(self._mark_path.read_bytes(), type=_Mark)
        except (OSError, msgspec.DecodeError):
            return None
        return mark if self._part.is_file() else None

    def _empty(self) -> None:
        """Begin anew."""
        self._mark = _Mark(self._url, sha256=self._wanted)
        self._hash = hashlib.sha256()
        self._have = 0
        self._resumed = False
        with open(self._part, "wb"):
            pass

    # ------------------------------------------------------------ one try

    async def _transfer(self, progress: Progress) -> None:
        """Read until the file is whole. Raises _Again or FetchError."""
        import httpx

        headers = self._headers | {"Accept-Encoding": "identity"}
        if self._have:
            headers["Range"] = f"bytes={self._have}-"
            if self._mark.etag:
                headers["If-Range"] = self._mark.etag
        timeout = httpx.Timeout(self._allowed.silence_s, connect=self._allowed.connect_s)
        try:
            async with self._client.stream(
                "GET", self._url, headers=headers, timeout=timeout, follow_redirects=True
            ) as response:
                if await self._judge(response):
                    await self._body(response, progress)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise FetchError("bad_source", f"{self._shown_url}: {error}") from None
        except httpx.TransportError as error:
            raise _Again(f"{type(error).__name__}: {error}".rstrip(": ")) from None

    async def _judge(self, response: httpx.Response) -> bool:
        """Whether a body that goes on where we are follows; also learns size, etag and the hub's hash."""
        status = response.status_code
        if status == 416:
            return await self._beyond_end(response)
        if status in _TRANSIENT:
            raise _Again(f"the server answered {status}", self._retry_after_s(response))
        if status not in (200, 206):
            code = {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}.get(
                status, "download_failed"
            )
            hint = "; a gated model needs HF_TOKEN in the peer's environment" if code == "forbidden" else ""
            raise FetchError(code, f"{self._shown_url}: the server answered {status}{hint}")
        total = self._total(response)
        if status == 206 and self._range_start(response) != self._have:
            await trio.to_thread.run_sync(self._empty)
            raise _Again("the server sent another part than was asked for")
        if status == 200 and self._have:  # it does not do ranges, or the file has changed
            await trio.to_thread.run_sync(self._empty)
        self._learn(response)
        await self._check_size(total)
        await trio.to_thread.run_sync(self._write_mark)
        return True

    async def _beyond_end(self, response: httpx.Response) -> bool:
        match = _RANGE.match(response.headers.get("content-range", ""))
        if match and match[3] == str(self._have):
            self._size = self._size or self._have
            return False
        await trio.to_thread.run_sync(self._empty)
        raise _Again("the server has a shorter file than what is here")

    def _learn(self, response: httpx.Response) -> None:
        etag = response.headers.get("etag", "")
        self._mark.etag = etag if etag.startswith('"') else ""
        for answer in (*response.history, response):
            match = _SHA256.match(answer.headers.get("x-linked-etag", ""))
            if match and not self._wanted:
                self._wanted = match[1]

    def _total(self, response: httpx.Response) -> int:
        """Of the whole file, 0 if the server does not say."""
        match = _RANGE.match(response.headers.get("content-range", ""))
        if match and response.status_code == 206:
            return 0 if match[3] == "*" else int(match[3])
        length = response.headers.get("content-length", "")
        return int(length) if response.status_code == 200 and length.isdecimal() else 0

    def _range_start(self, response: httpx.Response) -> int:
        match = _RANGE.match(response.headers.get("content-range", ""))
        return int(match[1]) if match and match[1] else -1

    def _retry_after_s(self, response: httpx.Response) -> float:
        text = response.headers.get("retry-after", "")
        return min(float(text), self._allowed.retry_after_s_max) if text.isdecimal() else 0.0

    async def _check_size(self, total: int) -> None:
        most = self._allowed.bytes_max
        if self._size and total and total != self._size:
            text = f"{self._shown_url} has {total} bytes, the catalogue says {self._size}"
            raise FetchError("wrong_size", text)
        if total > most or self._size > most:
            raise FetchError("too_large", f"{self._shown_url} has {total} bytes, over the limit of {most}")
        self._size = self._size or total
        missing = self._size - self._have
        free = (await trio.to_thread.run_sync(shutil.disk_usage, self._target.parent)).free
        if missing + DISK_RESERVE_BYTES > free:
            text = (
                f"{self._target.parent} has {free} bytes free; {missing} are missing of {self._shown_url} and "
                f"{DISK_RESERVE_BYTES} are kept free"
            )
            raise FetchError("disk_full", text)

    async def _body(self, response: httpx.Response, progress: Progress) -> None:
        with open(self._part, "r+b") as part:  # noqa: ASYNC230
            part.seek(self._have)
            part.truncate()
            await self._pour(response, part, progress)
        if self._size and self._have < self._size:
            raise _Again(f"it was cut off after {self._have} of {self._size} bytes")

    async def _pour(self, response: httpx.Response, part: BinaryIO, progress: Progress) -> None:
        """The body into the file. httpx's generators must run to their end, so trouble of ours waits for it."""
        import httpx

        most = self._size or self._allowed.bytes_max
        trouble: FetchError | OSError | None = None
        try:
            async for chunk in response.aiter_raw(CHUNK_BYTES):
                if trouble is None and self._have + len(chunk) > most:
                    trouble = FetchError("too_large", f"{self._shown_url} sends more than {most} bytes")
                if trouble is None:
                    try:
                        await trio.to_thread.run_sync(self._keep, part, chunk)
                        progress("fetch", self._have, self._size)
                    except OSError as error:
                        trouble = error
                if trouble is not None:
                    await response.aclose()  # the next read ends the iteration
        except (httpx.TransportError, httpx.StreamError):
            if trouble is None:
                raise
        if trouble is not None:
            raise trouble

    def _keep(self, part: BinaryIO, chunk: bytes) -> None:
        part.write(chunk)
        self._hash.update(chunk)
        self._have += len(chunk)

    def _write_mark(self) -> None:
        self._mark_path.write_bytes(msgspec.json.encode(self._mark))

    # ------------------------------------------------------------ the end

    async def _finish(self) -> str | None:
        """The hash, with the file in place; None to fetch it once more from the beginning."""
        found = self._hash.hexdigest()
        if self._wanted and found != self._wanted:
            resumed = self._resumed
            await trio.to_thread.run_sync(self._empty)
            if resumed:  # what an earlier process left was bad
                log.warning("download_was_corrupt", url=self._shown_url)
                return None
            await trio.to_thread.run_sync(self._discard)
            text = f"{self._shown_url} has the sha256 {found}, expected was {self._wanted}: not used"
            raise FetchError("wrong_hash", text)
        await trio.to_thread.run_sync(put_in_place, self._part, self._target)
        self._mark_path.unlink(missing_ok=True)
        return found

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._mark_path.unlink(missing_ok=True)


async def hash_file(stream: BinaryIO, into: Any, progress: Callable[[str, int, int], None], size: int) -> int:
    """Feed a file to a hash in a thread, chunk by chunk. Returns its length."""

    def step() -> int:
        data = stream.read(8 * CHUNK_BYTES)
        into.update(data)
        return len(data)

    done = 0
    while count := await trio.to_thread.run_sync(step):
        done += count
        progress("verify", done, size)
    return done


def put_in_place(part: Path, target: Path) -> None:
    """Durable, then visible."""
    with open(part, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
