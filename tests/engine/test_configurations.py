"""GGUF files whose configuration asks for what cannot be, and folders' for what Hugging Face's defaults mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import open_checkpoint
from engine.embedding.text import read_text_encoder
from engine.errors import LoadError
from engine.files import gguf
from engine.kernels.weights import Weights
from engine.models import FAMILIES, read_config
from engine.models.decoder import DecoderConfig
from tests.engine import small_gguf
from tests.engine.family_checks import FIXTURES


def rewritten(to: Path, fixture: str, changes: dict[str, Any], without: str = "") -> gguf.Gguf:
    """A fixture's file with other metadata, and without a tensor."""
    whole = gguf.read(FIXTURES / fixture / "model.gguf")
    data = whole.path.read_bytes()
    tensors = {
        name: (info.shape[::-1], info.kind, data[info.offset : info.offset + info.size])
        for name, info in whole.tensors.items()
        if name != without
    }
    return gguf.read(small_gguf.write(to / "model.gguf", whole.metadata | changes, tensors))


def configured(to: Path, fixture: str, family: str, context: int = 128, **changes: Any) -> DecoderConfig:
    """What a fixture's folder with another config.json describes. None takes a key away."""
    shutil.copytree(FIXTURES / fixture, to, dirs_exist_ok=True)
    path = to / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    found = read_config(open_checkpoint(to), FAMILIES[family], context)
    assert isinstance(found, DecoderConfig)
    return found


@pytest.mark.parametrize(
    ("fixture", "changes", "words"),
    [
        ("llama", {"tokenizer.ggml.tokens": 5}, "tokens are no list"),
        ("bert", {"tokenizer.ggml.tokens": "abc"}, "tokens are no list"),
        ("llama", {"llama.rope.freq_base": 0.0}, "rotary parameter is 0.0"),
        ("llama", {"llama.rope.freq_base": -1.0}, "rotary parameter is -1.0"),
        ("llama", {"llama.rope.freq_base": float("nan")}, "rotary parameter is nan"),
        ("gemma3", {"gemma3.attention.sliding_window": (1 << 31) - 1}, "window of 2147483647"),
        ("phi3", {"phi3.attention.sliding_window": (1 << 32) - 1}, "window of 4294967295"),
    ],
)
def test_files_that_describe_no_model(
    tmp_path: Path, fixture: str, changes: dict[str, Any], words: str
) -> None:
    file = rewritten(tmp_path, fixture, changes)
    with pytest.raises(LoadError, match=words) as caught:
        read_config(file, FAMILIES[fixture], 128)
    assert caught.value.code == "bad_model_file"


@pytest.mark.parametrize(
    ("fixture", "family", "changes", "words"),
    [
        ("mistral-window", "mistral", {"sliding_window": -5}, "window of -5"),
        ("mistral-window", "mistral", {"sliding_window": 2**40}, "window of 1099511627776"),
        ("llama3", "llama", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama3", "llama", {"num_attention_heads": 0, "head_dim": None}, "sizes make no sense"),
        ("llama3", "llama", {"head_dim": 10**12}, "rotary factors"),
        ("mistral-window", "mistral", {"head_dim": 10**400}, "head_dim in config.json is '1000"),
        ("qwen3", "qwen3", {"head_dim": 10**12}, "sizes make no sense"),
        ("llama3", "llama", {"rope_parameters": {"rope_theta": 10**400}}, "rotary parameter"),
        ("llama3", "llama", {"rope_parameters": {"rope_theta": 1e300}}, "rotary parameter is 1e\\+300"),
        ("gemma3", "gemma3", {"query_pre_attn_scalar": 5e-324}, "rotary parameter is 5e-324"),
    ],
)
def test_folders_that_describe_no_model(
    tmp_path: Path, fixture: str, family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LoadError, match=words) as caught:
        configured(tmp_path, fixture, family, **changes)
    assert caught.value.code == "bad_model_file"


def test_a_missing_matrix_is_named(tmp_path: Path) -> None:
    """Also the one that is looked at before any is loaded."""
    file = rewritten(tmp_path, "llama", {}, "blk.0.ffn_down.weight")
    with Weights(file, lambda done, total: None) as weights:
        with pytest.raises(LoadError, match=r"no tensor 'blk\.0\.ffn_down\.weight'"):
            weights.block("blk.0.ffn_down.weight")
        assert weights.block("blk.1.ffn_down.weight") in (1, 32)


def test_gemmas_window_is_not_always_said(tmp_path: Path) -> None:
    """Hugging Face takes an absent one for 4,096; without it the layers' rotary base would be another, too."""
    layers = configured(tmp_path, "gemma3", "gemma3", sliding_window=None).layers
    assert {(layer.window, layer.rope) for layer in layers} == {(4096, 1), (0, 0)}


def test_long_rope_goes_by_the_context_that_slots_get(tmp_path: Path) -> None:
    """A longer one than the model's is cut to it."""
    short, long = (1.0, 1.05, 1.1, 1.2), (1.0, 1.5, 4.0, 9.0)
    for most, context, divisors in ((256, 128, long), (256, 64, short), (64, 128, short)):
        found = configured(tmp_path, "phi3-long", "phi3", context, max_position_embeddings=most)
        assert found.ropes[0].divisors == divisors
        file = rewritten(tmp_path, "phi3-long", {"phi3.context_length": most})
        assert read_config(file, FAMILIES["phi3"], context).ropes[0].divisors == pytest.approx(divisors)


def test_long_ropes_magnitude_may_be_said(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "phi3-long" / "config.json").read_text())
    said = config["rope_parameters"] | {"attention_factor": 1.75}
    assert configured(tmp_path, "phi3-long", "phi3", rope_parameters=said).ropes[0].magnitude == 1.75
    assert configured(tmp_path, "phi3-long", "phi3").ropes[0].magnitude != 1.75


def test_the_unknown_token_need_not_be_marked(tmp_path: Path) -> None:
    """A word that a tokenizer does not know is its unknown token, or it is no tokenizer."""
    kinds = [1] * len(gguf.read(FIXTURES / "bert" / "model.gguf").metadata["tokenizer.ggml.tokens"])
    encoder = read_text_encoder(rewritten(tmp_path, "bert", {"tokenizer.ggml.token_type": kinds}))
    assert encoder.tokenizer.token_to_id("[UNK]") in encoder.encode("\u4e00")
    shutil.copytree(FIXTURES / "bert", tmp_path / "folder")
    path = tmp_path / "folder" / "tokenizer.json"
    found = json.loads(path.read_text())
    assert "[UNK]" in (added["content"] for added in found["added_tokens"])  # where the model does not look
    found["model"]["vocab"].pop("[UNK]")
    path.write_text(json.dumps(found))
    with pytest.raises(LoadError, match=r"no token '\[UNK\]'"):
        read_text_encoder(open_checkpoint(tmp_path / "folder"))
