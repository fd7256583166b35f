"""Where a model's file comes from: a catalogue entry's `source`, understood."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

SUFFIXES: Final = (".gguf", ".safetensors", ".onnx")
PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SOURCE_CHARS_MAX: Final = 2_000
FORMS: Final = (
    "package:NAME==VERSION#MEMBER, hf:OWNER/REPO@REVISION#PATH, https://..., file:/PATH, builtin:echo"
)
_PACKAGE = re.compile(r"package:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)#(.+)\Z")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)@([\w./-]+)#(.+)\Z", re.ASCII)


class SourceError(Exception):
    """It is none of the known forms; the text says what is expected."""


class PackageSource(msgspec.Struct, frozen=True):
    name: str
    version: str
    member: str


class HubSource(msgspec.Struct, frozen=True):
    repository: str
    revision: str
    path: str

    def url(self, base: str) -> str:
        return f"{base}/{self.repository}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"


class UrlSource(msgspec.Struct, frozen=True):
    url: str


class FileSource(msgspec.Struct, frozen=True):
    path: str


class BuiltinSource(msgspec.Struct, frozen=True):
    name: str


Source = PackageSource | HubSource | UrlSource | FileSource | BuiltinSource


def parse_source(text: str) -> Source:
    """Raises SourceError. Paths cannot climb out of where they are; pickled weights are refused."""
    if len(text) > SOURCE_CHARS_MAX or any(ord(character) < 32 for character in text):
        raise SourceError(f"expected one of {FORMS}")
    if text == "builtin:echo":
        return BuiltinSource("echo")
    if match := _PACKAGE.match(text):
        return PackageSource(match[1], match[2], _safe(match[3]))
    if match := _HUB.match(text):
        if ".." in match[1] or ".." in match[2]:
            raise SourceError("`..` has no place in a repository or revision")
        return HubSource(match[1], match[2], _safe(match[3]))
    if text.startswith("file:"):
        path = text.removeprefix("file:")
        if not path.startswith("/"):
            raise SourceError("file: needs a full path: file:/srv/models/x.gguf")
        return FileSource(_known(path, folder_too=True))
    if text.startswith(("https://", "http://")):
        parts = urlsplit(text)
        if not parts.hostname or parts.username or parts.password:
            raise SourceError("expected https://HOST/PATH, without a password")
        _known(parts.path)
        return UrlSource(text)
    raise SourceError(f"expected one of {FORMS}")


def file_name(source: Source) -> str:
    """What its file is called on disk."""
    match source:
        case PackageSource():
            path = source.member
        case HubSource() | FileSource():
            path = source.path
        case UrlSource():
            path = urlsplit(source.url).path
        case BuiltinSource():
            path = source.name
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[-1])


def _safe(path: str) -> str:
    if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise SourceError(f"`{path}` is no plain relative path")
    return _known(path)


def _known(path: str, folder_too: bool = False) -> str:
    lower = path.lower()
    if lower.endswith(PICKLED):
        raise SourceError(
            f"`{path}` is a pickle, which can run any code when it is read; use GGUF or safetensors"
        )
    if not lower.endswith(SUFFIXES) and not folder_too:
        raise SourceError(f"`{path}` ends in none of {', '.join(SUFFIXES)}")
    return path
