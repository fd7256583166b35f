"""`engine-cache export` and `import`: from host to host by signature, and everything that is refused."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from peer.adapters.devices import engine_cache
from peer.adapters.devices.engine_cache import MadeFor
from peer.adapters.links.cluster_files import ClusterFiles
from peer.cli.exits import Exit
from peer.errors import ConfigError
from peer.state.enrol import Enrolled
from tests.adapters.pki import Pki
from tests.cli.conftest import Run
from tests.cli.stub import Stub

FACTS = {
    "tinygrad": "0.13.0",
    "cache format": "22",
    "device": "CPU",
    "architecture": "x86_64",
    "features": "+avx,+avx2,-sse4a",
    "threads": "2",
}
HERE = MadeFor(FACTS, "ab" * 16)
ROWS = {f"{number:064x}": b"program %d" % number for number in range(5)}


@pytest.fixture(autouse=True)
def _equal_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "made_for", lambda device: HERE)


def cache_of(data_dir: Path) -> Path:
    return data_dir / "cache" / "cpu0" / "kernels.db"


def kept(data_dir: Path) -> dict[str, bytes]:
    with closing(sqlite3.connect(cache_of(data_dir))) as database:
        return dict(database.execute("SELECT key, val FROM bitinglip_programs_22"))


@pytest.fixture
def exported(run: Run, tmp_path: Path) -> tuple[Path, str]:
    """A single node's file, and the key that it is signed with."""
    host = tmp_path / "host1"
    host.mkdir(mode=0o700)
    engine_cache.merge(ROWS, HERE, cache_of(host).parent)
    engine_cache.merge({"f" * 64: b"for another card"}, MadeFor(FACTS, "cd" * 16), cache_of(host).parent)
    file = tmp_path / "kernels"
    ran = run("engine-cache", "export", str(file), "--device", "CPU", "--data-dir", str(host), "--json")
    assert ran.code == 0, ran.err
    assert ran.json["kernels"] == len(ROWS)
    return file, ran.json["signer"]


def test_from_one_single_node_to_another(run: Run, exported: tuple[Path, str], tmp_path: Path) -> None:
    file, key = exported
    host = tmp_path / "host2"
    engine_cache.merge({f"{0:064x}": b"older"}, HERE, cache_of(host).parent)
    ran = run("engine-cache", "import", str(file), "--trust", key, "--device", "CPU", "--data-dir", str(host))
    assert ran.code == 0, ran.err
    assert "cpu0" in ran.out
    expected = {f"{HERE.digest}:{row}": value for row, value in ROWS.items()}
    assert kept(host) == expected | {f"{HERE.digest}:{0:064x}": b"older"}
    assert cache_of(host).parent.stat().st_mode & 0o077 == 0
    again = run(
        "engine-cache",
        "import",
        str(file),
        "--trust",
        key,
        "--device",
        "CPU",
        "--data-dir",
        str(host),
        "--json",
    )
    assert again.json == {"kernels": 5, "signer": key, "added": {"cpu0": 0}}


def test_the_same_key_signs_again_and_is_known_at_home(
    run: Run, exported: tuple[Path, str], tmp_path: Path
) -> None:
    file, key = exported
    home = ("--device", "CPU", "--data-dir", str(tmp_path / "host1"))
    assert run("engine-cache", "import", str(file), *home).code == 0
    told = run("engine-cache", "export", str(file), *home)
    assert f"--trust {key}" in told.err
    assert (tmp_path / "host1" / "engine-cache.pem").stat().st_mode & 0o077 == 0


def refused(run: Run, file: Path, *arguments: str, data_dir: Path) -> tuple[int, str]:
    """An import that must leave nothing."""
    ran = run("engine-cache", "import", str(file), "--device", "CPU", "--data-dir", str(data_dir), *arguments)
    assert not cache_of(data_dir).exists()
    return ran.code, ran.err


def test_a_key_that_nobody_named_is_refused(run: Run, exported: tuple[Path, str], tmp_path: Path) -> None:
    file, key = exported
    code, said = refused(run, file, data_dir=tmp_path / "host2")
    assert code == Exit.UNAUTHORIZED
    assert key in said
    other = engine_cache.public_text(engine_cache.Ed25519PrivateKey.generate())
    assert refused(run, file, "--trust", other, data_dir=tmp_path / "host2")[0] == Exit.UNAUTHORIZED
    code, said = refused(run, file, "--trust", "mine", data_dir=tmp_path / "host2")
    assert (code, "is no key" in said) == (Exit.USAGE, True)


