"""Folders through the whole engine process, and what is wrong with a folder named before anything is uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import open_checkpoint, vocabulary_of
from engine.errors import LoadError
from engine.files import gguf, safetensors
from engine.models import FAMILIES, check_family, read_config
from engine.protocol import (
    Configure,
    CountTokens,
    Load,
    Loaded,
    LoadFailed,
    Ready,
    TokenCount,
    Unload,
    Unloaded,
)
from tests.engine import small_gguf
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.family_checks import FIXTURES, each_expert_apart
from tests.engine.harness import EngineProcess

F32, Q8_0 = 0, 8  # ggml types


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(Configure(worker_id="w", device=DEVICE, slots_max=3, cache_dir=str(CACHE))) as engine:
        assert isinstance(engine.wait_type(Ready, timeout_s=120), Ready)
        yield engine


def loaded(engine: EngineProcess, name: str, path: Path, family: str) -> Loaded | LoadFailed:
    at = len(engine.seen)
    engine.send(Load(model=name, path=str(path), family=family, context=128, slots=3))
    found: Loaded | LoadFailed = engine.wait_type(Loaded, LoadFailed, timeout_s=120, start=at)
    return found


@pytest.mark.process
@pytest.mark.parametrize(("fixture", "family"), [("llama3", "llama"), ("qwen3", "qwen3")])
def test_both_formats_say_the_same(engine: EngineProcess, fixture: str, family: str) -> None:
    """Models with the same tokens in both: a GGUF file has some for rows beyond the last, which a folder has not, and
    SentencePiece in a GGUF file puts a space after special tokens."""
    texts, logprobs = [], []
    for kind, path in (("folder", FIXTURES / fixture), ("gguf", FIXTURES / fixture / "model.gguf")):
        name = f"{fixture}-{kind}"
        done = loaded(engine, name, path, family)
        assert isinstance(done, Loaded), done
        asked = {
            "prompt": "the moon",
            "temperature": 0,
            "max_tokens": 12,
            "logprobs": True,
            "top_logprobs": 2,
        }
        engine.run(f"t/{name}", model=name, **asked)
        assert engine.wait_end(f"t/{name}").tokens_generated > 0
        tokens = [m for m in engine.of_run(f"t/{name}") if getattr(m, "count", 0)]
        texts.append("".join(m.text for m in tokens))
        logprobs.append([m.logprobs[0].token.logprob for m in tokens])
        at = len(engine.seen)
        engine.send(
            CountTokens(request_id=name, path=str(path), family=family, parameters={"prompt": "the moon"})
        )
        counted = engine.wait_type(TokenCount, start=at)
        assert counted.tokens == engine.wait_end(f"t/{name}").prompt_tokens
        engine.send(Unload(model=name))
        freed = engine.wait_for(lambda m, name=name: isinstance(m, Unloaded) and m.model == name)
        assert freed.freed_bytes >= 0.99 * done.memory_bytes
    assert texts[0] == texts[1]
    # float16 of the folder beside Q8_0 of the file, which the device keeps quantised
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.02)


@pytest.mark.process
def test_the_engine_lives_through_bad_folders(engine: EngineProcess, tmp_path: Path) -> None:
    folder = copy(tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    failed = loaded(engine, "cut", folder, "qwen2")
    assert isinstance(failed, LoadFailed)
    assert failed.code == "bad_model_file"
    assert "model.safetensors" in failed.message
    for part in ("self_attn.q_proj", "mlp.down_proj"):  # as it is loaded, and before anything is
        name = f"model.layers.1.{part}.weight"
        other = copy(tmp_path / part, "mistral")
        rewrite(other, lambda h, name=name: h.update({name.replace("proj", "prox"): h.pop(name)}))
        failed = loaded(engine, "missing", other, "mistral")
        assert isinstance(failed, LoadFailed)
        assert f"no tensor {name!r}" in failed.message
    other = copy(tmp_path / "b", "mistral")
    rewrite(
        other, lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": end_of(h)}), bytes(4)
    )
    failed = loaded(engine, "surplus", other, "mistral")
    assert isinstance(failed, LoadFailed)
    assert failed.code == "unsupported_architecture"
    assert "(extra)" in failed.message
    failed = loaded(engine, "other", FIXTURES / "qwen2", "llama")
    assert isinstance(failed, LoadFailed)
    assert "catalogue" in failed.message


@pytest.mark.process
def test_the_engine_lives_through_experts_of_different_kinds(engine: EngineProcess, tmp_path: Path) -> None:
    """One matrix of one expert is float32, the others' are quantised."""
    apart = gguf.read(each_expert_apart(tmp_path / "apart.gguf"))
    data, odd = apart.path.read_bytes(), "blk.0.ffn_up.1.weight"
    tensors = {
        name: (info.shape[::-1], info.kind, data[info.offset : info.offset + info.size])
        for name, info in apart.tensors.items()
    }
    assert tensors[odd][1] == Q8_0
    tensors[odd] = tensors[odd][0], F32, bytes(4 * apart.tensors[odd].elements)
    failed = loaded(
        engine, "odd", small_gguf.write(tmp_path / "odd.gguf", apart.metadata, tensors), "mixtral"
    )
    assert isinstance(failed, LoadFailed)
    assert (failed.code, "different kinds" in failed.message) == ("unsupported_quantisation", True)
    assert isinstance(loaded(engine, "apart", apart.path, "mixtral"), Loaded)


