"""JSON by a schema: whatever a model says, the text keeps to it; what cannot be kept to is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import numpy as np
import pytest

from engine.batching.batcher import Batcher, Row
from engine.batching.pacing import Bucket
from engine.batching.sampling import Sampler
from engine.checkpoint import open_checkpoint, vocabulary_of
from engine.errors import RunError
from engine.protocol import Configure, Finished, Load, Loaded, Message, Ready, Run, RunFailed, Started, Tokens
from engine.text.grammar import SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, Grammars
from engine.text.tokenizer import Vocabulary
from tests.engine.conftest import CACHE, DEVICE
from tests.engine.harness import EngineProcess

FIXTURES = Path(__file__).parent / "families"
FILES = sorted(
    path.relative_to(FIXTURES) for path in FIXTURES.glob("*/model.gguf") if path.parent.name != "bert"
)  # which makes vectors, not text
PATHS = [str(each) for path in FILES for each in (path, path.parent)]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["tea", "caf\u00e9", None, 1.5]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "schema": PERSON}


def check(text: str, schema: dict[str, Any] = PERSON) -> Any:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return vocabulary_of(open_checkpoint(str(FIXTURES / "llama3")))


def written(vocabulary: Vocabulary, seed: int, temperature: float, response_format: Any = FORMAT) -> str:
    """What a model of random logits says."""
    noise = np.random.default_rng(seed)
    grammar = Grammars(vocabulary).begin(response_format)
    sampler = Sampler({"temperature": temperature, "seed": seed}, grammar=grammar)
    detokenizer, text = vocabulary.detokenizer(), ""
    for _ in range(2_000):
        token = sampler.choose(noise.normal(0, 4, len(vocabulary.pieces)).astype(np.float32))
        if token in vocabulary.ends:
            break
        text += detokenizer.push(token)
        if sampler.complete:
            break
    else:
        raise AssertionError(f"it does not end: {text[:200]!r}")
    return text + detokenizer.finish()


@pytest.mark.parametrize("path", PATHS)
def test_random_models_of_every_family_and_format_keep_to_the_schema(path: str) -> None:
    vocabulary = vocabulary_of(open_checkpoint(str(FIXTURES / path)))
    texts = {written(vocabulary, seed, temperature) for seed in range(4) for temperature in (0.0, 1.0)}
    for text in texts:
        value = check(text)
        assert text == json.dumps(value, ensure_ascii=False) or "\\" in text
    assert len(texts) > 4


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"enum": ["a", "ab", 3]},
        {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
        {"type": "number", "minimum": -2, "maximum": 7.5, "multipleOf": 0.01},
        {
            "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 1}},
            "$ref": "#/$defs/n",
        },
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_other_schemas(vocabulary: Vocabulary, schema: dict[str, Any]) -> None:
    for seed in range(5):
        check(written(vocabulary, seed, 1.0, {"type": "json_schema", "schema": schema}), schema)


def test_a_json_object(vocabulary: Vocabulary) -> None:
    for seed in range(5):
        assert isinstance(json.loads(written(vocabulary, seed, 1.0, {"type": "json_object"})), dict)


def test_a_tokenizer_that_does_not_leave_text_as_it_is(vocabulary: Vocabulary) -> None:
    """What must come next is then spelled without it."""
    for ids in ([], [5], [5] * 40):
        strange = SimpleNamespace(encode=lambda text, add_special_tokens, ids=ids: SimpleNamespace(ids=ids))
        for seed in range(3):
            check(written(replace(vocabulary, tokenizer=strange), seed, 1.0))


def test_a_vocabulary_without_a_letter_that_must_come_fails_the_run(vocabulary: Vocabulary) -> None:
    pieces = [b"" if b"{" in piece else piece for piece in vocabulary.pieces]
    with pytest.raises(RunError, match="response_format"):
        written(replace(vocabulary, pieces=pieces), 1, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("json", "must be"),
        ({"type": "xml"}, "must be"),
        ({"type": "json_schema"}, "must be"),
        ({"type": "json_schema", "schema": [1]}, "must be"),
        ({"type": "json_schema", "schema": {"type": "nonsense"}}, "cannot be served: Invalid type"),
        ({"type": "json_schema", "schema": {"not": {}}}, "cannot be served: Unimplemented"),
        ({"type": "json_schema", "schema": {"$ref": "#"}}, "cannot be served"),
        ({"type": "json_schema", "schema": {"$ref": "http://127.0.0.1:9/x"}}, "cannot be served"),
        ({"type": "json_schema", "schema": {"type": "string", "pattern": "("}}, "cannot be served"),
        ({"type": "json_schema", "schema": {"items": [{"multipleOf": 999983}]}}, "multipleOf 999983"),
        ({"type": "json_schema", "schema": {"enum": ["x" * SCHEMA_BYTES_MAX]}}, "bytes"),
    ],
)
def test_refusals(vocabulary: Vocabulary, wrong: Any, message: str) -> None:
    def first_tokens() -> Any:
        grammar = Grammars(vocabulary).begin(wrong)
        return grammar and grammar.allowed()  # that no text keeps to it is found out here at the latest

    with pytest.raises(RunError, match=message) as caught:
        first_tokens()
    assert caught.value.code == "bad_parameters"
    assert "response_format" in str(caught.value)


def test_a_schema_of_any_depth_is_survived(vocabulary: Vocabulary) -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "boolean"}
        for _ in range(depth):
            schema = {"anyOf": [schema]}
        return {"type": "json_schema", "schema": schema}

    grammars = Grammars(vocabulary)
    assert grammars.begin(nested((SCHEMA_DEPTH_MAX - 2) // 2)) is not None
    for depth in (SCHEMA_DEPTH_MAX // 2, 50_000):
        with pytest.raises(RunError, match="nested"):
            grammars.begin(nested(depth))


@pytest.mark.parametrize("levels", [0, 1, 29])
def test_a_chain_of_references_of_any_length_is_survived(vocabulary: Vocabulary, levels: int) -> None:
    def schema(length: int) -> dict[str, Any]:
        links: dict[str, Any] = {f"{length:x}": {"type": "integer"}}
        for number in range(length):
            link: dict[str, Any] = {"$ref": f"#/$defs/{number + 1:x}"}
            for _ in range(levels):
                link = {"allOf": [link]}
            links[f"{number:x}"] = link if levels else {"type": "array", "items": link}
        return {"$defs": links, "$ref": "#/$defs/0"}

    length = SCHEMA_BYTES_MAX * 9 // 10 * 100 // len(msgspec.json.encode(schema(100)))
    grammar = Grammars(vocabulary).begin({"type": "json_schema", "schema": schema(length)})
    assert grammar is not None
    assert grammar.push(int(grammar.allowed()[0])) is False


def test_a_model_without_an_end_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(RunError, match="no token that ends"):
        Grammars(replace(vocabulary, ends=frozenset())).begin(FORMAT)


# ---------------------------------------------------------------- in the batch


class Noise:
    """A model of random logits."""

    slots, context = 2, 200
    buckets = (Bucket(rows=16, logits=2, step_s=0.1),)

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._random = np.random.default_rng(1)

    def step(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
        return self._random.normal(0, 4, (len(wanted), self._vocabulary + 7)).astype(np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        pass


def until_done(batcher: Batcher) -> list[Message]:
    messages: list[Message] = []
    for _ in range(1_000):
        if not batcher.busy:
            return messages
        messages += batcher.step(room=9)
    raise AssertionError("it does not end")


def asked(run_id: str, response_format: Any, **parameters: Any) -> Run:
    given = {"prompt": "the moon", "max_tokens": 150, **parameters}
    if response_format is not None:
        given["response_format"] = response_format
    return Run(run_id=run_id, model="m", task_type="text_generation", parameters=given)


def text_of(messages: list[Message], run_id: str) -> str:
    return "".join(m.text for m in messages if isinstance(m, Tokens) and m.run_id == run_id)


def test_runs_with_and_without_a_schema_side_by_side(vocabulary: Vocabulary) -> None:
    batcher = Batcher(Noise(len(vocabulary.pieces)), vocabulary)
    formats = {"a": FORMAT, "free": None, "b": FORMAT, "short": FORMAT}
    for run_id, response_format in formats.items():
        more = {"max_tokens": 4} if run_id == "short" else {"max_tokens": 190, "logprobs": True}
        assert batcher.add(asked(run_id, response_format, **more)) == []
    messages = until_done(batcher)
    reasons = {m.run_id: m.reason for m in messages if isinstance(m, Finished)}
    assert (reasons["a"], reasons["b"], reasons["short"]) == ("stop", "stop", "length")
    for run_id in ("a", "b"):
        check(text_of(messages, run_id))
    told = [m for m in messages if isinstance(m, Tokens) and m.run_id == "a" and m.count]
    assert all(len(m.logprobs) == m.count and np.isfinite(m.logprobs[0].token.logprob) for m in told)


def test_a_grammar_that_breaks_down_fails_its_run_alone(vocabulary: Vocabulary) -> None:
    wide = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(2_000)}}
    batcher = Batcher(Noise(len(vocabulary.pieces)), vocabulary)
    assert batcher.add(asked("wide", {"type": "json_schema", "schema": wide})) == []
    assert batcher.add(asked("good", FORMAT)) == []
    assert batcher.add(asked("next", FORMAT)) == []
    messages = until_done(batcher)
    (failed,) = (m for m in messages if isinstance(m, RunFailed))
    assert (failed.run_id, failed.code, failed.retryable) == ("wide", "bad_parameters", False)
    for run_id in ("good", "next"):  # the slot is free again
        check(text_of(messages, run_id))
    assert {m.run_id for m in messages if isinstance(m, Started)} == {"wide", "good", "next"}


# ---------------------------------------------------------------- on the real engine


@pytest.fixture(scope="module")
def tiny() -> Iterator[EngineProcess]:
    """A random model of the families on CPU:LLVM, as "m"."""
    configure = Configure(worker_id="w", device=DEVICE, slots_max=3, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        assert isinstance(engine.wait_type(Ready, timeout_s=120), Ready)
        path = str(FIXTURES / "llama3" / "model.gguf")
        engine.send(Load(model="m", path=path, family="llama", context=128, slots=3))
        assert isinstance(engine.wait_type(Loaded, timeout_s=120), Loaded)
        yield engine


@pytest.mark.process
def test_the_engine_process_keeps_to_a_schema(tiny: EngineProcess) -> None:
    tiny.run("alone", prompt="the moon", temperature=0, max_tokens=30)
    tiny.wait_end("alone")
    for seed in range(3):
        tiny.run(
            f"r{seed}", prompt="the moon", response_format=FORMAT, seed=seed, temperature=1.5, max_tokens=90
        )
        tiny.run(f"free{seed}", prompt="the moon", temperature=0, max_tokens=30)
    for seed in range(3):
        done = tiny.wait_end(f"r{seed}")
        if done.reason == "stop":
            check(tiny.text(f"r{seed}"))
        tiny.wait_end(f"free{seed}")
        assert tiny.text(f"free{seed}") == tiny.text("alone")
    assert any(tiny.wait_end(f"r{seed}").reason == "stop" for seed in range(3))
    tiny.run("bad", prompt="x", response_format={"type": "json_schema", "schema": {"type": "nonsense"}})
    assert tiny.wait_end("bad").code == "bad_parameters"


@pytest.mark.model
@pytest.mark.process
def test_the_real_model_keeps_to_a_schema(real: EngineProcess) -> None:
    prompt = "Describe a person called Ann, who is 30 and likes tea, as JSON."
    real.run("schema/1", prompt=prompt, response_format=FORMAT, temperature=0, max_tokens=60)
    real.run("object/1", prompt=prompt, response_format={"type": "json_object"}, temperature=0, max_tokens=60)
    assert real.wait_end("schema/1").reason == "stop"
    check(real.text("schema/1"))
    if real.wait_end("object/1").reason == "stop":
        assert isinstance(json.loads(real.text("object/1")), dict)
    assert real.text("object/1").startswith("{")