def test_any_changed_byte_is_refused(run: Run, exported: tuple[Path, str], tmp_path: Path) -> None:
    file, key = exported
    good = file.read_bytes()
    for at in range(0, len(good), 23):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        code, _ = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
        assert code in (Exit.UNAUTHORIZED, Exit.USAGE), at


def forged(file: Path, **changes: object) -> None:
    """The file with parts replaced, its signature as it was."""
    archive = msgspec.msgpack.decode(file.read_bytes(), type=engine_cache._Archive)
    file.write_bytes(msgspec.msgpack.encode(msgspec.structs.replace(archive, **changes)))


def test_other_programs_under_the_old_signature(run: Run, exported: tuple[Path, str], tmp_path: Path) -> None:
    file, key = exported
    forged(file, payload=msgspec.msgpack.encode({"0" * 64: b"another program"}))
    code, said = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
    assert (code, "was changed" in said) == (Exit.UNAUTHORIZED, True)


def test_signed_by_another_key_that_is_named_as_the_trusted_one(
    run: Run, exported: tuple[Path, str], tmp_path: Path
) -> None:
    file, key = exported
    archive = msgspec.msgpack.decode(file.read_bytes(), type=engine_cache._Archive)
    wrong = engine_cache.Ed25519PrivateKey.generate()
    forged(file, signature=wrong.sign(engine_cache._signed(archive.manifest)))
    code, said = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
    assert (code, "its signature is wrong" in said) == (Exit.UNAUTHORIZED, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tinygrad": "0.14.0"}, "tinygrad there is 0.13.0, here 0.14.0"),
        (
            {"architecture": "gfx1100", "device": "AMD"},
            "device there is CPU, here AMD; architecture there is x86_64",
        ),
        ({"features": "+avx,-avx2,-sse4a"}, "features there are +avx2"),
        ({"threads": "8"}, "threads there is 2, here 8"),
    ],
)
def test_kernels_for_something_else(
    run: Run,
    exported: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    words: str,
) -> None:
    file, key = exported
    monkeypatch.setattr(engine_cache, "made_for", lambda device: MadeFor(FACTS | change, "ef" * 16))
    code, said = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
    assert code == Exit.CONFLICT
    assert words in said


def test_what_is_no_such_file(
    run: Run, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = exported
    monkeypatch.setattr(engine_cache, "ARCHIVE_BYTES_MAX", file.stat().st_size - 1)
    code, said = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
    assert (code, "over the limit" in said) == (Exit.USAGE, True)
    file.write_bytes(b"\x80\x04]" + b"[" * 1_000)  # a pickle
    assert refused(run, file, "--trust", key, data_dir=tmp_path / "host2")[0] == Exit.USAGE
    assert refused(run, tmp_path / "none", data_dir=tmp_path / "host2")[0] == Exit.FAILED


def test_rows_that_an_export_would_not_write_are_refused_though_signed(
    run: Run, exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = exported
    monkeypatch.setattr(engine_cache, "_rows", lambda *_: {"../../etc/passwd": b"x"})
    assert (
        run(
            "engine-cache", "export", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "host1")
        ).code
        == 0
    )
    code, said = refused(run, file, "--trust", key, data_dir=tmp_path / "host2")
    assert (code, "no export writes" in said) == (Exit.USAGE, True)


# ---------------------------------------------------------------- in a cluster


def member(pki: Pki, data_dir: Path, peer_id: str, *, age_s: float = 0.0) -> None:
    """A data directory of a host of the cluster, with a kernel in its cache."""
    data_dir.mkdir(mode=0o700)
    pem = pki.host(peer_id, age_s=age_s).file.read_text()
    at = pem.index("-----BEGIN CERTIFICATE-----")
    enrolled = Enrolled(
        cluster=pki.cluster,
        peer_id=peer_id,
        certificate=pem[at:],
        ca=pki.ca_pem,
        voter=False,
        gossip_key="",
        seeds=(),
    )
    files = ClusterFiles(data_dir)
    files.folder.mkdir(mode=0o700)
    files.joined(pem[:at], enrolled)


def test_hosts_of_a_cluster_trust_each_other_and_nobody_else(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    ours, others = Pki(tmp_path / "pki"), Pki(tmp_path / "pki", "c2")
    member(ours, tmp_path / "a", "gpu-a")
    member(ours, tmp_path / "b", "gpu-b")
    member(others, tmp_path / "c", "gpu-c")
    engine_cache.merge(ROWS, HERE, cache_of(tmp_path / "a").parent)
    file = tmp_path / "kernels"
    ran = run("engine-cache", "export", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "a"))
    assert "signed by gpu-a" in ran.out
    ran = run("engine-cache", "import", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "b"))
    assert ran.code == 0, ran.err
    assert "no peer here could say whether gpu-a has been revoked" in ran.err
    assert len(kept(tmp_path / "b")) == len(ROWS)
    code, _ = refused(run, file, data_dir=tmp_path / "c")
    assert code == Exit.UNAUTHORIZED
    code, said = refused(run, file, data_dir=tmp_path / "alone")
    assert (code, "this host is in none" in said) == (Exit.UNAUTHORIZED, True)
    certificate = ours.host("gpu-x").file.read_text()
    forged(file, signer=certificate[certificate.index("-----BEGIN CERT") :])
    member(ours, tmp_path / "d", "gpu-d")
    assert refused(run, file, data_dir=tmp_path / "d")[0] == Exit.UNAUTHORIZED