@pytest.mark.process
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_the_engine_lives_through_weights_that_are_no_numbers(
    engine: EngineProcess, tmp_path: Path, broken: float
) -> None:
    """A run would take their logits for a fault of the device, which ends the engine."""
    whole = gguf.read(FIXTURES / "llama" / "model.gguf")
    data = bytearray(whole.path.read_bytes())
    at = whole.tensors["output_norm.weight"].offset
    data[at : at + 4] = np.float32(broken).tobytes()
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    failed = loaded(engine, "broken", path, "llama")
    assert isinstance(failed, LoadFailed)
    assert (failed.code, "finite" in failed.message) == ("bad_model_file", True)


# ---------------------------------------------------------------- readers only


def copy(to: Path, fixture: str = "qwen2") -> Path:
    folder = to / fixture
    shutil.copytree(FIXTURES / fixture, folder)
    return folder


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], data: bytes = b"") -> None:
    path = folder / "model.safetensors"
    header, rest = header_of(path)
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + rest + data)


def end_of(header: dict[str, Any]) -> list[int]:
    """Where four more bytes lie."""
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return [end, end + 4]


NORM = "model.norm.weight"


def _overlap(header: dict[str, Any]) -> None:
    other = header["model.layers.0.input_layernorm.weight"]
    header[NORM]["data_offsets"] = other["data_offsets"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_overlap, "begins at byte"),
        (lambda h: h[NORM].update(data_offsets=[1 << 50, (1 << 50) + 64]), "begins at byte"),
        (lambda h: h[NORM].update(data_offsets=[64, 0]), "takes 64 bytes"),
        (lambda h: h[NORM].update(data_offsets=[-64, 0]), "header"),
        (lambda h: h[NORM].update(shape=[1 << 61]), "header"),
        (lambda h: h[NORM].update(shape=[1 << 40, 1 << 40]), "impossible shape"),
        (lambda h: h[NORM].update(shape=[0]), "impossible shape"),
        (lambda h: h[NORM].update(shape=[]), "impossible shape"),
        (lambda h: h[NORM].update(shape=[1] * 9), "impossible shape"),
        (lambda h: h[NORM].update(shape=[33]), "takes 66 bytes"),
        (lambda h: h[NORM].update(dtype="F8_E4M3"), "F8_E4M3"),
        (lambda h: h[NORM].pop("dtype"), "header"),
        (lambda h: h.update(x=[1]), "header"),
    ],
)
def test_headers_that_lie(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    folder = copy(tmp_path)
    rewrite(folder, change)
    with pytest.raises(LoadError, match=words) as caught:
        open_checkpoint(folder)
    assert caught.value.code in ("bad_model_file", "unsupported_quantisation")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "0 bytes"),
        (b"\xff" * 64, "announces"),
        ((20).to_bytes(8, "little") + b"{}", "announces"),
        ((1).to_bytes(8, "little") + b"{" + bytes(9), "header"),
        ((2).to_bytes(8, "little") + b"{}" + bytes(9), "end at byte 10"),
        ((100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995, "header"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "header"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, raw: bytes, words: str) -> None:
    folder = copy(tmp_path)
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(LoadError, match=words):
        open_checkpoint(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = copy(tmp_path, "qwen3")
    index = json.loads((folder / safetensors.INDEX).read_text())
    for change, words in (
        (
            {"weight_map": index["weight_map"] | {"model.extra": "model-00001-of-00003.safetensors"}},
            "model.extra",
        ),
        ({"weight_map": dict.fromkeys(index["weight_map"], "../../etc/passwd")}, "names the file"),
        ({"weight_map": dict.fromkeys(index["weight_map"], "/etc/x.safetensors")}, "names the file"),
        ({"weight_map": {}}, "names 0 files"),
        ({"weight_map": {"a": 1}}, "no index"),
    ):
        (folder / safetensors.INDEX).write_text(json.dumps(change))
        with pytest.raises(LoadError, match=words):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rotary"),
        ({"rope_parameters": 3}, "no object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "blocks"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "sizes"),
        ({"num_key_value_heads": 3}, "sizes"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 1 << 40}, "sizes"),
        (
            {"layer_types": ["sliding_attention"], "sliding_window": 4, "use_sliding_window": True},
            "layer_types",
        ),
        ({"layer_types": ["linear"] * 2, "sliding_window": 4, "use_sliding_window": True}, "linear"),
    ],
)
def test_configurations_that_are_not_built(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = copy(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(LoadError, match=words):
        read_config(checkpoint, FAMILIES["qwen2"], 128)


def test_configurations_as_they_were_before(tmp_path: Path) -> None:
    """Published folders have `rope_theta` and `rope_scaling`; Gemma 3's leave most out."""
    folder = copy(tmp_path, "llama3")
    new = read_config(open_checkpoint(folder), FAMILIES["llama"], 128)
    config = json.loads((folder / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    config |= {"rope_theta": ropes.pop("rope_theta"), "rope_scaling": ropes}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(open_checkpoint(folder), FAMILIES["llama"], 128) == new

    folder = copy(tmp_path, "gemma3")
    new = read_config(open_checkpoint(folder), FAMILIES["gemma3"], 128)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern", "tie_word_embeddings"):
        config.pop(key)
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(open_checkpoint(folder), FAMILIES["gemma3"], 128) == new


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad_model_file"),
        ("{}", "bad_model_file"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "unsupported_tokenizer"),
        (
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "ByteLevel"}}',
            "bad_model_file",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}, "decoder": {"type": "ByteLevel"}}',
            "bad_model_file",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}, "decoder": {"type": "ByteLevel"}}',
            "bad_model_file",
        ),
        ('{"model": ' + "[" * 5000 + "}", "bad_model_file"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "ByteLevel"},'
            '"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},'
            '"single": [{"SpecialToken": {"id": "b", "type_id": 0}}]}}',
            "bad_model_file",
        ),
    ],
)
def test_tokenizers_that_are_none(tmp_path: Path, text: str, code: str) -> None:
    folder = copy(tmp_path)
    whole = '"ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}'
    (folder / "tokenizer.json").write_text(text.replace('"ByteLevel"}', whole))
    with pytest.raises(LoadError) as caught:
        vocabulary_of(open_checkpoint(folder))
    assert caught.value.code == code


def test_where_chat_templates_and_ends_stand(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 99999, true, -1, "x"]}')
    found = vocabulary_of(open_checkpoint(folder))
    assert found.chat_template == "d"
    assert 7 in found.ends
    assert max(found.ends) < len(found.names)
    (folder / "chat_template.jinja").write_text("j")
    assert vocabulary_of(open_checkpoint(folder)).chat_template == "j"


def test_a_folder_of_no_known_family(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    with pytest.raises(LoadError, match="mamba") as caught:
        check_family(open_checkpoint(folder), "qwen2")
    assert caught.value.code == "unsupported_architecture"
    path.unlink()
    with pytest.raises(LoadError, match=r"config\.json"):
        open_checkpoint(folder)
