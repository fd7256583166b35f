"""Compiled kernels of this host's engines as a signed file, so that another host with equal devices starts warm.

An engine unpickles what it finds in its cache: whoever writes there runs code as the peer. So nothing is taken from a
file before its signature has been checked: in a cluster it is a host's, by the certificate that the CA issued;
elsewhere that of an Ed25519 key of the owner, which is made on the first export and named on import. What is taken are
rows of one table whose keys begin with what the kernels were made for; a file names no files and no tables.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peer.adapters.devices.engine_process import engine_environment
from peer.adapters.links import certificates
from peer.adapters.links.cluster_files import ClusterFiles
from peer.adapters.models.download import put_in_place
from peer.errors import BadRequest, ConfigError, Conflict, Unauthorized
from peer.identity import make_folder, write_private

CACHE_FOLDER: Final = "cache"
CACHE_FILE: Final = "kernels.db"
KEY_FILE: Final = "engine-cache.pem"
ARCHIVE_BYTES_MAX: Final = 256 * 1024 * 1024
KERNELS_MAX: Final = 100_000
DESCRIBE_S_MAX: Final = 60.0
LOCK_S_MAX: Final = 60.0
_MAGIC: Final = "bitinglip engine cache 1"
_KEY_PREFIX: Final = "ed25519:"
_ROW = re.compile(r"[0-9a-f]{64}\Z")


class MadeFor(msgspec.Struct, frozen=True):
    """What kernels depend on (`engine.compatibility`), and its digest."""

    facts: dict[str, str]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]

    @property
    def table(self) -> str:
        return f"bitinglip_programs_{int(self.facts['cache format'])}"


class Manifest(msgspec.Struct, frozen=True):
    """What is signed."""

    facts: dict[str, str]
    made_at: float
    kernels: int
    payload_sha256: str


class _Archive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    magic: str
    manifest: bytes  # JSON
    signature: bytes  # of the magic and the manifest
    signer: str  # a host's certificate, PEM, or a public key as `public_text` writes it
    payload: bytes  # msgpack: dict of row and program


def made_for(device: str) -> MadeFor:
    """Asked of a process like the engine's, which does not open the device. Raises ConfigError."""
    command = [sys.executable, "-P", "-m", "engine.compatibility", device]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=engine_environment(),
            cwd="/",
            timeout=DESCRIBE_S_MAX,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"what {device}'s kernels depend on cannot be told: {error}") from None
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[-1_000:]
        raise ConfigError(f"{device} cannot be used: {said}")
    return msgspec.json.decode(done.stdout, type=MadeFor)


# ---------------------------------------------------------------- export


def export(
    data_dir: Path, labels: Iterable[str], wanted: MadeFor, target: Path, now: float
) -> tuple[int, str]:
    """Write what the caches of these devices have into `target`. Returns how many kernels, and who signed.

    Raises BadRequest where there is nothing to write, ConfigError, OSError.
    """
    rows: dict[str, bytes] = {}
    for label in labels:
        rows |= _rows(data_dir / CACHE_FOLDER / label / CACHE_FILE, wanted)
    if not rows:
        raise BadRequest(
            f"no kernels for {wanted.facts['device']} {wanted.facts['architecture']} are kept in "
            f"{data_dir / CACHE_FOLDER}: load a model first"
        )
    payload = msgspec.msgpack.encode(rows)
    if len(rows) > KERNELS_MAX or len(payload) > ARCHIVE_BYTES_MAX - 1024 * 1024:
        raise BadRequest(
            f"{len(rows)} kernels of {len(payload)} bytes are over the limit of {KERNELS_MAX} and "
            f"{ARCHIVE_BYTES_MAX}: stop the peer and remove {data_dir / CACHE_FOLDER} to begin anew"
        )
    manifest = msgspec.json.encode(
        Manifest(wanted.facts, now, len(rows), hashlib.sha256(payload).hexdigest())
    )
    signer, signature = _sign(data_dir, _signed(manifest))
    archive = msgspec.msgpack.encode(_Archive(_MAGIC, manifest, signature, signer, payload))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".engine-cache-") as folder:
        part = Path(folder) / "part"
        part.write_bytes(archive)
        put_in_place(part, target)
    return len(rows), signer if signer.startswith(_KEY_PREFIX) else _host_of(signer)


def _rows(file: Path, wanted: MadeFor) -> dict[str, bytes]:
    if not file.is_file():
        return {}
    try:
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", timeout=LOCK_S_MAX, uri=True)
        ) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (wanted.table,)).fetchone():
                return {}
            found = database.execute(
                f"SELECT key, val FROM {wanted.table} WHERE key > ? AND key < ? LIMIT {KERNELS_MAX + 1}",
                (f"{wanted.digest}:", f"{wanted.digest};"),
            )
            return {key.partition(":")[2]: bytes(value) for key, value in found}
    except sqlite3.Error as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _signed(manifest: bytes) -> bytes:
    return _MAGIC.encode() + b"\n" + manifest


def _sign(data_dir: Path, data: bytes) -> tuple[str, bytes]:
    """The certificate or public key to check it with, and the signature."""
    files = ClusterFiles(data_dir)
    if files.belonging() is not None:
        pem = files.credentials().file.read_text()
        return pem[pem.index("-----BEGIN CERTIFICATE-----") :], certificates.sign(pem, data)
    key = _owner_key(data_dir, create=True)
    assert key is not None
    return public_text(key), key.sign(data)


