"""A script: `python -m tests.engine.fuzz TARGET SECONDS [SEED]` feeds broken model files to what reads them.

Whatever the bytes are, only an EngineError (or, from a chat template, a TemplateError) may come out, within bounded
time and memory. With atheris installed the inputs are guided by coverage, else they are mutations of valid files. Exits
with status 0, or not, having printed the input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

GROWTH_BYTES_MAX = 1 << 30  # of address space, over what the imports took
INPUT_SECONDS_MAX = 6.0  # of processor time; a template may take 2
INPUT_BYTES_MAX = 1 << 16
TEXT_MAX = 1600
CODES = ("bad_model_file", "unsupported_architecture", "unsupported_tokenizer", "unsupported_quantisation")
FIXTURES = Path(__file__).parent / "families"
ATHERIS = importlib.util.find_spec("atheris") is not None
os.environ |= {"DEV": "CPU:LLVM", "CACHELEVEL": "0"}  # of what an ONNX model's parser computes

if ATHERIS:
    import atheris

    with atheris.instrument_imports(include=["engine"], enable_loader_override=False):
        from engine import checkpoint, device, models
        from engine.embedding.loading import EmbeddingFiles
        from engine.errors import EngineError
        from engine.files import gguf, safetensors
        from engine.kernels.weights import weights_bytes
        from engine.onnx.model import MODEL, TEST, OnnxFiles, OnnxModel
        from engine.self_test import open_devices
        from engine.text import chat, templates
else:
    from engine import checkpoint, device, models
    from engine.embedding.loading import EmbeddingFiles
    from engine.errors import EngineError
    from engine.files import gguf, safetensors
    from engine.kernels.weights import weights_bytes
    from engine.onnx.model import MODEL, TEST, OnnxFiles, OnnxModel
    from engine.self_test import open_devices
    from engine.text import chat, templates

PARAMETERS = {
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there 12"}]
}
TOKENS = [
    *(
        b"\xff" * 8,
        b"\0" * 8,
        (1 << 63).to_bytes(8, "little"),
        (1 << 40).to_bytes(8, "little"),
        b"\x7f\xff\xff\xff",
    ),
    *(
        b"null",
        b"-1",
        b"1e999",
        b"99999999999999999999",
        b"[]",
        b"{}",
        b'""',
        b"true",
        b"[[[[",
        b'{"a":' * 9,
        b"\\u0000",
    ),
    *(
        b"data_offsets",
        b"shape",
        b"dtype",
        b"BF16",
        b"F32",
        b"I64",
        b"rope_parameters",
        b"head_dim",
        b"longrope",
    ),
    *(
        b"WordPiece",
        b"[UNK]",
        b"\xe2\x96\x81",
        b"unk_token",
        b"single",
        b"pooling_mode_cls_token",
        b"max_seq_length",
        b"../x",
    ),
    *(
        b"\x70\x01",
        b"raw_data",
        b"ConstantOfShape",
        b"'shape': (1099511627776,)",
        b"|O8",
    ),
    *(
        b"{% for a in range(9999) %}",
        b"{% endfor %}",
        b"{% set x = x ~ x %}",
        b"{{ x }}",
        b"|tojson",
        b"* 99999999",
        b"** 9",
    ),
]


class Target:
    """Some valid inputs, and a function that reads one as the engine does."""

    codes: tuple[str, ...] = CODES  # of errors

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds: list[bytes] = []

    def read(self, data: bytes) -> None:
        raise NotImplementedError

    def use(self, path: Path, families: tuple[str, ...]) -> None:
        """What a load and a count of tokens do before the device is touched."""
        found = checkpoint.open_checkpoint(path)
        vocabulary = checkpoint.vocabulary_of(found)
        vocabulary.encode("Hi there 12")
        for family in families:
            try:
                models.read_config(found, models.check_family(found, family), 128)
                assert weights_bytes(found) > 0
            except EngineError:
                continue
        try:
            chat.prompt_tokens(vocabulary, PARAMETERS)
        except EngineError:
            return


class GgufTarget(Target):
    """Headers; the tensors' bytes are a hole of the right length."""

    fixtures: tuple[str, ...] = ("llama", "qwen3", "phi3-long", "gemma3")
    families: tuple[str, ...] = ("llama", "qwen3", "phi3", "gemma3", "mixtral")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.data_bytes = 0
        for fixture in self.fixtures:
            path = FIXTURES / fixture / "model.gguf"
            infos = gguf.read(path).tensors.values()
            start = min(info.offset for info in infos)
            self.data_bytes = max(self.data_bytes, path.stat().st_size - start)
            self.seeds.append(path.read_bytes()[:start])

    def read(self, data: bytes) -> None:
        path = self.folder / "model.gguf"
        path.write_bytes(data)
        os.truncate(path, len(data) + self.data_bytes)
        self.use(path, self.families)


