"""A model shared by several devices: the same logits as on one, each device with its share of the memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.errors import LoadError
from engine.kernels.sharing import shares
from engine.protocol import Configure, Finished, Load, Loaded, LoadFailed, Ready, Run, Unusable
from tests.engine.conftest import CACHE
from tests.engine.devices import check_models, compare, found_by
from tests.engine.embedding_checks import vectors
from tests.engine.family_checks import FIXTURES
from tests.engine.harness import EngineProcess

# quantised; experts; heads that end within a block; norms of heads; fused and tied matrices
FAMILIES = ["llama:gguf", "mixtral:folder", "qwen2:gguf", "qwen3:gguf", "phi4:folder"]


def test_uneven_shares() -> None:
    two, three = shares(["a", "b"], 6, 160, 250, 32), shares(["a", "b", "c"], 6, 160, 250, 32)
    assert [share.feed_forward for share in two] == [(0, 64), (64, 160)]
    assert [share.groups for share in three] == [(0, 2), (2, 4), (4, 6)]
    assert [share.vocabulary for share in three] == [(0, 83), (83, 166), (166, 250)]
    assert [share.first for share in three] == [True, False, False]
    assert shares(["a"], 1, 7, 5, 32)[0].feed_forward == (0, 7)


@pytest.mark.parametrize(
    ("devices", "groups", "tokens", "words"),
    [
        (4, 6, 250, "6 key/value heads .* 4 devices"),
        (6, 6, 250, "blocks of 32, too few"),
        (3, 6, 2, "2 tokens are too few for 3 devices"),
    ],
)
def test_what_cannot_be_shared_says_why(devices: int, groups: int, tokens: int, words: str) -> None:
    with pytest.raises(LoadError, match=words) as caught:
        shares([str(number) for number in range(devices)], groups, 160, tokens, 32)
    assert caught.value.code == "not_shareable"


@pytest.mark.process
def test_families_give_their_references_logits(tmp_path: Path) -> None:
    found = compare("CPU:0,1", tmp_path / "found.json", [*FAMILIES, "gemma3:folder"])
    refused = found["models"].pop("gemma3:folder")["refused"]
    assert refused[0] == "not_shareable"
    check_models(found, 0.15)


@pytest.mark.process
def test_two_and_three_devices_give_ones_logits(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    on_cpu = os.environ | {"DEV": "CPU:LLVM", "CACHEDB": str(CACHE / "families.db")}
    found = found_by("shared_checks", [str(tmp_path), str(out)], out, on_cpu, timeout_s=300)
    assert "6 key/value heads" in found.pop("4 devices")[1]
    assert "too few for 6 devices" in found.pop("6 devices")[1]
    assert len(found) == 3
    for what, result in found.items():
        assert result["worst"] < 1e-3, (
            what,
            result,
        )  # sums in another order, rounded to 16 bits after each block
        assert result["largest_share"] < (0.7 if "2 devices" in what else 0.5), (what, result)


@pytest.mark.process
def test_an_engine_of_two_devices_generates() -> None:
    folder = FIXTURES / "llama"
    configure = Configure(worker_id="w", device="CPU:0,1", slots_max=2, cache_dir=str(CACHE))
    with EngineProcess(configure) as engine:
        ready = engine.wait_type(Ready, Unusable, timeout_s=60)
        assert isinstance(ready, Ready), ready
        engine.send(Load(model="m", path=str(folder), family="llama", context=128, slots=2))
        loaded = engine.wait_type(Loaded, LoadFailed, timeout_s=120)
        assert isinstance(loaded, Loaded), loaded
        engine.run("r", prompt="Hi there", max_tokens=5, temperature=0)
        assert engine.wait_end("r").tokens_generated == 5
        engine.send(Load(model="g", path=str(FIXTURES / "gemma3"), family="gemma3", context=128, slots=2))
        failed = engine.wait_for(lambda m: isinstance(m, LoadFailed) and m.model == "g", 60)
        assert failed.code == "not_shareable"


@pytest.mark.process
def test_embeddings_take_the_first_of_two_devices() -> None:
    """Loaded and right beside a model that both share, and judged by what one of the two may use."""
    expected = json.loads((FIXTURES / "bert" / "expected.json").read_text())
    right = dict(np.load(FIXTURES / "bert" / "expected.npz"))["mean"]
    limit = 4 << 20  # of each; the small model needs more than half of it, and less than all
    configure = Configure(
        worker_id="w", device="CPU:0,1", slots_max=2, cache_dir=str(CACHE), memory_limit_bytes=limit
    )
    with EngineProcess(configure) as engine:
        ready = engine.wait_type(Ready, Unusable, timeout_s=60)
        assert (ready.device, ready.memory_total_bytes) == ("CPU:0,1", 2 * limit)
        load = Load(model="e", path=str(FIXTURES / "bert"), family="bert", task_type="embedding")
        engine.send(load)
        loaded = engine.wait_type(Loaded, LoadFailed, timeout_s=120)
        assert isinstance(loaded, Loaded), loaded
        ask = {"input": expected["texts"], "normalize": False}
        engine.send(Run(run_id="r", model="e", task_type="embedding", parameters=ask))
        assert isinstance(engine.wait_end("r"), Finished)
        found = vectors(engine.of_run("r")[1])
        assert np.abs(found - right).max() < 0.02 * right.std()
        engine.send(msgspec.structs.replace(load, model="second"))
        failed = engine.wait_for(lambda m: isinstance(m, LoadFailed) and m.model == "second", 60)
        assert (failed.code, f"the device may use {limit}" in failed.message) == ("out_of_memory", True)
