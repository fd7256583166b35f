"""Corrupt, truncated and hostile model files give clear errors, never a crash or a big allocation."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import LoadError
from engine.files import gguf
from engine.models import check_family
from engine.text import tokenizer
from tests.engine.small_gguf import write

METADATA = {"general.architecture": "llama", "llama.block_count": 1, "x.names": ["a", "b"], "x.scores": [0.5]}


def good(folder: Path) -> Path:
    tensors = {"a.weight": ((4, 2), 0, bytes(32)), "b.weight": ((32,), 8, bytes(34))}
    return write(folder / "good.gguf", METADATA, tensors)


def test_reads_metadata_and_places(tmp_path: Path) -> None:
    header = gguf.read(good(tmp_path))
    assert header.metadata["x.names"] == ["a", "b"]
    assert header.integer("llama.block_count") == 1
    assert header.tensors["a.weight"].shape == (2, 4)
    assert header.tensors["b.weight"].size == 34
    assert header.tensors["a.weight"].offset % 32 == 0


def test_every_truncation_is_named(tmp_path: Path) -> None:
    whole = good(tmp_path).read_bytes()
    used = len(whole) - (-34 % 32)  # the last tensor's padding may go
    cut = tmp_path / "cut.gguf"
    for length in range(0, used, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(LoadError) as caught:
            gguf.read(cut)
        assert caught.value.code == "bad_model_file"
        assert "cut.gguf" in str(caught.value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_flipped_bytes_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good(tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(raw)
    try:
        header = gguf.read(bad)
    except LoadError:
        return
    assert all(info.offset + info.size <= len(raw) for info in header.tensors.values())


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "bytes"),
        (b"PK\x03\x04" + bytes(60), "GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(8), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50) + b"x", "ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 40), "announces"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 20), "announces"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "type 77"),
    ],
)
def test_hostile_headers(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(LoadError, match=words):
        gguf.read(path)


@pytest.mark.parametrize("kind", [0, 8])
def test_a_big_file_is_no_reason_for_a_big_header(tmp_path: Path, kind: int) -> None:
    """The file really has what it announces: holes of gigabytes. Small, and refused at once."""
    path = tmp_path / "big.gguf"
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k"
    counted = head + struct.pack("<IIQ", 9, kind, 1 << 31)  # an array of bytes, of strings
    path.write_bytes(counted)
    os.truncate(path, 1 << 35)
    with pytest.raises(LoadError, match="announces arrays"):
        gguf.read(path)
    path.write_bytes(head + struct.pack("<IQ", 8, 1 << 31))  # a string
    os.truncate(path, 1 << 35)
    with pytest.raises(LoadError, match="header has more than"):
        gguf.read(path)


def test_a_very_long_token(tmp_path: Path) -> None:
    names = ["<unk>", "a" * 100_000]
    metadata = METADATA | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [0.0, -1.0],
    }
    with pytest.raises(LoadError, match="tokens of more than"):
        tokenizer.from_gguf(gguf.read(write(tmp_path / "long.gguf", metadata, {})))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(LoadError) as caught:
            gguf.read(path)
        assert caught.value.code == "bad_model_file"


def test_unknown_quantisation_and_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "q.gguf", METADATA, {"a.weight": ((256,), 10, bytes(84))})
    with pytest.raises(LoadError) as caught:
        gguf.read(path)
    assert caught.value.code == "unsupported_quantisation"
    other = gguf.read(write(tmp_path / "o.gguf", {"general.architecture": "gemma2"}, {}))
    with pytest.raises(LoadError) as caught:
        check_family(other, "gemma2")
    assert caught.value.code == "unsupported_architecture"
    with pytest.raises(LoadError, match="catalogue"):
        check_family(gguf.read(good(tmp_path)), "qwen2")