def use_for_embeddings(path: Path, families: tuple[str, ...]) -> None:
    """What a load and a count do for a model of embeddings; the last family's error is raised if none can be read."""
    for family in families:
        try:
            files = EmbeddingFiles.read(str(path), family, 2, 128)
            files.encoder.encode("Hi there 12, na\u00efve \u4f60")
            assert files.memory_needed(True) > 0
            return
        except EngineError:
            if family == families[-1]:
                raise


class EmbeddingGgufTarget(GgufTarget):
    """The same, of models of embeddings: WordPiece and pooling."""

    fixtures = ("bert", "qwen3-embedding")
    families = ("bert", "qwen3")

    def use(self, path: Path, families: tuple[str, ...]) -> None:
        use_for_embeddings(path, families)


class FolderTarget(Target):
    """One of a folder's files; the first byte says which, the others stay valid."""

    files: tuple[str, ...] = (
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        safetensors.INDEX,
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        source = FIXTURES / "phi3-long"
        self.valid = {name: (source / name).read_bytes() for name in self.files[:-1]}
        length = 8 + int.from_bytes(self.valid["model.safetensors"][:8], "little")
        self.data_bytes = len(self.valid["model.safetensors"]) - length
        self.valid["model.safetensors"] = self.valid["model.safetensors"][:length]
        names = safetensors.read(source).tensors
        self.valid[safetensors.INDEX] = json.dumps(
            {"weight_map": dict.fromkeys(names, "model.safetensors")}
        ).encode()
        self.seeds = [bytes([index]) + self.valid[name] for index, name in enumerate(self.files)]
        config = (FIXTURES / "gemma3" / "config.json").read_bytes()
        self.seeds += [b"\0" + config, b"\0" + (FIXTURES / "llama3" / "config.json").read_bytes()]

    def read(self, data: bytes) -> None:
        changed = self.files[(data[0] if data else 0) % len(self.files)]
        for name in self.files:
            (self.folder / name).write_bytes(data[1:] if name == changed else self.valid[name])
        if changed != safetensors.INDEX:
            (self.folder / safetensors.INDEX).unlink()
        path = self.folder / "model.safetensors"
        os.truncate(path, path.stat().st_size + self.data_bytes)
        self.use(self.folder, tuple(models.FAMILIES))


class EmbeddingFolderTarget(Target):
    """The same, of a model of embeddings."""

    files = (
        *("modules.json", "1_Pooling/config.json", "tokenizer.json", "config.json"),
        "sentence_bert_config.json",
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in (*self.files, "model.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((FIXTURES / "bert" / name).read_bytes())
        self.valid = {name: (folder / name).read_bytes() for name in self.files}
        self.seeds = [bytes([index]) + self.valid[name] for index, name in enumerate(self.files)]
        for index, name in enumerate(self.files[:2]):
            self.seeds.append(bytes([index]) + (FIXTURES / "qwen3-embedding" / name).read_bytes())

    def read(self, data: bytes) -> None:
        changed = self.files[(data[0] if data else 0) % len(self.files)]
        (self.folder / changed).write_bytes(data[1:])
        try:
            use_for_embeddings(self.folder, ("bert",))
        finally:
            (self.folder / changed).write_bytes(self.valid[changed])


class OnnxTarget(Target):
    """A model, its test, or an array of it, as the first byte says; operators compute nothing here."""

    codes = (*CODES, "out_of_memory")  # of lengths that the parser believes

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        open_devices(device.parse("CPU"))
        with zipfile.ZipFile(FIXTURES / "onnx" / TEST) as archive:
            self.arrays = {name: archive.read(name) for name in archive.namelist()}
        self.valid = {name: (FIXTURES / "onnx" / name).read_bytes() for name in (MODEL, TEST)}
        self.seeds = [b"\0" + self.valid[MODEL], b"\1" + self.valid[TEST]]
        self.seeds.append(b"\2" + self.arrays["0.input.extra.npy"])

    def read(self, data: bytes) -> None:
        kind, data = (data[0] if data else 0) % 3, data[1:]
        (self.folder / MODEL).write_bytes(data if kind == 0 else self.valid[MODEL])
        (self.folder / TEST).write_bytes(data if kind == 1 else self.valid[TEST])
        if kind == 2:
            with zipfile.ZipFile(self.folder / TEST, "w") as archive:
                for name, array in self.arrays.items():
                    archive.writestr(name, data if name == "0.input.extra.npy" else array)
        OnnxModel(OnnxFiles.read(str(self.folder)), 1).free()


class TemplateTarget(Target):
    """Chat templates, rendered."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for fixture in ("llama", "gemma3"):
            settings = json.loads((FIXTURES / fixture / "tokenizer_config.json").read_bytes())
            self.seeds.append(settings["chat_template"].encode())
        self.seeds += [
            b"{% macro f(x) %}{{ x }}{{ f(x + 1) if x < 3 }}{% endmacro %}{{ f(0) }}{{ [1, 2] | join(',') }}",
            b"{% set ns = namespace(x='ab') %}{% for m in messages[1:] %}{% set ns.x = ns.x + m.content %}"
            b"{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.x | replace('a', 'b') | upper }}",
            b"{% generation %}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
            b"{% endgeneration %}{{ messages | tojson(indent=2) }}{{ 'a-b'.split('-')[0] ~ 3 ** 2 % 5 // 2 }}",
        ]

    def read(self, data: bytes) -> None:
        try:
            templates.render(data.decode("utf-8", "replace"), PARAMETERS)
        except templates.TemplateError:
            return


TARGETS: dict[str, Callable[[Path], Target]] = {
    "gguf": GgufTarget,
    "folder": FolderTarget,
    "template": TemplateTarget,
    "embedding-gguf": EmbeddingGgufTarget,
    "embedding-folder": EmbeddingFolderTarget,
    "onnx": OnnxTarget,
}


def mutated(source: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice((1, 1, 2, 4, 8))):
        at, span = source.randrange(len(data) + 1), source.choice((1, 2, 4, 8, 32, 256))
        how = source.randrange(6)
        if how == 0 and at < len(data):
            data[at] = source.randrange(256)
        elif how == 1:
            data[at : at + span] = b""
        elif how == 2:
            data[at:at] = data[at : at + span] * source.choice((1, 2, 50))
        elif how == 3:
            token = source.choice(TOKENS)
            data[at : at + source.choice((0, len(token)))] = token
        elif how == 4:
            other = source.choice(seeds)
            start = source.randrange(len(other) + 1)
            data[at : at + span] = other[start : start + span]
        else:
            del data[source.choice((at, len(data))) :]
    return bytes(data[:INPUT_BYTES_MAX])


def checked(target: Target, data: bytes) -> None:
    began, said = time.process_time(), None
    try:
        target.read(data)
    except EngineError as error:
        said = error
    assert said is None or (said.code in target.codes and len(str(said)) < TEXT_MAX), said
    took = time.process_time() - began
    assert took < INPUT_SECONDS_MAX, f"{took:.1f} s"


def limit_memory() -> None:
    """What is taken now and a gigabyte; over it Python raises MemoryError, which is no EngineError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GROWTH_BYTES_MAX, resource.RLIM_INFINITY))


def main(name: str, seconds: float, seed: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        for data in target.seeds:
            target.read(data)  # valid ones are read without any error
        limit_memory()
        if ATHERIS:
            guided(target, seconds, seed)
            return
        source, count, end = random.Random(seed), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            data = mutated(source, target.seeds)
            count += 1
            try:
                checked(target, data)
            except BaseException:
                print(data)
                raise
        print(f"{count} inputs")


def guided(target: Target, seconds: float, seed: int) -> None:
    corpus = target.folder / "corpus"
    corpus.mkdir()
    for index, data in enumerate(target.seeds):
        (corpus / str(index)).write_bytes(data)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        source = random.Random(number)
        changed = mutated(source, [data, *target.seeds] if source.random() < 0.3 else [data])
        return changed[:most]

    arguments = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", f"-max_len={INPUT_BYTES_MAX}"]
    arguments += [
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        "-timeout=60",
        f"-artifact_prefix={target.folder}/",
    ]
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus)], lambda data: checked(target, data), custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