def test_a_peer_that_runs_here_is_asked_whether_the_signer_was_revoked(
    run: Run, stub: Stub, tmp_path: Path
) -> None:
    (tmp_path / "pki").mkdir()
    pki = Pki(tmp_path / "pki")
    member(pki, tmp_path / "a", "gpu-a")
    member(pki, tmp_path / "b", "gpu-b")
    engine_cache.merge(ROWS, HERE, cache_of(tmp_path / "a").parent)
    file = tmp_path / "kernels"
    run("engine-cache", "export", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "a"))
    (tmp_path / "b" / "peer.json").write_text(msgspec.json.encode({"url": stub.url, "pid": 1}).decode())
    (tmp_path / "b" / "admin.key").write_text("blk_id_secret")
    stub.replies["GET /cluster/hosts"] = (200, {"hosts": [{"peer_id": "gpu-a", "status": "revoked"}]})
    code, said = refused(run, file, data_dir=tmp_path / "b")
    assert (code, "has been revoked" in said) == (Exit.UNAUTHORIZED, True)
    stub.replies["GET /cluster/hosts"] = (200, {"hosts": [{"peer_id": "gpu-a", "status": "offline"}]})
    assert (
        run("engine-cache", "import", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "b")).code
        == 0
    )


def test_a_certificate_that_has_ended_signs_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    pki = Pki(tmp_path / "pki")
    member(pki, tmp_path / "a", "gpu-a", age_s=40 * 86_400)
    member(pki, tmp_path / "b", "gpu-b")
    engine_cache.merge(ROWS, HERE, cache_of(tmp_path / "a").parent)
    file = tmp_path / "kernels"
    run("engine-cache", "export", str(file), "--device", "CPU", "--data-dir", str(tmp_path / "a"))
    code, said = refused(run, file, data_dir=tmp_path / "b")
    assert (code, "held until" in said) == (Exit.UNAUTHORIZED, True)


# ---------------------------------------------------------------- the cache itself


def test_an_import_waits_for_an_engine_that_writes_and_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = cache_of(tmp_path).parent
    engine_cache.merge({"0" * 64: b"first"}, HERE, folder)
    with closing(
        sqlite3.connect(folder / "kernels.db", isolation_level=None, check_same_thread=False)
    ) as engine:
        engine.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.2, lambda: engine.execute("COMMIT"))
        timer.start()
        began = time.monotonic()
        assert engine_cache.merge(ROWS, HERE, folder) == len(ROWS) - 1
        assert time.monotonic() - began > 0.1
        timer.join()
    with pytest.raises(ConfigError, match="binding"):
        engine_cache.merge({"1" * 64: b"good", "2" * 64: object()}, HERE, folder)  # type: ignore[dict-item]
    assert len(kept(tmp_path)) == len(ROWS)
    cache_of(tmp_path).write_bytes(b"no database" * 100)
    for suffix in ("-wal", "-shm"):
        Path(f"{cache_of(tmp_path)}{suffix}").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="not a database"):
        engine_cache.merge(ROWS, HERE, folder)


def test_nothing_to_export(run: Run, tmp_path: Path) -> None:
    ran = run(
        "engine-cache", "export", str(tmp_path / "k"), "--device", "CPU", "--data-dir", str(tmp_path / "data")
    )
    assert (ran.code, "load a model first" in ran.err) == (Exit.USAGE, True)
    ran = run("engine-cache", "export", str(tmp_path / "k"), "--device", "fake")
    assert (ran.code, "compiles kernels" in ran.err) == (Exit.USAGE, True)