def _owner_key(data_dir: Path, *, create: bool) -> Ed25519PrivateKey | None:
    file = data_dir / KEY_FILE
    if not file.exists():
        if not create:
            return None
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        make_folder(data_dir)
        write_private(file, pem.decode())
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file} is no Ed25519 key")
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """The public half, for people to pass on."""
    return _KEY_PREFIX + base64.urlsafe_b64encode(key.public_key().public_bytes_raw()).decode()


def parse_public(text: str) -> Ed25519PublicKey:
    """Raises BadRequest."""
    try:
        raw = base64.b64decode(text.removeprefix(_KEY_PREFIX), altchars=b"-_", validate=True)
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise BadRequest(
            f"{text[:100]!r} is no key; `engine-cache export` prints it: {_KEY_PREFIX}..."
        ) from None


# ---------------------------------------------------------------- import


def read(
    source: Path, data_dir: Path, trusted: Iterable[str], now: float
) -> tuple[str, Manifest, dict[str, bytes]]:
    """Whom a file is signed by, what it is for, its rows. Nothing of it is used before its signature is known.

    Raises BadRequest on what is no such file, Unauthorized on a signature that is not trusted, ConfigError, OSError.
    """
    with open(source, "rb") as stream:
        data = stream.read(ARCHIVE_BYTES_MAX + 1)
    if len(data) > ARCHIVE_BYTES_MAX:
        raise BadRequest(f"{source} is over the limit of {ARCHIVE_BYTES_MAX} bytes")
    try:
        archive = msgspec.msgpack.decode(data, type=_Archive)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadRequest(f"{source} is no exported engine cache: {error}") from None
    if archive.magic != _MAGIC:
        raise BadRequest(f"{source} is no exported engine cache of this version of bitinglip")
    signer = _check_signature(archive, data_dir, frozenset(trusted), now)
    manifest = msgspec.json.decode(archive.manifest, type=Manifest)
    if hashlib.sha256(archive.payload).hexdigest() != manifest.payload_sha256:
        raise Unauthorized(f"{source} was changed after it was signed")
    rows = msgspec.msgpack.decode(archive.payload, type=dict[str, bytes])
    if len(rows) > KERNELS_MAX or not all(_ROW.match(row) for row in rows):
        raise BadRequest(f"{source} has rows that no export writes")
    return signer, manifest, rows


def _check_signature(archive: _Archive, data_dir: Path, trusted: frozenset[str], now: float) -> str:
    """Who signed it."""
    data = _signed(archive.manifest)
    if archive.signer.startswith(_KEY_PREFIX):
        own = _owner_key(data_dir, create=False)
        known = {*trusted, *([public_text(own)] if own else [])}
        key = parse_public(archive.signer)
        if archive.signer not in known:
            raise Unauthorized(
                f"it is signed with the key {archive.signer[:100]}, which is not trusted here; if that is what "
                "`engine-cache export` printed on the other host, name it with --trust"
            )
        try:
            key.verify(archive.signature, data)
        except InvalidSignature:
            raise Unauthorized(
                "its signature is wrong: it was changed, or is not by the key it names"
            ) from None
        return archive.signer
    files = ClusterFiles(data_dir)
    if files.belonging() is None:
        raise Unauthorized("it is signed by a host of a cluster, and this host is in none")
    subject = certificates.signer_of(archive.signer, files.ca_pem(), archive.signature, data, now)
    return subject.peer_id


def check_made_for(manifest: Manifest, wanted: MadeFor) -> None:
    """Raises Conflict that says in what the two hosts differ."""
    differences = []
    for name in dict.fromkeys((*wanted.facts, *manifest.facts)):
        there, here = manifest.facts.get(name, "none"), wanted.facts.get(name, "none")
        if there == here:
            continue
        if name == "features":
            marks = sorted(set(there.split(",")) ^ set(here.split(",")))
            has = [mark for mark in marks if mark in there.split(",")]
            differences.append(f"features there are {','.join(has)[:300] or 'fewer'}")
        else:
            differences.append(f"{name} there is {there[:100]}, here {here}")
    if differences:
        raise Conflict(f"its kernels do not run here: {'; '.join(differences)}", code="other_device")


def merge(rows: Mapping[str, bytes], wanted: MadeFor, folder: Path) -> int:
    """Into the cache in `folder`, all or none, also while an engine uses it. Returns how many were not there.

    Raises ConfigError, OSError.
    """
    make_folder(folder)
    file = folder / CACHE_FILE
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_S_MAX, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute(
                    f"CREATE TABLE IF NOT EXISTS '{wanted.table}' (key text, val blob, PRIMARY KEY (key))"
                )
                before = database.total_changes
                database.executemany(
                    f"INSERT OR IGNORE INTO '{wanted.table}' (key, val) VALUES (?, ?)",
                    ((f"{wanted.digest}:{row}", value) for row, value in rows.items()),
                )
                added = database.total_changes - before
    except sqlite3.Error as error:
        raise ConfigError(f"{file} cannot be written: {error}") from None
    os.chmod(file, 0o600)
    return added


def _host_of(certificate_pem: str) -> str:
    return certificates.subject_of(certificates.der_of(certificate_pem)).peer_id
